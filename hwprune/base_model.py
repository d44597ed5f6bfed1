"""The dense model behind one that is pruned: what a file says of it, whichever library it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hwprune import timm_base, transformers_base
from hwprune.transformers_checkpoint import note_entry


def describe_base(model: nn.Module) -> dict[str, Any]:
    """How to build the dense model that `model` is, or was before it was pruned.

    Returns:
        {"library", "architecture", "tag", "model_args", "num_classes"}, JSON-able.

    Raises:
        ValueError: no file could say how; says why.
    """
    if transformers_base.is_transformers(model):
        return transformers_base.describe(model)
    return timm_base.describe_base(model)


def note_spec(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Leave on a pruned model what it is, for `save` and for its library's own way to save.

    Args:
        model: realised.
        spec: version, base, shape, kinds and report.
    """
    vars(model)["hwprune_spec"] = dict(spec)
    if spec["shape"] and transformers_base.is_transformers(model):
        note_entry(model, spec)
