"""Energy of a repeated piece of work, from one tick of the counter to another in steady state.

The protocol: warm up for 1.5 s, go on until power, clocks and temperature are steady, then take the counter
from one change to another at least 3 s apart, and check it against the power sensors of the same board.
What the host sees late cancels; a constant gain of the sensor cancels in a ratio, an offset does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.energy_window import DISCARD, Chunk, EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Capabilities, EnergySource, Reading
from hwprune.meter.steady import PATIENCE_S, Ends, Run
from hwprune.meter.ticks import (
    board_flags,
    counter_fault,
    grown,
    held_mean,
    reading_fault,
)

MIN_WINDOW_S = 3.0
POWER_WINDOW_S = 10.0  # where only power is answered, whose window ends are not known
RAMP_S = 1.5  # longer than the 1 s average and one refresh
SETTLE_S = 15.0  # then it is measured as it is, and flagged
AGREE_REL = 0.05  # counter and power sensors of one board
# A sensor that looks 25 of every 100 ms errs by 16 % at a period of 20 ms, by less than 1 % at 5 ms.
_SAFE_PERIOD_S = 0.005
_FEWEST_CHUNKS = 4  # of which at least two finish, with two queued
_LOW_POWER_W, _LOW_SHARE_OF_CAP = 100.0, 0.25  # below, a sensor's offset is 2 to 15 % of it
_WALL_STEP_NS = 1_000_000


def energy_of(
    source: EnergySource | Unavailable,
    run_chunk: Callable[[], Chunk],
    *,
    min_window_s: float = MIN_WINDOW_S,
    ramp_s: float = RAMP_S,
    settle_s: float = SETTLE_S,
    idle_w: float | None = None,
    drain: Callable[[], None] | None = None,
    clock: Clock | None = None,
) -> EnergyWindow | Unavailable:
    """Runs work over and over and measures its energy in steady state.

    The sensor is polled beside the work, so a chunk may block; about 50 ms of work a call is enough, and
    no more than that should be queued on the device when it returns.

    Args:
        source: an opened sensor; an `Unavailable` is handed back, and no work is run.
        run_chunk: runs or enqueues more work; returns what has finished since its last call.
        min_window_s: shortest window. Where only power is answered it is at least 10 s.
        ramp_s: work before anything is read.
        settle_s: how long to wait for a steady state, ramp included.
        idle_w: power of the idle device, for the dynamic part.
        drain: waits for what is still queued; called at the end, also after an error.
        clock: a test's own.

    Returns:
        The window, flagged where it must be; `Unavailable` where the sensor failed, went back or stood still.

    Raises:
        ValueError: a time that is not positive, or an iteration count that never grows.
    """
    if isinstance(source, Unavailable):
        return source
    if not (min_window_s > 0 and ramp_s >= 0 and settle_s >= ramp_s):
        raise ValueError(
            f"expected min_window_s > 0 and 0 <= ramp_s <= settle_s, got {min_window_s}, {ramp_s}, "
            f"{settle_s}"
        )
    caps = source.caps
    refused = _refuse(caps, min_window_s)
    if refused is not None:  # an Unavailable is false
        return refused
    run = Run(source, run_chunk, clock or RealClock())
    foreign = bool(source.foreign())
    wall_ns = run.clock.wall_ns() - run.clock.now_ns()
    run.recorder.start()
    try:
        steady = run.settle(ramp_s, settle_s)
        ends = run.tick_to_tick(min_window_s) if caps.counter else None
        silent = run.counter_silence() if caps.counter and ends is None else ""
        if ends is None and not silent and (caps.instant or caps.average):
            ends = run.span(max(min_window_s, POWER_WINDOW_S))
    finally:
        run.recorder.stop()
        if drain is not None:
            drain()
    if run.recorder.fault or silent:
        return Unavailable(run.recorder.fault or silent)
    if ends is None:
        return Unavailable(
            f"the energy counter of {caps.device} did not move in {PATIENCE_S:g} s of work, and it answers no "
            "power either"
        )
    flags = [] if steady else ["unsteady"]
    if foreign or bool(source.foreign()):
        flags.append("foreign_process")
    if abs(run.clock.wall_ns() - run.clock.now_ns() - wall_ns) > _WALL_STEP_NS:
        flags.append("clock_step")
    return _assess(run, caps, ends, flags, idle_w)


def time_per_call(
    run_chunk: Callable[[], Chunk],
    drain: Callable[[], None],
    seconds: float,
    *,
    clock: Clock | None = None,
) -> float:
    """Seconds an iteration over at least so many seconds: what is left to tell where there is no sensor.

    Raises:
        ValueError: nothing finished.
    """
    clock = clock or RealClock()
    first_ns = last_ns = (
        None  # of the chunks that finished: what is still queued at the end does not count
    )
    start_ns, done = clock.now_ns(), 0
    chunks = 0
    while clock.now_ns() - start_ns < seconds * 1e9 or (done == 0 and chunks < _FEWEST_CHUNKS):
        iterations, chunks = run_chunk().iterations, chunks + 1
        if iterations and first_ns is None:
            first_ns = clock.now_ns()
        elif iterations:
            last_ns, done = clock.now_ns(), done + iterations
    drain()
    if first_ns is None or last_ns is None:
        raise ValueError(
            f"expected run_chunk to finish work within {seconds} s, got {done} iterations"
        )
    return (last_ns - first_ns) / 1e9 / done


def _refuse(caps: Capabilities, min_window_s: float) -> Unavailable | None:
    if not (caps.counter or caps.instant or caps.average):
        why = "; ".join(f"{name}: {reason}" for name, reason in caps.missing.items())
        return Unavailable(f"{caps.device} answers neither energy nor power ({why or 'no reason'})")
    if not caps.counter and not caps.instant and min_window_s < 3 * caps.average_window_s:
        return Unavailable(
            f"{caps.device} answers only power averaged over {caps.average_window_s:g} s, which cannot tell "
            f"{min_window_s:g} s from what came before; ask for at least {3 * caps.average_window_s:g} s"
        )
    return None


def _assess(
    run: Run, caps: Capabilities, ends: Ends, flags: list[str], idle_w: float | None
) -> EnergyWindow | Unavailable:
    """The window's figures, its checks and its flags."""
    start, end = ends.start.t_ns, ends.end.t_ns
    readings = [r for r in run.recorder.since(start) if r.t_ns <= end + ends.end.slack_ns]
    duration_s = (end - start) / 1e9
    counter_w = None
    if ends.method == "counter":
        if fault := counter_fault(readings):
            return Unavailable(fault)
        counter_w = (ends.end.energy_mj - ends.start.energy_mj) / 1e3 / duration_s
    elif fault := reading_fault(readings, f"{ends.method}_mw"):
        return Unavailable(fault)
    instant_w = _watts(readings, "instant_mw", start, end)
    smoothed_w = _watts(readings, "average_mw", start, end)  # of a second that was steady before
    power_w = {"counter": counter_w, "instant": instant_w, "average": smoothed_w}[ends.method]
    if power_w is None or power_w <= 0:
        return Unavailable(f"{caps.device} reported no energy over {duration_s:.1f} s of work")
    per_iteration_s = _time_per_iteration(run.progress, start, end, flags)
    checks = [w for w in (instant_w, smoothed_w) if w is not None and ends.method == "counter"]
    if ends.method != "counter":
        flags.append("integrated_power")
    elif not checks:
        flags.append("no_cross_check")
    elif any(abs(w / power_w - 1) > AGREE_REL for w in checks):
        flags.append("sensor_disagreement")
    if per_iteration_s > _SAFE_PERIOD_S and not caps.continuous:
        flags.append("aliasing_risk")
    if caps.scope != "package" and power_w < _low_power_w(caps):
        flags.append("low_power")
    flags += board_flags(readings, caps.scope)
    capped_ns = grown(readings, "capped_ns")
    covered_ns = readings[-1].t_ns - readings[0].t_ns
    energy_j = power_w * duration_s
    refresh_ns = run.recorder.refresh_ns
    polled_s = (run.recorder.readings[-1].t_ns - run.recorder.readings[0].t_ns) / 1e9
    status = "discard" if DISCARD & set(flags) else "unsteady" if "unsteady" in flags else "ok"
    return EnergyWindow(
        energy_j=energy_j,
        duration_s=duration_s,
        average_power_w=power_w,
        iterations=duration_s / per_iteration_s,
        time_per_iteration_s=per_iteration_s,
        energy_per_iteration_j=power_w * per_iteration_s,
        idle_power_w=idle_w,
        dynamic_energy_j=None if idle_w is None else energy_j - idle_w * duration_s,
        method=ends.method,
        scope=caps.scope,
        uncertainty_rel=(ends.start.slack_ns + ends.end.slack_ns) / 1e9 / duration_s,
        counter_power_w=counter_w,
        instant_power_w=instant_w,
        smoothed_power_w=smoothed_w,
        capped_fraction=min(1.0, capped_ns / covered_ns)
        if capped_ns is not None and covered_ns
        else None,
        clock_sm_mhz=held_mean(readings, "clock_sm_mhz", start, end),
        clock_mem_mhz=held_mean(readings, "clock_mem_mhz", start, end),
        temperature_c=held_mean(readings, "temperature_c", start, end),
        refresh_s=caps.refresh_s if refresh_ns is None else refresh_ns / 1e9,
        meter_cpu_s=run.recorder.cpu_s,
        meter_share=run.recorder.cpu_s / polled_s if polled_s else math.nan,
        flags=tuple(flags),
        status=status,
    )


def _watts(readings: Sequence[Reading], name: str, start: float, end: float) -> float | None:
    milliwatts = held_mean(readings, name, start, end)
    return None if milliwatts is None else milliwatts / 1e3


def _low_power_w(caps: Capabilities) -> float:
    return _LOW_POWER_W if caps.cap_w is None else _LOW_SHARE_OF_CAP * caps.cap_w


def _time_per_iteration(
    progress: Sequence[tuple[int, int, float | None]], start: float, end: float, flags: list[str]
) -> float:
    """Seconds an iteration, from the chunks that ended inside the window and the one before."""
    inside = [p for p in progress if start <= p[0] <= end]
    before = [p for p in progress if p[0] < start]
    inside = before[-1:] + inside
    done = inside[-1][1] - inside[0][1] if inside else 0
    if done <= 0:
        raise ValueError(
            f"expected run_chunk to finish work within {(end - start) / 1e9:.1f} s, got {done} iterations; let "
            "it return what has finished since its last call"
        )
    host_s = (inside[-1][0] - inside[0][0]) / 1e9 / done
    if inside[0][2] is None or inside[-1][2] is None:
        return host_s
    device_s = (inside[-1][2] - inside[0][2]) / done
    if device_s < 0.98 * host_s:  # the joules include the gaps, so the time must
        flags.append("host_gaps")
        return host_s
    return device_s
