"""From a mask to a model: zeroed weights to try it, smaller layers to keep it.

`masked` zeroes what a mask drops and restores it on exit. `realise_` rebuilds each cut layer smaller, in
place: stock `nn.Linear`s for heads, neurons and channels, `BlockSparseLinear` for tiles,
`ConstantBranch` where nothing is left. The structure of the result is a small JSON-able dict, from which
`reshape_` gives the same shape to a freshly built dense model before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hwprune.cost import input_rows
from hwprune.coupled import realise_coupled_, reshape_coupled_
from hwprune.layers import AttentionSizes, BlockSparseLinear, ConstantBranch, SlimAttention
from hwprune.units import (
    AnyLayer,
    AttentionLayer,
    CoupledLayer,
    Layer,
    Mask,
    MlpLayer,
    ResidualBlock,
    Units,
    check_mask,
    expand,
    full_mask,
    get_linear,
    layers_of,
)

# layer or linear name -> {"type": "attention" | "mlp" | "block" | "constant" | "units" | "removed", ...sizes}
Shape: TypeAlias = dict[str, dict[str, Any]]


@contextmanager
def masked(model: nn.Module, units: Sequence[Units], mask: Mask) -> Iterator[nn.Module]:
    """The model with everything the mask drops zeroed; weights are restored on exit, bit for bit.

    Args:
        model: a dense model, already rotated where the mask speaks of qk or vo channels.
        units: the units the mask is about.
        mask: units name -> bool grid; names left out are kept.

    Raises:
        ValueError: the mask does not fit.
    """
    saved = zero_(model, units, mask)
    try:
        yield model
    finally:
        restore_(model, saved)


@torch.no_grad()
def zero_(model: nn.Module, units: Sequence[Units], mask: Mask) -> dict[str, Tensor]:
    """Zero what the mask drops; returns the parameters as they were."""
    check_mask(units, mask)
    saved: dict[str, Tensor] = {}
    for unit in units:
        grid = mask.get(unit.name)
        if grid is None or bool(grid.all()):
            continue
        for part in unit.slices:
            parameter = model.get_parameter(part.param)
            saved.setdefault(part.param, parameter.detach().clone())
            keep = expand(grid.to(parameter.device), part, parameter.shape)
            parameter.copy_(torch.where(keep, parameter, torch.zeros_like(parameter)))
    return saved


@torch.no_grad()
def restore_(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put parameters back."""
    for name, value in saved.items():
        model.get_parameter(name).copy_(value)


def _layer_masks(units: Sequence[Units], mask: Mask) -> dict[str, dict[str, Tensor]]:
    """layer name -> {kind or linear name: grid}, only for layers something leaves."""
    found: dict[str, dict[str, Tensor]] = {}
    for unit in units:
        grid = mask.get(unit.name)
        if grid is None or bool(grid.all()):
            continue
        key = unit.slices[0].param.removesuffix(".weight") if unit.kind == "block" else unit.kind
        found.setdefault(unit.layer.name, {})[key] = grid
    return found


@torch.no_grad()
def realise_(
    model: nn.Module,
    units: Sequence[Units],
    mask: Mask,
    tiles: Mapping[str, tuple[int, int]] | None = None,
) -> Shape:
    """Make the model physically smaller, in place.

    Args:
        model: as for `masked`.
        units: the units the mask is about.
        mask: True = keep.
        tiles: linear name, as in the realised model -> (rows, columns): linears to store as tiles although
            none of theirs is dropped, because a device runs them faster so; those that are tiles are left.

    Returns:
        The shape of every rebuilt layer, for `reshape_` and for files.

    Raises:
        ValueError: the mask does not fit, or nothing is left to remove.
    """
    if any(isinstance(u.layer, CoupledLayer | ResidualBlock) for u in units):
        return realise_coupled_(model, units, mask)
    check_mask(units, mask)
    mask = {**full_mask(units), **mask}
    by_layer = _layer_masks(units, mask)
    if not by_layer and not tiles:
        raise ValueError("realise: the mask keeps everything, so there is nothing to remove")
    cut_by = {
        u.slices[0].param.removesuffix(".weight"): u.slices[0].tile
        for u in units
        if u.kind == "block" and not bool(mask[u.name].all())  # one of several sizes, at most
    }
    shape: Shape = {}
    for layer in layers_of(units):
        grids = by_layer.get(layer.name)
        if grids is None:
            continue
        structured = {k: g for k, g in grids.items() if k in ("head", "qk", "vo", "neuron")}
        if structured and len(structured) < len(grids):
            raise ValueError(f"{layer.name}: cut by blocks and by whole units at once; choose one")
        if not structured:
            for name, grid in grids.items():
                block = cut_by[name]
                assert block is not None
                linear = get_linear(model, name)
                sparse = BlockSparseLinear.from_dense(linear, grid, block)
                _replace(model, name, sparse)
                shape[name] = {"type": "block", "block": list(block), "kept": int(grid.sum())}
        elif isinstance(layer, AttentionLayer):
            shape[layer.name] = _cut_attention(model, layer, structured)
        else:
            shape[layer.name] = _cut_mlp(model, layer, structured["neuron"])
    return shape | _tile(model, tiles or {})


def _tile(model: nn.Module, tiles: Mapping[str, tuple[int, int]]) -> Shape:
    """Store linears that are still dense as tiles, every one of them kept: the same function."""
    shape: Shape = {}
    for name, tile in tiles.items():
        if isinstance(model.get_submodule(name), BlockSparseLinear):
            continue
        linear = get_linear(model, name)
        grid = -(-linear.out_features // tile[0]), -(-linear.in_features // tile[1])
        every = torch.ones(grid, dtype=torch.bool)
        _replace(model, name, BlockSparseLinear.from_dense(linear, every, tile))
        shape[name] = {"type": "block", "block": list(tile), "kept": every.numel()}
    return shape


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _constant(model: nn.Module, layer: Layer) -> dict[str, Any]:
    """Replace a layer by its output bias."""
    out = get_linear(model, layer.out)
    kind = ConstantBranch
    if isinstance(layer, AttentionLayer):
        kind = (layer.slim or SlimAttention).empty
    branch = kind(out.out_features, out.bias).requires_grad_(out.weight.requires_grad)
    _replace(model, layer.name, branch.to(out.weight.device, out.weight.dtype))
    return {"type": "constant", "features": out.out_features}


def _small_linear(source: nn.Linear, rows: Tensor | None, cols: Tensor | None) -> nn.Linear:
    """A linear that keeps some rows and columns of another."""
    weight: Tensor = source.weight.detach()
    bias: Tensor | None = source.bias
    if rows is not None:
        weight = weight[rows]
        bias = bias[rows] if bias is not None else None
    if cols is not None:
        weight = weight[:, cols]
    small = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype
    )
    small.weight = nn.Parameter(weight.clone(), requires_grad=source.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.detach().clone(), requires_grad=source.weight.requires_grad)
    return small


def _cut_mlp(model: nn.Module, layer: Layer, keep: Tensor) -> dict[str, Any]:
    assert isinstance(layer, MlpLayer)
    kept = keep.nonzero()[:, 0]
    if len(kept) == 0:
        return _constant(model, layer)
    rows_of: dict[str, list[Tensor]] = {}
    for rows, _ in input_rows(layer):
        rows_of.setdefault(rows.linear, []).append(kept + rows.start)
    for name, rows_kept in rows_of.items():
        _replace(model, name, _small_linear(get_linear(model, name), torch.cat(rows_kept), None))
    _replace(model, layer.out, _small_linear(get_linear(model, layer.out), None, kept))
    return {"type": "mlp", "neurons": len(kept)}


def slim_attention(
    model: nn.Module, layer: AttentionLayer, sizes: Mapping[str, Any]
) -> SlimAttention:
    """An empty `SlimAttention` of the given sizes, with everything else as in the dense layer."""
    old = model.get_submodule(layer.name)
    q, out = get_linear(model, layer.q.linear), get_linear(model, layer.out)
    v = get_linear(model, layer.v.linear)
    wanted = AttentionSizes(
        q.in_features,
        sizes["heads"],
        sizes["qk"],
        sizes["v"],
        layer.scale,
        out.out_features,
        qkv_bias=q.bias is not None or v.bias is not None,
        proj_bias=out.bias is not None,
    )
    kind: type[SlimAttention] = layer.slim or SlimAttention
    # The initial weights are overwritten: they must not cost the user draws of the global generator.
    with torch.random.fork_rng(devices=[]):
        slim = kind.like(old, wanted)
    return slim.to(out.weight.device, out.weight.dtype)


def _cut_attention(
    model: nn.Module, layer: AttentionLayer, grids: Mapping[str, Tensor]
) -> dict[str, Any]:
    every = torch.ones(layer.heads, dtype=torch.bool)
    channels = torch.ones(layer.head_dim, dtype=torch.bool)
    heads = grids.get("head", every)
    qk, v = grids.get("qk", channels), grids.get("vo", channels)
    if not bool(heads.any()) or not bool(v.any()):
        return _constant(model, layer)
    if not bool(qk.any()):
        raise ValueError(
            f"{layer.name}: no q/k channel left; keep at least one, or remove the heads"
        )
    sizes = {"heads": int(heads.sum()), "qk": int(qk.sum()), "v": int(v.sum())}
    slim = slim_attention(model, layer, sizes)
    rows_qk = (heads[:, None] & qk[None]).flatten().nonzero()[:, 0]
    rows_v = (heads[:, None] & v[None]).flatten().nonzero()[:, 0]
    weights, biases = [], []
    for rows, kept in ((layer.q, rows_qk), (layer.k, rows_qk), (layer.v, rows_v)):
        linear = get_linear(model, rows.linear)
        weights.append(linear.weight[kept + rows.start])
        bias = linear.bias[kept + rows.start] if linear.bias is not None else None
        biases.append(bias if bias is not None else linear.weight.new_zeros(len(kept)))
    slim.qkv.weight.copy_(torch.cat(weights))
    if slim.qkv.bias is not None:
        slim.qkv.bias.copy_(torch.cat(biases))
    out = get_linear(model, layer.out)
    slim.proj.weight.copy_(out.weight[:, rows_v])
    if out.bias is not None:
        slim.proj.bias.copy_(out.bias)
    for table in layer.tables:
        mine = slim.get_parameter(table.removeprefix(f"{layer.name}."))
        mine.copy_(model.get_parameter(table)[..., heads])
        mine.requires_grad_(model.get_parameter(table).requires_grad)
    slim.qkv.requires_grad_(get_linear(model, layer.q.linear).weight.requires_grad)
    slim.proj.requires_grad_(out.weight.requires_grad)
    _replace(model, layer.name, slim)
    return {"type": "attention", **sizes}


def reshape_(model: nn.Module, layers: Sequence[AnyLayer], shape: Shape) -> None:
    """Give a freshly built dense model the shape of a pruned one; weights are left for loading.

    Args:
        model: the dense architecture.
        layers: its layers, from the family's `find_layers`.
        shape: from `realise_`.

    Raises:
        ValueError: the shape names layers the model does not have, or sizes it cannot hold.
    """
    if any(isinstance(layer, CoupledLayer | ResidualBlock) for layer in layers):
        reshape_coupled_(model, layers, shape)
        return
    by_name = {
        layer.name: layer for layer in layers if isinstance(layer, AttentionLayer | MlpLayer)
    }
    # A layer before its own linears, which are those of the smaller layer.
    for name, entry in sorted(shape.items()):
        kind = entry.get("type")
        if kind == "block" and _is_linear(model, name):
            _reshape_block(model, name, entry)
        elif name not in by_name or kind not in ("attention", "mlp", "constant"):
            raise ValueError(f"{name}: the file's shape {entry!r} fits no layer of this model")
        elif kind == "constant":
            _constant(model, by_name[name])
        else:
            _reshape_layer(model, by_name[name], entry)


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _size(name: str, entry: Mapping[str, Any], key: str, limit: int) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ValueError(f"{name}: expected {key} between 1 and {limit}, got {value!r}")
    return value


def _reshape_layer(model: nn.Module, layer: Layer, entry: Mapping[str, Any]) -> None:
    if isinstance(layer, AttentionLayer):
        limits = {"heads": layer.heads, "qk": layer.head_dim, "v": layer.head_dim}
        sizes = {k: _size(layer.name, entry, k, limit) for k, limit in limits.items()}
        _replace(model, layer.name, slim_attention(model, layer, sizes))
        return
    neurons = _size(layer.name, entry, "neurons", layer.hidden)
    keep = torch.arange(layer.hidden) < neurons
    _cut_mlp(model, layer, keep)


def _reshape_block(model: nn.Module, name: str, entry: Mapping[str, Any]) -> None:
    linear = get_linear(model, name)
    block = entry.get("block")
    if not (isinstance(block, list) and len(block) == 2):
        raise ValueError(f"{name}: expected block [rows, cols], got {block!r}")
    rows = _size(name, {"rows": block[0]}, "rows", 1 << 16)
    cols = _size(name, {"cols": block[1]}, "cols", 1 << 16)
    sparse = BlockSparseLinear(
        linear.in_features, linear.out_features, (rows, cols), 0, bias=linear.bias is not None
    )
    kept = entry.get("kept")
    if not isinstance(kept, int) or not 0 <= kept <= sparse.grid[0] * sparse.grid[1]:
        raise ValueError(f"{name}: expected kept tiles within {sparse.grid}, got {kept!r}")
    sparse = BlockSparseLinear(
        linear.in_features, linear.out_features, (rows, cols), kept, bias=linear.bias is not None
    )
    _replace(model, name, sparse.to(linear.weight.device, linear.weight.dtype))
