"""What units of a denoiser cost: true MACs and parameters of one model evaluation, exact for every mask.

MACs are counted by torch's FLOP counter on the dense model, module by module, and are shared out over units:
a head has its rows, its columns and its part of the attention products (whatever the attention computes:
softmax, joint or linear), a neuron its rows and columns. All of that is linear in what is kept, so the
cost of a mask needs no second count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hwprune.coupled import weight_module
from hwprune.units import AnyLayer, Columns, CoupledLayer, Mask, ResidualBlock, Rows


@dataclass(frozen=True)
class UnitCost:
    """What goes with one unit of a layer, and with its last one.

    Attributes:
        macs: multiply-accumulates of one image that go with each unit.
        params: parameters that go with each unit.
        last_params: further parameters that go with the last unit: q/k norms of an attention.
        count: units of the layer.
        block: name of the block the layer sits in, if that can be removed; else "".
    """

    macs: float
    params: int
    last_params: int
    count: int
    block: str


@dataclass(frozen=True)
class DenoiserCost:
    """Cost of a dense denoiser and what each of its units contributes.

    Attributes:
        macs: of one image in one evaluation of the dense model.
        params: of the dense model.
        units: units name -> what a unit costs.
        blocks: units name of a block's depth -> (macs, params) of the whole block.
    """

    macs: float
    params: int
    units: Mapping[str, UnitCost]
    blocks: Mapping[str, tuple[float, int]]

    def of(self, mask: Mask) -> tuple[float, int]:
        """(MACs of one image, parameters) with a mask realised; names left out are kept whole."""
        gone = {name for name in self.blocks if name in mask and not bool(mask[name].any())}
        macs = self.macs - sum(self.blocks[name][0] for name in gone)
        params = self.params - sum(self.blocks[name][1] for name in gone)
        for name, unit in self.units.items():
            if name not in mask or f"{unit.block}:depth" in gone:
                continue
            removed = unit.count - int(mask[name].sum())
            macs -= removed * unit.macs
            params -= removed * unit.params
            if removed == unit.count:
                params -= unit.last_params
        return macs, params


def denoiser_cost(
    model: nn.Module, layers: Sequence[AnyLayer], call: Callable[[], object], images: int
) -> DenoiserCost:
    """Count a dense denoiser once.

    Args:
        model: the denoiser.
        layers: from its family's `find_layers`.
        call: evaluates the model once; also with everything on the meta device.
        images: how many images that call is for (guided: count the pair once).

    Raises:
        ValueError: a layer took no part in the call.
    """
    counts = module_macs(model, call, images)
    blocks = [layer for layer in layers if isinstance(layer, ResidualBlock)]
    units: dict[str, UnitCost] = {}
    for layer in layers:
        if isinstance(layer, CoupledLayer):
            block = next((b.name for b in blocks if layer.name.startswith(f"{b.name}.")), "")
            units[f"{layer.name}:{layer.kind}"] = _unit_cost(model, layer, counts, block)
    whole = {
        f"{b.name}:depth": (counts.get(b.name, 0.0), _params(model.get_submodule(b.name)))
        for b in blocks
    }
    return DenoiserCost(counts[""], _params(model), units, whole)


def module_macs(model: nn.Module, call: Callable[[], object], images: int) -> dict[str, float]:
    """MACs an image of every module that does any, by name; "" is the whole model."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton where installed

    counter = FlopCounterMode(display=False)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    root = type(model).__name__
    found = {"": counter.get_total_flops() / 2 / images}
    for name, operations in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(operations.values()) / 2 / images
    return found


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _unit_cost(
    model: nn.Module, layer: CoupledLayer, counts: Mapping[str, float], block: str
) -> UnitCost:
    runs: list[Rows | Columns] = [*layer.inputs, *layer.outputs]
    idle = next((run.linear for run in runs if not counts.get(run.linear)), None)
    if idle is not None:
        raise ValueError(
            f"{idle} took no part when the model was called, so its cost is not known; call the model with all "
            "the inputs it is used with (text, class labels)"
        )
    macs, params, inside = 0.0, 0, 0
    for run in runs:
        module = weight_module(model, run.linear)
        dim = 0 if isinstance(run, Rows) else 1
        entries = layer.width * (module.weight.numel() // module.weight.shape[dim])
        if dim == 0 and module.bias is not None:
            entries += layer.width
        macs += counts[run.linear] * layer.width / module.weight.shape[dim]
        params += entries
        if run.linear.startswith(f"{layer.name}."):
            inside += entries
    if layer.kind == "head":
        linears = {run.linear for run in runs if run.linear.startswith(f"{layer.name}.")}
        products = counts[layer.name] - sum(counts[name] for name in linears)
        macs += products / layer.count
    last = 0
    if layer.residue != "width":
        whole = _params(model.get_submodule(layer.name))
        last = whole - layer.count * inside - _residue_params(model, layer)
    return UnitCost(macs, params, last, layer.count, block)


def _residue_params(model: nn.Module, layer: CoupledLayer) -> int:
    """Parameters of what stands in an emptied module's place."""
    if layer.residue == "empty":
        return 0
    outs = [weight_module(model, run.linear) for run in layer.outputs]
    if layer.residue == "bias" and layer.kind == "neuron":
        return int(outs[0].weight.shape[0])  # `ConstantBranch` has a bias, zeros if need be
    return sum(out.bias.numel() for out in outs if out.bias is not None)
