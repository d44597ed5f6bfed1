"""Peak memory of one forward: what its allocator handed out at most, and the weights and inputs beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hwprune.meter.estimate import Unavailable


@dataclass(frozen=True)
class Memory:
    """Bytes a forward needs.

    Attributes:
        peak_bytes: weights, inputs and activations together, at the worst moment. Of this model alone,
            whatever else is on the device.
        weight_bytes: parameters and buffers, each storage once.
        activation_bytes: the most that was handed out during the forward, workspace included.
        method: "torch.cuda.max_memory_allocated" or "torch profiler of CPU allocations".
    """

    peak_bytes: int
    weight_bytes: int
    activation_bytes: int
    method: str


def peak_memory(
    call: Callable[[], object],
    module: nn.Module | None,
    inputs: Sequence[Tensor],
    device: torch.device,
) -> Memory | Unavailable:
    """Runs a forward once more, watching allocations.

    Args:
        call: one forward, warmed up.
        module: whose weights count; None = none.
        inputs: tensors that count.
        device: where it runs.
    """
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    weight_bytes = _bytes(tensors)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device) - before
        method = "torch.cuda.max_memory_allocated"
    else:
        found = _profiled(call)
        if isinstance(found, Unavailable):
            return found
        most, method = found, "torch profiler of CPU allocations"
    return Memory(weight_bytes + _bytes(inputs) + most, weight_bytes, most, method)


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages, each once: tied weights and views share theirs."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _profiled(call: Callable[[], object]) -> int | Unavailable:
    """The most that torch's CPU allocator had handed out at once during a call."""
    quiet = "KINETO_LOG_LEVEL" in os.environ
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell stderr that there is no GPU
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kept = call()  # alive until the profiler stops: its bytes are part of the peak
    finally:
        if not quiet:
            del os.environ["KINETO_LOG_LEVEL"]
    del kept
    results = getattr(profiled.profiler, "kineto_results", None)
    if results is None:
        return Unavailable(
            f"torch {torch.__version__} keeps no list of allocations in its profiler"
        )
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
