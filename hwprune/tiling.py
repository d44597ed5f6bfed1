"""Which tile sizes a plan may choose from: those a device runs fast enough to gain from.

A mask of finer tiles can say all that one of coarser tiles says, so a coarser size must be faster at the same
density; and tiles must be faster than dense layers with as many multiply-accumulates, which lose less accuracy
where whole units go instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from hwprune import families
from hwprune.cost import input_rows
from hwprune.ops import Op
from hwprune.predict import CostModel, UnknownOp
from hwprune.units import Layer, Mask, Units

Tile = tuple[int, int]
SIZES: tuple[Tile, ...] = ((32, 32), (64, 32), (64, 64), (128, 64))
_DENSITIES = (0.95, 0.75, 0.5, 0.25)
_AHEAD = 0.97  # of the rival's time: a few percent are within the noise of a profile
# Work of the curves of one size above which it is left out: some three minutes on one core.
_LONGEST = 2e12


def sizes_worth_it(costs: CostModel, linears: Sequence[Op]) -> tuple[Tile, ...]:
    """The tile sizes to offer on a device; none where whole units are as fast.

    Args:
        costs: of the device.
        linears: the dense linears that may be cut, as they run.
    """
    dense = sum(count * costs.predict(op).latency_s for op, count in Counter(linears).items())
    if not linears:
        return ()
    whole = [density * dense for density in _DENSITIES]
    paying: dict[Tile, list[float]] = {}
    for tile in SIZES:
        with suppress(UnknownOp):
            times = [_time(costs, linears, tile, density) for density in _DENSITIES]
            if _ahead(times, whole):
                paying[tile] = times
    short = [tile for tile in paying if _work(linears, tile) <= _LONGEST]
    found: list[Tile] = []
    for tile in short or list(paying)[-1:]:
        finer = [size for size in found if not (tile[0] % size[0] or tile[1] % size[1])]
        if all(_ahead(paying[tile], paying[size]) for size in finer):
            found.append(tile)
    return tuple(found)


def _ahead(times: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether the times are clearly shorter at some density."""
    return any(a < _AHEAD * b for a, b in zip(times, rival, strict=True))


def _time(costs: CostModel, linears: Sequence[Op], tile: Tile, density: float) -> float:
    """Seconds of the linears with this share of their tiles.

    Raises:
        UnknownOp: the profile has no tiles of this size.
    """
    total = 0.0
    for op, count in Counter(linears).items():
        m, n, k = op.shape
        kept = max(1, round(density * math.ceil(n / tile[0]) * math.ceil(k / tile[1])))
        total += count * costs.predict(Op.tiles((m, n, k), op.dtype, tile, kept)).latency_s
    return total


def _work(linears: Sequence[Op], tile: Tile) -> float:
    """Multiply-accumulates of the curves: every block row has an I x I matrix, a third left on average."""
    return sum(math.ceil(op.shape[1] / tile[0]) * op.shape[2] ** 3 / 3 for op in linears)


def linears_of(parts: Sequence[tuple[str, Op]], layers: Sequence[Layer]) -> list[Op]:
    """The dense linears of prunable layers, of the operations of a forward.

    Args:
        parts: (module name, operation), from `count_operations`.
        layers: prunable.
    """
    names = {rows.linear for layer in layers for rows, _ in input_rows(layer)}
    names |= {layer.out for layer in layers}
    return [op for name, op in parts if name in names and op.kind == "linear"]


def find_units(
    model: nn.Module, kinds: Sequence[str] | None, block: Tile, tiles: Sequence[Tile] = ()
) -> list[Units]:
    """The units of a vision transformer; with `tiles` the kind block in several sizes, named by their size.

    Args:
        model: dense.
        kinds: see `hwprune.families.Family.find_units`.
        block: tile size of the kind block, where `tiles` is empty.
        tiles: sizes to offer side by side, beside the other kinds.

    Raises:
        ValueError: see `find_units` of the family.
    """
    family = families.of(model)
    if not tiles:
        return family.find_units(model, kinds, block=block)
    whole = None if kinds is None else [kind for kind in kinds if kind != "block"]
    found = family.find_units(model, whole) if whole != [] else []
    for tile in tiles:
        found += [
            replace(unit, name=f"{unit.name}{tile[0]}x{tile[1]}")
            for unit in family.find_units(model, ["block"], block=tile)
        ]
    return found


def in_use(units: Sequence[Units], mask: Mask) -> tuple[list[Units], Mask]:
    """The units and the mask without the tiles of linears that are not cut by them.

    Of a linear offered in several tile sizes one is cut at most; a layer that loses whole units has no tiles.
    """
    whole = {unit.layer.name for unit in units if unit.kind != "block"}
    cut = {_linear(u) for u in units if u.kind == "block" and not bool(mask[u.name].all())}
    seen: set[str] = set()
    found = []
    for unit in units:
        if unit.kind == "block" and bool(mask[unit.name].all()):
            if unit.layer.name in whole or _linear(unit) in cut | seen:
                continue
            seen.add(_linear(unit))
        found.append(unit)
    return found, {unit.name: mask[unit.name] for unit in found}


def _linear(unit: Units) -> str:
    return unit.slices[0].param.removesuffix(".weight")
