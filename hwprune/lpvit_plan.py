"""LPViT as a way to choose blocks for `hwprune.prune`: its masks as a plan that the rest of the road takes.

Scores, power model and slope search are LPViT's, in the form of its paper. Weights are left as they are, as
published, or re-fitted afterwards like any other choice (`repair`). Only MACs can be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hwprune.budget import Budget, UnreachableBudget
from hwprune.cost import ModelCost, Structure, layer_macs, layer_params
from hwprune.lpvit import Scored, scored
from hwprune.plan import Plan
from hwprune.repair import fit_columns
from hwprune.statistics import Statistics
from hwprune.units import Mask, Units, expand, get_linear, layers_of

KINDS = ("block",)


def check_lpvit(budgets: Sequence[Budget], kinds: Sequence[str] | None) -> None:
    """Refuse what LPViT has no answer to.

    Raises:
        ValueError: a budget of something else than MACs, or kinds other than block.
    """
    for budget in budgets:
        other = [metric for metric in budget.given if metric != "macs"]
        if other:
            raise ValueError(
                f"objective lpvit: expected a budget of macs alone, got {', '.join(budget.given)}: it "
                "searches one slope for the compute; for other budgets use the objective second-order"
            )
    if kinds is not None and tuple(kinds) != KINDS:
        raise ValueError(
            f"objective lpvit: expected the kind block alone, got {', '.join(kinds)}; leave kinds out"
        )


def score(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], block: tuple[int, int]
) -> Scored:
    """LPViT's calibration pass over the linears of some blocks.

    Args:
        model: a dense classifier.
        units: of the kind block.
        batches: calibration images.
        block: tile size.

    Raises:
        ValueError: no classifier, NaN, or a layer it cannot score.
    """
    if not int(getattr(model, "num_classes", 1) or 0):
        raise ValueError(
            "objective lpvit: expected a classifier, since it differentiates the squared logits, got a model "
            "with num_classes=0; use the objective second-order"
        )
    return scored(model, batches, block=block, layers=[_linear(unit) for unit in units])


def lpvit_plan(
    model: nn.Module,
    units: Sequence[Units],
    found: Scored,
    statistics: Statistics,
    cost: ModelCost,
    budget: Budget,
    *,
    repair: bool,
) -> tuple[Plan, Mask]:
    """The blocks LPViT keeps within a budget of MACs.

    Args:
        model: dense.
        units: of the kind block.
        found: from `score` with these units.
        statistics: of the calibration pass, for the predicted distortion: second-order, of LPViT's choice.
        cost: of the dense model.
        budget: of macs.
        repair: whether weights will be re-fitted, which the prediction then counts in.

    Raises:
        UnreachableBudget: a ratio that cannot be reached; says which can.
    """
    dense = {"macs": cost.macs, "params": float(cost.params)}
    limits = budget.limits(dense)
    ratio = min(1.0, limits["macs"] / cost.macs)
    try:
        masks = found.masks(ratio, true_macs=True, stored=True)
    except ValueError as error:
        raise UnreachableBudget(
            f"budget macs <= {limits['macs']:.4g} ({ratio:.3f} of dense) is out of reach of LPViT: {error}"
        ) from None
    mask = {unit.name: masks[_linear(unit)] for unit in units}
    structures, macs, params = {}, cost.fixed_macs, float(cost.fixed_params)
    for layer in layers_of(units):
        mine = [unit for unit in units if unit.layer.name == layer.name]
        structure = _structure(model, mine, mask)
        structures[layer.name] = structure
        macs += layer_macs(model, layer, structure, cost.tokens[layer.name])
        params += layer_params(model, layer, structure)
    plan = Plan(
        {unit.name: int(mask[unit.name].sum()) for unit in units},
        structures,
        sum(_predicted(model, unit, mask[unit.name], statistics, repair) for unit in units),
        macs,
        params,
        cost.macs,
        float(cost.params),
        limits,
    )
    return plan, mask


def _linear(unit: Units) -> str:
    return unit.slices[0].param.removesuffix(".weight")


def _structure(model: nn.Module, units: Sequence[Units], mask: Mapping[str, Tensor]) -> Structure:
    """What is left of a layer: stored weights of each linear, whole tiles where any are gone."""
    weights: dict[str, int] = {}
    tiles: dict[str, tuple[int, int]] = {}
    for unit in units:
        grid, tile = mask[unit.name], unit.slices[0].tile
        assert tile is not None
        weights[_linear(unit)] = get_linear(model, _linear(unit)).weight.numel()
        if not bool(grid.all()):
            weights[_linear(unit)] = int(grid.sum()) * tile[0] * tile[1]
            tiles[_linear(unit)] = tile
    return Structure(weights=weights, tiles=tiles)


def _predicted(
    model: nn.Module, unit: Units, grid: Tensor, statistics: Statistics, repair: bool
) -> float:
    """Half of tr(G D H D'), with D what changes in the weight: removed alone, or re-fitted too."""
    if bool(grid.all()):
        return 0.0
    linear, moments = get_linear(model, _linear(unit)), statistics.linear[_linear(unit)]
    weight_OI = linear.weight.detach().double()
    keep_OI = expand(grid.to(weight_OI.device), unit.slices[0], weight_OI.shape)
    moment = moments.centred if repair and linear.bias is not None else moments.second
    fresh_OI = weight_OI * keep_OI
    if repair:
        floor = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
        fresh_OI = fit_columns(weight_OI, keep_OI, moment, moment, 1e-3, floor)
    change_OI = weight_OI - fresh_OI
    return 0.5 * float(((moments.metric @ change_OI @ moment) * change_OI).sum())
