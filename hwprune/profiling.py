"""Measures a device into a profile: every operation once a round, in random order, round after round.

Drift of the machine then meets all operations alike. A run is cut by its minutes, not by its list: what was
not reached is not in the profile. It goes on where it was stopped: each round is kept on disk.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwprune.device import DeviceProfile, Entry, device_key, software_here
from hwprune.meter.arms import describe
from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.modes import Runnable, capture
from hwprune.meter.open import open_source
from hwprune.meter.provenance import load_average, provenance
from hwprune.meter.rounds import of_arm
from hwprune.meter.source import EnergySource
from hwprune.meter.timing import Call, Timer, make_timer, noise_rel
from hwprune.ops import Op, Pool, runnable
from hwprune.profile_power import Anchors, measure_powers, with_power
from hwprune.profile_state import State, claimed

Progress = Callable[[str, int, int], None]  # (step, done, total)
Note = Callable[[str], None]

FEWEST_ROUNDS, MOST_ROUNDS = 5, 16
_BLOCK_S = 0.015  # of calls of one operation in a round
_REPLAY_S = 2e-3  # of a CUDA graph
_TOO_LONG_S = 3.0  # an operation that would eat the time of a hundred others
_COMPILED_S = 0.2  # of a first look
_FIRST_PASS = 0.3  # share of the time for seeing each operation once
_SAVE_EVERY = 32  # operations of the first pass
_KEPT_BYTES = 31 << 20
_AMBIGUOUS_REL = 0.05
_ENERGY_SHARE = 0.4  # of the time, where there is a sensor


@dataclass
class Bench:
    """What measures: the device's own instruments, or a test's.

    Attributes:
        timer: of calls.
        clock: of the run.
        source: of energy.
        by_cpu_time: take the CPU time of calls instead of their wall time.
        capture: makes a CUDA graph of some calls; None = they are run as they are.
        make: an operation, ready to be called.
        noise: of the machine.
    """

    timer: Timer
    clock: Clock
    source: EnergySource | Unavailable
    by_cpu_time: bool = False
    capture: Callable[[Call, torch.device, int], Runnable] | None = None
    make: Callable[[Op, Pool], Callable[[], Tensor]] = runnable
    noise: Callable[[Timer], float] = noise_rel


def settle_allocator() -> None:
    """Let glibc's malloc keep memory between calls, whatever ran in this process before.

    It maps the largest blocks it has freed so far afresh at each allocation, up to 32 MiB, and each page of
    them faults: the GELU of a ViT-Tiny of batch 8 then takes 2.2 ms instead of 0.3 ms. One larger block freed
    before moves the bound.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


def make_bench(device: torch.device) -> Bench:
    """The instruments of a device."""
    settle_allocator()
    # One thread's CPU time is its latency on a machine that does nothing else, and neighbours add less to it.
    by_cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    graphs = capture if device.type == "cuda" else None
    return Bench(make_timer(device), RealClock(), open_source(device), by_cpu_time, graphs)


def measure_device(
    ops: Sequence[Op],
    device: torch.device,
    *,
    name: str,
    minutes: float,
    partial: Path | None = None,
    command: str = "",
    seed: int = 0,
    progress: Progress | None = None,
    note: Note | None = None,
    bench: Bench | None = None,
) -> DeviceProfile:
    """Measure operations within a time.

    Args:
        ops: the most useful first; those that the time does not reach are left out.
        device: cuda or cpu.
        name: of the profile.
        minutes: of measuring.
        partial: where the state of the run is kept, so that a stopped one goes on; removed at the end.
        command: how it was called, for the provenance.
        seed: of the order.
        progress: called with ("first pass" | "rounds" | "energy", done, total).
        note: called with a line for the user, about a stopped run that was found.
        bench: a test's instruments.

    Raises:
        ValueError: no operations, no time, or too little of it for any operation to have five rounds;
            another run measures into the same `partial`.
    """
    if not ops or not 0 < minutes < float("inf"):
        raise ValueError(f"expected operations and minutes > 0, got {len(ops)} and {minutes}")
    with ExitStack() as stack:
        stack.enter_context(claimed(partial))
        bench = bench or make_bench(device)
        if not isinstance(bench.source, Unavailable):
            stack.callback(bench.source.close)
        run = _Run(device, bench, partial, minutes, seed, progress)
        if note is not None and run.found:
            note(run.found)
        with torch.no_grad():
            run.first_pass(ops)
            run.rounds()
            entries = run.entries()
            if not entries:
                why = (
                    f"; the first failure: {next(iter(run.failed.values()))}" if run.failed else ""
                )
                raise ValueError(
                    f"profile: {minutes:g} minutes gave no operation {FEWEST_ROUNDS} rounds; give more with "
                    f"--minutes{why}"
                )
            anchors = measure_powers(
                entries, bench.source, device, run.ready, run.end_s, bench.clock, progress
            )
        profile = run.profile(name, with_power(entries, anchors), anchors, len(ops), command)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return profile


class _Run:
    """One run: what there is to measure, what was measured, and until when."""

    def __init__(
        self,
        device: torch.device,
        bench: Bench,
        partial: Path | None,
        minutes: float,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.device, self.bench, self.partial, self.seed = device, bench, partial, seed
        self.progress, self.pool = progress, Pool(device)
        self.about = provenance(device, bench.source)
        self.key = f"{_about_device(self.about)} {self.about['versions']}"
        self.state, self.found = State.load(partial, self.key) if partial else (State(), "")
        self.start_s = self.now_s()
        self.end_s = self.start_s + 60 * minutes
        share = 0.0 if isinstance(bench.source, Unavailable) else _ENERGY_SHARE
        self.latency_end_s = self.end_s - 60 * minutes * share
        self.noise_before = bench.noise(bench.timer)
        self.failed: dict[Op, str] = {}
        self.wanted: list[Op] = []

    def now_s(self) -> float:
        """Seconds of the run's clock."""
        return self.bench.clock.now_ns() / 1e9

    def ready(self, op: Op, target_s: float) -> Runnable:
        """An operation ready to be called over and over: a graph of about `target_s`, or itself."""
        call = self.bench.make(op, self.pool)
        call()
        if self.bench.capture is None:
            return Runnable(call)
        roughly = self.bench.timer.block(call, 3).median_s
        repeats = max(1, min(200, round(target_s / roughly)))
        return self.bench.capture(call, self.device, repeats)

    def once(self, op: Op) -> bool:
        """Time an operation; False where it fails, which is noted and ends nothing else."""
        timer = self.bench.timer
        try:
            ready = self.ready(op, _REPLAY_S)
            calls = 5
            if self.bench.capture is None:
                calls = max(1, min(50, round(_BLOCK_S / timer.block(ready.call, 1).median_s)))
            block = timer.block(ready.call, calls)
            seconds = block.cpu_s / calls if self.bench.by_cpu_time else block.median_s
            if not seconds > 0:
                raise RuntimeError(f"the clock says that {calls} call(s) took {seconds} s")
        except (
            Exception
        ) as error:  # out of memory, a kernel this device refuses: others are worth having
            self.failed[op] = describe(error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return False
        worst_s = float(np.quantile(block.times_s, 0.95))
        self.state.add(op, seconds / ready.per_call, worst_s / ready.per_call)
        return True

    def save(self) -> None:
        """Keep what there is."""
        if self.partial is not None:
            self.state.save(self.partial, self.key)

    def first_pass(self, ops: Sequence[Op]) -> None:
        """See operations once, in order, while the time for all later rounds still holds."""
        began_s, cost_s = self.now_s(), 0.0
        available_s = (self.latency_end_s - began_s) * (1 - _FIRST_PASS)
        for i, op in enumerate(dict.fromkeys(ops)):
            if op not in self.state.times_s:
                if self.now_s() - began_s > (self.latency_end_s - began_s) * _FIRST_PASS:
                    break
                start_s = self.now_s()
                seen = self.once(op)
                spent_s = self.now_s() - start_s
                # Far longer than its calls: something was compiled, which later rounds do not pay again.
                if seen and spent_s > _COMPILED_S and self.state.times_s[op][-1] < spent_s / 20:
                    start_s = self.now_s()
                    seen = self.once(op)
                    spent_s = self.now_s() - start_s
                if i % _SAVE_EVERY == _SAVE_EVERY - 1:
                    self.save()
                if not seen:
                    continue
            else:
                spent_s = _BLOCK_S + 3 * self.state.times_s[op][0]
            if spent_s > _TOO_LONG_S or (cost_s + spent_s) * FEWEST_ROUNDS > available_s:
                continue
            cost_s += spent_s
            self.wanted.append(op)
            if self.progress is not None and i % 16 == 0:
                self.progress("first pass", i + 1, len(ops))
        if self.progress is not None:
            self.progress("first pass", len(ops), len(ops))
        self.save()

    def rounds(self) -> None:
        """All wanted operations in random order, again and again; the least useful go if time is short."""
        order = random.Random(self.seed + self.state.rounds)
        state = self.state
        while state.rounds < MOST_ROUNDS and self.wanted:
            if state.rounds >= FEWEST_ROUNDS and self.now_s() > self.latency_end_s:
                break
            start_s = self.now_s()
            for i, op in enumerate(order.sample(self.wanted, len(self.wanted))):
                late = i % 16 == 0 and self.now_s() > self.latency_end_s
                if late and state.rounds >= FEWEST_ROUNDS:
                    return
                if op not in self.failed:
                    self.once(op)
            state.rounds += 1
            self.save()
            if self.progress is not None:
                self.progress("rounds", state.rounds, MOST_ROUNDS)
            needed_s = (self.now_s() - start_s) * (FEWEST_ROUNDS - state.rounds)
            left_s = max(0.0, self.latency_end_s - self.now_s())
            if needed_s > left_s:  # the first pass was told a quicker machine
                self.wanted = self.wanted[: int(len(self.wanted) * left_s / needed_s)]

    def entries(self) -> list[Entry]:
        """The median over rounds; the first, which also warmed up, is not among them."""
        found = []
        for op in self.wanted:
            times = self.state.times_s[op][1:]
            if op in self.failed or len(times) < FEWEST_ROUNDS - 1:
                continue
            figure = of_arm(times)
            if not isinstance(figure, Estimate):
                continue
            status = "ok" if figure.half_width_rel <= _AMBIGUOUS_REL else "ambiguous"
            mode = "eager" if self.bench.capture is None else "graph"
            ends = (figure.value, figure.lo, figure.hi, figure.n)
            found.append(Entry(op, *ends, self.state.worst_s[op], status=status, mode=mode))
        return found

    def profile(
        self, name: str, entries: Sequence[Entry], anchors: Anchors, asked: int, command: str
    ) -> DeviceProfile:
        """Everything with where it comes from."""
        about, source = dict(self.about), self.bench.source
        clock = "thread CPU time" if self.bench.by_cpu_time else "wall"
        about |= {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "command": command,
            "seed": self.seed,
            "backend": None if isinstance(source, Unavailable) else source.caps.backend,
            "rounds": self.state.rounds,
            "seconds": self.now_s() - self.start_s,
            "noise_rel": [self.noise_before, self.bench.noise(self.bench.timer)],
            "load_average_after": load_average(),
            "aa_ratio_latency": aa_ratio([self.state.times_s[e.op][1:] for e in entries]),
            "clock": "CUDA events" if self.device.type == "cuda" else clock,
            "not_reached": asked - len(entries) - len(self.failed),
            "failed": [{**op.to_dict(), "reason": why} for op, why in self.failed.items()],
            "energy_failed": [
                {**op.to_dict(), "reason": why} for op, why in anchors.failed.items()
            ],
        }
        told, reason = about.pop("sensor", None), about.pop("sensor_reason", "")
        if told is None:
            sensor: dict[str, Any] = {"source": None, "reason": reason}
        else:
            sensor = {"source": told["backend"], **told, "idle_w": anchors.idle_w}
            if not anchors.windows:
                sensor["reason"] = next(
                    iter(anchors.failed.values()), "no time was left for energy"
                )
        versions = {**about.pop("versions"), **software_here()}
        software = versions | {k: about.pop(k) for k in ("python", "os", "cuda")}
        return DeviceProfile(name, _about_device(about), software, sensor, tuple(entries), about)


def _about_device(about: dict[str, Any]) -> dict[str, Any]:
    """The device with its threads, which are part of what a CPU is."""
    found = dict(about["device"])
    if found.get("type") == "cpu":
        found["threads"] = about["threads"]
    return found


def this_device(device: torch.device) -> str:
    """The key of the machine at hand, to compare with `DeviceProfile.key`."""
    return device_key(_about_device(provenance(device, Unavailable("not asked"))))


def aa_ratio(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Even rounds against odd ones, over all operations: 1 where the machine holds still.

    Args:
        times: of each operation, one a round, at least two.
    """
    halves = [(statistics.median(t[0::2]), statistics.median(t[1::2])) for t in times]
    logs = np.log([even / odd for even, odd in halves])
    middle, spread = float(np.median(logs)), float(np.median(np.abs(logs)))
    return {"median": float(np.exp(middle)), "median_abs_error": float(np.expm1(spread))}
