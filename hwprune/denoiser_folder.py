"""The denoiser alone of a folder of diffusers: of a pipeline, of parts, or a component; pruned or dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from hwprune.denoiser_checkpoint import load_denoiser
from hwprune.families.denoiser import known_classes

_COMPONENTS = ("transformer", "unet")


def denoiser_folder(folder: Path) -> Path | None:
    """The folder of the denoiser that a folder is or holds; None where it is none of diffusers.

    Raises:
        ValueError: a pipeline without a denoiser, or with two.
    """
    held = [folder / name for name in _COMPONENTS if (folder / name / "config.json").is_file()]
    if len(held) > 1:
        raise ValueError(f"{folder} holds both a transformer and a unet; name one: {held[0]}")
    if held:
        return held[0]
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is a pipeline without {' or '.join(_COMPONENTS)}")
    return folder if _class_name(folder) is not None else None


def open_denoiser(folder: Path) -> nn.Module:
    """A denoiser with its weights, as they are stored: pruned by hwprune or not.

    Args:
        folder: from `denoiser_folder`.

    Raises:
        ValueError: diffusers has no such class.
        CheckpointError: it is damaged.
        ModuleNotFoundError: diffusers is not installed.
    """
    name = _class_name(folder)
    if name in known_classes():
        return load_denoiser(folder)
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "diffusers models need diffusers, which is not installed: pip install 'hwprune[diffusers]'"
        ) from error
    kind: Any = getattr(diffusers, str(name), None)
    if kind is None:
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} has no {name}")
    model: nn.Module = kind.from_pretrained(folder)
    return model.eval()


def _class_name(folder: Path) -> str | None:
    """The class of diffusers that a folder's config names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever opens it as something else says what is wrong with it
    name = config.get("_class_name") if isinstance(config, dict) else None
    return None if name is None else str(name)
