"""The spec of a saved model: what it was built from and the shape it was given, as plain JSON.

A spec read from a file is not trusted: every part is checked here before anything is built from it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from typing import Any

VERSION = 1
BUILDER = "hwprune_vit"  # the architecture name our folders carry in timm's registry

_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")
_LIMIT = 1 << 20  # of numbers in a file: more classes or pixels than any model has
_TILE_LIMIT = 4096  # side of a tile: a shape entry can then allocate little beyond the dense layer
_COUNTS = ("depth", "depths", "layers", "num_layers", "blocks", "num_blocks")  # loops in building
_HEADER = ("version", "base", "shape", "kinds")  # the part in every safetensors header


class CheckpointError(ValueError):
    """A folder or file that cannot be opened as a model; the message says why and what to do."""


def jsonable(value: Any, where: str) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None alone.

    Args:
        value: tuples become lists; anything else that is not JSON is refused.
        where: name of the value, for the message.

    Raises:
        ValueError: something in it cannot be written as JSON, named by its path.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} cannot be written as JSON; use None and a reason")
        return float(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{where}: expected text as keys, got {wrong[0]!r}")
        return {key: jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where}: expected a plain JSON value, got {type(value).__name__} ({str(value)[:80]})"
    )


def architecture(spec: Mapping[str, Any]) -> str:
    """The name in config.json that timm looks up: our builder's, or the base's own if nothing is cut."""
    return BUILDER if spec["shape"] else str(spec["base"]["architecture"])


def model_args(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What timm hands to that builder: the base's own arguments, and for ours what to build."""
    base = spec["base"]
    ours = {"base": base["architecture"], "shape": spec["shape"]} if spec["shape"] else {}
    return {**ours, **base["model_args"], "num_classes": base["num_classes"]}


def exported_spec(config: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a folder that timm wrote of an opened model (`timm.models.push_to_hf_hub`).

    Args:
        config: config.json whose architecture is our builder; not yet checked.

    Returns:
        A spec for `check_spec`, without the report, which timm does not keep.
    """
    args = config.get("model_args")
    args = dict(args) if isinstance(args, dict) else {}
    noted = config.get("pretrained_cfg")
    base = {
        "library": "timm",
        "architecture": args.pop("base", None),
        "tag": str(noted.get("tag") or "") if isinstance(noted, dict) else "",
        "num_classes": args.pop("num_classes", config.get("num_classes")),
    }
    shape = args.pop("shape", None)
    spec = {"version": VERSION, "shape": shape, "kinds": [], "report": {}}
    return {**spec, "base": {**base, "model_args": args}}


def header(spec: Mapping[str, Any]) -> str:
    """The spec as text for a safetensors header, without the report."""
    return json.dumps({key: spec[key] for key in _HEADER}, sort_keys=True)


def reserved_args() -> frozenset[str]:
    """Arguments of timm's factory that say where weights come from: never taken from a file."""
    import timm.models

    factory = inspect.signature(timm.models.create_model).parameters
    builder = inspect.signature(timm.models.build_model_with_cfg).parameters
    others = ("features_only", "out_indices", "feature_cls", "pruned", "device", "dtype")
    return frozenset({*factory, *builder, *others, "base", "shape", "num_classes"})


def check_arg(key: str, value: Any) -> None:
    """Refuse a model argument that is no scalar or short flat list of scalars.

    Raises:
        CheckpointError: naming the argument.
    """
    items = value if isinstance(value, list) else [value]
    if len(items) > 64:
        raise CheckpointError(f"model_args.{key}: expected at most 64 values, got {len(items)}")
    for item in items:
        if item is not None and not isinstance(item, bool | int | float | str):
            raise CheckpointError(
                f"model_args.{key}: expected numbers, text or a flat list of them, got "
                f"{type(item).__name__}"
            )
        if isinstance(item, str) and len(item) > 200:
            raise CheckpointError(f"model_args.{key}: text of {len(item)} characters, 200 allowed")
        if isinstance(item, int | float) and not abs(item) <= _LIMIT:
            raise CheckpointError(f"model_args.{key}: {item} is out of range (±{_LIMIT})")


def check_architecture(name: Any) -> None:
    """Refuse anything but the plain name of a timm architecture: no path, no hub, not our builder.

    Raises:
        CheckpointError: naming what was found.
    """
    import timm

    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BUILDER:
        raise CheckpointError(
            f"spec: expected the plain name of a timm architecture as base, got {str(name)[:80]!r}"
        )
    if not timm.is_model(name):
        raise CheckpointError(
            f"spec: timm {timm.__version__} has no architecture {name!r}; install the version of timm "
            "that report.json names"
        )


def _check_base(base: Any, stored_tensors: int) -> None:
    if not isinstance(base, dict) or base.get("library") != "timm":
        raise CheckpointError(
            "spec: expected a base of library 'timm'; this hwprune opens no other"
        )
    check_architecture(base.get("architecture"))
    if not isinstance(base.get("tag"), str):
        raise CheckpointError(f"spec: expected base.tag as text, got {base.get('tag')!r}")
    classes = base.get("num_classes")
    if not isinstance(classes, int) or isinstance(classes, bool) or not 0 <= classes <= _LIMIT:
        raise CheckpointError(f"spec: expected num_classes of 0 to {_LIMIT}, got {classes!r}")
    args = base.get("model_args")
    if not isinstance(args, dict):
        raise CheckpointError(f"spec: expected base.model_args as an object, got {args!r}")
    refused = sorted(reserved_args() & set(args))
    if refused:
        raise CheckpointError(f"spec: model_args may not hold {', '.join(refused)}")
    for key, value in args.items():
        check_arg(key, value)
        items = value if isinstance(value, list) else [value]
        count = sum(item for item in items if isinstance(item, int))
        if key in _COUNTS and count > stored_tensors:
            raise CheckpointError(f"spec: {key}={value} for a file of {stored_tensors} tensors")


def check_shape(shape: Any) -> None:
    """Refuse what is no table of layers with sizes; `reshape_` checks those against the model.

    Raises:
        CheckpointError: naming the layer.
    """
    if not isinstance(shape, dict):
        raise CheckpointError(f"spec: expected shape as an object, got {type(shape).__name__}")
    for name, entry in shape.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise CheckpointError(
                f"spec: shape of {name!r}: expected type and sizes, got {entry!r}"
            )
        for key, value in entry.items():
            sizes = value if isinstance(value, list) else [value]
            whole = all(isinstance(v, int) and 0 <= v <= _LIMIT for v in sizes)
            if key != "type" and not (whole and len(sizes) <= 2):
                raise CheckpointError(
                    f"spec: shape of {name!r}: expected {key} of 0 to {_LIMIT}, got {value!r}"
                )
        if entry["type"] == "block":
            block = entry.get("block")
            if not isinstance(block, list) or not all(1 <= side <= _TILE_LIMIT for side in block):
                raise CheckpointError(
                    f"spec: shape of {name!r}: expected tiles of 1 to {_TILE_LIMIT} a side, got "
                    f"{block!r}"
                )


def check_spec(spec: Any, stored_tensors: int = _LIMIT) -> dict[str, Any]:
    """Check a spec read from a file, or about to be written.

    Args:
        spec: the parsed JSON.
        stored_tensors: tensors in the file, which bounds how many layers it can speak of.

    Returns:
        The spec.

    Raises:
        CheckpointError: unknown version, or a part that is missing or not as expected.
    """
    if not isinstance(spec, dict):
        raise CheckpointError(f"spec: expected an object, got {type(spec).__name__}")
    version = spec.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"spec: version {str(version)[:40]} is unknown, expected {VERSION}; upgrade hwprune to open "
            "files of a newer one"
        )
    _check_base(spec.get("base"), stored_tensors)
    check_shape(spec.get("shape"))
    check_shape(spec.get("zeroed", {}))
    kinds = spec.get("kinds")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"spec: expected kinds as a list of names, got {kinds!r}")
    if not isinstance(spec.get("report"), dict):
        raise CheckpointError("spec: expected report as an object")
    return spec
