"""The units of a vision transformer's attention and MLP layers, whatever family found them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hwprune.units import (
    KINDS,
    AttentionLayer,
    Kind,
    Layer,
    MlpLayer,
    Rows,
    Slice,
    Units,
    get_linear,
)


def linears_of(layer: Layer) -> list[str]:
    """Names of the distinct linears of a layer, inputs before output."""
    rows = (layer.q, layer.k, layer.v) if isinstance(layer, AttentionLayer) else layer.inputs
    return list(dict.fromkeys([r.linear for r in rows] + [layer.out]))


def sorted_out(model: nn.Module, found: Iterable[Layer | str]) -> tuple[list[Layer], list[str]]:
    """What a family found, in order: layers, and the reasons for those left dense.

    Raises:
        ValueError: a linear of a layer is no `nn.Linear`.
    """
    layers: list[Layer] = []
    left: list[str] = []
    for one in found:
        if isinstance(one, str):
            left.append(one)
            continue
        for linear in linears_of(one):
            get_linear(model, linear)
        layers.append(one)
    return layers, left


def _row_slices(model: nn.Module, rows: Rows, index: Tensor) -> list[Slice]:
    """Weight and bias slices for units that own `index` [U, E] of a run of rows."""
    index = index + rows.start
    slices = [Slice(f"{rows.linear}.weight", 0, index)]
    if get_linear(model, rows.linear).bias is not None:
        slices.append(Slice(f"{rows.linear}.bias", 0, index))
    return slices


def _merge(slices: list[Slice]) -> tuple[Slice, ...]:
    """One slice for each (parameter, dim): the three parts of a fused qkv become one index."""
    merged: dict[tuple[str, int | None], list[Tensor]] = {}
    for s in slices:
        assert s.index is not None
        merged.setdefault((s.param, s.dim), []).append(s.index)
    return tuple(Slice(p, d, torch.cat(parts, 1)) for (p, d), parts in merged.items())


def _structured(model: nn.Module, layer: Layer, kind: Kind) -> Units | None:
    """Units of one structured kind in one layer; None where the kind does not apply."""
    slices: list[Slice] = []
    if isinstance(layer, MlpLayer):
        if kind != "neuron":
            return None
        index = torch.arange(layer.hidden)[:, None]
        for rows in layer.inputs:
            slices += _row_slices(model, rows, index)
        slices.append(Slice(f"{layer.out}.weight", 1, index))
        return Units(f"{layer.name}:neuron", layer, kind, (layer.hidden,), _merge(slices))
    if kind not in ("head", "qk", "vo"):
        return None
    # Row of channel c of head h inside one of q, k, v: h * head_dim + c.
    grid_HD = torch.arange(layer.heads * layer.head_dim).view(layer.heads, layer.head_dim)
    index = grid_HD if kind == "head" else grid_HD.T.contiguous()
    parts = {"head": (layer.q, layer.k, layer.v), "qk": (layer.q, layer.k), "vo": (layer.v,)}[kind]
    for rows in parts:
        slices += _row_slices(model, rows, index)
    if kind == "head":
        one_H1 = torch.arange(layer.heads)[:, None]
        slices += [Slice(t, model.get_parameter(t).dim() - 1, one_H1) for t in layer.tables]
    if kind != "qk":
        slices.append(Slice(f"{layer.out}.weight", 1, index))
    return Units(f"{layer.name}:{kind}", layer, kind, (index.shape[0],), _merge(slices))


def vision_units(
    model: nn.Module,
    found: tuple[list[Layer], list[str]],
    kinds: Sequence[str] | None = None,
    *,
    block: tuple[int, int] = (32, 32),
) -> list[Units]:
    """Everything of `kinds` that can be removed from `model`.

    Args:
        model: a dense vision transformer.
        found: from its family's `find_layers`.
        kinds: any of block, head, neuron, qk, vo. None = every structured kind the model allows
            (head, neuron, qk, vo). A kind asked for by name must be possible everywhere.
        block: (rows, cols) of a tile, for the kind block; edges may be ragged.

    Returns:
        Units in model order. `qk` and `vo` channels are those of the rotated layer
        (`hwprune.rotate`); patch embedding and classifier are left dense.

    Raises:
        ValueError: unknown kind; a kind named explicitly that a layer refuses; a model without layers.
    """
    unknown = [k for k in kinds or () if k not in KINDS]
    if unknown or (kinds is not None and not kinds):
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {list(kinds or ())}")
    layers, left = found
    if not layers:
        raise ValueError("nothing to prune: every layer is left dense: " + "; ".join(left[:4]))
    units: list[Units] = []
    for layer in layers:
        for kind in kinds if kinds is not None else ("head", "qk", "vo", "neuron"):
            if kind in layer.refused:
                if kinds is not None:
                    raise ValueError(
                        f"{layer.name}: kind {kind!r} cannot be removed exactly: {layer.refused[kind]}; "
                        f"leave {kind!r} out of kinds"
                    )
                continue
            if kind == "block":
                units += [_tiles(model, layer, name, block) for name in linears_of(layer)]
            else:
                whole = _structured(model, layer, cast(Kind, kind))
                units += [whole] if whole is not None else []
    if not units:
        reasons = left + [f"{x.name}: {why}" for x in layers for why in x.refused.values()]
        raise ValueError(
            f"no layer of {type(model).__name__} has units of the kinds "
            f"{', '.join(kinds or ('head', 'qk', 'vo', 'neuron'))}: {'; '.join(reasons[:4])}"
        )
    return units


def _tiles(model: nn.Module, layer: Layer, linear: str, block: tuple[int, int]) -> Units:
    weight = get_linear(model, linear).weight
    shape = (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    return Units(
        f"{linear}:block", layer, "block", shape, (Slice(f"{linear}.weight", None, None, block),)
    )
