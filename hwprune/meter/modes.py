"""How a model is run: eager, through torch.compile, or as a CUDA graph; and what gets compiled meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hwprune.meter.inputs import Inputs
from hwprune.meter.timing import SHORTEST_S, Call

Mode = Literal["eager", "compile", "graph"]
MODES = ("eager", "compile", "graph")

RECOMPILES = 64
# A replay of 2 to 5 ms is above the noise of a launch and below what aliases with a power sensor that
# looks 25 of every 100 ms.
REPLAY_S = 3e-3


@dataclass(frozen=True, eq=False)
class Runnable:
    """A model made ready to run over and over on the same inputs.

    Attributes:
        call: runs it `per_call` times and returns the last output.
        per_call: forwards in a call.
    """

    call: Callable[[], Any]
    per_call: int = 1


def check_mode(mode: str, device: torch.device) -> None:
    """Refuse a mode that is none, or none of this device.

    Raises:
        ValueError: unknown, or a CUDA graph without CUDA.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "graph" and device.type != "cuda":
        raise ValueError(
            f"mode graph replays a CUDA graph, and the model is on {device}; use eager or compile there"
        )


def make_runnable(
    forward: Callable[..., Any], inputs: Inputs, mode: Mode, device: torch.device
) -> Runnable:
    """Prepares a forward for a mode; torch.compile compiles at the first call.

    Args:
        forward: a module or function; called with the inputs, which stay where they are in memory.
        inputs: of every call.
        mode: a checked mode.
        device: where it runs.

    Raises:
        RuntimeError: it cannot be captured as a graph.
    """
    if mode == "compile":
        forward = torch.compile(forward, dynamic=False)

    def call() -> Any:
        return forward(*inputs.args, **inputs.kwargs)

    return capture(call, device, 1) if mode == "graph" else Runnable(call)


def lengthened(
    runnable: Runnable,
    call_s: float,
    mode: Mode,
    forward: Callable[[], Any],
    device: torch.device,
    *,
    cold: bool,
) -> Runnable:
    """More forwards in a call where one is too short to time; as it is where caches are flushed between.

    Args:
        runnable: of one forward.
        call_s: its time.
        mode: a graph is captured anew with as many forwards as take 3 ms.
        forward: runs the model once on its inputs.
        device: where it runs.
        cold: whether caches are flushed before each call.
    """
    target_s = REPLAY_S if mode == "graph" else SHORTEST_S
    if cold or call_s >= target_s or call_s <= 0:
        return runnable
    count = min(1000, max(2, round(target_s / call_s)))
    if mode == "graph":
        return capture(forward, device, count)
    once = runnable.call

    def several() -> Any:
        for _ in range(count - 1):
            once()
        return once()

    return Runnable(several, count)


def capture(call: Call, device: torch.device, count: int) -> Runnable:
    """A CUDA graph of `count` forwards; its output lies in memory that each replay writes again."""
    with torch.cuda.device(device):
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(3):  # lazy initialisation and autotuning may not happen in a capture
                call()
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return Runnable(replay, count)


class CompileWatch:
    """Counts what torch.compile and Triton compile in this process, from when it is entered."""

    def __init__(self) -> None:
        self._kernels = 0

    def count(self) -> int:
        """Graphs of torch.compile since the process began, and Triton kernels since this was entered."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        graphs = dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0
        return int(graphs) + self._kernels

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count Triton's kernels inside; a hook that is there already is called too."""
        triton = sys.modules.get("triton")
        runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
        if runtime is None or not hasattr(runtime, "jit_post_compile_hook"):
            yield
            return
        before = runtime.jit_post_compile_hook

        def hook(*args: Any, **kwargs: Any) -> Any:
            self._kernels += 1
            return before(*args, **kwargs) if before is not None else None

        runtime.jit_post_compile_hook = hook
        try:
            yield
        finally:
            runtime.jit_post_compile_hook = before


@contextmanager
def limits_that_fail(mode: Mode) -> Iterator[None]:
    """Inside, torch.compile takes 64 models of one class, and one that it gives up on raises.

    Its own limit is 8, and then it runs a model eagerly without a word: the ninth ViT of a session would be
    timed uncompiled under the name compile.
    """
    if mode != "compile":
        yield
        return
    from torch._dynamo import config

    with config.patch(recompile_limit=RECOMPILES, fail_on_recompile_limit_hit=True):
        yield
