"""Multiply heads, neurons and blocks of a denoiser by gates, differentiably, without touching its weights.

A gate acts where its unit is read: on the input columns of the output projections (heads, neurons), or on
the whole result of a block's output projections (depth). At 0 and 1 that is what `masked` computes. The
gates of one trajectory are one flat tensor, so that one gradient serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hwprune.coupled import weight_module
from hwprune.trajectory import Denoise
from hwprune.units import CoupledLayer, Mask, ResidualBlock, Units


class Layout:
    """Where the gates of each units lie in one flat tensor of N gates.

    Args:
        units: units of a denoiser.

    Raises:
        ValueError: there are none, or one is of another model.
    """

    def __init__(self, units: Sequence[Units]) -> None:
        """Number the gates in the order of the units."""
        if not units:
            raise ValueError("gates: expected units of a denoiser, got none")
        self.units = tuple(units)
        self.places: dict[str, slice] = {}
        start = 0
        for unit in units:
            if not isinstance(unit.layer, CoupledLayer | ResidualBlock):
                raise ValueError(
                    f"{unit.name}: expected a unit of a denoiser; vision transformers are pruned without gates"
                )
            self.places[unit.name] = slice(start, start + unit.count)
            start += unit.count
        self.count = start

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat [..., N] by units name."""
        return {name: flat[..., place] for name, place in self.places.items()}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The flat float32 [N] of scores or masks by units name; names left out count as 1."""
        return torch.cat(
            [parts.get(u.name, torch.ones(u.count)).reshape(-1).float() for u in self.units]
        )

    def mask(self, keep: Tensor) -> Mask:
        """The mask of a flat bool [N]."""
        return {name: part.bool().cpu() for name, part in self.split(keep).items()}


@dataclass
class Gating:
    """The gates in force; made by `gated`.

    Attributes:
        layout: which gate is where.
        now: the flat gates [N], or [B, N] with a row for each image, the model multiplies by.
    """

    layout: Layout
    now: Tensor | None = None
    _parts: dict[str, Tensor] = field(default_factory=dict)

    def set(self, flat: Tensor | None) -> None:
        """Put gates in force, [N] or [B, N], or none.

        Raises:
            ValueError: another number of gates.
        """
        if flat is not None and (flat.ndim > 2 or flat.shape[-1] != self.layout.count):
            raise ValueError(
                f"gates: expected a flat tensor of {self.layout.count}, got {tuple(flat.shape)}"
            )
        self.now = flat
        self._parts = self.layout.split(flat) if flat is not None else {}

    def part(self, name: str) -> Tensor | None:
        """The gates of one units, or None where none are in force."""
        return self._parts.get(name)

    def wrap(self, denoise: Denoise, flat: Tensor, timesteps: Tensor | None = None) -> GatedDenoise:
        """A denoiser with these gates, whatever is put in force elsewhere meanwhile.

        Args:
            denoise: what to call.
            flat: [N]; or [B, N], the gates of each image (their gradients then come apart); or with
                `timesteps` [T, N], the gates of each step.
            timesteps: [T], of the solver.
        """
        rows = (
            {float(t): row for t, row in zip(timesteps.tolist(), flat, strict=True)}
            if timesteps is not None
            else {}
        )
        return GatedDenoise(self, denoise, flat, rows)


@dataclass(eq=False)
class GatedDenoise:
    """A denoiser that has its gates in force while it is called; made by `Gating.wrap`.

    Attributes:
        gating: the hooks' state.
        denoise: what is called.
        flat: gates of every step.
        rows: gates of single steps by timestep.
    """

    gating: Gating
    denoise: Denoise
    flat: Tensor
    rows: Mapping[float, Tensor]
    _held: bool = False

    @property
    def model(self) -> nn.Module | None:
        """The denoiser's model, for names in errors."""
        return getattr(self.denoise, "model", None)

    def __call__(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Predict with the gates of this step."""
        self.gating.set(self.rows[float(timestep)] if self.rows else self.flat)
        try:
            return self.denoise(latent, timestep)
        finally:
            if not self._held:
                self.gating.set(None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a call's gates in force until the end: a backward pass may run layers again.

        Gradient checkpointing inside the model does, and would otherwise run them without gates.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.gating.set(None)


@contextmanager
def gated(model: nn.Module, units: Sequence[Units]) -> Iterator[Gating]:
    """Hook a denoiser so that gates multiply its units; the hooks are gone on exit.

    Args:
        model: the dense denoiser; its weights are not changed.
        units: from its family's `find_units`.

    Raises:
        ValueError: units of another kind of model, or a layer that is not dense any more.
    """
    gating = Gating(Layout(units))
    readers: dict[str, list[tuple[str, Tensor]]] = {}
    writers: dict[str, list[str]] = {}
    for unit in units:
        for part in unit.slices:
            linear, _, tensor = part.param.rpartition(".")
            if tensor != "weight":
                continue
            if isinstance(unit.layer, ResidualBlock):
                writers.setdefault(linear, []).append(unit.name)
            elif part.dim == 1:
                assert part.index is not None
                readers.setdefault(linear, []).append((unit.name, part.index))
    handles = []
    try:
        for name, parts in readers.items():
            module = weight_module(model, name)
            hook = _read_hook(gating, parts, module)
            handles.append(module.register_forward_pre_hook(hook))
        for name, owners in writers.items():
            module = weight_module(model, name)
            handles.append(module.register_forward_hook(partial(_write, gating, owners)))
        yield gating
    finally:
        for handle in handles:
            handle.remove()


def _read_hook(
    gating: Gating, parts: Sequence[tuple[str, Tensor]], module: nn.Linear | nn.Conv2d
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    """Multiply the columns a projection reads: the last dimension of its input, or a map's channels."""
    width = module.weight.shape[1]
    channels_first = isinstance(module, nn.Conv2d)

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        grids = [(gating.part(name), index) for name, index in parts]
        if all(grid is None for grid, _ in grids):
            return None
        x = args[0]
        rows = next(len(grid) if grid.ndim == 2 else 1 for grid, _ in grids if grid is not None)
        line = torch.ones(rows, width, dtype=torch.float32, device=x.device)
        for grid, index in grids:
            if grid is not None:
                spread = grid.view(rows, -1).to(x.device).repeat_interleave(index.shape[1], 1)
                line = line.to(spread.dtype).index_copy(1, index.reshape(-1).to(x.device), spread)
        return (x * _broadcast(line, x, 1 if channels_first else -1), *args[1:])

    return read


def _broadcast(line: Tensor, x: Tensor, dim: int) -> Tensor:
    """Rows of gates in the shape they multiply x [k B, ...] by.

    Guidance runs k = 2 predictions of the same B images in one batch, one after the other. Gates are float32,
    the product is in the model's own type: activations would double in size otherwise.
    """
    rows, width = line.shape
    if rows > 1:
        if len(x) % rows:
            raise ValueError(f"gates of {rows} images for a batch of {len(x)}")
        line = line.repeat(len(x) // rows, 1)
    shape = [len(line), *[1] * (x.ndim - 1)]
    shape[dim] = width
    return line.to(x.dtype).view(shape)


def _write(
    gating: Gating, owners: Sequence[str], module: nn.Module, _: tuple[Tensor, ...], out: Tensor
) -> Tensor | None:
    """Multiply all a projection gives by the gate of its block."""
    for name in owners:
        grid = gating.part(name)
        if grid is not None:
            out = out * _broadcast(grid.view(-1, 1).to(out.device), out, -1)
    return out
