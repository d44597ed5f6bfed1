"""Energy of any code: `with hwprune.measure_energy("cuda:0") as e: ...`, and then `e.energy_j`.

The window starts on a tick of the counter. Its end is between two ticks, so the energy is between two values
of the counter: half of what separates them is the uncertainty, which a longer window makes small.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.open import open_source
from hwprune.meter.recorder import Recorder
from hwprune.meter.source import GAIN_UNCERTAINTY_REL, Capabilities, EnergySource, Reading
from hwprune.meter.ticks import board_flags, counter_fault, held_mean, reading_fault, ticks

_TICK_PATIENCE_S = 0.3  # three times the slowest refresh seen
_STRETCH = 1 / 500  # a reading every 0.2 % of the time so far
_WORST_REL = 0.5  # beyond, it is not a measurement
_ENOUGH_S = 2.0  # known to 5 % with a refresh of 0.1 s
_CHECK_FROM_S = 3.0  # shorter windows hold too few power readings to check the counter by
_POWER_REFRESH_S = 0.1


@dataclass
class MeasuredEnergy:
    """What a block of code took; complete when the block has ended.

    Attributes:
        energy_j: gross energy of the device, its idle part included; None where it could not be known.
        reason: why there is no energy; "" where there is.
        duration_s: of the block, with the device's queue run empty at both ends.
        average_power_w: the one over the other.
        uncertainty_rel: half of the interval that the energy is in for certain, as far as the counter is right.
        gain_uncertainty_rel: what an uncalibrated sensor may be off by on top; it cancels in a ratio of two
            measurements on one board.
        method: "counter", or "instant" or "average" where power readings were added up.
        scope: what the joules cover: "gpu", "module" or "package".
        device: name of the board or processor.
        flags: what the reader must know; `hwprune.meter.energy_window.FLAGS` explains them.
    """

    energy_j: float | None = None
    reason: str = "the block has not ended"
    duration_s: float | None = None
    average_power_w: float | None = None
    uncertainty_rel: float | None = None
    gain_uncertainty_rel: float = GAIN_UNCERTAINTY_REL
    method: str = ""
    scope: str = ""
    device: str = ""
    flags: tuple[str, ...] = ()


@contextmanager
def measure_energy(
    device: object,
    *,
    source: EnergySource | Unavailable | None = None,
    clock: Clock | None = None,
) -> Iterator[MeasuredEnergy]:
    """Measures the energy of a device while a block of code runs.

    Entering waits for a tick of the counter (up to 0.1 s on most boards) and leaving for another one; the
    time is that of the block alone. Other work on the device counts too, and is flagged where NVML tells.

    Args:
        device: "cuda:0" or a torch.device, "nvml:0", "GPU-<uuid>", "rocm:0", or "rapl" for the CPU packages.
        source: an opened sensor, which stays open; without it `device` is opened and closed here.
        clock: a test's own.

    Yields:
        What is filled in when the block ends. A missing, forbidden or lost sensor gives `energy_j` None and a
        `reason`, and never an exception.

    Raises:
        ValueError: a device of no known form.

    Example:
        >>> import torch
        >>> import hwprune
        >>> with hwprune.measure_energy("rapl") as energy:
        ...     product = torch.randn(512, 512) @ torch.randn(512, 512)
        >>> (energy.energy_j is None) == bool(energy.reason)  # a figure, or why there is none
        True
    """
    clock = clock or RealClock()
    own = source is None
    opened = open_source(device, clock=clock) if source is None else source
    found = MeasuredEnergy()
    recorder = (
        None if isinstance(opened, Unavailable) else Recorder(opened, clock, stretch=_STRETCH)
    )
    try:
        _synchronise(device, opened)
        if recorder is not None:
            recorder.start()
            _await_tick(recorder, clock, clock.now_ns())
            recorder.watch(closely=False)
        start_ns = clock.now_ns()
        try:
            yield found
        except BaseException:
            found.reason = "the measured code raised an exception"
            raise
        _synchronise(device, opened)
        end_ns = clock.now_ns()
        found.duration_s = (end_ns - start_ns) / 1e9
        if isinstance(opened, Unavailable):
            found.reason = opened.reason
        elif recorder is not None:
            _await_tick(recorder, clock, end_ns)
            recorder.stop()
            _fill(found, recorder, opened, start_ns, end_ns)
    finally:
        if recorder is not None:
            recorder.stop()
        if own and not isinstance(opened, Unavailable):
            opened.close()


def _await_tick(recorder: Recorder, clock: Clock, after_ns: int) -> None:
    """Wait until the counter has changed after a time, or has shown that it does not."""
    recorder.watch(closely=True)
    while not recorder.fault and clock.now_ns() - after_ns < _TICK_PATIENCE_S * 1e9:
        if any(t.t_ns - t.slack_ns >= after_ns for t in ticks(recorder.since(after_ns))):
            return
        clock.sleep(0.001)


def _synchronise(device: object, source: EnergySource | Unavailable) -> None:
    """Wait for the device's queue, where torch has used CUDA at all."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    name = str(device)
    if name.startswith("cuda"):
        index = torch.device(name).index
        if index is None or index < torch.cuda.device_count():  # else the reason says so
            torch.cuda.synchronize(index)
        return
    identity = "" if isinstance(source, Unavailable) else source.caps.identity.lower()
    for index in range(torch.cuda.device_count()):
        uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", "?")).lower()
        if uuid.removeprefix("gpu-") == identity.removeprefix("gpu-"):
            torch.cuda.synchronize(index)
            return
    torch.cuda.synchronize()


def _fill(
    found: MeasuredEnergy, recorder: Recorder, source: EnergySource, start_ns: int, end_ns: int
) -> None:
    """Work out the energy between two times."""
    caps = source.caps
    found.device, found.scope = caps.device, caps.scope
    readings = recorder.since(start_ns)
    if recorder.fault:
        found.reason = recorder.fault
        return
    got = _counted(recorder, start_ns, end_ns) if caps.counter else None
    if got is None:
        got = _integrated(readings, caps, start_ns, end_ns)
    if isinstance(got, Unavailable):
        found.reason = got.reason
        return
    energy_j, slack_j, found.method = got
    duration_s = (end_ns - start_ns) / 1e9
    if energy_j <= 0 or slack_j > _WORST_REL * energy_j:
        found.reason = (
            f"{duration_s:.3g} s is too short to tell: the sensor cannot place the energy better than "
            f"{slack_j:.3g} J; repeat the work for at least {_ENOUGH_S:g} s"
        )
        return
    found.energy_j, found.reason = energy_j, ""
    found.average_power_w = energy_j / duration_s
    found.uncertainty_rel = slack_j / energy_j
    flags = _flags(readings, caps, found, start_ns, end_ns)
    if bool(source.foreign()):
        flags.append("foreign_process")
    found.flags = tuple(flags)


def _counted(
    recorder: Recorder, start_ns: int, end_ns: int
) -> tuple[float, float, str] | Unavailable | None:
    """Joules and how far they may be off, from the counter; None where it stands still."""
    inside = recorder.since(start_ns)
    if fault := counter_fault(inside):
        return Unavailable(fault)
    seen = ticks(recorder.since(start_ns - _TICK_PATIENCE_S * 1e9))
    origin = next((t for t in reversed(seen) if t.t_ns <= start_ns), None)
    upper = next((t for t in seen if t.t_ns > end_ns), None)
    if origin is None or upper is None:
        return None
    last = next(t for t in reversed(seen) if t.t_ns <= end_ns)
    lower_mj, upper_mj = last.energy_mj - origin.energy_mj, upper.energy_mj - origin.energy_mj
    middle_mj = upper_mj / 2  # where not one whole interval was inside, it may be anything between
    if last.t_ns > origin.t_ns:
        # The block's own power went on from its last tick; what came after it may have drawn less.
        own = lower_mj / (last.t_ns - origin.t_ns)
        middle_mj = min(upper_mj, lower_mj + own * (end_ns - last.t_ns))
    slack_mj = max(upper_mj - middle_mj, middle_mj - lower_mj)
    # From the tick to the start went a poll or two.
    rate = upper_mj / (upper.t_ns - origin.t_ns)
    lead_ns = start_ns - origin.t_ns
    slack_mj += rate * (lead_ns + origin.slack_ns)
    return (middle_mj - rate * lead_ns) / 1e3, slack_mj / 1e3, "counter"


def _integrated(
    readings: Sequence[Reading], caps: Capabilities, start_ns: int, end_ns: int
) -> tuple[float, float, str] | Unavailable:
    """Joules and how far they may be off, from power readings held until the next one."""
    if not (caps.instant or caps.average):
        return Unavailable(
            f"the energy counter of {caps.device} does not move, and it answers no power"
        )
    method, window_s = "instant", _POWER_REFRESH_S
    if not caps.instant:
        method, window_s = "average", caps.average_window_s
    if fault := reading_fault(readings, f"{method}_mw"):
        return Unavailable(fault)
    milliwatts = held_mean(readings, f"{method}_mw", start_ns, end_ns)
    if not milliwatts:
        return Unavailable(f"{caps.device} reported no power")
    duration_s = (end_ns - start_ns) / 1e9
    if method == "average" and duration_s < 3 * window_s:
        return Unavailable(
            f"{caps.device} answers only power averaged over {window_s:g} s, which cannot tell "
            f"{duration_s:.3g} s from what came before; repeat the work for at least {3 * window_s:g} s"
        )
    return milliwatts / 1e3 * duration_s, milliwatts / 1e3 * window_s, method


def _flags(
    readings: Sequence[Reading],
    caps: Capabilities,
    found: MeasuredEnergy,
    start_ns: int,
    end_ns: int,
) -> list[str]:
    flags = []
    assert found.average_power_w is not None and found.uncertainty_rel is not None
    if found.method != "counter":
        flags.append("integrated_power")
    elif caps.instant and end_ns - start_ns > _CHECK_FROM_S * 1e9:
        milliwatts = held_mean(readings, "instant_mw", start_ns, end_ns)
        allowed = 0.05 + found.uncertainty_rel
        if milliwatts and abs(milliwatts / 1e3 / found.average_power_w - 1) > allowed:
            flags.append("sensor_disagreement")
    return flags + board_flags(readings, caps.scope)
