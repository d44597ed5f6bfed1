"""What a run of readings says: counter ticks, mean power held between readings, steadiness, faults.

A counter that refreshes every 100 ms is read wrong by up to 100 ms of energy at each end of a window
(1.3 % rms over 3 s). From one change of the counter to another there is no such error: what remains is
how closely the two changes were seen (reference: simulation in `tests/test_meter_simulated.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from hwprune.meter.source import Reading


@dataclass(frozen=True)
class Tick:
    """A change of the counter.

    Attributes:
        t_ns: when, at best.
        slack_ns: how far it may have been from there, either way.
        energy_mj: the counter after it.
    """

    t_ns: float
    slack_ns: float
    energy_mj: float


def ticks(readings: Sequence[Reading]) -> list[Tick]:
    """The changes of the counter, each between the last reading of the old and the first of the new value."""
    found = []
    counted = [r for r in readings if r.energy_mj is not None]
    for old, new in pairwise(counted):
        if new.energy_mj == old.energy_mj or new.epoch != old.epoch:
            continue
        assert new.energy_mj is not None
        early, late = old.t_ns - old.took_ns / 2, new.t_ns + new.took_ns / 2
        middle = (old.t_ns + new.t_ns) / 2
        found.append(Tick(middle, max(late - middle, middle - early), new.energy_mj))
    return found


def refresh_ns(found: Sequence[Tick]) -> float | None:
    """The usual time between ticks; None where no two neighbours were seen closely enough to tell.

    Polled every 100 ms a counter of 10 ms looks like one of 100 ms, so only close pairs count.
    """
    pairs = [(b.t_ns - a.t_ns, a.slack_ns + b.slack_ns) for a, b in pairwise(found)]
    close = [gap for gap, slack in pairs if slack < 0.3 * gap]
    return median(close) if close else None


def counter_fault(readings: Sequence[Reading]) -> str:
    """Why the counter cannot be trusted over these readings; "" where it can."""
    if fault := reading_fault(readings, "energy_mj"):
        return fault
    for old, new in pairwise(readings):
        if new.epoch != old.epoch:
            return "the energy counter lost its continuity inside the window"
        assert old.energy_mj is not None and new.energy_mj is not None
        if new.energy_mj < old.energy_mj:
            return (
                f"the energy counter went back from {old.energy_mj:.0f} to {new.energy_mj:.0f} mJ inside "
                "the window (a driver reload or a reset)"
            )
    return ""


def reading_fault(readings: Sequence[Reading], name: str) -> str:
    """Why a field is missing in one of the readings; "" where it is in all of them."""
    for reading in readings:
        if reading.error:
            return reading.error
        if getattr(reading, name) is None:
            return f"{name} could not be read: {reading.status.get(name, 'no reason given')}"
    return ""


def held_mean(
    readings: Sequence[Reading], name: str, start_ns: float, end_ns: float
) -> float | None:
    """Mean of a field over a time, each value held until the next reading; None where there is none.

    Holding is right for constant power, where dropping repeated values and integrating between the rest
    gives nothing at all. A value read before the start holds until the first inside.
    """
    known = [(r.t_ns, getattr(r, name)) for r in readings if getattr(r, name) is not None]
    if not known or end_ns <= start_ns:
        return None
    times = [max(t, start_ns) for t, _ in known] + [end_ns]
    times[0] = start_ns
    total = sum(
        float(value) * max(0.0, min(t1, end_ns) - t0)
        for (_, value), (t0, t1) in zip(known, pairwise(times), strict=True)
    )
    return total / (end_ns - start_ns)


def counted_power(readings: Sequence[Reading], start_ns: float, end_ns: float) -> float | None:
    """Mean milliwatts from the counter between the last readings before the two times."""
    before = [r for r in readings if r.energy_mj is not None and r.t_ns <= end_ns]
    first = [r for r in before if r.t_ns <= start_ns]
    if not first or before[-1].t_ns <= first[-1].t_ns:
        return None
    a, b = first[-1], before[-1]
    assert a.energy_mj is not None and b.energy_mj is not None
    return (b.energy_mj - a.energy_mj) / (b.t_ns - a.t_ns) * 1e9


def drift(means: Sequence[float]) -> float:
    """How far the last two of some block means are from the first two, relative to all of them."""
    overall = sum(means) / len(means)
    if overall <= 0:
        return float("inf")
    return abs((means[-1] + means[-2]) - (means[0] + means[1])) / 2 / overall


def block_means(
    mean: Callable[[float, float], float | None], end_ns: float, block_s: float, blocks: int
) -> list[float] | None:
    """Means over the last blocks of time before `end_ns`, oldest first; None where one is missing."""
    edges = [end_ns - block_s * 1e9 * k for k in range(blocks, -1, -1)]
    found = [mean(a, b) for a, b in pairwise(edges)]
    known = [m for m in found if m is not None]
    return known if len(known) == blocks else None


def slope_per_s(readings: Sequence[Reading], name: str, start_ns: float) -> float | None:
    """Change of a field a second since a time, by least squares; None with fewer than three values."""
    known = [
        (r.t_ns / 1e9, float(value))
        for r in readings
        if r.t_ns >= start_ns and (value := getattr(r, name)) is not None
    ]
    if len(known) < 3:
        return None
    middle = sum(t for t, _ in known) / len(known)
    level = sum(v for _, v in known) / len(known)
    spread = sum((t - middle) ** 2 for t, _ in known)
    return sum((t - middle) * (v - level) for t, v in known) / spread if spread else None


def grown(readings: Sequence[Reading], name: str) -> int | None:
    """By how much a cumulative field grew from the first reading that has it to the last."""
    known = [value for r in readings if (value := getattr(r, name)) is not None]
    return int(known[-1] - known[0]) if len(known) > 1 else None


def board_flags(readings: Sequence[Reading], scope: str) -> list[str]:
    """What the board itself says of a window: what its joules cover, and whether it slowed down."""
    flags = ["module_scope"] if scope == "module" else []
    if grown(readings, "thermal_ns"):
        flags.append("thermal_slowdown")
    if grown(readings, "brake_ns"):
        flags.append("hw_power_brake")
    return flags
