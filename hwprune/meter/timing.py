"""How long calls take: one time a call from the device's own clock, in blocks, caches warm or flushed.

On a GPU each call lies between two CUDA events; on a CPU between two reads of `perf_counter_ns`, with the
CPU time of the process beside it. A block ends with a synchronisation, so that wall and device time can be
compared: where they differ the device waited.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from hwprune.meter.rounds import Floats

L2 = Literal["hot", "cold"]
Call = Callable[[], object]

WARM_UP_S, WARM_UP_CALLS = 0.5, 20
_COMPILING_BLOCKS = 16  # then it will not end
WARM_UP_MOST_S = 10.0  # a call of minutes is not made twenty times
GAP_REL = 0.02  # wall against device time
# On a CPU the arms take turns this many times in a round, and are compared turn by turn: on a busy machine with
# two cores the ratio of two equal ViT-Tiny then scatters by 4 % a round, and by 17 % with blocks in one piece.
SLICES = 5
RAN_SHARE = 0.9  # of the wall time of a CPU's calls
LAUNCH_BOUND = 0.9  # share of the wall time the host spent handing over work
SHORTEST_S = 100e-6  # below, a CUDA event's 0.5 us or two clocks' 1 us are a part of a call
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE_BYTES = 64 << 20  # where the system does not tell: more than most have


@dataclass(frozen=True)
class Block:
    """Some calls in a row.

    Attributes:
        times_s: [calls], by the device's clock.
        wall_s: of the host, from the first call to the device's being done, flushes included.
        host_s: the part of it in which work was handed over; None on a CPU, which does the work itself.
        cpu_s: CPU time of all threads of the process in the calls.
        flushed: caches were flushed between the calls.
    """

    times_s: Floats
    wall_s: float
    host_s: float | None
    cpu_s: float
    flushed: bool = False

    @property
    def median_s(self) -> float:
        """Median call."""
        return float(np.median(self.times_s))

    @property
    def gap_rel(self) -> float:
        """Share of the wall time that lies between the calls; 0 where the flushes are there."""
        if self.flushed or self.wall_s <= 0:
            return 0.0
        return 1 - float(self.times_s.sum()) / self.wall_s

    @property
    def ran_share(self) -> float:
        """CPU time by wall time of the calls: below 1 even one thread waited. 1 where a GPU does the work."""
        return 1.0 if self.host_s is not None else self.cpu_s / float(self.times_s.sum())

    @classmethod
    def joined(cls, parts: Sequence[Block]) -> Block:
        """Several blocks of one arm as one."""
        hosts = [part.host_s for part in parts if part.host_s is not None]
        return cls(
            np.concatenate([part.times_s for part in parts]),
            sum(part.wall_s for part in parts),
            sum(hosts) if hosts else None,
            sum(part.cpu_s for part in parts),
            parts[0].flushed,
        )

    @property
    def launch_share(self) -> float:
        """Share of the wall time that the host took to hand over the work; 0 on a CPU."""
        return 0.0 if self.host_s is None or self.flushed else self.host_s / self.wall_s


class Timer(Protocol):
    """Runs calls and times each."""

    @property
    def device(self) -> torch.device:
        """Where the calls run."""

    @property
    def flush(self) -> CacheFlush | None:
        """What runs before each call, outside its time; None = caches stay warm."""

    def block(self, call: Call, calls: int) -> Block:
        """Time `calls` calls in a row."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector: it takes milliseconds of whichever call it falls into."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class CacheFlush:
    """Puts other data into the device's last-level cache, by reading and writing twice its size."""

    def __init__(self, device: torch.device) -> None:
        size, self.source = last_level_cache_bytes(device)
        self.bytes = 2 * size
        self._buffer = torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        """Flush. Added to, not filled: large fills write around the caches of a CPU."""
        self._buffer.add_(1)


def last_level_cache_bytes(device: torch.device) -> tuple[int, str]:
    """Size of the cache before memory, and who says so: "torch", "sysfs", "sysconf" or "assumed"."""
    if device.type == "cuda":
        size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        return (size, "torch") if size else (_ASSUMED_CACHE_BYTES, "assumed")
    sizes = []
    for file in _CPU_CACHES.glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1:]
        if number.isdigit() and unit in "KMG":
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    if sizes:
        return max(sizes), "sysfs"
    names = getattr(os, "sysconf_names", {})
    told = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in names else 0
    return (told, "sysconf") if told > 0 else (_ASSUMED_CACHE_BYTES, "assumed")


class CpuTimer:
    """Wall time by `perf_counter_ns`, CPU time by `process_time_ns`."""

    def __init__(
        self,
        flush: CacheFlush | None = None,
        wall_ns: Callable[[], int] = time.perf_counter_ns,
        cpu_ns: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self.device = torch.device("cpu")
        self.flush = flush
        self._wall_ns, self._cpu_ns = wall_ns, cpu_ns

    def block(self, call: Call, calls: int) -> Block:
        """Time `calls` calls in a row."""
        wall_ns, cpu_ns, flush = self._wall_ns, self._cpu_ns, self.flush
        times = np.empty(calls)
        used = 0
        start = wall_ns()
        with _no_collection():
            for i in range(calls):
                if flush is not None:
                    flush()
                cpu = cpu_ns()
                begin = wall_ns()
                call()
                times[i] = (wall_ns() - begin) / 1e9
                used += cpu_ns() - cpu
        wall_s = (wall_ns() - start) / 1e9
        return Block(times, wall_s, None, used / 1e9, flush is not None)


class CudaTimer:
    """Device time between CUDA events on the current stream."""

    def __init__(self, device: torch.device, flush: CacheFlush | None = None) -> None:
        self.device = device
        self.flush = flush

    def block(self, call: Call, calls: int) -> Block:
        """Time `calls` calls in a row; nothing waits between them."""
        with torch.cuda.device(self.device), _no_collection():
            pairs = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(calls)
            ]
            torch.cuda.synchronize(self.device)
            cpu, begin = time.process_time_ns(), time.perf_counter_ns()
            for start, end in pairs:
                if self.flush is not None:
                    self.flush()
                start.record()
                call()
                end.record()
            handed, used = time.perf_counter_ns(), time.process_time_ns()
            torch.cuda.synchronize(self.device)
            done = time.perf_counter_ns()
        times = np.asarray([start.elapsed_time(end) / 1e3 for start, end in pairs])
        flushed = self.flush is not None
        wall_s, host_s = (done - begin) / 1e9, (handed - begin) / 1e9
        return Block(times, wall_s, host_s, (used - cpu) / 1e9, flushed)


def make_timer(device: torch.device, l2: L2 = "hot") -> Timer:
    """The timer of a device.

    Args:
        device: cuda or cpu.
        l2: "cold" flushes the last-level cache before each call, outside its time.

    Raises:
        ValueError: another device, or another word.
    """
    if l2 not in ("hot", "cold"):
        raise ValueError(f"l2: expected 'hot' or 'cold', got {l2!r}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"expected a cuda or cpu device, got {device}; no timer for it is here")
    flush = CacheFlush(device) if l2 == "cold" else None
    return CudaTimer(device, flush) if device.type == "cuda" else CpuTimer(flush)


def warm_up(
    timer: Timer,
    call: Call,
    compilations: Callable[[], int],
    *,
    least_s: float = WARM_UP_S,
    least_calls: int = WARM_UP_CALLS,
    most_s: float = WARM_UP_MOST_S,
) -> tuple[float, tuple[str, ...]]:
    """Run until the calls are what they will be: 0.5 s, 20 calls, and nothing compiled in the last block.

    Args:
        timer: of the device.
        call: what will be timed.
        compilations: how many things were compiled in this process so far.
        least_s: time to spend.
        least_calls: calls to make.
        most_s: when to give up, flagged "short_warm_up"; at least two calls are made.

    Returns:
        (seconds a call, flags).
    """
    spent_s, made, calls, compiled = 0.0, 0, 1, 0
    while True:
        before = compilations()
        block = timer.block(call, calls)
        if not math.isfinite(block.wall_s) or block.wall_s <= 0:
            raise ValueError(f"the clock says that {calls} call(s) took {block.wall_s} s")
        if compilations() != before:  # that time was not the calls': begin anew
            spent_s, made, compiled = 0.0, 0, compiled + 1
            if compiled == _COMPILING_BLOCKS:
                return block.median_s, ("compiles_all_the_time",)
            continue
        spent_s, made = spent_s + block.wall_s, made + calls
        if made >= least_calls and spent_s >= least_s:
            return block.median_s, ()
        if spent_s >= most_s and made >= 2:
            return block.median_s, ("short_warm_up",)
        # About 0.1 s a block, so that the end is met closely.
        calls = max(1, min(1000, int(0.1 * calls / block.wall_s)))


def calls_per_block(call_s: float, device: torch.device, seconds_per_arm: float) -> int:
    """How many calls make a block: enough for a median, and 16 blocks within the time of an arm.

    A GPU does not get interrupted: 50 ms are enough. On a CPU other processes take the core now and then, so
    a block is 0.2 s and at least `SLICES` calls.
    """
    target_s, least = (0.05, 3) if device.type == "cuda" else (0.2, SLICES)
    wanted = max(least, math.ceil(target_s / call_s))
    return max(1, min(wanted, int(seconds_per_arm / 16 / call_s), 10_000))


def noise_rel(timer: Timer, calls: int = 200) -> float:
    """The machine's own noise: standard deviation of one fixed small matrix product, relative to its mean."""
    side = 1024 if timer.device.type == "cuda" else 192  # 0.05 ms of an H200, 0.2 ms of a core
    x = torch.ones(side, side, device=timer.device)
    out = torch.empty_like(x)

    def product() -> object:
        return torch.mm(x, x, out=out)

    timer.block(product, calls // 4)
    times_s = timer.block(product, calls).times_s
    return float(times_s.std(ddof=1) / times_s.mean())
