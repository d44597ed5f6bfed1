"""Lets diffusers' own `from_pretrained` open pruned denoisers, alone and inside pipelines.

diffusers builds the dense model from its config and then fills it from the file. Between the two we give it
the pruned shape, in `from_config`; afterwards `from_pretrained` makes sure that every tensor was filled.
Models without our entry pass through untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hwprune.families.denoiser import find_layers
from hwprune.pruned_config import METHOD, PrunedConfig, pruned_entry
from hwprune.realise import reshape_
from hwprune.spec import CheckpointError

_filling: ContextVar[bool] = ContextVar("hwprune_filling", default=False)


def register() -> None:
    """Make diffusers know our config entry, and shape models by it; does nothing a second time."""
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.quantizers import auto

    if "shaped_by_hwprune" not in vars(ModelMixin):
        ModelMixin.from_config = _shaping(ModelMixin)
        ModelMixin.from_pretrained = _checking(ModelMixin.from_pretrained.__func__)
        ModelMixin.shaped_by_hwprune = True
    # Last: where the above fails, stock diffusers still says that it does not know the entry.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PrunedConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _no_quantizer


# Only diffusers decides which arguments these take, hence *args, **kwargs here and below.
def _no_quantizer(*_: Any, **__: Any) -> None:
    """What diffusers gets where it asks for a quantizer: a pruned model needs none."""


def _shaping(mixin: Any) -> Any:
    """diffusers' from_config (it stands behind ModelMixin), and then the shape the config speaks of."""

    def from_config(cls: Any, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = super(mixin, cls).from_config(config, *args, **kwargs)
        entry = pruned_entry(config if isinstance(config, Mapping) else None)
        if entry is not None:
            model = made[0] if isinstance(made, tuple) else made
            shape_(model, entry)
            if _filling.get():
                _mark(model)
        return made

    return classmethod(from_config)


def _checking(inner: Any) -> Any:
    """diffusers' from_pretrained, which leaves no tensor of a pruned model unset."""

    @functools.wraps(inner)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        token = _filling.set(True)
        try:
            made = inner(cls, *args, **kwargs)
        finally:
            _filling.reset(token)
        model = made[0] if isinstance(made, tuple) else made
        if pruned_entry(getattr(model, "config", None)) is not None:
            _check_filled(model, offloaded=kwargs.get("device_map") is not None)
        return made

    return classmethod(from_pretrained)


def shape_(model: nn.Module, entry: PrunedConfig) -> None:
    """Give a dense model the shape of an entry; weights are left unset.

    Raises:
        CheckpointError: the entry does not fit the model, naming the layer.
    """
    try:
        layers, _ = find_layers(model)
        reshape_(model, layers, entry["shape"])
    except (ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{type(model).__name__}: {error}") from error


@torch.no_grad()
def _mark(model: nn.Module) -> None:
    """Put NaN where a file shall put numbers."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            parameter.view(-1)[0] = float("nan")


def _check_filled(model: nn.Module, *, offloaded: bool) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            if offloaded:
                continue
            raise CheckpointError(f"{name} is missing from the file; save the model again")
        wide = parameter.float() if parameter.element_size() == 1 else parameter
        if parameter.is_floating_point() and not bool(torch.isfinite(wide).all()):
            raise CheckpointError(
                f"{name} is missing from the file, or holds NaN or Inf; save the model again"
            )
