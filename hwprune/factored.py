"""Modulation linears of diffusion transformers as two factors: which there are, their sizes, their units.

A linear [O, I] becomes `nn.Sequential(Linear(I, K), Linear(K, O))` in its place; stock layers, so that
every loader and exporter knows them. How the factors are found is `hwprune.modulation`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hwprune.units import AnyLayer, Columns, CoupledLayer, Rows

# By class of what holds them: `linear` of the adaptive norms, the second entry of Qwen-Image's `img_mod`.
# The one shared modulation of PixArt and Sana is 0.2 to 2 % of the parameters, so it stays as it is.
_HOLDERS: dict[str, tuple[str, ...]] = {
    "AdaLayerNormZero": ("linear",),
    "AdaLayerNormZeroSingle": ("linear",),
    "AdaLayerNormContinuous": ("linear",),
    "SD35AdaLayerNormZeroX": ("linear",),
    "QwenImageTransformerBlock": ("img_mod.1", "txt_mod.1"),
}


def modulation_linears(model: nn.Module) -> list[str]:
    """Names of the modulation linears, dense or factored, in model order."""
    found = []
    for name, module in model.named_modules():
        for child in _HOLDERS.get(type(module).__name__, ()):
            full = f"{name}.{child}"
            if isinstance(model.get_submodule(full), nn.Linear) or is_factored(model, full):
                found.append(full)
    return found


def is_factored(model: nn.Module, name: str) -> bool:
    """Whether two factors stand where a linear was."""
    module = model.get_submodule(name)
    return (
        isinstance(module, nn.Sequential)
        and len(module) == 2
        and all(isinstance(part, nn.Linear) for part in module)
    )


def most_components(linear: nn.Linear) -> int:
    """As many components as are no larger than the linear: each has I + 1 + O entries."""
    rows, columns = linear.weight.shape
    own = rows * columns - (rows if linear.bias is None else 0)
    return int(own // (rows + columns + 1))


def factored_layers(model: nn.Module, layers: Sequence[AnyLayer]) -> list[AnyLayer]:
    """The factored modulation of a model; each component is a unit.

    Args:
        model: a denoiser.
        layers: its other layers, which say the stages.
    """
    found: list[AnyLayer] = []
    for name in modulation_linears(model):
        if is_factored(model, name):
            first: Any = model.get_submodule(f"{name}.0")
            kept = int(first.weight.shape[0])
            inputs = (Rows(f"{name}.0", 0, kept),)
            outputs = (Columns(f"{name}.1", 0, kept),)
            stage = _stage(name, layers)
            found.append(
                CoupledLayer(name, stage, "modulation", kept, 1, inputs, outputs, residue="width")
            )
    return found


def _stage(name: str, layers: Sequence[AnyLayer]) -> int:
    """The stage of the block a name is in; after the last one for what stands behind the blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    block = ".".join(parts[: number + 1]) + "." if number is not None else "?"
    inside = [layer.stage for layer in layers if f"{layer.name}.".startswith(block)]
    return inside[0] if inside else 1 + max((layer.stage for layer in layers), default=-1)


def put_factors_(
    model: nn.Module,
    name: str,
    first_KI: Tensor,
    first_K: Tensor,
    second_OK: Tensor,
    second_O: Tensor,
) -> None:
    """Put two linears, of the given weights and biases, in the place of one."""
    old: Any = model.get_submodule(name)
    like = old.weight
    factors = []
    for weight, bias in ((first_KI, first_K), (second_OK, second_O)):
        rows, columns = weight.shape
        linear = nn.Linear(1, 1)  # its weights are given, not drawn
        linear.in_features, linear.out_features = columns, rows
        linear.weight = nn.Parameter(weight.to(like), requires_grad=like.requires_grad)
        linear.bias = nn.Parameter(bias.to(like), requires_grad=like.requires_grad)
        factors.append(linear)
    put_(model, name, nn.Sequential(*factors).train(old.training))


def put_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def blank_factors_(model: nn.Module, name: str, kept: object) -> None:
    """Give a dense linear the shape of a factored one; its weights are left unset, for loading.

    Raises:
        ValueError: no modulation linear of that name, or a number of components it cannot have.
    """
    linear = model.get_submodule(name) if name in modulation_linears(model) else None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name}: the file's factors fit no modulation linear of this model")
    most = most_components(linear)
    if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept <= most:
        raise ValueError(f"{name}: expected kept of 0 to {most} components, got {kept!r}")
    rows, columns = linear.weight.shape
    blank = linear.weight.new_empty
    put_factors_(model, name, blank(kept, columns), blank(kept), blank(rows, kept), blank(rows))
