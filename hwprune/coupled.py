"""Heads, neurons and whole blocks of diffusion models: which entries are theirs, and cutting them out.

One description serves every family (`CoupledLayer`): runs of rows that make the units and runs of columns
that read them, in as many linears as it takes. Cutting narrows those linears in place, so that hooks and
names stay; it collects all layers first, because a fused projection (FLUX's proj_out) belongs to two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hwprune.factored import blank_factors_
from hwprune.layers import ConstantBranch
from hwprune.pruned_config import check_names_stand, note_shape
from hwprune.residues import ConstantAttention, ConstantMap
from hwprune.units import (
    AnyLayer,
    Columns,
    CoupledLayer,
    Kind,
    Mask,
    ResidualBlock,
    Rows,
    Slice,
    Units,
    check_mask,
    full_mask,
)

DIFFUSION_KINDS: tuple[Kind, ...] = ("head", "neuron", "depth", "modulation")


def weight_module(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The linear or convolution called `name`.

    Raises:
        ValueError: it is something else, e.g. quantised, or wrapped by LoRA.
    """
    module = model.get_submodule(name)
    if type(module) not in (nn.Linear, nn.Conv2d):
        raise ValueError(
            f"{name}: expected nn.Linear or nn.Conv2d, got {type(module).__name__}; prune the dense model, "
            "before quantising it, fuse or unload LoRA weights first"
        )
    return cast("nn.Linear | nn.Conv2d", module)


def _index(layer: CoupledLayer, run: Rows | Columns) -> Tensor:
    """Entries of each unit in a run: [U, width]."""
    return torch.arange(layer.count * layer.width).view(layer.count, layer.width) + run.start


def coupled_units(model: nn.Module, layer: AnyLayer) -> Units:
    """The units of a layer, or of a block: the one unit of its depth.

    Raises:
        ValueError: a linear of it is no plain one, or a run reaches outside it.
    """
    merged: dict[tuple[str, int], list[Tensor]] = {}
    if isinstance(layer, ResidualBlock):
        for name in layer.outputs:
            module = weight_module(model, name)
            every = torch.arange(module.weight.shape[0])[None]
            merged[f"{name}.weight", 0] = [every]
            if module.bias is not None:
                merged[f"{name}.bias", 0] = [every]
        slices = tuple(Slice(p, d, torch.cat(i, 1)) for (p, d), i in merged.items())
        return Units(f"{layer.name}:depth", layer, "depth", (1,), slices)
    assert isinstance(layer, CoupledLayer)
    for rows in layer.inputs:
        module = weight_module(model, rows.linear)
        _check_run(layer, rows, module.weight.shape[0])
        merged.setdefault((f"{rows.linear}.weight", 0), []).append(_index(layer, rows))
        if module.bias is not None:
            merged.setdefault((f"{rows.linear}.bias", 0), []).append(_index(layer, rows))
    for columns in layer.outputs:
        module = weight_module(model, columns.linear)
        _check_run(layer, columns, module.weight.shape[1])
        merged.setdefault((f"{columns.linear}.weight", 1), []).append(_index(layer, columns))
    slices = tuple(Slice(p, d, torch.cat(i, 1)) for (p, d), i in merged.items())
    return Units(f"{layer.name}:{layer.kind}", layer, layer.kind, (layer.count,), slices)


def _check_run(layer: CoupledLayer, run: Rows | Columns, size: int) -> None:
    if run.count != layer.count * layer.width or run.start + run.count > size:
        raise ValueError(
            f"{run.linear}: expected {layer.count} x {layer.width} entries from {run.start} for the units of "
            f"{layer.name}, got a run of {run.count} in {size}; was the model pruned or fused before?"
        )


def find_coupled_units(
    model: nn.Module,
    layers: Sequence[AnyLayer],
    left: Sequence[str],
    kinds: Sequence[str] | None = None,
) -> list[Units]:
    """The units of some kinds among a family's layers.

    Args:
        model: the dense model.
        layers: from the family's `find_layers`.
        left: reasons for what is left dense, for the message where nothing is found.
        kinds: any of head, neuron, depth, modulation; None = head and neuron.

    Raises:
        ValueError: an unknown kind, or no unit of the kinds asked for, with the reasons.
    """
    known = ", ".join(DIFFUSION_KINDS)
    unknown = [k for k in kinds or () if k not in DIFFUSION_KINDS]
    if unknown or (kinds is not None and not kinds):
        raise ValueError(
            f"kinds: expected some of {known} for a diffusion model, got {list(kinds or ())}"
        )
    chosen = tuple(kinds or ("head", "neuron"))
    units = [
        coupled_units(model, layer)
        for layer in layers
        if (layer.kind if isinstance(layer, CoupledLayer) else "depth") in chosen
    ]
    if not units:
        raise ValueError(
            f"no layer of {type(model).__name__} has units of the kinds {', '.join(chosen)}: "
            f"{'; '.join(left[:4]) or 'it has no transformer blocks'}"
        )
    return units


@torch.no_grad()
def realise_coupled_(
    model: nn.Module, units: Sequence[Units], mask: Mask
) -> dict[str, dict[str, Any]]:
    """Make a diffusion model physically smaller, in place; see `hwprune.realise.realise_`.

    Returns:
        name -> {"type": "units", "kept"} for layers, {"type": "factored", "kept"} for modulation,
        {"type": "removed"} for blocks; names as in the dense model.

    Raises:
        ValueError: the mask does not fit, or keeps everything; blocks were removed before.
    """
    check_mask(units, mask)
    check_names_stand(model)
    mask = {**full_mask(units), **mask}
    cuts: list[tuple[CoupledLayer, Tensor]] = []
    gone: list[ResidualBlock] = []
    for unit in units:
        grid = mask[unit.name].cpu()
        if bool(grid.all()) and unit.kind != "modulation":  # that is factored, whatever is kept
            continue
        if isinstance(unit.layer, ResidualBlock):
            gone.append(unit.layer)
        elif isinstance(unit.layer, CoupledLayer):
            cuts.append((unit.layer, grid))
    if not cuts and not gone:
        raise ValueError("realise: the mask keeps everything, so there is nothing to remove")
    names = [block.name for block in gone]
    cuts = [(layer, grid) for layer, grid in cuts if not _inside(layer.name, names)]
    _cut_(model, cuts)
    _remove_(model, names)
    shape: dict[str, dict[str, Any]] = {
        layer.name: {
            "type": "factored" if layer.kind == "modulation" else "units",
            "kept": int(grid.sum()),
        }
        for layer, grid in cuts
    }
    shape |= {name: {"type": "removed"} for name in names}
    note_shape(model, shape)
    return shape


def reshape_coupled_(
    model: nn.Module, layers: Iterable[AnyLayer], shape: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a freshly built dense model the shape of a pruned one; weights are left for loading.

    Raises:
        ValueError: the shape names layers the model does not have, or sizes it cannot hold.
    """
    by_name = {layer.name: layer for layer in layers}
    cuts: list[tuple[CoupledLayer, Tensor]] = []
    names: list[str] = []
    factored: list[str] = []
    for name, entry in shape.items():
        layer = by_name.get(name)
        if entry.get("type") == "removed" and isinstance(layer, ResidualBlock):
            names.append(name)
            continue
        if entry.get("type") == "factored":
            factored.append(name)
            continue
        if entry.get("type") != "units" or not isinstance(layer, CoupledLayer):
            raise ValueError(f"{name}: the file's shape {entry!r} fits no layer of this model")
        kept = entry.get("kept")
        if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept < layer.count:
            raise ValueError(
                f"{name}: expected kept of 0 to {layer.count - 1} {layer.kind}s, got {kept!r}"
            )
        cuts.append((layer, torch.arange(layer.count, device="cpu") < kept))
    cut = [*(layer.name for layer, _ in cuts), *factored]
    inside = next((name for name in cut if _inside(name, names)), None)
    if inside is not None:
        raise ValueError(f"{inside}: the file's shape cuts a layer of a block it removes")
    for name in factored:
        blank_factors_(model, name, shape[name].get("kept"))
    _cut_(model, cuts, blank=True)
    _remove_(model, names)


def _inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


@torch.no_grad()
def _cut_(
    model: nn.Module, cuts: Sequence[tuple[CoupledLayer, Tensor]], *, blank: bool = False
) -> None:
    """Narrow every linear the cuts touch, once, and replace modules with nothing left.

    `blank` leaves the narrowed weights unset: memory nobody has written to costs nothing yet.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for layer, keep in cuts:
        every = keep.repeat_interleave(layer.width)
        for inputs in layer.inputs:
            _and(rows, inputs, every, weight_module(model, inputs.linear).weight.shape[0])
        for outputs in layer.outputs:
            _and(columns, outputs, every, weight_module(model, outputs.linear).weight.shape[1])
        kept = int(keep.sum())
        for attribute, each in layer.attributes:
            _set(model, attribute, kept * each)
        if kept == 0 and layer.residue != "width":
            _replace(model, layer)
    for name in {**rows, **columns}:
        module = _found(model, name)
        if module is not None:
            _narrow_(module, rows.get(name), columns.get(name), blank)


def _and(lines: dict[str, Tensor], run: Rows | Columns, keep: Tensor, size: int) -> None:
    line = lines.setdefault(run.linear, torch.ones(size, dtype=torch.bool, device="cpu"))
    line[run.start : run.start + run.count] &= keep


def _found(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d | None:
    """The linear, or None where its module has been replaced as a whole."""
    try:
        return weight_module(model, name)
    except AttributeError:
        return None


def _narrow_(
    module: nn.Linear | nn.Conv2d, rows: Tensor | None, columns: Tensor | None, blank: bool
) -> None:
    """Keep some rows and columns of a linear, pointwise or depthwise convolution, in place."""
    weight, bias, trained = module.weight.detach(), module.bias, module.weight.requires_grad
    bias = bias.detach() if bias is not None else None
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    if blank:
        high = int(rows.sum()) if rows is not None else weight.shape[0]
        wide = int(columns.sum()) if columns is not None else weight.shape[1]
        weight = weight.new_empty((high, wide, *weight.shape[2:]))
        bias = bias.new_empty(high) if bias is not None else None
    else:
        # By indices, not by the mask: their number is known on the meta device too.
        if rows is not None:
            kept = rows.nonzero()[:, 0].to(weight.device)
            weight = weight[kept]
            bias = bias[kept] if bias is not None else None
        if columns is not None:
            weight = weight[:, columns.nonzero()[:, 0].to(weight.device)]
        weight, bias = weight.clone(), bias.clone() if bias is not None else None
    module.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=trained)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[0] if depthwise else weight.shape[1]
        module.groups = weight.shape[0] if depthwise else 1


def _replace(model: nn.Module, layer: CoupledLayer) -> None:
    """Put a module's constant in its place."""
    old = model.get_submodule(layer.name)
    outs = [weight_module(model, run.linear) for run in layer.outputs]
    new: nn.Module
    first = outs[0]
    if layer.residue == "empty":
        new = ConstantAttention(0)
    elif layer.residue == "map":
        new = ConstantMap(first.weight.shape[0], first.bias)
    elif layer.residue == "joint":
        text = outs[1] if len(outs) > 1 else None
        new = ConstantAttention(
            first.weight.shape[0],
            first.bias,
            joint=True,
            context_bias=text.bias if text is not None else None,
            context_features=text.weight.shape[0] if text is not None else 0,
        )
    elif layer.kind == "head":
        new = ConstantAttention(first.weight.shape[0], first.bias)
    else:
        bias = first.bias if first.bias is not None else first.weight.new_zeros(len(first.weight))
        new = ConstantBranch(len(first.weight), bias)
    new.train(old.training)
    new.requires_grad_(first.weight.requires_grad)
    parent, _, child = layer.name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _remove_(model: nn.Module, names: Sequence[str]) -> None:
    """Delete blocks from their lists, the last first so that the names before stay right."""
    places: dict[str, list[int]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        places.setdefault(parent, []).append(int(child))
    for parent, indices in places.items():
        blocks = model.get_submodule(parent)
        assert isinstance(blocks, nn.ModuleList)
        for index in sorted(indices, reverse=True):
            del blocks[index]


def _set(model: nn.Module, attribute: str, value: int) -> None:
    """Set a dotted attribute; a last part that is a number sets an entry of a list."""
    path, _, last = attribute.rpartition(".")
    if last.isdigit():
        owner, _, name = path.rpartition(".")
        getattr(model.get_submodule(owner), name)[int(last)] = value
    else:
        setattr(model.get_submodule(path), last, value)
