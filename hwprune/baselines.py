"""What a front is compared with: the field's yardsticks under the same budgets, without a re-fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from hwprune import families
from hwprune.allocate import offer
from hwprune.analysis import Analysis, analyse
from hwprune.budget import Budget, UnreachableBudget
from hwprune.contract import Contract
from hwprune.cost import count_macs
from hwprune.criteria import magnitude
from hwprune.cutting import cut_
from hwprune.distortion import curves_from_scores
from hwprune.front import refused
from hwprune.judging import Judge
from hwprune.plan import select
from hwprune.pruning import prune
from hwprune.units import full_mask

BASELINES = ("magnitude", "lpvit")


def by_magnitude(
    model: nn.Module,
    batches: Sequence[Tensor],
    budgets: Sequence[Budget],
    analysis: Analysis,
    terms: Contract | None,
    judge: Judge,
) -> Iterator[dict[str, Any]]:
    """Points of whole heads and neurons of least norm, their norms summed up in the same knapsack.

    Args:
        model: dense; unchanged.
        batches: that the distortion is measured on.
        budgets: one a point.
        analysis: of the model, for its statistics and costs.
        terms: of budgets on a device, for its prices; time is predicted, not settled by measuring.
        judge: makes the points.
    """
    allowed = families.of(model).find_units(model)
    units = [unit for unit in allowed if unit.kind in ("head", "neuron")]
    if not units:
        return
    found = curves_from_scores(units, magnitude(model, units, batches))
    choices = offer(
        model if terms is None else terms.model,
        found,
        analysis.cost,
        pricer=None if terms is None else terms.pricer,
        memory=None if terms is None else terms.memory,
    )
    own = Analysis(units, analysis.statistics, found, analysis.cost, {}, {})
    for budget in budgets:
        try:
            plan = choices.plan(budget)
        except UnreachableBudget as error:
            yield refused("magnitude", budget.given, str(error).splitlines()[0])
            continue
        pruned, distance = copy.deepcopy(model).eval(), 0.0
        mask = {**full_mask(units), **select(found, plan)}
        if not all(bool(grid.all()) for grid in mask.values()):
            _, distance = cut_(pruned, own, mask, batches, False, {}, None)
        told = {
            "budget": dict(budget.given),
            "macs_ratio": count_macs(pruned, batches[0][:1]) / plan.dense_macs,
            "params_ratio": sum(p.numel() for p in pruned.parameters()) / plan.dense_params,
            "distortion": {"measured": distance, "predicted": None},
        }
        yield judge.point("magnitude", pruned, told)


def by_lpvit(
    model: nn.Module,
    batches: Sequence[Tensor],
    budgets: Sequence[Budget],
    judge: Judge,
    *,
    block: tuple[int, int],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Points of LPViT as published; budgets of something else than MACs are left out.

    Args:
        model: a dense classifier; unchanged.
        batches: calibration images.
        budgets: one a point.
        judge: makes the points.
        block: tile size.
        seed: of the calibration.
    """
    mine = [budget for budget in budgets if set(budget.given) == {"macs"}]
    if not mine:
        return
    found = analyse(model, batches, block=block, objective="lpvit", seed=seed)
    for budget in mine:
        pruned = copy.deepcopy(model)
        try:
            report = prune(
                pruned,
                batches,
                budget,
                objective="lpvit",
                repair=False,
                block=block,
                seed=seed,
                analysis=found,
            )
        except ValueError as error:
            yield refused("lpvit", budget.given, str(error).splitlines()[0])
            continue
        yield judge.point("lpvit", pruned, report.to_dict())
