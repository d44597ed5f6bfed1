"""What a layer costs under a choice of structure: true MACs and parameters.

A multiply-accumulate counts once; attention products QKᵀ and PV are counted, the classifier once an
image. The rest of the model (patch embedding, norms, head) is counted by torch's own FLOP counter on the
dense model, so totals agree with an independent count of the realised model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hwprune.units import AttentionLayer, Layer, Rows, get_linear


@dataclass(frozen=True)
class Structure:
    """What is left of one layer. Fields that do not apply are None.

    Attributes:
        heads: kept attention heads.
        qk: kept channels of q and k in each head.
        v: kept channels of v in each head.
        neurons: kept hidden neurons of an MLP.
        weights: linear name -> stored weights, for layers cut by blocks (whole tiles count).
        tiles: linear name -> (rows, cols) of its tiles, for linears that run as tiles: those of `weights`, and
            of a layer cut in whole units those that keep every tile of what is left, because a device is
            faster so. Names are those of the realised layer.
    """

    heads: int | None = None
    qk: int | None = None
    v: int | None = None
    neurons: int | None = None
    weights: Mapping[str, int] | None = None
    tiles: Mapping[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class ModelCost:
    """Fixed and dense cost of a model.

    Attributes:
        macs: dense multiply-accumulates of one image.
        params: dense parameters.
        tokens: layer name -> tokens it processes an image.
        fixed_macs: MACs of everything that is no prunable layer.
        fixed_params: parameters of the same.
    """

    macs: float
    params: int
    tokens: Mapping[str, int]
    fixed_macs: float
    fixed_params: int


def count_macs(model: nn.Module, x: Tensor) -> float:
    """True MACs of one image, by torch's FLOP counter (attention decomposed into matmuls).

    Args:
        model: any module.
        x: [B, ...]; the count is divided by B.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton where installed

    counter = FlopCounterMode(display=False)
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # The counter's hooks stumble over views of parameters (an expanded class token), even under no_grad.
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(x)
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return counter.get_total_flops() / 2 / len(x)


def dense_structure(layer: Layer) -> Structure:
    """Everything kept."""
    if isinstance(layer, AttentionLayer):
        return Structure(heads=layer.heads, qk=layer.head_dim, v=layer.head_dim)
    return Structure(neurons=layer.hidden)


def input_rows(layer: Layer) -> list[tuple[Rows, str]]:
    """The row runs of a layer's input linears with the width that scales each: qk, v or neurons."""
    if isinstance(layer, AttentionLayer):
        return [(layer.q, "qk"), (layer.k, "qk"), (layer.v, "v")]
    return [(rows, "neurons") for rows in layer.inputs]


def cut_linears(model: nn.Module, layer: Layer, keep: Structure) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linears of a layer once whole units are gone; none if it is emptied."""
    wide = _inner(keep)
    if not wide:
        return []
    sums: dict[str, int] = {}
    for rows, field in input_rows(layer):
        sums[rows.linear] = sums.get(rows.linear, 0) + _width(keep, field)
    found = [(name, rows, get_linear(model, name).in_features) for name, rows in sums.items()]
    out = layer.out
    if isinstance(layer, AttentionLayer) and not is_dense(layer, keep):
        # A cut attention has one fused projection, whatever the dense one had.
        found = [(f"{layer.name}.qkv", sum(sums.values()), found[0][2])]
        out = f"{layer.name}.proj"
    return [*found, (out, get_linear(model, layer.out).out_features, wide)]


def is_dense(layer: Layer, keep: Structure) -> bool:
    """Whether nothing is removed, however it runs."""
    return keep.weights is None and replace(keep, tiles=None) == dense_structure(layer)


def _padding(model: nn.Module, layer: Layer, keep: Structure) -> int:
    """Weights that are stored beyond those of linears which keep every tile: border tiles are whole."""
    more, tiles = 0, keep.tiles or {}
    for name, rows, columns in cut_linears(model, layer, keep) if tiles else ():
        if name in tiles:
            height, width = tiles[name]
            more += -(-rows // height) * height * (-(-columns // width) * width) - rows * columns
    return more


def layer_params(model: nn.Module, layer: Layer, keep: Structure) -> int:
    """Parameters of one layer; an emptied layer keeps its output bias."""
    out = get_linear(model, layer.out)
    bias = out.bias.numel() if out.bias is not None else 0
    names = {rows.linear for rows, _ in input_rows(layer)}
    own = {id(p) for n in (*names, layer.out) for p in get_linear(model, n).parameters()}
    module = model.get_submodule(layer.name)
    total = bias + sum(p.numel() for p in module.parameters() if id(p) not in own)  # qk-norms
    if isinstance(layer, AttentionLayer) and keep.heads is not None:
        gone = layer.heads - keep.heads
        total -= sum(model.get_parameter(t).numel() // layer.heads * gone for t in layer.tables)
    if keep.weights is not None:
        biases = [get_linear(model, n).bias for n in names]
        return total + sum(keep.weights.values()) + sum(b.numel() for b in biases if b is not None)
    wide = _inner(keep)
    if wide == 0:
        return bias if bias else out.out_features
    total += wide * out.out_features
    biased = [get_linear(model, rows.linear).bias is not None for rows, _ in input_rows(layer)]
    if isinstance(layer, AttentionLayer) and not is_dense(layer, keep):
        biased = [any(biased)] * 3  # q, k and v are one linear then
    for (rows, field), bias_too in zip(input_rows(layer), biased, strict=True):
        total += _width(keep, field) * (get_linear(model, rows.linear).in_features + bias_too)
    return total + _padding(model, layer, keep)


def layer_macs(model: nn.Module, layer: Layer, keep: Structure, tokens: int) -> float:
    """MACs of one layer for one image of `tokens` tokens."""
    products = 0
    if keep.weights is not None:
        if isinstance(layer, AttentionLayer):
            products = tokens * (layer.window or tokens) * layer.heads * 2 * layer.head_dim
        return float(products + tokens * sum(keep.weights.values()))
    wide = _inner(keep)
    if wide == 0:
        return 0.0
    if isinstance(layer, AttentionLayer):
        products = tokens * (layer.window or tokens) * (_width(keep, "qk") + _width(keep, "v"))
    macs = tokens * wide * get_linear(model, layer.out).out_features
    for rows, field in input_rows(layer):
        macs += tokens * _width(keep, field) * get_linear(model, rows.linear).in_features
    return float(products + macs + tokens * _padding(model, layer, keep))


def _width(keep: Structure, field: str) -> int:
    """Rows left of a run: heads x channels, or neurons."""
    if field == "neurons":
        assert keep.neurons is not None
        return keep.neurons
    each = keep.qk if field == "qk" else keep.v
    assert keep.heads is not None and each is not None
    return keep.heads * each


def _inner(keep: Structure) -> int:
    """Columns left of the output linear."""
    return _width(keep, "neurons" if keep.neurons is not None else "v")


def model_cost(model: nn.Module, layers: Sequence[Layer], x: Tensor) -> ModelCost:
    """Measure a dense model's fixed cost and tokens with one image.

    Args:
        model: the dense model.
        layers: its prunable layers.
        x: [1, 3, height, width], the resolution MACs are for.
    """
    tokens: dict[str, int] = {}
    handles = []
    for layer in layers:

        def watch(
            _: nn.Module,
            args: tuple[Tensor, ...],
            given: dict[str, Tensor],
            name: str = layer.name,
        ) -> None:
            x = args[0] if args else next(iter(given.values()))
            tokens[name] = x.numel() // x.shape[-1]

        module = model.get_submodule(layer.name)
        handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        macs = count_macs(model, x[:1])
    finally:
        for handle in handles:
            handle.remove()
    params = sum(p.numel() for p in model.parameters())
    dense = [(layer, dense_structure(layer)) for layer in layers]
    return ModelCost(
        macs,
        params,
        tokens,
        macs - sum(layer_macs(model, layer, s, tokens[layer.name]) for layer, s in dense),
        params - sum(layer_params(model, layer, s) for layer, s in dense),
    )
