"""Keeps work going beside a polled sensor: until the state is steady, from tick to tick, or for a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hwprune.meter.clock import Clock
from hwprune.meter.energy_window import Chunk
from hwprune.meter.recorder import Recorder
from hwprune.meter.source import EnergySource
from hwprune.meter.ticks import (
    Tick,
    block_means,
    counted_power,
    drift,
    held_mean,
    reading_fault,
    slope_per_s,
    ticks,
)

# Without a change in that time there is no counter; the slowest one seen refreshes every 0.1 s.
PATIENCE_S = 1.0
_NOTED_NS = (
    1_000_000  # progress is noted no more often: chunks of microseconds would fill the memory
)
# A tick seen as closely as that is taken; else a second one is waited for, but not for long.
_CLOSE_NS, _SECOND_LOOK_NS, _LAST_LOOK_NS = 1.5e6, 0.15e9, 0.35e9
_BLOCK_S, _BLOCKS, _STEADY_REL, _STEADY_C_PER_S = 0.3, 5, 0.01, 0.5


@dataclass(frozen=True)
class Ends:
    """The two ends of a window.

    Attributes:
        start, end: ticks of the counter; or mere times, with 0 for the counter, where only power is read.
        method: "counter", "instant" or "average".
    """

    start: Tick
    end: Tick
    method: str


class Run:
    """Work going on, with a recorder beside it.

    Attributes:
        progress: every ms or more: time in ns, iterations so far, their device seconds (None: unknown).
    """

    def __init__(self, source: EnergySource, run_chunk: Callable[[], Chunk], clock: Clock) -> None:
        self.clock = clock
        self.recorder = Recorder(source, clock)
        self.progress: list[tuple[int, int, float | None]] = []
        self._done = 0
        self._device_s: float | None = 0.0
        self._caps = source.caps
        self._run_chunk = run_chunk

    def step(self) -> int:
        """One chunk; returns the time after it."""
        chunk = self._run_chunk()
        now = self.clock.now_ns()
        self._done += chunk.iterations
        if self._device_s is not None:
            self._device_s = None if chunk.device_s is None else self._device_s + chunk.device_s
        if not self.progress or now - self.progress[-1][0] >= _NOTED_NS:
            self.progress.append((now, self._done, self._device_s))
        return now

    def settle(self, ramp_s: float, settle_s: float) -> bool:
        """Run until the ramp is over and the state is steady; False where it never was."""
        start = now = self.clock.now_ns()
        checked = start
        while not self.recorder.fault:
            now = self.step()
            if now - start < ramp_s * 1e9 or now - checked < 1e8:
                continue
            checked = now
            recent = self.recorder.since(now - PATIENCE_S * 1e9)
            if now - start >= settle_s * 1e9 or all(r.error for r in recent):
                return False  # and what follows says what the matter is
            if self._steady(now):
                return True
        return False

    def _steady(self, now: int) -> bool:
        start = now - _BLOCK_S * _BLOCKS * 1e9
        recent = self.recorder.since(start)
        if not recent or recent[0].t_ns > start:
            return False
        slack = 0.0
        if self._caps.instant or self._caps.average:
            name = "instant_mw" if self._caps.instant else "average_mw"
            power = block_means(lambda a, b: held_mean(recent, name, a, b), now, _BLOCK_S, _BLOCKS)
        else:
            power = block_means(lambda a, b: counted_power(recent, a, b), now, _BLOCK_S, _BLOCKS)
            slack = (self.recorder.refresh_ns or 0.0) / (_BLOCK_S * 1e9)
        if power is None or drift(power) > _STEADY_REL + slack:
            return False
        if any(r.clock_sm_mhz is not None for r in recent):
            clocks = block_means(
                lambda a, b: held_mean(recent, "clock_sm_mhz", a, b), now, _BLOCK_S, _BLOCKS
            )
            if clocks is not None and drift(clocks) > _STEADY_REL:
                return False
        warming = slope_per_s(recent, "temperature_c", start)
        return warming is None or abs(warming) < _STEADY_C_PER_S

    def _next_tick(self, after_ns: float) -> Tick | None:
        """Run until the counter changes after a time, watching closely; None where it does not."""
        asked = now = self.clock.now_ns()
        best: Tick | None = None
        self.recorder.watch(closely=True)
        try:
            looked = 0
            while not self.recorder.fault and now - asked < PATIENCE_S * 1e9:
                now = self.step()
                if looked == len(self.recorder.readings):
                    continue
                looked = len(self.recorder.readings)
                seen = [t for t in ticks(self.recorder.since(asked)) if t.t_ns > after_ns]
                best = min(seen, key=lambda tick: tick.slack_ns, default=None)
                enough_ns = _SECOND_LOOK_NS if len(seen) > 1 else _LAST_LOOK_NS
                if best and (best.slack_ns < _CLOSE_NS or now - asked > enough_ns):
                    break
        finally:
            self.recorder.watch(closely=False)
        return best

    def tick_to_tick(self, min_window_s: float) -> Ends | None:
        """Run from one change of the counter to another; None where it stands still or fails."""
        start = self._next_tick(self.clock.now_ns())
        if start is None:
            return None
        while not self.recorder.fault and self.step() < start.t_ns + min_window_s * 1e9:
            pass
        end = self._next_tick(start.t_ns + min_window_s * 1e9)
        return None if end is None else Ends(start, end, "counter")

    def counter_silence(self) -> str:
        """Why no tick was seen, where the counter could not be read; "" where it merely stood still."""
        recent = self.recorder.since(self.clock.now_ns() - PATIENCE_S * 1e9)
        return self.recorder.fault or reading_fault(recent, "energy_mj")

    def span(self, window_s: float) -> Ends:
        """Run for a time; its ends are known to a reading of the power sensor."""
        start = self.clock.now_ns()
        now = start
        while not self.recorder.fault and now - start < window_s * 1e9:
            now = self.step()
        slack = 0.05e9  # half a refresh of 0.1 s, the slowest power sensor seen
        method = "instant" if self._caps.instant else "average"
        return Ends(Tick(start, slack, 0.0), Tick(now, slack, 0.0), method)
