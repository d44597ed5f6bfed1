"""The dense form of a pruned model: the original shapes, zeros where something was removed.

Which heads, channels and neurons were kept does not matter to the function, so the kept ones fill
the first places. Zero channels of q and k add nothing to a score, and the softmax scale is the dense
layer's; zero columns of the output projection add nothing to the output. Equal up to the order of
summation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hwprune.cost import input_rows
from hwprune.layers import BlockSparseLinear, ConstantBranch, SlimAttention
from hwprune.realise import Shape
from hwprune.route import dense_layer
from hwprune.units import AttentionLayer, Layer, MlpLayer, Rows, get_linear

State = dict[str, Tensor]


@torch.no_grad()
def dense_state(
    model: nn.Module, dense: nn.Module, layers: Sequence[Layer], shape: Shape
) -> dict[str, Tensor]:
    """The state dict that gives the dense architecture the function of a pruned model.

    Args:
        model: the pruned model.
        dense: its dense architecture; only names and shapes are read: it may be on the meta device.
        layers: the layers of `dense`, from the family's `find_layers`.
        shape: of the pruned model, from `realise_`.

    Returns:
        name -> tensor, in the names, order and shapes of `dense`, in the types and on the devices
        of `model`.

    Raises:
        ValueError: the shape does not fit, or a bias of the pruned model has no place in the dense.
    """
    by_name = {layer.name: layer for layer in layers}
    model, shape = _without_inner_tiles(model, shape)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, entry in shape.items():
        module = model.get_submodule(name)
        if isinstance(module, BlockSparseLinear):
            fresh: State = {f"{name}.weight": module.to_dense().detach()}
            if module.bias is not None:
                fresh[f"{name}.bias"] = module.bias.detach()
        elif name not in by_name:
            raise ValueError(f"{name}: the shape {entry!r} fits no layer of the dense model")
        elif isinstance(module, ConstantBranch):
            fresh = _constant(dense, by_name[name], module)
        elif isinstance(module, SlimAttention):
            fresh = _attention(dense, by_name[name], module)
            fresh |= _kept(state, dense, name, fresh)
        else:
            fresh = _mlp(model, dense, by_name[name])
            fresh |= _kept(state, dense, name, fresh)
        state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")} | fresh
    return _ordered(state, dense)


def _without_inner_tiles(model: nn.Module, shape: Shape) -> tuple[nn.Module, Shape]:
    """The model with dense linears inside of layers cut in whole units; the model itself where it has them."""
    inner = [name for name in shape if any(name.startswith(f"{other}.") for other in shape)]
    if not inner:
        return model, shape
    model = copy.deepcopy(model)
    for name in inner:
        module = model.get_submodule(name)
        assert isinstance(module, BlockSparseLinear)
        model.set_submodule(name, dense_layer(module))
    return model, {name: entry for name, entry in shape.items() if name not in inner}


def _ordered(state: State, dense: nn.Module) -> State:
    expected = dense.state_dict()
    odd = sorted(set(expected) ^ set(state))
    if odd:
        where = "pruned" if odd[0] in state else "dense"
        raise ValueError(f"{odd[0]} of the {where} model has no counterpart in the other")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name}: expected {tuple(expected[name].shape)} in the dense form, got "
                f"{tuple(tensor.shape)}"
            )
    return {name: state[name] for name in expected}


def _kept(state: State, dense: nn.Module, name: str, fresh: State) -> State:
    """Parameters of a layer that pruning leaves alone, such as the norms of q and k."""
    names = [f"{name}.{key}" for key in dense.get_submodule(name).state_dict()]
    return {key: state[key] for key in names if key in state and key not in fresh}


def _constant(dense: nn.Module, layer: Layer, branch: ConstantBranch) -> State:
    """All zeros but the output bias."""
    fresh = {
        f"{layer.name}.{key}": branch.bias.detach().new_zeros(value.shape)
        for key, value in dense.get_submodule(layer.name).state_dict().items()
    }
    return fresh | _bias(dense, layer.out, branch.bias)


def _bias(dense: nn.Module, linear: str, bias: Tensor | None) -> State:
    """A bias under its name in the dense layer; where that has none, only zeros may be lost."""
    if bias is None:
        return {}
    if get_linear(dense, linear).bias is not None:
        return {f"{linear}.bias": bias.detach()}
    if bool(bias.any()):
        raise ValueError(
            f"{linear}: the dense layer has no bias and the pruned one is not zero there; save in "
            "format 'pruned'"
        )
    return {}


def _attention(dense: nn.Module, layer: Layer, slim: SlimAttention) -> State:
    assert isinstance(layer, AttentionLayer)
    heads, widths = slim.num_heads, (slim.qk_width, slim.qk_width, slim.v_width)
    weights = slim.qkv.weight.detach().split([heads * width for width in widths])
    bias = slim.qkv.bias
    none = (None, None, None)
    biases = none if bias is None else bias.detach().split([heads * width for width in widths])
    fresh: State = {}
    for rows, width, weight, part in zip(
        (layer.q, layer.k, layer.v), widths, weights, biases, strict=True
    ):
        linear = get_linear(dense, rows.linear)
        key = f"{rows.linear}.weight"
        fresh.setdefault(key, weight.new_zeros(linear.weight.shape))
        if linear.bias is not None:
            fresh.setdefault(f"{rows.linear}.bias", weight.new_zeros(linear.bias.shape))
        _heads(fresh[key], rows, layer)[:heads, :width] = weight.view(heads, width, -1)
        if part is None:
            continue
        if linear.bias is not None:
            slots = _heads(fresh[f"{rows.linear}.bias"], rows, layer)
            slots[:heads, :width] = part.view(heads, width)
        else:
            _bias(dense, rows.linear, part)
    out = slim.proj.weight.detach()
    wide = out.new_zeros(out.shape[0], layer.heads, layer.head_dim)
    wide[:, :heads, : slim.v_width] = out.view(out.shape[0], heads, slim.v_width)
    fresh[f"{layer.out}.weight"] = wide.flatten(1)
    for table in layer.tables:
        kept = slim.get_parameter(table.removeprefix(f"{layer.name}.")).detach()
        fresh[table] = kept.new_zeros(dense.get_parameter(table).shape)
        fresh[table][..., :heads] = kept
    return fresh | _bias(dense, layer.out, slim.proj.bias)


def _heads(tensor: Tensor, rows: Rows, layer: AttentionLayer) -> Tensor:
    """A view [heads, head_dim, ...] of one run of rows."""
    run = tensor[rows.start : rows.start + rows.count]
    return run.view(layer.heads, layer.head_dim, *run.shape[1:])


def _mlp(model: nn.Module, dense: nn.Module, layer: Layer) -> State:
    assert isinstance(layer, MlpLayer)
    out = get_linear(model, layer.out)
    neurons = out.in_features
    fresh: State = {}
    used: dict[str, int] = {}  # rows of the small linear already placed: a gated fc1 has two runs
    for rows, _ in input_rows(layer):
        small, linear = get_linear(model, rows.linear), get_linear(dense, rows.linear)
        start = used.get(rows.linear, 0)
        used[rows.linear] = start + neurons
        for key, value, place in (
            ("weight", small.weight, linear.weight),
            ("bias", small.bias, linear.bias),
        ):
            if value is None:
                continue
            name = f"{rows.linear}.{key}"
            fresh.setdefault(name, value.detach().new_zeros(place.shape))
            fresh[name][rows.start : rows.start + neurons] = value.detach()[start : start + neurons]
    wide = out.weight.detach().new_zeros(out.out_features, layer.hidden)
    wide[:, :neurons] = out.weight.detach()
    fresh[f"{layer.out}.weight"] = wide
    return fresh | _bias(dense, layer.out, out.bias)
