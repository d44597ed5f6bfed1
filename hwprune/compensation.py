"""Gates of a model that is re-fitted as it loses units: a mask is learned for the model that will be deployed.

A repaired layer predicts what it has lost from what it keeps. While a mask is learned the same is done
on the fly: with H the moments of what an output projection reads, the lost columns are x_R = R x_S with
R = H_RS H_SS^-1, and a gate takes from its unit only what the others do not know already, its innovation.
Masks learned without it keep what is irreplaceable in the unrepaired model, which is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.coupled import weight_module
from hwprune.gating import Gating
from hwprune.trajectory_scores import Moments, readers
from hwprune.units import Units

_RIDGE = 1e-2  # of the mean variance; the re-fit itself tries 1e-3 and 1e-1


@dataclass(eq=False)
class _Projection:
    """What one projection reads, and how its columns stand for each other under the mask in force.

    Attributes:
        owners: the units of its columns, [U, E] each.
        mean: [I].
        second: [I, I] about the mean, with ridge, float64.
        innovation: [I, I], from a column's values to what the kept others do not know of it.
        restored: [I, I], from the kept columns to all.
        kept: bool [I].
    """

    owners: list[tuple[Units, Tensor]]
    mean: Tensor
    second: Tensor
    innovation: Tensor
    restored: Tensor
    kept: Tensor

    def settle(self, kept: Tensor) -> None:
        """Solve for a mask: bool [I]."""
        size, like = len(kept), self.second
        on, off = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        innovation = torch.eye(size, dtype=like.dtype, device=like.device)
        restored = torch.diag(kept.to(like.dtype))
        if len(on):
            inverse = torch.linalg.inv(like[on][:, on])
            if len(off):
                lost = like[off][:, on] @ inverse
                restored[off[:, None], on] = lost
                innovation[off[:, None], on] = -lost
            place = torch.full((size,), -1, device=like.device)
            place[on] = torch.arange(len(on), device=like.device)
            for _, index in self.owners:
                units = place[index.to(like.device)]
                units = units[(units >= 0).all(1)]  # a unit is kept or lost as a whole
                if len(units):
                    own = inverse[units[:, :, None], units[:, None, :]]
                    rows = torch.linalg.solve(own, inverse[units])
                    innovation[on[units][:, :, None], on[None, None]] = rows
        dtype = self.mean.dtype
        self.innovation, self.restored = innovation.to(dtype), restored.to(dtype)
        self.kept = kept


class Compensation(Gating):
    """Gates whose removed units are predicted from the kept ones; made by `compensated`.

    Args:
        gating: the plain gates; those of whole blocks, and of what is not compensated, stay with it.
        projections: by name.
    """

    def __init__(self, gating: Gating, projections: Mapping[str, _Projection]) -> None:
        """Start with no gates in force."""
        super().__init__(gating.layout)
        self.plain, self.projections = gating, projections
        self._settled: Tensor | None = None
        own = {unit.name for p in projections.values() for unit, _ in p.owners}
        self._apart = torch.zeros(self.layout.count, dtype=torch.bool)
        for name, place in self.layout.places.items():
            self._apart[place] = name not in own

    def set(self, flat: Tensor | None) -> None:
        """Put gates in force, [N] or [B, N], each 0 or 1 and the same in every row; or none."""
        super().set(flat)
        if flat is None:
            self.plain.set(None)
            return
        rows = flat.detach().reshape(-1, self.layout.count)
        keep = (rows[0] > 0.5).cpu()
        if self._settled is None or not torch.equal(keep, self._settled):
            parts = self.layout.split(keep)
            for projection in self.projections.values():
                kept = torch.ones_like(projection.kept)
                for unit, index in projection.owners:
                    kept[index.reshape(-1).to(kept.device)] = (
                        parts[unit.name].repeat_interleave(index.shape[1]).to(kept.device)
                    )
                projection.settle(kept)
            self._settled = keep
        if bool(self._apart.any()):
            apart = self._apart.to(flat.device)
            self.plain.set(torch.where(apart, flat, torch.ones_like(flat)))

    def read(self, projection: _Projection, x: Tensor) -> Tensor:
        """What the projection reads with the gates in force: [..., I], at least [B, I]."""
        size = len(projection.kept)
        rows = 1 if self.now is None or self.now.ndim == 1 else len(self.now)
        line = torch.ones(rows, size, device=x.device)
        for unit, index in projection.owners:
            part = self.part(unit.name)
            assert part is not None
            spread = part.view(rows, -1).to(x.device).repeat_interleave(index.shape[1], 1)
            line = line.index_copy(1, index.reshape(-1).to(x.device), spread.to(line.dtype))
        if rows > 1:  # guidance: k predictions of the same images, one after the other
            line = line.repeat(len(x) // rows, 1)
        gates = line.view(len(line), *[1] * (x.ndim - 2), size)
        kept = projection.kept
        off_mean = x.to(projection.mean.dtype) - projection.mean
        fresh = off_mean @ projection.innovation.T
        own = torch.where(kept, off_mean + (gates - 1) * fresh, torch.zeros_like(off_mean))
        back = torch.where(kept, torch.zeros_like(fresh), gates * fresh)
        return (own @ projection.restored.T + back + projection.mean).to(x.dtype)


def compensable(
    model: nn.Module, units: Sequence[Units], *, memory_bytes: int = 6 << 30
) -> list[str]:
    """Output projections whose matrices fit into some memory, the narrowest first.

    Moments and two matrices of each take 16 bytes an entry: 5120 columns (the widest of SDXL) 420 MB.
    A unit is compensated in all projections that read it, or in none.
    """
    every = readers(units)
    width = {name: weight_module(model, name).weight.shape[1] for name in every}
    fits: list[str] = []
    for name in sorted(every, key=width.__getitem__):
        memory_bytes -= 16 * width[name] ** 2
        if memory_bytes < 0:
            break
        fits.append(name)
    while True:
        apart = {u.name for name, own in every.items() if name not in fits for u, _ in own}
        kept = [name for name in fits if not any(u.name in apart for u, _ in every[name])]
        if len(kept) == len(fits):
            return [name for name in every if name in kept]
        fits = kept


@contextmanager
def compensated(
    model: nn.Module, gating: Gating, moments: Mapping[str, Moments]
) -> Iterator[Compensation]:
    """Hook a denoiser that is `gated` already; the hooks are gone on exit.

    Args:
        model: the dense denoiser.
        gating: its plain gates.
        moments: of what its output projections read, from the dense model's trajectories; those left out
            are only gated.
    """
    projections = {}
    for name, owners in readers(gating.layout.units).items():
        if name not in moments:
            continue
        second = moments[name].second(centred=True)
        size = _RIDGE * float(second.diagonal().mean()) + 1e-12
        second = second + size * torch.eye(len(second), dtype=second.dtype, device=second.device)
        kept = torch.ones(len(second), dtype=torch.bool, device=second.device)
        none = torch.empty(0)
        mean = moments[name].mean.float()
        projections[name] = _Projection(owners, mean, second, none, none, kept)
    found = Compensation(gating, projections)
    handles = []
    try:
        for name, projection in projections.items():
            module = weight_module(model, name)
            handles.append(module.register_forward_pre_hook(_hook(found, projection, module)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    compensation: Compensation, projection: _Projection, module: nn.Module
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    channels_first = isinstance(module, nn.Conv2d)

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if compensation.now is None:
            return None
        x = args[0].movedim(1, -1) if channels_first else args[0]
        out = compensation.read(projection, x)
        return ((out.movedim(-1, 1) if channels_first else out), *args[1:])

    return read
