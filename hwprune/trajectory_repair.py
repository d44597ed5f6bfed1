"""Closed-form re-fit of a pruned denoiser's output projections along its own trajectories.

Group after group of layers, in the order they run: moments of what the projections read, on the latents
the pruned model itself comes by, each step weighted by what an error there does to the final latent;
then least squares on the kept columns, so that the layer says what the dense one would, the mean folded
into the bias. A group's re-fit stays only where it brings the final latents of other images closer to the
dense model's; several ridges are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.coupled import weight_module
from hwprune.gating import Gating
from hwprune.teacher import Batch, Sampler
from hwprune.trajectory_scores import Moments, moments_along, readers, step_weights
from hwprune.units import CoupledLayer

RIDGES = (1e-3, 1e-1)  # of the mean kept variance, towards the weights as they were


@dataclass(frozen=True)
class Repaired:
    """What came of it.

    Attributes:
        before, after: mean squared distance on the check images.
        groups: of layers, tried.
        kept: groups whose re-fit stayed.
    """

    before: float
    after: float
    groups: int
    kept: int


@torch.no_grad()
def repair_trajectory_(
    sampler: Sampler,
    gating: Gating,
    keep: Tensor,
    train: Sequence[Batch],
    check: Sequence[Batch],
    *,
    groups: int = 12,
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Re-fit the output projections of cut layers in place.

    Args:
        sampler: of the dense model, whose weights change.
        gating: the hooks on its units.
        keep: bool [N], the mask; it is in force throughout.
        train: images to gather moments on.
        check: other images, to judge by.
        groups: passes over the train images at most; neighbouring blocks share one where there are more.
        progress: called with (done, total).

    Raises:
        FloatingPointError: NaN in the trajectory, with step and layer.
    """
    model = sampler.model
    flat = keep.float()
    columns = _kept_columns(model, gating, keep)
    grouped = _groups(gating, columns, groups)
    first = best = float(sampler.distance(check, gating, flat).mean())
    if not grouped:
        return Repaired(first, first, 0, 0)
    with torch.enable_grad():
        weights = step_weights(sampler, train[:1])
    stayed = 0
    for i, names in enumerate(grouped):
        found = moments_along(sampler, train, names, weights, gating, flat)
        before = {name: _copy(weight_module(model, name)) for name in names}
        chosen = before
        for ridge in RIDGES:
            for name in names:
                _put(weight_module(model, name), before[name])
                _refit_(weight_module(model, name), columns[name], found[name], ridge)
            distance = float(sampler.distance(check, gating, flat).mean())
            if distance < best:
                best = distance
                chosen = {name: _copy(weight_module(model, name)) for name in names}
        for name in names:
            _put(weight_module(model, name), chosen[name])
        stayed += chosen is not before
        if progress is not None:
            progress(i + 1, len(grouped))
    return Repaired(first, best, len(grouped), stayed)


def _kept_columns(model: nn.Module, gating: Gating, keep: Tensor) -> dict[str, Tensor]:
    """Columns kept, bool [I], of each projection that loses some and is not in a removed block."""
    parts = gating.layout.split(keep)
    gone = [
        u.layer.name for u in gating.layout.units if u.kind == "depth" and not parts[u.name].any()
    ]
    found = {}
    for name, owners in readers(gating.layout.units).items():
        if any(name.startswith(f"{block}.") for block in gone):
            continue
        kept = torch.ones(weight_module(model, name).weight.shape[1], dtype=torch.bool)
        for unit, index in owners:
            kept[index.reshape(-1)] &= parts[unit.name].cpu().repeat_interleave(index.shape[1])
        if not bool(kept.all()):
            found[name] = kept
    return found


def _groups(gating: Gating, columns: dict[str, Tensor], most: int) -> list[list[str]]:
    """Projections in the order they run, block by block, neighbouring blocks together where there are many."""
    stages: dict[int, list[str]] = {}
    for name, owners in readers(gating.layout.units).items():
        layer = owners[0][0].layer
        assert isinstance(layer, CoupledLayer)
        if name in columns:
            stages.setdefault(layer.stage, []).append(name)
    blocks = [stages[stage] for stage in sorted(stages)]
    if not blocks:
        return []
    each = -(-len(blocks) // max(1, most))
    return [
        [name for block in blocks[i : i + each] for name in block]
        for i in range(0, len(blocks), each)
    ]


def _refit_(module: nn.Linear | nn.Conv2d, kept: Tensor, moments: Moments, ridge: float) -> None:
    """Weighted least squares on the kept columns; the bias takes up the change of the mean."""
    if moments.weight == 0:
        return
    kept = kept.to(module.weight.device)
    weight_OI = module.weight.detach().double().flatten(1)
    second = moments.second(centred=module.bias is not None)
    fresh_OI = torch.zeros_like(weight_OI)
    if bool(kept.any()):
        own = second[kept][:, kept]
        # A constant input (behind an emptied layer) has rounding for a variance: it must not be fitted to.
        floor = 1e-11 * float(moments.square.diagonal().mean()) / moments.weight
        size = max(ridge * float(own.diagonal().mean()), floor, 1e-30)
        system = own + size * torch.eye(len(own), dtype=own.dtype, device=own.device)
        target = second[kept] @ weight_OI.T + size * weight_OI[:, kept].T
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            return  # moments too poor to fit to; the weights stay
        fresh_OI[:, kept] = torch.cholesky_solve(target, factor).T
    if module.bias is not None:
        change = (weight_OI - fresh_OI) @ moments.mean
        module.bias.copy_((module.bias.double() + change).to(module.bias))
    # What the mask drops keeps its weights: it is not read, and a later group must still know the target.
    fresh_OI[:, ~kept] = weight_OI[:, ~kept]
    module.weight.copy_(fresh_OI.view(module.weight.shape).to(module.weight))


def _copy(module: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    bias = module.bias.detach().clone() if module.bias is not None else None
    return module.weight.detach().clone(), bias


def _put(module: nn.Linear | nn.Conv2d, state: tuple[Tensor, Tensor | None]) -> None:
    module.weight.copy_(state[0])
    if module.bias is not None and state[1] is not None:
        module.bias.copy_(state[1])
