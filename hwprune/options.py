"""The choices a plan has: for every layer, the structures it can take, with distortion and cost.

Attention offers heads x q/k width x v width, an MLP its neurons, a linear under blocks its tiles; a
layer that allows both structured and block pruning offers them side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hwprune.block_options import block_groups, combined, run_by_tiles, tile_of
from hwprune.cost import ModelCost, Structure, layer_macs, layer_params
from hwprune.distortion import Curve
from hwprune.option import Option, dense_option, pareto
from hwprune.units import AttentionLayer, Layer, layers_of

if TYPE_CHECKING:
    from hwprune.pricing import MemoryPricer, Pricer


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


def option_groups(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    memory: MemoryPricer | None = None,
    limited: Sequence[str] = ("macs", "params"),
) -> list[tuple[Layer, list[Option]]]:
    """The choices of the knapsack: one group a layer, or one a linear under blocks.

    A layer with both block and structured curves offers its structured options and combinations of its
    block options side by side; one or the other is taken.

    Args:
        model: dense.
        curves: units name -> curve.
        cost: from `hwprune.cost.model_cost`.
        round_to: neurons are kept in multiples of this.
        gain: kind -> factor on the curves of that kind.
        pricer: gives each option its latency and energy on a device.
        memory: gives each option its bytes.
        limited: the fields of an option that are limited; options beaten on all of them are left out.
    """
    return [
        (layer, pareto(options, limited))
        for layer, options in all_options(
            model, curves, cost, round_to=round_to, gain=gain, pricer=pricer, memory=memory
        )
    ]


def all_options(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    memory: MemoryPricer | None = None,
) -> list[tuple[Layer, list[Option]]]:
    """`option_groups` with the options that no plan needs, whatever it limits."""
    gain = gain or {}
    groups: list[tuple[Layer, list[Option]]] = []
    metrics = ["macs"]  # what a combination of tiles may have to be cheap in
    metrics += ["latency_s"] if pricer is not None else []
    metrics += ["energy_j"] if pricer is not None and pricer.dense.energy_j is not None else []
    metrics += ["weight_bytes"] if memory is not None else []
    for layer in layers_of(c.units for c in curves.values()):
        tokens = cost.tokens[layer.name]
        mine = {n: c for n, c in curves.items() if c.units.layer.name == layer.name}
        blocks = [c for c in mine.values() if c.units.kind == "block"]
        structured = {n: c for n, c in mine.items() if c.units.kind != "block"}
        every = {name: curve.units.count for name, curve in mine.items()}

        def priced(
            options: Sequence[Option], layer: Layer = layer, tokens: int = tokens
        ) -> list[Option]:
            return _priced(model, layer, options, tokens, pricer, memory)

        timed = pricer is not None
        per_linear = [
            priced(group) for group in block_groups(model, blocks, gain, tokens, timed=timed)
        ]
        if not structured:
            groups += [(layer, group) for group in per_linear]
            continue
        options: list[Option] = []
        if isinstance(layer, AttentionLayer):
            options = _attention_options(model, layer, structured, gain, tokens, round_to)
        else:
            (curve,) = structured.values()
            options = _neuron_options(model, layer, curve, gain, tokens, round_to)
        options = [replace(o, keep={**every, **o.keep}) for o in priced(options)]
        if pricer is not None and blocks:
            sizes = list(dict.fromkeys(tile_of(curve) for curve in blocks))
            options += priced(run_by_tiles(model, layer, options, tokens, pricer, sizes))
        if per_linear:
            options += combined(per_linear, dense_option(options), metrics)
        groups.append((layer, options))
    return groups


def _priced(
    model: nn.Module,
    layer: Layer,
    options: Sequence[Option],
    tokens: int,
    pricer: Pricer | None,
    memory: MemoryPricer | None,
) -> list[Option]:
    """The options with what they cost on the device and in memory; under blocks the other linears are dense."""
    found = []
    for option in options:
        if pricer is not None:
            seconds, joules = pricer.price(model, layer, option.structure, tokens)
            energy = float("inf") if joules is None else joules
            option = replace(option, latency_s=seconds, energy_j=energy)
        if memory is not None:
            weights, peak = memory.price(model, layer, option.structure, tokens)
            option = replace(option, weight_bytes=weights, peak_bytes=peak)
        found.append(option)
    return found
