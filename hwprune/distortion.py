"""Second-order curves: what removing the k least important units of a layer costs the model's output.

Every curve is in the unit of the output's distortion (nats of KL for a classifier): the layer's
reconstruction error after the best re-fit, measured in the Gauss-Newton metric of its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.obs import (
    damped_inverse,
    eliminate_blocks,
    eliminate_groups,
    merge_rows,
    sqrt_psd,
)
from hwprune.rotate import Rotation, rotation_qk, rotation_vo
from hwprune.statistics import Moments, Progress, Statistics
from hwprune.units import AttentionLayer, Scores, Units, get_linear, vision_layer


@dataclass(frozen=True, eq=False)
class Curve:
    """Distortion of removing the k least important units, k = 0..all, and the order that attains it.

    Attributes:
        units: what the curve is about.
        order: [U] unit indices, first removed first.
        distortion: [U + 1] float64, non-decreasing, distortion[0] = 0.
        rotation: change of basis to apply before the order means anything (qk, vo); else None.
    """

    units: Units
    order: Tensor
    distortion: Tensor
    rotation: Rotation | None = None

    def kept(self, count: int) -> Tensor:
        """Bool grid that keeps `count` units."""
        keep = torch.ones(self.units.count, dtype=torch.bool)
        keep[self.order[: self.units.count - count]] = False
        return keep.view(self.units.shape)


def _monotone(curve: Tensor) -> Tensor:
    return curve.cummax(0).values.clamp_min(0)


def _metric_weight(model: nn.Module, name: str, moments: Moments) -> Tensor:
    root_OO, _ = sqrt_psd(moments.metric)
    return root_OO @ get_linear(model, name).weight.detach().double()


def _moment(model: nn.Module, name: str, moments: Moments) -> Tensor:
    """H of a linear's input; about the mean where a bias can take the mean up."""
    return moments.second if get_linear(model, name).bias is None else moments.centred


def _structured(model: nn.Module, units: Units, moments: Moments) -> Curve:
    """Heads and neurons: group-OBS on the columns of the output linear."""
    index = units.slices[-1].index
    assert index is not None
    out = vision_layer(units).out
    weight_OI = _metric_weight(model, out, moments)
    order, curve = eliminate_groups(weight_OI, damped_inverse(_moment(model, out, moments)), index)
    return Curve(units, order, _monotone(0.5 * curve))


def _rotated_vo(model: nn.Module, units: Units, moments: Moments) -> Curve:
    """v channels: truncation in the rotated basis, priced jointly over heads by group-OBS."""
    layer, index = units.layer, units.slices[-1].index
    assert isinstance(layer, AttentionLayer) and index is not None
    rotation = rotation_vo(model, layer, moments)
    heads, width = layer.heads, layer.head_dim
    weight = _metric_weight(model, layer.out, moments).view(-1, heads, width)
    weight_OI = torch.einsum("ohd,hdc->ohc", weight, rotation.second).flatten(1)
    turn_II = torch.block_diag(*rotation.first)
    moment_II = turn_II @ _moment(model, layer.out, moments) @ turn_II.T
    order = torch.arange(width - 1, -1, -1)
    _, curve = eliminate_groups(weight_OI, damped_inverse(moment_II), index, order)
    return Curve(units, order, _monotone(0.5 * curve), rotation)


def _rotated_qk(units: Units, queries: Moments) -> Curve:
    """q/k channels: the tail of the whitened SVD, summed over heads."""
    rotation = rotation_qk(queries)
    width = units.shape[0]
    return Curve(
        units,
        torch.arange(width - 1, -1, -1),
        _monotone(rotation.tail.sum(0).flip(0)),
        rotation,
    )


def _blocks(model: nn.Module, units: Units, moments: Moments) -> Curve:
    """Tiles: block-OBS in every block row, rows interleaved by cost."""
    part = units.slices[0]
    assert part.tile is not None
    rows, cols = part.tile
    name = part.param.removesuffix(".weight")
    weight = get_linear(model, name).weight.detach().double()
    pad = -weight.shape[0] % rows
    weight = torch.nn.functional.pad(weight, (0, 0, 0, pad))
    metric = torch.nn.functional.pad(moments.metric, (0, pad, 0, pad))
    weighted = []
    for r in range(units.shape[0]):
        block = slice(r * rows, (r + 1) * rows)
        root_RR, _ = sqrt_psd(metric[block, block])
        weighted.append(root_RR @ weight[block])
    order, loss = eliminate_blocks(
        torch.stack(weighted), damped_inverse(_moment(model, name, moments)), cols
    )
    taken, curve = merge_rows(order, 0.5 * loss)
    return Curve(units, taken, _monotone(curve))


def curves(
    model: nn.Module,
    units: Sequence[Units],
    statistics: Statistics,
    *,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """The curve of every group of units.

    Args:
        model: the dense model.
        units: from a family's `find_units`.
        statistics: from `calibrate` with the same units.
        progress: called with (units groups done, in all).

    Returns:
        units name -> Curve.

    Raises:
        ValueError: statistics of other units; degenerate moments.
    """
    found: dict[str, Curve] = {}
    for done, unit in enumerate(units):
        found[unit.name] = _curve(model, unit, statistics)
        if progress is not None:
            progress(done + 1, len(units))
    return found


def _curve(model: nn.Module, unit: Units, statistics: Statistics) -> Curve:
    linear: Mapping[str, Moments] = statistics.linear
    out = vision_layer(unit).out
    name = unit.slices[0].param.removesuffix(".weight") if unit.kind == "block" else out
    if name not in linear or (unit.kind == "qk" and unit.layer.name not in statistics.queries):
        raise ValueError(f"{unit.name}: no statistics; calibrate with the units you ask curves for")
    try:
        if unit.kind == "block":
            return _blocks(model, unit, linear[name])
        if unit.kind == "qk":
            return _rotated_qk(unit, statistics.queries[unit.layer.name])
        if unit.kind == "vo":
            return _rotated_vo(model, unit, linear[name])
        return _structured(model, unit, linear[name])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{unit.name}: {error}") from error


def curves_from_scores(units: Sequence[Units], scores: Scores) -> dict[str, Curve]:
    """Curves of any criterion: units leave in the order of their scores, whose sum is the distortion.

    Args:
        units: the units scored.
        scores: units name -> scores of the grid's shape; negative ones count as zero.

    Raises:
        ValueError: scores are missing, mis-shaped or not finite.
    """
    found: dict[str, Curve] = {}
    for unit in units:
        score = scores.get(unit.name)
        if score is None or tuple(score.shape) != unit.shape:
            got = None if score is None else tuple(score.shape)
            raise ValueError(f"{unit.name}: expected scores of shape {unit.shape}, got {got}")
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{unit.name}: scores hold NaN or Inf")
        ranked, order = score.detach().double().flatten().clamp_min(0).sort(stable=True)
        zero = torch.zeros(1, dtype=torch.float64)
        found[unit.name] = Curve(unit, order, torch.cat([zero, ranked.cpu().cumsum(0)]))
    return found
