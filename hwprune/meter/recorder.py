"""Polls a sensor beside the work: every 20 ms, and every 1.5 ms where a change of the counter is due.

Polling faster all the time would cost the measured process, and makes some drivers answer 0 mW or
"not supported".
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from hwprune.meter.clock import Beside, Clock
from hwprune.meter.source import EnergySource, Reading
from hwprune.meter.ticks import Tick, refresh_ns, ticks

PAUSE_S = 0.020  # between readings
SPIN_S = 0.0015  # between readings near a tick
STATE_S = 0.25  # between readings of clocks and temperature, which are slower calls
_KNOWN_TICKS = 9  # the refresh is the median of the last eight


class Recorder:
    """Readings, oldest first, while it runs.

    Args:
        source: what to poll.
        clock: time, and what the polling runs beside.
        stretch: lets the time between readings grow to this share of the time polled so far, up to a
            second, so that hours of work make thousands of readings and not a million.

    Attributes:
        readings: what was read so far; only appended to.
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
        self._seen: list[Tick] = []
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
        if self.readings:
            self._seen = (self._seen + ticks([self.readings[-1], reading]))[-_KNOWN_TICKS:]

    def _rest_s(self, now_ns: int) -> float:
        """Until the next reading: short only while a tick is wanted and due."""
        if not self._spinning:
            return max(PAUSE_S, min(1.0, self._stretch * (now_ns - self._began_ns) / 1e9))
        refresh = refresh_ns(self._seen)
        if refresh is None or self._seen[-1].slack_ns > 0.3 * refresh:
            return SPIN_S
        # The last tick was seen up to a pause late, or the refresh jitters: be there before it.
        early_ns = self._seen[-1].slack_ns + 0.1 * refresh
        left_s = (self._seen[-1].t_ns + refresh - early_ns - now_ns) / 1e9
        return max(SPIN_S, min(PAUSE_S, left_s))
