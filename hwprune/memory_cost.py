"""Bytes of a layer and of a network under a plan: weights exactly, peak activations as an estimate.

Weights are what the realised model's state holds, tiles with their indices. The peak of activations is counted
through a pre-norm block as eager torch runs it: the residual stream before, inside and after a block, the
norm's output, and what the widest step of attention or MLP reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from hwprune.cost import Structure, cut_linears, dense_structure, input_rows
from hwprune.operations import count_operations, layer_operations, stored_tiles
from hwprune.ops import DTYPES, Op
from hwprune.units import AttentionLayer, Layer, get_linear

_INDEX_BYTES = 4


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    stored = {
        t.untyped_storage().data_ptr() or id(t): t.untyped_storage().nbytes() for t in tensors
    }
    return sum(stored.values())


def layer_weight_bytes(model: nn.Module, layer: Layer, keep: Structure) -> int:
    """Bytes of a layer's weights once it is realised.

    Args:
        model: dense.
        layer: of a family's `find_layers`.
        keep: what is left of it.

    Raises:
        ValueError: stored weights that are no whole number of tiles.
    """
    if keep.weights is None and keep.tiles:
        plain = replace(keep, tiles=None)
        size = get_linear(model, layer.out).weight.element_size()
        return layer_weight_bytes(model, layer, plain) + sum(
            _stored_bytes(rows, columns, keep.tiles[name], size) - rows * columns * size
            for name, rows, columns in cut_linears(model, layer, plain)
            if name in keep.tiles
        )
    module = model.get_submodule(layer.name)
    whole = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    if keep == dense_structure(layer):
        return whole
    size = get_linear(model, layer.out).weight.element_size()
    if keep.weights is not None:
        return whole + sum(
            _tile_bytes(get_linear(model, name), name, keep)
            - get_linear(model, name).weight.numel() * size
            for name in keep.weights
        )
    out = get_linear(model, layer.out)
    if isinstance(layer, AttentionLayer):
        assert keep.heads is not None and keep.qk is not None and keep.v is not None
        wide = keep.heads * (2 * keep.qk + keep.v)
        if not keep.heads * keep.v:
            return out.out_features * size
        inputs = [get_linear(model, rows.linear) for rows in (layer.q, layer.v)]
        values = wide * (inputs[0].in_features + any(lin.bias is not None for lin in inputs))
        values += out.out_features * (keep.heads * keep.v + (out.bias is not None))
        if keep.qk == layer.head_dim:
            norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
            values += sum(p.numel() for n in norms if n is not None for p in n.parameters())
        for table in layer.tables:
            values += model.get_parameter(table).numel() // layer.heads * keep.heads
        index = sum(b.nbytes for b in module.buffers(recurse=False)) if layer.tables else 0
        return values * size + index
    assert keep.neurons is not None
    if not keep.neurons:
        return out.out_features * size
    gone = layer.hidden - keep.neurons
    values = gone * out.out_features
    for rows, _ in input_rows(layer):
        linear = get_linear(model, rows.linear)
        values += gone * (linear.in_features + (linear.bias is not None))
    return whole - values * size


def _tile_bytes(linear: nn.Linear, name: str, keep: Structure) -> int:
    """The weight of a linear of stored tiles, or of a dense one."""
    size, tiled = linear.weight.element_size(), stored_tiles(linear, name, keep)
    if tiled is None:
        return linear.weight.numel() * size
    return _stored_bytes(linear.out_features, linear.in_features, tiled[1], size, tiled[0])


def _stored_bytes(
    outputs: int, inputs: int, tile: tuple[int, int], size: int, kept: int | None = None
) -> int:
    """A weight of so many tiles (None = all) and their indices."""
    rows = -(-outputs // tile[0])
    count = rows * -(-inputs // tile[1]) if kept is None else kept
    return count * tile[0] * tile[1] * size + _INDEX_BYTES * (count + 1 + rows + 1 + rows)


def plan_weight_bytes(
    model: nn.Module, layers: Sequence[Layer], keep: Mapping[str, Structure]
) -> int:
    """Bytes of a whole model's weights under a plan that is not realised.

    Args:
        model: dense.
        layers: its prunable layers.
        keep: layer name -> what is left of it; layers left out stay dense.
    """
    found = weight_bytes(model)
    for layer in layers:
        if layer.name in keep:
            found += layer_weight_bytes(model, layer, keep[layer.name])
            found -= layer_weight_bytes(model, layer, dense_structure(layer))
    return found


def layer_activation_bytes(ops: Sequence[Op], *, gated: bool = False) -> float:
    """The most that a layer's own tensors take at once, without the residual stream and its input.

    Args:
        ops: of one layer, as `layer_operations` or `count_operations` has them.
        gated: its MLP multiplies two halves of its input linears.
    """
    if not ops:
        return 0.0
    size = DTYPES[ops[0].dtype].itemsize
    linears = [op for op in ops if op.kind == "linear"]
    for op in ops:
        if op.kind == "attention":
            b, h, t, d, e = op.shape
            wide = -(-max(d, e) // 4) * 4
            padded = min(d, e) < wide
            projected = h * (2 * d + e)
            attending = projected + (4 * wide * h if padded else h * e) + h * e
            leaving = (0 if padded else projected) + h * e + linears[-1].shape[1]
            return float(size * b * t * max(attending, leaving))
    if not linears:
        return 0.0
    m, out, hidden = linears[-1].shape
    # The hidden neurons before and after the activation; a gated MLP has both halves, the act and the product.
    return float(size * m * max((4 if gated else 2) * hidden, hidden + out))


def layer_peak_bytes(
    model: nn.Module, layer: Layer, keep: Structure, *, images: int, tokens: int, dtype: str
) -> float:
    """What is alive at the worst moment of a layer: its own tensors, and the residual stream beside it.

    Args:
        model: dense.
        layer: of a family's `find_layers`.
        keep: what is left of it; a linear of tiles has outputs as wide as the dense one.
        images: of a batch.
        tokens: of an image in this layer.
        dtype: fp32, fp16 or bf16.
    """
    if keep.weights is not None:
        keep = dense_structure(layer)
    ops = layer_operations(model, layer, keep, images=images, tokens=tokens, dtype=dtype)
    gated = not isinstance(layer, AttentionLayer) and len(layer.inputs) > 1
    width = get_linear(model, layer.out).out_features
    stream = images * tokens * width * DTYPES[dtype].itemsize
    # Alive beside a layer: the model's input to its blocks, the block's, the norm's output; in the MLP the sum
    # after attention too.
    beside = 3 if isinstance(layer, AttentionLayer) else 4
    return beside * stream + layer_activation_bytes(ops, gated=gated)


def peaks(
    model: nn.Module, layers: Sequence[Layer], keep: Mapping[str, Structure], x: Tensor
) -> dict[str, float]:
    """The bytes alive at the worst moment of each part of a forward, by the name of the layer or module.

    Args:
        model: dense.
        layers: its prunable layers.
        keep: layer name -> what is left of it; layers left out stay dense.
        x: the batch it will run.
    """
    counted = count_operations(model, x, partly=True)
    found: dict[str, float] = {}
    for name, op in counted.parts:
        # The patch embedding reorders its weight, and transposes its output.
        if isinstance(model.get_submodule(name), nn.Conv2d):
            found[name] = op.weight_bytes + 2 * op.shape[0] * op.shape[1] * x.element_size()
    for layer in layers:
        inside = [op for name, op in counted.parts if name.startswith(f"{layer.name}.")]
        inside += [op for name, op in counted.parts if name == layer.name]
        first = next((op for op in inside if op.kind == "linear"), None)
        if first is None:
            continue  # it does not run
        found[layer.name] = layer_peak_bytes(
            model,
            layer,
            keep.get(layer.name, dense_structure(layer)),
            images=len(x),
            tokens=first.shape[0] // len(x),
            dtype=first.dtype,
        )
    return found


def activation_bytes(
    model: nn.Module, layers: Sequence[Layer], keep: Mapping[str, Structure], x: Tensor
) -> float:
    """An estimate of the peak of activations of a forward under a plan, in bytes; inputs and weights left out.

    Args:
        model: dense.
        layers: its prunable layers.
        keep: layer name -> what is left of it; layers left out stay dense.
        x: the batch it will run.
    """
    return max(peaks(model, layers, keep, x).values(), default=0.0)
