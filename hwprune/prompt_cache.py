"""Encoded prompts on disk: a run that is started again, or asked for another budget, encodes only one.

A file holds what the pipeline handed its denoiser for each prompt: tensors as safetensors, the rest of the
nested inputs as JSON in its header. Its name is made of the prompts and all that decides how they are encoded
but the encoders' weights: for those the first prompt is encoded afresh and compared. A batch of another
size rounds differently, so it is compared to 1 %; other encoders give something else altogether.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_VERSION = 1
_ROUNDING = 1e-2
_PLAIN = (str, bool, int, float, type(None))

Inputs = Sequence[Mapping[str, Any]]


def cache_file(folder: Path, kind: str, prompts: Sequence[str], *said: Any) -> Path:
    """Where the prompts of a kind of pipeline are kept, by all that decides them."""
    text = json.dumps([_VERSION, kind, list(prompts), *said])
    return folder / f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def read(file: Path, first: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """Inputs and empty inputs of every prompt; None = encode them.

    Args:
        file: from `cache_file`.
        first: the first prompt's inputs as its encoders give them now.

    Returns:
        None where there is no such file, where it cannot be read, or where its first prompt is another: the
        encoders have changed.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["inputs"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        inputs, empty = (_filled(said[key], tensors) for key in ("inputs", "empty"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    if not inputs or not same(inputs[0], first):
        return None
    return inputs, empty


def write(file: Path, inputs: Inputs, empty: Inputs) -> bool:
    """Keep encoded prompts, whole or not at all; False where they hold what no file can."""
    tensors: dict[str, Tensor] = {}
    try:
        said = {"inputs": _emptied(list(inputs), tensors), "empty": _emptied(list(empty), tensors)}
    except TypeError:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file(tensors, fresh, metadata={"inputs": json.dumps(said)})
    fresh.replace(file)
    return True


def same(one: Any, other: Any) -> bool:
    """Whether nested inputs are equal, fractions to 1 % of their norm."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        return bool((one.double() - other.double()).norm() <= _ROUNDING * other.double().norm())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _emptied(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The nesting with names in the place of tensors, which are collected.

    Raises:
        TypeError: something else is in it.
    """
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": {str(key): _emptied(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_emptied(item, tensors) for item in value]}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    raise TypeError(f"{type(value).__name__} fits no file")


def _filled(said: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = said.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {key: _filled(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_filled(item, tensors) for item in value]
        return tuple(items) if kind == "tuple" else items
    return value
