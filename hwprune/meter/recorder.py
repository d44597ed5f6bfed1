"""Polls a sensor beside the work: ten times a second, and closely only where a change of the counter is due.

A reading after a rest costs some 0.2 ms of a core, caches being cold, so polling every 20 ms would take 1 % of
it from the measured process; polled faster still, some drivers answer 0 mW or "not supported".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from statistics import median

from hwprune.meter.clock import Beside, Clock
from hwprune.meter.source import EnergySource, Reading
from hwprune.meter.ticks import Tick, refresh_ns, ticks

PAUSE_S = 0.1  # between readings: power sensors refresh no faster
NEAR_S = 0.005  # between readings while a tick is looked for
SPIN_S = 0.0015  # between readings where one is expected
STATE_S = 0.5  # between readings of clocks and temperature, which are slower calls
_LEARN_S = 0.35  # three refreshes of the slowest counter seen
_ENOUGH = 8  # intervals that the refresh is the median of


class Recorder:
    """Readings, oldest first, while it runs.

    Args:
        source: what to poll.
        clock: time, and what the polling runs beside.
        stretch: lets the time between readings grow to this share of the time polled so far, up to a
            second, so that hours of work make thousands of readings and not a million.

    Attributes:
        readings: what was read so far; only appended to.
        refresh_ns: between changes of the counter, as far as seen closely; None = unknown.
        fault: why polling ended by itself; "" while it goes on.
        cpu_s: CPU seconds the polling took, once stopped.
    """

    def __init__(self, source: EnergySource, clock: Clock, *, stretch: float = 0.0) -> None:
        self.readings: list[Reading] = []
        self.fault = ""
        self.cpu_s = 0.0
        self._source = source
        self._clock = clock
        self._stretch = stretch
        self._spinning = False
        self.refresh_ns: float | None = None
        self._seen: list[Tick] = []
        self._intervals: list[float] = []
        self._began_ns = 0
        self._beside: Beside | None = None
        self._pid = os.getpid()

    def start(self) -> None:
        """Begin to poll."""
        self._began_ns = self._clock.now_ns()
        self._beside = self._clock.beside(self._steps())

    def watch(self, closely: bool) -> None:
        """Poll closely, while a change of the counter is waited for, or no longer."""
        self._spinning = closely
        if closely and self._beside is not None:
            self._beside.wake()

    def stop(self) -> None:
        """End polling; harmless when repeated."""
        beside, self._beside = self._beside, None
        if beside is None:
            return
        if os.getpid() != self._pid:  # the thread stayed behind in the parent
            self.fault = self.fault or "the process forked while it was measured"
            return
        self.cpu_s = beside.stop()

    def since(self, t_ns: float) -> list[Reading]:
        """The readings from a time on, and the last one before it."""
        first = len(self.readings)
        while first > 0 and self.readings[first - 1].t_ns >= t_ns:
            first -= 1
        return self.readings[max(first - 1, 0) :]

    def _steps(self) -> Iterator[float]:
        state_due = 0
        while True:
            now = self._clock.now_ns()
            with_state = now >= state_due and not self._spinning
            if with_state:
                state_due = now + int(STATE_S * 1e9)
            try:
                reading = self._source.read(with_state)
            except (
                Exception
            ) as error:  # a source must not raise; one that does must not be lost silently
                self.fault = f"the sensor's own code failed: {type(error).__name__}: {error}"
                return
            self._note(reading)
            self.readings.append(reading)
            if reading.lost:
                self.fault = reading.error
                return
            yield self._rest_s(reading.t_ns)

    def _note(self, reading: Reading) -> None:
        """Learn the refresh from neighbouring ticks."""
        found = ticks([self.readings[-1], reading]) if self.readings else []
        if not found:
            return
        self._seen = [*self._seen[-1:], *found]
        interval = refresh_ns(self._seen)
        if interval is not None:
            self._intervals = [*self._intervals[1 - _ENOUGH :], interval]
            self.refresh_ns = median(self._intervals)

    def _rest_s(self, now_ns: int) -> float:
        """Until the next reading: short only while a tick is wanted, and shortest where it is due."""
        polled_s = (now_ns - self._began_ns) / 1e9
        stated = self._source.caps.refresh_s
        if not self._spinning:
            learning = stated is None and not self._stretch and not self._intervals
            if learning and polled_s < _LEARN_S:
                return self._closer_s(now_ns)
            return max(PAUSE_S, min(1.0, self._stretch * polled_s))
        if stated is not None and stated < NEAR_S:
            return SPIN_S
        return self._closer_s(now_ns)

    def _closer_s(self, now_ns: int) -> float:
        """Find one tick nearly; the next comes a refresh later, give or take some jitter."""
        if not self._seen:
            return NEAR_S
        last = self._seen[-1]
        if len(self._seen) > 1 and last.t_ns - self._seen[0].t_ns < 4e9 * NEAR_S:
            return SPIN_S  # a quick counter: every look near would see a change
        if self.refresh_ns is None or last.slack_ns > 1e9 * NEAR_S:
            return NEAR_S
        early_ns = last.slack_ns + 0.1 * self.refresh_ns
        left_s = (last.t_ns + self.refresh_ns - early_ns - now_ns) / 1e9
        return max(SPIN_S, min(PAUSE_S, left_s))
