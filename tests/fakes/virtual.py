"""A virtual clock, and a board whose true energy is known and whose sensors look at it as real ones do."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator

from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Capabilities, Reading


class VirtualClock:
    """Time that passes only in `sleep`; what runs beside takes its turns meanwhile."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now = int(start_s * 1e9)
        self.wall_offset_ns = 1_700_000_000 * 10**9
        self._beside: list[_Turns] = []
        self._in_a_turn = False

    def now_ns(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        return self._now + self.wall_offset_ns

    def sleep(self, seconds: float) -> None:
        end = self._now + int(seconds * 1e9)
        while not self._in_a_turn:
            due = min(
                (t for t in self._beside if t.due_ns <= end), key=lambda t: t.due_ns, default=None
            )
            if due is None:
                break
            self._now = max(self._now, due.due_ns)
            self._in_a_turn = True
            try:
                due.turn()
            finally:
                self._in_a_turn = False
        self._now = max(self._now, end)

    def beside(self, steps: Iterator[float]) -> _Turns:
        turns = _Turns(self, steps)
        self._beside.append(turns)
        return turns

    @property
    def beside_count(self) -> int:
        return len(self._beside)

    def drop(self, turns: _Turns) -> None:
        if turns in self._beside:
            self._beside.remove(turns)


class _Turns:
    """What runs beside, one turn at a time."""

    def __init__(self, clock: VirtualClock, steps: Iterator[float]) -> None:
        self._clock, self._steps = clock, steps
        self.due_ns = clock.now_ns()

    def turn(self) -> None:
        pause_s = next(self._steps, None)
        if pause_s is None:
            self._clock.drop(self)
        else:
            self.due_ns = self._clock.now_ns() + max(1, int(pause_s * 1e9))

    def wake(self) -> None:
        self.due_ns = min(self.due_ns, self._clock.now_ns())

    def stop(self) -> float:
        self._clock.drop(self)
        return 0.0


class Board:
    """True power over time, piecewise constant, and its exact integral."""

    def __init__(self, clock: VirtualClock, watts: float = 80.0) -> None:
        self.clock = clock
        self._t = [0]
        self._j = [0.0]
        self._w = [watts]

    def draw(self, watts: float) -> None:
        """From now on."""
        now = self.clock.now_ns()
        joules = self.joules(now)
        self._t.append(now)
        self._j.append(joules)
        self._w.append(watts)

    def joules(self, t_ns: float) -> float:
        i = max(bisect.bisect_right(self._t, t_ns) - 1, 0)
        return self._j[i] + self._w[i] * (t_ns - self._t[i]) / 1e9

    def mean_w(self, start_ns: float, end_ns: float) -> float:
        return (self.joules(end_ns) - self.joules(start_ns)) / (end_ns - start_ns) * 1e9


class Sensor:
    """What a board's sensors show at a time.

    Args:
        board: the truth.
        refresh_s: of the counter and of power alike.
        window_s: what instantaneous power looks at before each refresh.
        phase_s, jitter_s: of the refreshes; each is off by up to +- jitter.
        gain, offset_w: a sensor's error.
        continuous: False: the counter adds up what instantaneous power saw.
    """

    def __init__(
        self,
        board: Board,
        *,
        refresh_s: float = 0.1,
        window_s: float = 0.025,
        phase_s: float = 0.0,
        jitter_s: float = 0.0,
        gain: float = 1.0,
        offset_w: float = 0.0,
        continuous: bool = True,
    ) -> None:
        self.board = board
        self._refresh, self._window = refresh_s * 1e9, window_s * 1e9
        self._phase, self._jitter = phase_s * 1e9, jitter_s * 1e9
        self._gain, self._offset_w = gain, offset_w
        self._sampled: dict[int, float] | None = None if continuous else {}
        self._first = self._index(board.clock.now_ns()) - 20
        self.lost_mj = 0.0  # set to what a reset takes away

    def _at(self, k: int) -> float:
        """Time of refresh k."""
        return self._phase + k * self._refresh + random.Random(k).uniform(-1, 1) * self._jitter

    def _index(self, t_ns: float) -> int:
        k = int((t_ns - self._phase) // self._refresh) + 1
        while self._at(k) > t_ns:
            k -= 1
        return k

    def _seen_w(self, k: int, window_ns: float) -> float:
        t = self._at(k)
        return self._gain * self.board.mean_w(t - window_ns, t) + self._offset_w

    def energy_mj(self, t_ns: float) -> int:
        k = self._index(t_ns)
        if self._sampled is None:
            t = self._at(k)
            joules = self._gain * self.board.joules(t) + self._offset_w * t / 1e9
        else:
            known = max(self._sampled, default=self._first)
            joules = self._sampled.get(known, 0.0)
            for i in range(known + 1, k + 1):
                joules += self._seen_w(i, self._window) * (self._at(i) - self._at(i - 1)) / 1e9
                self._sampled[i] = joules
            joules = self._sampled.get(k, 0.0)
        return int(joules * 1e3 - self.lost_mj)

    def instant_mw(self, t_ns: float) -> int:
        return int(self._seen_w(self._index(t_ns), self._window) * 1e3)

    def average_mw(self, t_ns: float) -> int:
        return int(self._seen_w(self._index(t_ns), 1e9) * 1e3)


class FakeSource:
    """An `EnergySource` over a `Sensor`.

    Args:
        twist: changes readings on their way out.
        latency_s: longest time a reading takes; each takes a random part of it.
    """

    def __init__(
        self,
        sensor: Sensor,
        *,
        counter: bool = True,
        instant: bool = True,
        average: bool = True,
        twist: Callable[[Reading], Reading] = lambda reading: reading,
        latency_s: float = 0.0,
        **caps: object,
    ) -> None:
        self._sensor, self._clock, self._twist = sensor, sensor.board.clock, twist
        self._latency_s, self._random = latency_s, random.Random(0)
        self.foreign_pids: tuple[int, ...] | Unavailable = ()
        self.closed = 0
        self.clock_mhz, self.temperature_c, self.thermal_ns, self.capped_ns = 1980.0, 50.0, 0, 0
        facts: dict[str, object] = {"backend": "fake", "device": "FAKE-BOARD", "scope": "gpu"}
        self.caps = Capabilities(
            **(facts | {"counter": counter, "instant": instant, "average": average} | caps)  # type: ignore[arg-type]
        )

    def read(self, state: bool = False) -> Reading:
        caps, half_s = self.caps, self._latency_s * self._random.random() / 2
        self._clock.sleep(half_s)
        now = self._clock.now_ns()
        self._clock.sleep(half_s)
        return self._twist(
            Reading(
                t_ns=now,
                took_ns=int(2e9 * half_s),
                energy_mj=self._sensor.energy_mj(now) if caps.counter else None,
                instant_mw=self._sensor.instant_mw(now) if caps.instant else None,
                average_mw=self._sensor.average_mw(now) if caps.average else None,
                capped_ns=self.capped_ns,
                thermal_ns=self.thermal_ns,
                brake_ns=0,
                clock_sm_mhz=self.clock_mhz if state else None,
                clock_mem_mhz=2619.0 if state else None,
                temperature_c=self.temperature_c if state else None,
            )
        )

    def foreign(self) -> tuple[int, ...] | Unavailable:
        return self.foreign_pids

    def close(self) -> None:
        self.closed += 1
