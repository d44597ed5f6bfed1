"""The dense timm model behind a saved one: how to describe it, and how to build it again.

timm notes in `model.pretrained_cfg` the architecture, input and licence of a model, and in newer versions in
`model._model_args` the arguments it was made with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hwprune.spec import CheckpointError, check_arg, jsonable

# Where weights come from and the name: written elsewhere in config.json, and never read from a file.
_SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")
_OF_THE_TAG = ("label_", "tag", "license", "description", "origin_url", "paper_", "notes")
_OTHER_INPUTS = ("test_input_size", "min_input_size", "test_pool_size")
# Arguments that say where, or how to train: not what the model is. timm leaves out the same.
_PASSING = ("device", "dtype", "drop_rate", "drop_path_rate", "drop_block_rate")


def pretrained_cfg_of(model: nn.Module) -> dict[str, Any]:
    """What timm noted about a model's weights and input.

    Raises:
        ValueError: the model was not made by `timm.create_model`.
    """
    noted = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if noted is not None and not isinstance(noted, Mapping) and hasattr(noted, "to_dict"):
        noted = noted.to_dict()
    if not isinstance(noted, Mapping) or not noted.get("architecture"):
        raise ValueError(
            f"expected a model made by timm.create_model, got {type(model).__name__} without the "
            "architecture name timm notes in model.pretrained_cfg; create it by its timm name, so "
            "that a file can say how to build it again"
        )
    return dict(noted)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """How to build the dense model that `model` is, or was before it was pruned.

    Args:
        model: made by `timm.create_model`, or opened by hwprune.

    Returns:
        {"library": "timm", "architecture", "tag", "model_args", "num_classes"}, JSON-able.

    Raises:
        ValueError: it is no model of timm's factory, or was made with an argument that cannot be
            written to a file; the argument is named.
    """
    spec = getattr(model, "hwprune_spec", None)
    if spec is not None:
        base: dict[str, Any] = jsonable(spec["base"], "hwprune_spec.base")
        classes = getattr(model, "num_classes", base["num_classes"])
        return {**base, "num_classes": int(classes)}
    noted = pretrained_cfg_of(model)
    args = {}
    for key, value in lasting_args(_exported_args(model)).items():
        try:
            args[key] = jsonable(value, key)
            check_arg(key, args[key])
        except ValueError as error:
            raise ValueError(
                f"{noted['architecture']} was made with {key!r}, which cannot be written to a file "
                f"({error}); use a timm architecture that sets it by name"
            ) from error
    classes = getattr(model, "num_classes", None)
    return {
        "library": "timm",
        "architecture": str(noted["architecture"]),
        "tag": str(noted.get("tag") or ""),
        "model_args": args,
        "num_classes": int(noted.get("num_classes", 1000) if classes is None else classes),
    }


def _exported_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that build the model again, as timm itself exports them where it can."""
    import timm.models

    export = getattr(timm.models, "get_model_args", None)
    if export is not None:
        args = dict(export(model))
    else:  # timm before 1.0.31 does not note them: what the model still shows
        args = _shown_args(model)
    return args


def _shown_args(model: nn.Module) -> dict[str, Any]:
    """The sizes of a plain vision transformer; `save` finds out where that is not all there is."""
    patches, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", ())
    pool = getattr(model, "global_pool", None)
    args = {
        "img_size": getattr(patches, "img_size", None),
        "patch_size": getattr(patches, "patch_size", None),
        "in_chans": getattr(getattr(patches, "proj", None), "in_channels", None),
        "embed_dim": getattr(model, "embed_dim", None),
        "depth": len(blocks) or None,
        "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None)
        if blocks
        else None,
        "global_pool": pool if isinstance(pool, str) else None,
    }
    return args


def lasting_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a file keeps: without the number of classes, which the spec has beside them."""
    return {
        key: value
        for key, value in args.items()
        if value is not None
        and key not in (*_PASSING, "num_classes")
        and not key.endswith("_drop_rate")
    }


def written_cfg(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg for these weights: the input as it is now, no source, JSON-able."""
    null = ("pool_size", "first_conv", "classifier")  # timm keeps these even when empty
    cfg = {k: v for k, v in pretrained_cfg_of(model).items() if v is not None or k in null}
    base = spec["base"]
    if cfg.get("num_classes") != base["num_classes"]:
        # Not the weights timm's tag and licence are of: a new classifier at least.
        cfg = {k: v for k, v in cfg.items() if not k.startswith(_OF_THE_TAG)}
    channels, *size = cfg.get("input_size", (3, 224, 224))
    channels = base["model_args"].get("in_chans", channels)
    if cfg.get("fixed_input_size"):
        now = base["model_args"].get("img_size") or size
        size = [now, now] if isinstance(now, int) else list(now)
    if list(cfg.get("input_size", ())) != [channels, *size]:
        cfg = {k: v for k, v in cfg.items() if k not in _OTHER_INPUTS}
    cfg |= {
        "input_size": [channels, *size],
        "num_classes": base["num_classes"],
        "custom_load": False,  # a file of ours is a plain state dict
        "label_offset": None,  # and has been applied to these weights already
    }
    written = {k: v for k, v in cfg.items() if k not in _SOURCES and (v is not None or k in null)}
    return dict(jsonable(written, "pretrained_cfg"))


def read_cfg(cfg: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields timm knows of a pretrained_cfg from a file, never one that names a source.

    Raises:
        CheckpointError: it is no object, or its input size is none.
    """
    from timm.models import PretrainedCfg

    if not isinstance(cfg, dict):
        raise CheckpointError("config.json: expected pretrained_cfg as an object; save it again")
    size = cfg.get("input_size")
    three = isinstance(size, list) and len(size) == 3
    if not three or not all(isinstance(v, int) and 0 < v < 1 << 16 for v in size or ()):
        raise CheckpointError(f"config.json: expected input_size of three sizes, got {size!r}")
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(_SOURCES)
    classes = spec["base"]["num_classes"]
    return {k: v for k, v in cfg.items() if k in known} | {"num_classes": classes}


def create(spec: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
    """The dense base with timm's own initial weights.

    Args:
        spec: checked.
        cfg: from `read_cfg` or `written_cfg`.

    Raises:
        CheckpointError: timm cannot build it with these arguments.
    """
    import timm

    base = spec["base"]
    name = base["architecture"]
    args = {**base["model_args"], "num_classes": base["num_classes"]}
    cfg = {**cfg, "architecture": name}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, pretrained_cfg=cfg, **args)
    except Exception as error:  # whatever a constructor makes of arguments that do not fit
        raise CheckpointError(f"{name}: timm cannot build it with {args}: {error}") from error
    return model


def create_empty(spec: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
    """The dense base on the meta device: names and shapes without memory; raises as `create`."""
    with torch.device("meta"):
        return create(spec, cfg)
