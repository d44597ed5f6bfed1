"""Scores of units, one signature for all: (model, units, batches, *, seed) -> Scores, higher = keep.

`obs` is what `hwprune.prune` rests on; the others are the field's usual yardsticks. Scores become curves
(`hwprune.distortion.curves_from_scores`) and then go through the same allocation as everything else.
Channels of qk and vo are scored in the model's own basis, but by `obs` in the rotated one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hwprune.distortion import curves
from hwprune.statistics import calibrate
from hwprune.units import Scores, Units, reduce

__all__ = ["fisher", "magnitude", "obs", "random", "taylor"]


def magnitude(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], *, seed: int = 0
) -> Scores:
    """L2 norm of everything a unit owns. `batches` and `seed` are not used."""
    scores: Scores = {}
    for unit in units:
        total = torch.zeros(unit.shape)
        for part in unit.slices:
            parameter = model.get_parameter(part.param).detach().float()
            total = total + reduce(parameter.square(), part).cpu()
        scores[unit.name] = total.sqrt()
    return scores


def random(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], *, seed: int = 0
) -> Scores:
    """Uniform in [0, 1): the yardstick below which no criterion may fall. `batches` is not used."""
    generator = torch.Generator().manual_seed(seed)
    return {unit.name: torch.rand(unit.shape, generator=generator) for unit in units}


def _sums(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    return calibrate(model, units, batches, sums=True, seed=seed).sums


def taylor(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], *, seed: int = 0
) -> Scores:
    """First order: E_n |Σ_w w g_nw| over the unit (Molchanov et al. 2019, grouped), label-free.

    g is the gradient of a random probe of the output (see `calibrate`), per sample, so that images of
    opposite sign do not cancel as they do in an averaged gradient.
    """
    sums = _sums(model, units, batches, seed)
    return {u.name: sums[u.name].abs().mean(0).view(u.shape).cpu() for u in units}


def fisher(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], *, seed: int = 0
) -> Scores:
    """Second order without re-fit: ½ E_n (Σ_w w g_nw)², the block-projected Gauss-Newton diagonal."""
    sums = _sums(model, units, batches, seed)
    return {u.name: 0.5 * sums[u.name].square().mean(0).view(u.shape).cpu() for u in units}


def obs(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Tensor], *, seed: int = 0
) -> Scores:
    """Optimal brain surgeon: the distortion reached when a unit goes, in greedy order with re-fit."""
    found = curves(model, units, calibrate(model, units, batches, seed=seed))
    scores: Scores = {}
    for unit in units:
        curve = found[unit.name]
        line = torch.empty(unit.count, dtype=torch.float64)
        line[curve.order] = curve.distortion[1:]
        scores[unit.name] = line.view(unit.shape).float()
    return scores
