"""Power of a device that does nothing: the part of every joule that no pruning saves."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, stdev

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.source import EnergySource, Reading
from hwprune.meter.ticks import counter_fault, reading_fault

IDLE_S = 10.0
_EVERY_S = 0.5  # reading a GPU more often than that keeps it awake
_REFRESH_S = 0.1  # the slowest counter seen: either end may be off by as much
_STABLE_REL = 0.03


def idle_power(
    source: EnergySource | Unavailable, seconds: float = IDLE_S, *, clock: Clock | None = None
) -> Estimate | Unavailable:
    """Watts of a device while the caller does nothing; the caller sees to that.

    Args:
        source: an opened sensor.
        seconds: how long to look, at twice a second.
        clock: a test's own.

    Returns:
        Mean power in W, flagged "unstable_idle" where quarters of the time differ by more than 3 %: somebody
        else may be using the device.

    Raises:
        ValueError: less than 2 s.
    """
    if isinstance(source, Unavailable):
        return source
    if not seconds >= 2:
        raise ValueError(f"expected at least 2 s to tell idle power, got {seconds}")
    clock = clock or RealClock()
    readings = []
    for _ in range(round(seconds / _EVERY_S) + 1):
        readings.append(source.read())
        if readings[-1].lost:
            return Unavailable(readings[-1].error)
        clock.sleep(_EVERY_S)
    if source.caps.counter:
        if fault := counter_fault(readings):
            return Unavailable(fault)
        if readings[-1].energy_mj != readings[0].energy_mj:
            return _counted(readings)
    for name in ("instant_mw", "average_mw"):
        if getattr(source.caps, name.removesuffix("_mw")):
            fault = reading_fault(readings, name)
            return Unavailable(fault) if fault else _averaged(readings, name)
    return Unavailable(f"{source.caps.device} answers no energy that moves, and no power")


def _watts(first: Reading, last: Reading) -> float:
    assert first.energy_mj is not None and last.energy_mj is not None
    return (last.energy_mj - first.energy_mj) / 1e3 / ((last.t_ns - first.t_ns) / 1e9)


def _counted(readings: list[Reading]) -> Estimate:
    watts = _watts(readings[0], readings[-1])
    length_s = (readings[-1].t_ns - readings[0].t_ns) / 1e9
    marks = [readings[round(k * (len(readings) - 1) / 4)] for k in range(5)]
    quarters = [_watts(a, b) for a, b in pairwise(marks)]
    slack_rel = _REFRESH_S / length_s
    return _estimate(watts, slack_rel, quarters, _STABLE_REL + 4 * slack_rel)


def _averaged(readings: list[Reading], name: str) -> Estimate:
    values = [getattr(r, name) / 1e3 for r in readings]
    watts = mean(values)
    size = max(1, len(values) // 4)
    quarters = [mean(values[k * size : (k + 1) * size]) for k in range(len(values) // size)]
    slack_rel = 2 * stdev(values) / len(values) ** 0.5 / watts
    return _estimate(watts, slack_rel, quarters, _STABLE_REL)


def _estimate(watts: float, slack_rel: float, quarters: list[float], allowed: float) -> Estimate:
    stable = max(abs(q / watts - 1) for q in quarters) <= allowed
    flags = () if stable else ("unstable_idle",)
    return Estimate(watts, watts * (1 - slack_rel), watts * (1 + slack_rel), 1, flags)
