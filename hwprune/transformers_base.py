"""transformers' vision encoders as something to save: which class it is, and its config as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hwprune.families.hf_vit import CLASSES
from hwprune.pruned_config import KEY
from hwprune.spec import CheckpointError

# Where weights, code or attention kernels come from: never taken from a file, and never written.
_SOURCES = (
    *("_name_or_path", "transformers_weights", "auto_map", "attn_implementation"),
    *("_attn_implementation", "experts_implementation", "fusion_config", "kernel_config"),
)
_LABELS = ("id2label", "label2id")
_LIMIT = 1 << 20  # of a number in a config: more pixels or channels than any model has
PREPROCESSOR = "preprocessor_config.json"


def is_transformers(model: object) -> bool:
    """Whether something is a model of transformers; looks at names, so transformers need not be there."""
    mro = type(model).__mro__
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in mro
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """What dense model it is, or was: {"library", "architecture", "tag", "model_args", "num_classes"}.

    Raises:
        ValueError: it is of a class that hwprune does not open again.
    """
    name = type(model).__name__
    if name not in CLASSES:
        raise ValueError(
            f"{name} of transformers is none hwprune opens again; expected one of {', '.join(CLASSES)}"
        )
    return {
        "library": "transformers",
        "architecture": name,
        "tag": "",
        "model_args": {},
        "num_classes": int(getattr(model, "num_labels", 0)),
    }


def written_config(model: nn.Module) -> dict[str, Any]:
    """The config as it goes to a file: that of the dense model, and the class it is of."""
    config: Any = model.config
    written: dict[str, Any] = json.loads(config.to_json_string())
    for key in (*_SOURCES, KEY):
        written.pop(key, None)
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    dtype = {"dtype": kinds.pop()} if len(kinds) == 1 else {}
    return {**written, "architectures": [type(model).__name__], **dtype}


def class_of(config: Mapping[str, Any], where: Path) -> Any:
    """The class a config names, one of ours only.

    Raises:
        CheckpointError: another, or none.
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this folder needs transformers, which is not installed: pip install 'hwprune[transformers]'"
        ) from error
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if name not in CLASSES:
        raise CheckpointError(
            f"{where}: architectures is {str(name)[:80]!r}, expected one of {', '.join(CLASSES)}"
        )
    return getattr(transformers, str(name))


def build(cls: Any, config: Mapping[str, Any], where: Path) -> nn.Module:
    """The dense model of a config, on the default device, with random weights.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    known = {k: v for k, v in config.items() if k not in (*_SOURCES, KEY)}
    try:
        model: nn.Module = cls(cls.config_class.from_dict(known))
    except Exception as error:  # whatever a constructor makes of arguments that do not fit
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{where}: {type(error).__name__}: {said}") from error
    return model


def check_config(config: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Bound what building the dense model can cost, before it is built.

    Args:
        config: as read from a file; those of its towers are looked at too.
        tensors: in the file, and as many more as pruning can have taken out.
        where: for the message.

    Raises:
        CheckpointError: naming the entry.
    """
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            check_config(value, tensors, where)
        items = value if isinstance(value, list) else [value]
        labels = len(value) if key in _LABELS and isinstance(value, dict) else 0
        numbers = [v for v in items if isinstance(v, int | float)] + [labels]
        if any(not abs(number) <= _LIMIT for number in numbers):
            raise CheckpointError(f"{where}: {key} is out of range (±{_LIMIT})")
        if "layers" in key and any(number > tensors for number in numbers):
            raise CheckpointError(f"{where}: {key}={value} for a file of {tensors} tensors")


def preprocessor(model: nn.Module) -> Path | None:
    """The file beside the weights that says how images are prepared, where they came from a folder."""
    source = getattr(getattr(model, "config", None), "name_or_path", "")
    file = Path(str(source)) / PREPROCESSOR
    return file if source and file.is_file() else None
