"""What all arms are given: one set of input tensors, copied, hashed, and known to vary.

Values matter: an A100 at its power cap was reported to run a GEMM of zeros 15 % faster than one of normally
distributed data, so inputs that are all alike are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of a forward, the same tensors for every arm.

    Attributes:
        args: positional.
        kwargs: by name.
        batch: images a call.
        digest: SHA-256 of every tensor's type, shape and values, 16 hex digits.
        flags: "constant_inputs" where the caller asked for those.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: int
    digest: str
    flags: tuple[str, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return tensors_in((self.args, self.kwargs))

    @contextmanager
    def guarded(self) -> Iterator[list[Tensor]]:
        """Put back what is written to the tensors inside; on exit the list holds those it was written to."""
        tensors = self.tensors()
        saved = [(tensor.clone(), tensor._version) for tensor in tensors]
        written: list[Tensor] = []
        try:
            yield written
        finally:
            for tensor, (old, version) in zip(tensors, saved, strict=True):
                if tensor._version != version:
                    written.append(tensor)
                    tensor.copy_(old)

    @contextmanager
    def varied(self) -> Iterator[bool]:
        """Other values in the same memory; put back on exit. Gives whether anything could be changed.

        Halved and mirrored along the last dimension: layer norm undoes a factor, a symmetric layer a
        mirror, hardly anything both. Whole numbers (tokens, timesteps) are only mirrored.
        """
        tensors = self.tensors()
        saved = [t.clone() for t in tensors]
        for tensor, old in zip(tensors, saved, strict=True):
            mirrored = old.flip(-1) if old.ndim else old
            tensor.copy_(mirrored * 0.5 if tensor.is_floating_point() else mirrored)
        try:
            yield not all(torch.equal(a, b) for a, b in zip(tensors, saved, strict=True))
        finally:
            for tensor, old in zip(tensors, saved, strict=True):
                tensor.copy_(old)


def prepare_inputs(
    inputs: object,
    *,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    allow_constant: bool = False,
) -> Inputs:
    """Copies of the caller's inputs, checked.

    Args:
        inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments; tensors may
            lie in lists, tuples and dicts inside.
        batch: images a call; None = the first size of the first tensor that has one.
        dtype: for floating-point tensors; None = as they are.
        allow_constant: measure tensors that are all zeros or all one value, flagged.

    Raises:
        ValueError: no tensor, no image, NaN or Inf, constant values.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        args = tuple(inputs)
    else:
        raise ValueError(
            f"inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(inputs).__name__}"
        )

    def copy(tensor: Tensor) -> Tensor:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # Expanded tensors share memory between images; a clone of their values does not.
        return tensor.detach().to(cast).contiguous().clone()

    args, kwargs = map_tensors((args, kwargs), copy)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise ValueError("inputs: expected at least one tensor, got none")
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError("inputs: a tensor on the meta device has no values; give real ones")
        if tensor.numel() == 0:
            raise ValueError(f"inputs: got an empty tensor of shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"inputs: the tensor of shape {tuple(tensor.shape)} holds NaN or Inf"
                + (f" as {dtype}" if dtype is not None else "")
            )
    constant = all(_constant(t) for t in tensors)
    if constant and not allow_constant:
        raise ValueError(
            "inputs: every tensor holds one value only, and such data runs faster and cooler than real "
            "data; give real images or torch.randn, or pass allow_constant=True"
        )
    sizes = [len(t) for t in tensors if t.ndim]
    images = batch if batch is not None else (sizes or [1])[0]
    if images < 1:
        raise ValueError(f"batch: expected at least 1 image a call, got {images}")
    flags = ("constant_inputs",) if constant else ()
    return Inputs(args, kwargs, images, digest(tensors), flags)


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.reshape(-1)[0]).all())


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    return []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of types, shapes and values, its first 16 hex digits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
