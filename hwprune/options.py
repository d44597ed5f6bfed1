"""The choices a plan has: for every layer, the structures it can take, with distortion and cost.

Attention offers heads x q/k width x v width, an MLP its neurons, a linear under blocks its tiles; a
layer that allows both structured and block pruning offers them side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from hwprune.cost import ModelCost, Structure, dense_structure, layer_macs, layer_params
from hwprune.distortion import Curve
from hwprune.units import AttentionLayer, Layer, layers_of

if TYPE_CHECKING:
    from hwprune.pricing import Pricer


@dataclass(frozen=True)
class Option:
    """One way to leave a layer (or one linear of it, under blocks)."""

    structure: Structure
    keep: Mapping[str, int]  # units name -> kept count
    distortion: float
    macs: float
    params: float
    latency_s: float = 0.0  # of a batch, where a pricer was given
    energy_j: float = 0.0


def levels(count: int, round_to: int) -> list[int]:
    """Kept counts worth offering: multiples of `round_to`, and all. Small grids step finer."""
    step = round_to if count >= 4 * round_to else max(1, count // 8)
    return sorted({*range(0, count, step), count})


def _attention_options(
    model: nn.Module,
    layer: AttentionLayer,
    curves: Mapping[str, Curve],
    gain: Mapping[str, float],
    tokens: int,
    round_to: int,
) -> list[Option]:
    """Every (heads, qk, v) the curves allow, with per-head tails of the kept heads."""
    head, qk, vo = (curves.get(f"{layer.name}:{kind}") for kind in ("head", "qk", "vo"))
    width = layer.head_dim
    channel = min(round_to, 8)  # head channels: 8 is what tensor cores and SDPA kernels ask for
    options = []
    for heads in range(layer.heads + 1) if head is not None else [layer.heads]:
        kept = head.kept(heads) if head is not None else None
        base = float(head.distortion[layer.heads - heads]) if head is not None else 0.0
        for q_width in levels(width, channel) if qk is not None else [width]:
            for v_width in levels(width, channel) if vo is not None else [width]:
                if heads and not q_width:
                    continue
                if head is not None and vo is not None and (heads == 0) != (v_width == 0):
                    continue
                loss, keep = base * gain.get("head", 1.0), {}
                for kind, curve, count in (("qk", qk, q_width), ("vo", vo, v_width)):
                    if curve is None:
                        continue
                    keep[curve.units.name] = count if heads else width
                    if not heads:
                        continue
                    tail = curve.distortion[width - count]
                    if kept is not None and heads < layer.heads:
                        # Only the heads that stay lose channels.
                        share = torch.full((layer.heads,), 1.0 / layer.heads, dtype=torch.float64)
                        if curve.rotation is not None:
                            tails = curve.rotation.tail[:, count]
                            share = tails / tails.sum().clamp_min(1e-300)
                        tail = tail * share[kept].sum()
                    loss += float(tail) * gain.get(kind, 1.0)
                if head is not None:
                    keep[head.units.name] = heads
                structure = Structure(heads=heads, qk=q_width, v=v_width)
                options.append(
                    Option(
                        structure,
                        keep,
                        loss,
                        layer_macs(model, layer, structure, tokens),
                        layer_params(model, layer, structure),
                    )
                )
    return options


def _neuron_options(
    model: nn.Module,
    layer: Layer,
    curve: Curve,
    gain: Mapping[str, float],
    tokens: int,
    round_to: int,
) -> list[Option]:
    options = []
    for count in levels(curve.units.count, round_to):
        structure = Structure(neurons=count)
        loss = float(curve.distortion[curve.units.count - count]) * gain.get("neuron", 1.0)
        options.append(
            Option(
                structure,
                {curve.units.name: count},
                loss,
                layer_macs(model, layer, structure, tokens),
                layer_params(model, layer, structure),
            )
        )
    return options


def _block_groups(
    model: nn.Module,
    layer: Layer,
    curves: Sequence[Curve],
    gain: Mapping[str, float],
    tokens: int,
) -> list[list[Option]]:
    """One group a linear: kept tiles at up to 64 levels. Costs are per linear; products are fixed."""
    groups = []
    for curve in curves:
        part = curve.units.slices[0]
        assert part.tile is not None
        name, area = part.param.removesuffix(".weight"), part.tile[0] * part.tile[1]
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        count = curve.units.count
        options = []
        for kept in sorted({*range(0, count, max(1, count // 64)), count}):
            # Border tiles are stored whole, so the last few tiles may cost more than the dense weight.
            stored = kept * area if kept < count else linear.weight.numel()
            if stored > linear.weight.numel():
                continue
            loss = float(curve.distortion[count - kept]) * gain.get("block", 1.0)
            options.append(
                Option(
                    Structure(weights={name: stored}),
                    {curve.units.name: kept},
                    loss,
                    float(tokens * stored),
                    float(stored),
                )
            )
        groups.append(options)
    return groups


def dense_option(options: Sequence[Option]) -> Option:
    """The option that keeps everything: the dearest of those that lose nothing."""
    return max((o for o in options if o.distortion <= 0), key=lambda o: (o.macs, o.params))


def pareto(options: Sequence[Option], limited: Sequence[str] = ("macs", "params")) -> list[Option]:
    """Drop options that another beats on distortion and on all that is limited; dense stays.

    A unit that does nothing (a dead neuron) leaves the dense option beaten, but a budget that allows
    the dense model must be able to choose it.

    Args:
        options: of one layer.
        limited: the fields of an option that a budget limits.
    """
    dense = dense_option(options)
    costs = np.array([[getattr(o, name) for name in limited] for o in options])
    losses = np.array([o.distortion for o in options])
    order = np.lexsort((losses, *costs.T[::-1]))
    kept: list[int] = []
    for i in order:
        among = np.array(kept, dtype=np.int64)
        beaten = (losses[among] <= losses[i]) & (costs[among] <= costs[i]).all(1)
        if options[i] is dense or not beaten.any():
            kept.append(int(i))
    return [options[i] for i in kept]


def option_groups(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    limited: Sequence[str] = ("macs", "params"),
) -> list[tuple[Layer, list[Option]]]:
    """The choices of the knapsack: one group a layer, or one a linear under blocks.

    A layer with both block and structured curves offers its structured options and the hull of its
    block options side by side; one or the other is taken. With a pricer each option has its latency and
    energy on a device.
    """
    gain = gain or {}
    groups: list[tuple[Layer, list[Option]]] = []
    for layer in layers_of(c.units for c in curves.values()):
        tokens = cost.tokens[layer.name]
        mine = {n: c for n, c in curves.items() if c.units.layer.name == layer.name}
        blocks = [c for c in mine.values() if c.units.kind == "block"]
        structured = {n: c for n, c in mine.items() if c.units.kind != "block"}
        options: list[Option] = []
        if structured and isinstance(layer, AttentionLayer):
            options = _attention_options(model, layer, structured, gain, tokens, round_to)
        elif structured:
            (curve,) = structured.values()
            options = _neuron_options(model, layer, curve, gain, tokens, round_to)
        per_linear = _block_groups(model, layer, blocks, gain, tokens) if blocks else []
        if options and per_linear:
            dense = layer_macs(model, layer, dense_structure(layer), tokens)
            options += _hull(per_linear, layer, mine, dense, cost, model)
        for group in [options] if options else per_linear:
            if pricer is not None:
                group = _priced(model, layer, group, tokens, pricer)
            groups.append((layer, pareto(group, limited)))
    return groups


def _priced(
    model: nn.Module, layer: Layer, options: Sequence[Option], tokens: int, pricer: Pricer
) -> list[Option]:
    """The options with what they cost on the device; under blocks of one linear the linear alone."""
    found = []
    for option in options:
        seconds, joules = pricer.price(model, layer, option.structure, tokens)
        energy = float("inf") if joules is None else joules
        found.append(replace(option, latency_s=seconds, energy_j=energy))
    return found


def _hull(
    per_linear: Sequence[Sequence[Option]],
    layer: Layer,
    mine: Mapping[str, Curve],
    dense_macs: float,
    cost: ModelCost,
    model: nn.Module,
) -> list[Option]:
    """Block options of a whole layer: the lower convex hull of the sum over its linears."""
    full = {n: c.units.count for n, c in mine.items() if c.units.kind != "block"}
    slopes = {0.0}
    for group in per_linear:
        for a, b in pairwise(group):
            if b.macs > a.macs:
                slopes.add(max(0.0, (a.distortion - b.distortion) / (b.macs - a.macs)))
    linear_dense = sum(group[-1].macs for group in per_linear)
    out = []
    for slope in sorted(slopes):
        chosen = [_cheapest(group, slope) for group in per_linear]
        weights = {n: w for o in chosen for n, w in (o.structure.weights or {}).items()}
        structure = Structure(weights=weights)
        out.append(
            Option(
                structure,
                {**full, **{n: k for o in chosen for n, k in o.keep.items()}},
                sum(o.distortion for o in chosen),
                dense_macs - linear_dense + sum(o.macs for o in chosen),
                layer_params(model, layer, structure),
            )
        )
    return out


def _cheapest(group: Sequence[Option], slope: float) -> Option:
    """The option a Lagrangian with this price of a MAC picks."""
    return min(group, key=lambda option: option.distortion + slope * option.macs)
