"""Any denoiser of diffusers we can cut exactly: picks its family by class, or says why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import nn

from hwprune.coupled import find_coupled_units
from hwprune.factored import factored_layers
from hwprune.families import dit, mmdit, qwen_image, sana, unet
from hwprune.units import AnyLayer, Units

_FAMILIES: tuple[ModuleType, ...] = (unet, dit, mmdit, sana, qwen_image)
_ACROSS_HEADS = (
    "its q/k norm (rms_norm_across_heads) runs over all heads at once, so removing one changes the "
    "others: masked and realised models would differ"
)
_REFUSED = dict.fromkeys(
    ("WanTransformer3DModel", "WanVACETransformer3DModel", "LTXVideoTransformer3DModel"),
    _ACROSS_HEADS,
)


def known_classes() -> tuple[str, ...]:
    """Names of the classes some family knows."""
    return tuple(name for family in _FAMILIES for name in family.CLASSES)


def family_of(model: nn.Module) -> ModuleType:
    """The module of `hwprune.families` that knows this class.

    Raises:
        ValueError: none does, or none can: Wan and LTX are refused with the reason.
    """
    name = type(model).__name__
    for family in _FAMILIES:
        if name in family.CLASSES:
            return family
    if name in _REFUSED:
        raise ValueError(f"{name} cannot be pruned exactly: {_REFUSED[name]}")
    raise ValueError(
        f"{name} is no denoiser hwprune can cut; expected one of {', '.join(known_classes())}"
    )


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers of a denoiser in order, and the reasons for those left dense; raises as `family_of`."""
    found: tuple[list[AnyLayer], list[str]] = family_of(model).find_layers(model)
    layers, left = found
    return [*layers, *factored_layers(model, layers)], left


def find_units(model: nn.Module, kinds: Sequence[str] | None = None) -> list[Units]:
    """Everything of `kinds` that can be removed from a denoiser.

    Args:
        model: a dense denoiser of diffusers.
        kinds: any of head, neuron, depth, and of factored models modulation; None = head and neuron.

    Raises:
        ValueError: as `family_of`; an unknown kind; nothing found.
    """
    return find_coupled_units(model, *find_layers(model), kinds)
