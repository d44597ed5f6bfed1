"""Measures a device into a profile: every operation once a round, in random order, round after round.

Drift of the machine then meets all operations alike. A run is cut by its minutes, not by its list: what was
not reached is not in the profile. It goes on where it was stopped: each round is kept on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwprune.device import DeviceProfile, Entry, device_key
from hwprune.meter.arms import Arm
from hwprune.meter.energy_window import EnergyWindow
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.modes import Runnable, capture
from hwprune.meter.open import open_source
from hwprune.meter.provenance import provenance
from hwprune.meter.rounds import of_arm
from hwprune.meter.schedule import chunks
from hwprune.meter.source import EnergySource
from hwprune.meter.timing import make_timer, noise_rel
from hwprune.meter.window import energy_of
from hwprune.ops import Op, Pool, runnable

Progress = Callable[[str, int, int], None]  # (step, done, total)

FEWEST_ROUNDS, MOST_ROUNDS = 5, 16
_BLOCK_S = 0.015  # of calls of one operation in a round
_TOO_LONG_S = 3.0  # an operation that would eat the time of a hundred others
_FIRST_PASS = 0.3  # share of the time for seeing each operation once
_AMBIGUOUS_REL = 0.05
_ANCHOR_S = 6.0  # of an energy window with its ramp
_ENERGY_SHARE = 0.4  # of the time, where there is a sensor


@dataclass
class _State:
    """What was measured so far: per operation one median a round."""

    times_s: dict[Op, list[float]] = field(default_factory=dict)
    worst_s: dict[Op, float] = field(default_factory=dict)
    rounds: int = 0

    def save(self, path: Path, key: str) -> None:
        found = [
            {"op": op.to_dict(), "times_s": times, "worst_s": self.worst_s[op]}
            for op, times in self.times_s.items()
        ]
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps({"key": key, "rounds": self.rounds, "ops": found}))
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path, key: str) -> _State:
        """What a stopped run left, of the same device and versions; empty otherwise."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text())
            if found["key"] == key:
                ops = [Op.from_dict(entry["op"]) for entry in found["ops"]]
                times = [[float(t) for t in entry["times_s"]] for entry in found["ops"]]
                worst = [float(entry["worst_s"]) for entry in found["ops"]]
                return cls(
                    dict(zip(ops, times, strict=True)),
                    dict(zip(ops, worst, strict=True)),
                    int(found["rounds"]),
                )
        return cls()


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

    Raises:
        ValueError: the time is too short for any operation to have five rounds.
    """
    source = open_source(device)
    about = provenance(device, source)
    timer, pool = make_timer(device), Pool(device)
    # One thread's CPU time is its latency on a machine that does nothing else, and neighbours add less to it.
    by_cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    noise = noise_rel(timer)
    end = time.monotonic() + 60 * minutes
    latency_end = end - (0 if isinstance(source, Unavailable) else 60 * minutes * _ENERGY_SHARE)
    key = f"{_about_device(about)} {about['versions']}"
    state = _State.load(partial, key) if partial is not None else _State()
    failed: dict[Op, str] = {}

    def once(op: Op) -> bool:
        try:
            see(op)
        except (RuntimeError, ValueError) as error:  # out of memory, a kernel this device refuses
            failed[op] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return False
        return True

    def see(op: Op) -> None:
        call = runnable(op, pool)
        call()
        if device.type == "cuda":
            roughly = timer.block(call, 3).median_s
            repeats = max(1, min(200, round(2e-3 / roughly)))
            graph = capture(call, device, repeats)
            block, repeats = timer.block(graph.call, 5), graph.per_call
        else:
            first = timer.block(call, 1).median_s
            block, repeats = timer.block(call, max(1, min(50, round(_BLOCK_S / first)))), 1
        seconds = block.cpu_s / len(block.times_s) if by_cpu_time else block.median_s / repeats
        state.times_s.setdefault(op, []).append(seconds)
        worst = float(np.quantile(block.times_s, 0.95)) / repeats
        state.worst_s[op] = max(state.worst_s.get(op, 0.0), worst)

    with torch.no_grad():
        wanted = _first_pass(ops, state, once, latency_end, progress)
        if partial is not None:
            state.save(partial, key)
        order = random.Random(seed + state.rounds)
        most = max(MOST_ROUNDS, FEWEST_ROUNDS)
        while state.rounds < most and time.monotonic() < latency_end:
            turn = order.sample(wanted, len(wanted))
            for i, op in enumerate(turn):
                if i % 16 == 0 and state.rounds >= FEWEST_ROUNDS and time.monotonic() > latency_end:
                    break
                if op not in failed:
                    once(op)
            else:
                state.rounds += 1
                if partial is not None:
                    state.save(partial, key)
                if progress is not None:
                    progress("rounds", state.rounds, most)
                continue
            break
        made = [_entry(op, state, device) for op in wanted if op not in failed]
        entries = {entry.op: entry for entry in made if entry is not None}
        if not entries:
            raise ValueError(
                f"profile: {minutes:g} minutes gave no operation {FEWEST_ROUNDS} rounds; give more with "
                "--minutes"
            )
        powers = _powers(list(entries), state, source, device, pool, end, progress)
    measured = [_with_power(entry, powers.get(op)) for op, entry in entries.items()]
    if partial is not None:
        partial.unlink(missing_ok=True)
    about |= {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "command": command,
        "seed": seed,
        "backend": None if isinstance(source, Unavailable) else source.caps.backend,
        "rounds": state.rounds,
        "noise_rel": noise,
        "aa_ratio_latency": _aa(list(entries), state),
        "clock": "thread CPU time"
        if by_cpu_time
        else "wall"
        if device.type == "cpu"
        else "CUDA events",
        "not_reached": len(ops) - len(measured),
        "failed": [{**op.to_dict(), "reason": reason} for op, reason in failed.items()],
    }
    sensor = about.pop("sensor", None)
    told = {"source": None, "reason": about.pop("sensor_reason", "")} if sensor is None else sensor
    software = about.pop("versions") | {"python": about.pop("python"), "os": about.pop("os")}
    return DeviceProfile(name, _about_device(about), software, told, tuple(measured), about)


def _about_device(about: dict[str, Any]) -> dict[str, Any]:
    """The device with its threads, which are part of what a CPU is."""
    found = dict(about["device"])
    if found.get("type") == "cpu":
        found["threads"] = about["threads"]
    return found


def this_device(device: torch.device) -> str:
    """The key of the machine at hand, to compare with `DeviceProfile.key`."""
    return device_key(_about_device(provenance(device, Unavailable("not asked"))))


def _first_pass(
    ops: Sequence[Op],
    state: _State,
    once: Callable[[Op], bool],
    end: float,
    progress: Progress | None,
) -> list[Op]:
    """See operations once, in order, while the time for all later rounds still holds; those that fit."""
    began, wanted, cost_s = time.monotonic(), [], 0.0
    available = (end - began) * (1 - _FIRST_PASS)
    for i, op in enumerate(ops):
        if op not in state.times_s:
            if time.monotonic() - began > (end - began) * _FIRST_PASS:
                break
            start = time.monotonic()
            if not once(op):
                continue
            spent = time.monotonic() - start
        else:
            spent = _BLOCK_S + 3 * state.times_s[op][0]
        if spent > _TOO_LONG_S or (cost_s + spent) * FEWEST_ROUNDS > available:
            continue
        cost_s += spent
        wanted.append(op)
        if progress is not None and i % 16 == 0:
            progress("first pass", i + 1, len(ops))
    return wanted


def _entry(op: Op, state: _State, device: torch.device) -> Entry | None:
    """The median over rounds; the first, which also warmed up, is not among them."""
    times = state.times_s[op][1:]
    if len(times) < FEWEST_ROUNDS - 1:
        return None
    found = of_arm(times)
    if not isinstance(found, Estimate):
        return None
    status = "ok" if found.half_width_rel <= _AMBIGUOUS_REL else "ambiguous"
    mode = "graph" if device.type == "cuda" else "eager"
    return Entry(
        op, found.value, found.lo, found.hi, found.n, state.worst_s[op], status=status, mode=mode
    )


def _powers(
    ops: list[Op],
    state: _State,
    source: EnergySource | Unavailable,
    device: torch.device,
    pool: Pool,
    end: float,
    progress: Progress | None,
) -> dict[Op, EnergyWindow]:
    """Power of anchors spread over the list, as many as the time allows; energy is power times latency."""
    if isinstance(source, Unavailable):
        return {}
    count = max(0, min(len(ops), int((end - time.monotonic()) / _ANCHOR_S)))
    anchors = [ops[round(i * (len(ops) - 1) / max(1, count - 1))] for i in range(count)]
    found: dict[Op, EnergyWindow] = {}
    for i, op in enumerate(dict.fromkeys(anchors)):
        if time.monotonic() > end:
            break
        call, call_s = runnable(op, pool), statistics.median(state.times_s[op])
        ready = Runnable(call)
        if device.type == "cuda":
            ready = capture(call, device, max(1, min(200, round(3e-3 / call_s))))
        arm = Arm("op", call, runnable=ready, call_s=call_s * ready.per_call, calls=1)
        run_chunk, drain = chunks(arm, device)
        window = energy_of(source, run_chunk, drain=drain, settle_s=4.0)
        if isinstance(window, EnergyWindow):
            found[op] = window
        if progress is not None:
            progress("energy", i + 1, len(anchors))
    return found


def _with_power(entry: Entry, window: EnergyWindow | None) -> Entry:
    """An entry with the power of its window, and its energy."""
    if window is None or window.status == "discard":
        return entry
    power_w = window.average_power_w
    values = {**entry.__dict__, "power_w": power_w, "energy_j": power_w * entry.latency_s}
    return Entry(**values)


def _aa(ops: Sequence[Op], state: _State) -> dict[str, float]:
    """Even rounds against odd ones, over all operations: 1 where the machine holds still."""
    logs = []
    for op in ops:
        times = state.times_s[op][1:]
        even, odd = times[0::2], times[1::2]
        logs.append(np.log(statistics.median(even) / statistics.median(odd)))
    middle, spread = float(np.median(logs)), float(np.median(np.abs(logs)))
    return {"median": float(np.exp(middle)), "median_abs_error": float(np.expm1(spread))}
