"""The whole front of a model: one calibration, one set of curves, a pruned model for each of many budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hwprune import families
from hwprune.analysis import (
    Analysis,
    Objective,
    StepProgress,
    analyse,
    on_device,
    refuse_pruned,
)
from hwprune.baselines import BASELINES, by_lpvit, by_magnitude
from hwprune.budget import ON_A_DEVICE, Budget, UnreachableBudget
from hwprune.contract import contract, timed_images
from hwprune.front import Front, refused
from hwprune.judging import Evaluate, Gauge, Judge
from hwprune.lpvit_plan import check_lpvit
from hwprune.meter.modes import Mode
from hwprune.pruning import REFINE, TILE, prune, tiles_of
from hwprune.report import Report

Each = Callable[[nn.Module, Report], str]  # a pruned model and its report, to the folder it is in


def sweep(
    model: nn.Module,
    batches: Sequence[Tensor],
    budgets: Sequence[Budget],
    *,
    metric: str | None = None,
    device: str | None = None,
    kinds: Sequence[str] | None = None,
    objective: Objective = "second-order",
    refine: int = REFINE,
    repair: bool = True,
    seed: int = 0,
    block: tuple[int, int] | None = None,
    round_to: int = 8,
    timed_batch: int = 8,
    timed_dtype: torch.dtype | None = None,
    mode: Mode | None = None,
    energy_weight: float = 0.0,
    baselines: Sequence[str] = ("magnitude",),
    each: Each | None = None,
    evaluate: Evaluate | None = None,
    progress: StepProgress | None = None,
) -> Front:
    """Prune copies of a model to several budgets, from one calibration.

    Args:
        model: dense; unchanged.
        batches: calibration images [B, 3, height, width].
        budgets: one a point.
        metric: that is swept, for the report; None = the first one limited.
        device: device profile for latency and energy: limits them, or predicts them for the picture where
            MACs or parameters are limited. None = this machine's own, if it has one.
        kinds: unit kinds, as of `hwprune.prune`.
        objective: "second-order" or "lpvit".
        refine: other plans to try at each point; what won at one is tried at the next.
        repair: re-fit what is kept.
        seed: of the calibration probe.
        block: tile size for the kind block; None = as of `hwprune.prune`.
        round_to: keep neurons in multiples of this.
        timed_batch: images of the batch whose latency or energy is limited or predicted.
        timed_dtype: type of the weights when the models will be run, as of `hwprune.prune`.
        mode: how they will be run.
        energy_weight: what the energy of the dense model's batch counts in the unit of the distortion.
        baselines: at the same budgets, not saved: "magnitude" (heads and neurons by norm, no re-fit),
            "lpvit" (as published, for budgets of macs alone).
        each: called with each pruned model and its report; returns the folder it was saved in.
        evaluate: top-1 of a model and the number of images; None = distortion alone.
        progress: called with (step, done, total).

    Returns:
        The front; a budget that cannot be kept is a point that says why.

    Raises:
        UnreachableBudget: none of the budgets can be kept.
        ValueError: bad input.
    """
    refuse_pruned(model)
    if not budgets:
        raise ValueError("sweep: expected at least one budget, got none")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"sweep: expected baselines of {', '.join(BASELINES)}, got {unknown[0]!r}")
    if objective == "lpvit":
        check_lpvit(budgets, kinds)
    batches = on_device(model, batches)
    x = timed_images(batches, timed_batch)
    layers, _ = families.of(model).find_layers(model)
    first = (device, mode) if energy_weight or _timed(budgets[0]) else (None, None)
    terms = contract(
        model,
        budgets[0],
        first[0],
        x,
        layers,
        energy_weight=energy_weight,
        mode=first[1],
        dtype=timed_dtype,
    )
    analysis = analyse(
        model,
        batches,
        kinds=kinds,
        block=block or TILE,
        tiles=tiles_of(terms, kinds, block),
        objective=objective,
        seed=seed,
        progress=progress,
    )
    judge = Judge(Gauge.of(model, device, x.to(timed_dtype or x.dtype)), evaluate)
    name = "hwprune" if objective == "second-order" else objective
    points: list[dict[str, Any]] = []
    reports: list[Report] = []
    last: UnreachableBudget | None = None
    for done, budget in enumerate(budgets):
        if progress is not None:
            progress("sweep", done, len(budgets))
        pruned = copy.deepcopy(model)
        try:
            report = prune(
                pruned,
                batches,
                budget,
                device=device if energy_weight or _timed(budget) else None,
                objective=objective,
                refine=refine,
                repair=repair,
                seed=seed,
                block=block,
                round_to=round_to,
                timed_batch=timed_batch,
                timed_dtype=timed_dtype,
                mode=mode if energy_weight or _timed(budget) else None,
                energy_weight=energy_weight,
                analysis=analysis,
                progress=progress,
            )
        except UnreachableBudget as error:
            last = error
            points.append(refused(name, budget.given, str(error).splitlines()[0]))
            continue
        reports.append(report)
        analysis = _warmer(analysis, report)
        points.append(judge.point(name, pruned, report.to_dict()))  # before it is cast and saved
        points[-1]["folder"] = None if each is None else each(pruned, report)
    if last is not None and not reports:
        raise last
    beside: list[dict[str, Any]] = []
    if "magnitude" in baselines:
        beside += by_magnitude(model, batches, budgets, analysis, terms, judge)
    if "lpvit" in baselines and objective != "lpvit":
        beside += by_lpvit(model, batches, budgets, judge, block=block or TILE, seed=seed)
    if progress is not None:
        progress("sweep", len(budgets), len(budgets))
    return Front(
        metric or next(iter(budgets[0].given)),
        reports[0].distortion["unit"],
        sum(len(batch) for batch in batches),
        judge.dense(model),
        tuple(points),
        tuple(beside),
        judge.images,
        tuple(reports),
    )


def _timed(budget: Budget) -> bool:
    return any(metric in ON_A_DEVICE for metric in budget.given)


def _warmer(analysis: Analysis, report: Report) -> Analysis:
    """The analysis, with the factors that the best plan of this budget was solved with for the next to try."""
    for row in report.plans:
        if row["won"]:
            return replace(analysis, factors=row["factors"])
    return analysis
