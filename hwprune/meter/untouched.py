"""Measuring leaves what it measures as it was: modes, gradients, buffers, random numbers; also on an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(modules: Sequence[nn.Module], device: torch.device) -> Iterator[dict[int, str]]:
    """Eval mode and no gradients inside; everything as before on exit.

    Buffers that the forward writes are put back. Of parameters there is no copy: one that is written is
    named instead.

    Args:
        modules: what will run.
        device: whose random state to keep, beside the CPU's.

    Yields:
        A dict that on exit holds, by the id of the module, a parameter that was written meanwhile.
    """
    written: dict[int, str] = {}
    modes = [(part, part.training) for module in modules for part in module.modules()]
    buffers = _versions(t for module in modules for t in module.buffers())
    saved = [tensor.detach().clone() for tensor, _ in buffers]
    owners = [(id(m), name) for m in modules for name, _ in m.named_parameters()]
    parameters = _versions(p for module in modules for p in module.parameters())
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad():
            for module in modules:
                module.eval()
            yield written
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for (tensor, version), old in zip(buffers, saved, strict=True):
                if _version(tensor) != version:
                    tensor.copy_(old)
        for (owner, name), (tensor, version) in zip(owners, parameters, strict=True):
            if _version(tensor) != version:
                written.setdefault(owner, name)


def _versions(tensors: Iterator[Tensor]) -> list[tuple[Tensor, int]]:
    return [(tensor, _version(tensor)) for tensor in tensors]


def _version(tensor: Tensor) -> int:
    """Counts in-place writes; tensors born in inference mode have no counter, and cannot be watched."""
    return 0 if tensor.is_inference() else int(tensor._version)
