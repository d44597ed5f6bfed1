"""Lets `timm.create_model("local-dir:FOLDER", pretrained=True)` open what `hwprune.save` wrote.

timm reads config.json, finds the architecture `hwprune_vit` in its registry and calls it with the
`model_args` of the file and the arguments of the caller. Weights are read by our own strict reader, and
put in by timm's loader, so that a new number of classes or input channels is treated as timm does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hwprune import families, shards
from hwprune.checkpoint import (
    Folder,
    adopt,
    empty_model,
    read_folder,
)
from hwprune.realise import reshape_
from hwprune.spec import (
    BUILDER,
    VERSION,
    CheckpointError,
    check_architecture,
    check_shape,
    jsonable,
)
from hwprune.timm_base import lasting_args
from hwprune.verify import check_tiles, check_types


def register() -> None:
    """Put our builder into timm's registry; does nothing where it is there already."""
    from timm.models import is_model, register_model

    if not is_model(BUILDER):
        register_model(hwprune_vit)


# timm calls every architecture with the caller's own arguments, hence **model_args.
def hwprune_vit(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    *,
    base: str = "",
    shape: dict[str, dict[str, Any]] | None = None,
    features_only: bool = False,
    pretrained_model_args: dict[str, Any] | None = None,
    **model_args: Any,
) -> nn.Module:
    """A pruned vision transformer, as timm builds a model.

    Args:
        pretrained: load the weights of the folder or hub repository in `pretrained_cfg`.
        pretrained_cfg: from timm's factory, read from config.json.
        pretrained_cfg_overlay: from timm's factory.
        cache_dir: where hub files are kept.
        base: timm architecture of the dense model.
        shape: layer name -> sizes, as in the spec.
        features_only: refused; a feature pyramid is not what was pruned.
        pretrained_model_args: from timm's factory: the file's own arguments.
        model_args: of the base architecture; num_classes, in_chans and img_size may differ from the
            file's.

    Returns:
        The model, in training mode as timm builds it, with `hwprune_spec`.

    Raises:
        CheckpointError: the file asks for what no model of ours has, or its weights do not fit.
        ValueError: an option that a pruned model does not offer.
    """
    if features_only:
        raise ValueError(
            f"{BUILDER}: features_only is not offered for a pruned model; call forward_intermediates on "
            "the whole model, or save it with format='dense'"
        )
    if not base or not shape:
        raise ValueError(
            f"{BUILDER} is no architecture of its own: open a folder written by hwprune.save with "
            "timm.create_model('local-dir:FOLDER', pretrained=True)"
        )
    check_architecture(base)
    check_shape(shape)
    found = _opened(pretrained_cfg, cache_dir, base, shape) if pretrained else None
    size = None
    if found is not None:
        size = _resize(model_args, found.spec["base"]["model_args"])
    model = _build(base, pretrained_cfg, pretrained_cfg_overlay, pretrained_model_args, model_args)
    layers, _ = families.of(model).find_layers(model)
    reshape_(model, layers, shape)
    spec = _spec(model, base, shape, model_args)
    if found is not None:
        _load(model, found, model_args)
        spec = {**found.spec, "base": {**spec["base"], "tag": found.spec["base"]["tag"]}}
        if size is not None:
            _set_size(model, size)
            spec["base"]["model_args"]["img_size"] = size
    adopt(model, spec)
    return model


def _build(
    base: str,
    cfg: Any,
    overlay: dict[str, Any] | None,
    source_args: dict[str, Any] | None,
    model_args: Mapping[str, Any],
) -> nn.Module:
    """The dense base with these arguments, by timm's own entry point."""
    from timm.models import model_entrypoint

    own = {} if source_args is None else {"pretrained_model_args": source_args}
    model: nn.Module = model_entrypoint(base)(
        pretrained=False, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **own, **model_args
    )
    return model


def _opened(cfg: Any, cache_dir: str | Path | None, base: str, shape: Mapping[str, Any]) -> Folder:
    """The folder the weights are in, checked from end to end before anything is built for real."""
    source = cfg.get("source") if isinstance(cfg, Mapping) else None
    if source == "local-dir":
        folder = Path(cfg["file"])
    elif source == "hf-hub":
        folder = _download(str(cfg["hf_hub_id"]), cache_dir)
    else:
        raise ValueError(
            f"{BUILDER}: pretrained weights come with their folder: use timm.create_model("
            "'local-dir:FOLDER', pretrained=True), or 'hf-hub:OWNER/NAME'"
        )
    found = read_folder(folder)
    if (found.spec["base"]["architecture"], found.spec["shape"]) != (base, shape):
        raise CheckpointError(
            f"{folder}: asked for another base or shape than the folder holds; leave both out"
        )
    empty_model(found)
    return found


def _download(repository: str, cache_dir: str | Path | None) -> Path:
    """Fetch config and tensor files of a hub repository; returns the folder they are in."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name, _, revision = repository.partition("@")

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision or None, cache_dir=cache_dir))

    folder = fetch("config.json").parent
    try:
        fetch(shards.SINGLE)
    except EntryNotFoundError:
        for file in shards.index_files(fetch(shards.INDEX)):
            fetch(file)
    return folder


def _resize(model_args: dict[str, Any], stored: Mapping[str, Any]) -> list[int] | None:
    """Build at the stored image size; returns the one the caller wants instead, if another."""
    wanted, now = (_pair(args.get("img_size")) for args in (model_args, stored))
    if wanted is None or wanted == now:
        return None
    model_args.pop("img_size")
    if now is not None:
        model_args["img_size"] = now
    return wanted


def _pair(size: Any) -> list[int] | None:
    if size is None:
        return None
    return [size, size] if isinstance(size, int) else list(size)


def _set_size(model: nn.Module, size: list[int]) -> None:
    """Resample position embeddings to another image size, by the model's own method."""
    resize = getattr(model, "set_input_size", None)
    if resize is None:
        raise ValueError(
            f"{type(model).__name__} cannot change its image size to {size}; leave img_size out"
        )
    resize(img_size=tuple(size))


def _spec(
    model: nn.Module, base: str, shape: dict[str, dict[str, Any]], model_args: Mapping[str, Any]
) -> dict[str, Any]:
    """The spec of a model with random weights: what it is, and no report."""
    args = {}
    for key, value in lasting_args(model_args).items():
        with contextlib.suppress(ValueError):  # a class from the caller: `save` says what it cannot
            args[key] = jsonable(value, key)
    classes = int(getattr(model, "num_classes", 0))
    described = {"library": "timm", "architecture": base, "tag": "", "model_args": args}
    return {
        "version": VERSION,
        "base": {**described, "num_classes": classes},
        "shape": shape,
        "kinds": [],
        "report": {},
    }


def _load(model: nn.Module, found: Folder, model_args: Mapping[str, Any]) -> None:
    """Put a folder's weights in, by timm's loader; only the classifier may stay as built."""
    from timm.models import load_pretrained

    tensors = shards.read_tensors(found.stored)
    cfg = {k: v for k, v in vars(model)["pretrained_cfg"].items() if v is not None}
    names = cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    odd = set(model.state_dict()) ^ set(tensors)
    unplaced = sorted(name for name in odd if not name.startswith(classifiers or ("\0",)))
    if unplaced:
        raise CheckpointError(
            f"{found.path}: {unplaced[0]} is in the file or in the model, but not in both; leave out the "
            "argument that changes the architecture"
        )
    check_types(model, tensors)
    classes = found.spec["base"]["num_classes"]
    cfg |= {"state_dict": tensors, "num_classes": classes, "custom_load": False}
    for key in ("source", "file", "url", "hf_hub_id", "hf_hub_filename", "label_offset"):
        cfg.pop(key, None)
    channels = int(model_args.get("in_chans", found.cfg["input_size"][0]))
    num_classes = int(getattr(model, "num_classes", classes))
    load_pretrained(model, cfg, num_classes=num_classes, in_chans=channels, strict=True)
    check_tiles(model)
