"""The choices tiles give: each linear at up to 64 densities, in each size there is a curve for, or all of them.

A layer that may also be cut by whole units takes one or the other: for it the tiles of its linears are
combined into the few combinations that a price of the limit can pick, the lower convex hull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from hwprune.cost import Structure, cut_linears, layer_macs, layer_params
from hwprune.distortion import Curve
from hwprune.lagrange import Lagrangian
from hwprune.option import Option
from hwprune.units import Layer, get_linear

if TYPE_CHECKING:
    from hwprune.pricing import Pricer

_LEVELS = 64  # densities of one linear in one tile size
_WORTH = 0.01  # of a layer's time, that running one of its linears by tiles must save


def block_groups(
    model: nn.Module,
    curves: Sequence[Curve],
    gain: Mapping[str, float],
    tokens: int,
    *,
    timed: bool = False,
) -> list[list[Option]]:
    """One group a linear: dense, or some of its tiles in one of the sizes. Costs are of the linear alone.

    Args:
        model: dense.
        curves: of the kind block, of one layer; one a linear and tile size.
        gain: kind -> factor on the curves of that kind.
        tokens: of an image in this layer.
        timed: also offer every tile kept, which removes nothing and may be faster than dense on a device.
    """
    sizes: dict[str, list[Curve]] = {}
    for curve in curves:
        sizes.setdefault(curve.units.slices[0].param.removesuffix(".weight"), []).append(curve)
    return [_of_linear(model, name, found, gain, tokens, timed) for name, found in sizes.items()]


def _of_linear(
    model: nn.Module,
    name: str,
    curves: Sequence[Curve],
    gain: Mapping[str, float],
    tokens: int,
    timed: bool,
) -> list[Option]:
    whole = get_linear(model, name).weight.numel()
    every = {curve.units.name: curve.units.count for curve in curves}
    options = []
    for curve in curves:
        tile, count = tile_of(curve), curve.units.count
        area = tile[0] * tile[1]
        # Border tiles are stored whole: the last few cost more than the dense weight, and can only save time.
        levels = [n for n in range(0, count, max(1, count // _LEVELS)) if n * area <= whole]
        for kept in [*levels, count] if timed else levels:
            stored = kept * area
            structure = Structure(weights={name: stored}, tiles={name: tile})
            keep = {**every, curve.units.name: kept}
            loss = float(curve.distortion[count - kept]) * gain.get("block", 1.0)
            options.append(Option(structure, keep, loss, float(tokens * stored), float(stored)))
    dense = Structure(weights={name: whole}, tiles={})
    options.append(Option(dense, every, 0.0, float(tokens * whole), float(whole)))
    return options


def tile_of(curve: Curve) -> tuple[int, int]:
    """(rows, columns) of the tiles a curve is about."""
    tile = curve.units.slices[0].tile
    assert tile is not None
    return tile


def run_by_tiles(
    model: nn.Module,
    layer: Layer,
    options: Sequence[Option],
    tokens: int,
    pricer: Pricer,
    sizes: Sequence[tuple[int, int]],
) -> list[Option]:
    """Options whose linears keep every tile of what whole units leave, where a device runs them faster so.

    Args:
        model: dense.
        layer: whose options these are.
        options: in whole units, with their latency.
        tokens: of an image in this layer.
        pricer: of the device.
        sizes: of tiles.
    """
    found = []
    for option in options:
        tiles = {}
        for name, _, _ in cut_linears(model, layer, option.structure):
            times = {}
            for tile in sizes:
                alone = replace(option.structure, tiles={name: tile})
                times[tile] = pricer.price(model, layer, alone, tokens)[0]
            best = min(times, key=times.__getitem__)
            if times[best] < (1 - _WORTH) * option.latency_s:
                tiles[name] = best
        if tiles:
            structure = replace(option.structure, tiles=tiles)
            macs = layer_macs(model, layer, structure, tokens)
            params = layer_params(model, layer, structure)
            found.append(replace(option, structure=structure, macs=macs, params=float(params)))
    return found


def combined(
    per_linear: Sequence[Sequence[Option]], dense: Option, costs: Sequence[str]
) -> list[Option]:
    """Block options of a whole layer: what a price of one cost picks in each linear, for every such price.

    Args:
        per_linear: options of each linear, dense the last of each.
        dense: the layer as it is, with its costs and the keep of its whole units.
        costs: the fields of an option that may be limited.
    """
    found: dict[tuple[int, ...], None] = {}
    losses = [np.array([option.distortion for option in group]) for group in per_linear]
    for cost in costs:
        spends = [np.array([getattr(option, cost) for option in group]) for group in per_linear]
        priced = Lagrangian(losses, spends)
        found.update({tuple(priced.at(edges)): None for edges in range(len(priced.owners) + 1)})
    return [
        _together([group[i] for group, i in zip(per_linear, at, strict=True)], per_linear, dense)
        for at in found
    ]


def _together(
    chosen: Sequence[Option], per_linear: Sequence[Sequence[Option]], dense: Option
) -> Option:
    """One option of the layer from one of each linear; what they cost more or less than dense adds up."""
    weights: dict[str, int] = {}
    tiles: dict[str, tuple[int, int]] = {}
    keep = dict(dense.keep)
    for option in chosen:
        weights.update(option.structure.weights or {})
        tiles.update(option.structure.tiles or {})
        keep.update(option.keep)
    costs = {}
    for name in ("macs", "params", "latency_s", "energy_j", "weight_bytes"):
        whole = getattr(dense, name)
        more = [
            getattr(option, name) - getattr(group[-1], name)
            for option, group in zip(chosen, per_linear, strict=True)
        ]
        costs[name] = whole + sum(more) if whole < inf else inf  # no energy figures
    loss = sum(option.distortion for option in chosen)
    return replace(
        dense,
        structure=Structure(weights=weights, tiles=tiles),
        keep=keep,
        distortion=loss,
        **costs,
    )
