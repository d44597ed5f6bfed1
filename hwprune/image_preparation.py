"""How a model wants its images prepared, in timm's words: from timm's notes, or a transformers processor's.

Beside the weights of transformers lies `preprocessor_config.json`. Where it is missing, what transformers
does by default for that class is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from hwprune.transformers_base import is_transformers, preprocessor

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Number of a PIL filter, as processors write it, to the name timm has for it.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def preparation(model: nn.Module) -> dict[str, Any]:
    """input_size (channels, height, width), mean, std, interpolation, crop_pct and crop_mode.

    timm's data config is that of the pretrained weights; a model built with another `img_size` or
    `in_chans` takes something else, and says so in its patch embedding.

    Raises:
        ValueError: neither timm's nor transformers', or prepared in a way that timm's transforms cannot.
    """
    if is_transformers(model):
        return _of_transformers(model)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"expected a timm model, whose `pretrained_cfg` says how images are prepared, got a "
            f"{type(model).__name__}; give calibration batches of your own instead of DATA"
        )
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    patches = getattr(model, "patch_embed", None)
    height, width = getattr(patches, "img_size", None) or (height, width)
    if type(patches).__name__ == "PatchEmbed":
        channels = model.get_parameter("patch_embed.proj.weight").shape[1]
    return config | {"input_size": (int(channels), int(height), int(width))}


def assumed(model: nn.Module) -> str:
    """What to tell a user of a model of transformers without a file of its processor; else ""."""
    if not is_transformers(model) or preprocessor(model) is not None:
        return ""
    return f"no preprocessor_config.json beside the weights: images are prepared as usual for {_kind(model)}"


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _of_transformers(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    config = getattr(config, "vision_config", config)  # of two towers
    channels = int(getattr(config, "num_channels", 3))
    file = preprocessor(model)
    if file is not None:
        try:
            found = _read(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
    else:
        size = config.image_size
        size = [size, size] if isinstance(size, int) else list(size)
        found = _usual(_kind(model), size)
    return found | {"input_size": (channels, *found["input_size"])}


def _usual(kind: str, size: list[int]) -> dict[str, Any]:
    """What transformers does for a kind of model, at the size the model was built for."""
    mean, std = _HALF, _HALF  # ViT and SigLIP
    if kind.startswith("clip"):
        mean, std = _CLIP
    elif not kind.startswith(("vit", "siglip")):
        mean, std = _IMAGENET
    squash = kind.startswith(("vit", "siglip"))
    return {
        "input_size": (size[0], size[1]),
        "mean": mean,
        "std": std,
        "interpolation": "bilinear" if kind.startswith("vit") else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash" if squash else "center",
    }


def _read(said: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's config in timm's words.

    Raises:
        ValueError: it does what timm's transforms do not.
        KeyError: it does not say what is needed.
    """
    factor = said.get("rescale_factor", 1 / 255)
    if not said.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"expected pixels divided by 255, got a rescale_factor of {factor}")
    if not said.get("do_resize", True):
        raise ValueError("expected do_resize; give calibration batches of your own instead of DATA")
    crops, size = bool(said.get("do_center_crop", False)), said["size"]
    if isinstance(size, int):  # the oldest files
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if "shortest_edge" in size:
        if not crops:
            raise ValueError("expected do_center_crop beside a size of the shortest edge alone")
        wanted = said.get("crop_size", size["shortest_edge"])
        wanted = {"height": wanted, "width": wanted} if isinstance(wanted, int) else wanted
        height, width = int(wanted["height"]), int(wanted["width"])
        share, mode = min(height, width) / size["shortest_edge"], "center"
    else:
        height, width, share, mode = int(size["height"]), int(size["width"]), 1.0, "squash"
        wanted = said.get("crop_size", height) if crops else height
        cropped = wanted if isinstance(wanted, int) else int(wanted["height"])
        if cropped != height:  # resized out of shape, then cropped
            height = width = cropped
            share = cropped / int(size["height"])
    normal = bool(said.get("do_normalize", True))
    return {
        "input_size": (height, width),
        "mean": tuple(said["image_mean"]) if normal else (0.0, 0.0, 0.0),
        "std": tuple(said["image_std"]) if normal else (1.0, 1.0, 1.0),
        "interpolation": _FILTERS[said.get("resample", 2)],
        "crop_pct": share,
        "crop_mode": mode,
    }
