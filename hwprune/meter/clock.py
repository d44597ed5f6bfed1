"""The clock that measurements run by, and work that runs beside it: real, or a test's own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol


class Beside(Protocol):
    """Something that runs beside the caller until it is stopped."""

    def wake(self) -> None:
        """End its rest now."""

    def stop(self) -> float:
        """End it and wait for it; returns the CPU seconds it took."""


class Clock(Protocol):
    """Monotonic time, wall time, and a way to do something at intervals meanwhile."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds: every duration comes from these."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970; only watched for steps."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def beside(self, steps: Iterator[float]) -> Beside:
        """Run `steps` beside the caller: after each step it rests for the seconds the step yields."""


class RealClock:
    """The system's clocks, and a thread."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds."""
        return time.perf_counter_ns()

    def wall_ns(self) -> int:
        """Nanoseconds since 1970."""
        return time.time_ns()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def beside(self, steps: Iterator[float]) -> Beside:
        """Run `steps` in a daemon thread."""
        return _Thread(steps)


class _Thread:
    """A thread that walks through an iterator and can be woken from its rest."""

    def __init__(self, steps: Iterator[float]) -> None:
        self._steps = steps
        # A bare lock, held while there is no reason to wake: an Event costs 50 us more a turn.
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._ended = False
        self._cpu_s = 0.0
        self._thread = threading.Thread(target=self._run, name="hwprune-meter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for pause_s in self._steps:
            self._asleep.acquire(timeout=pause_s)
            if self._ended:
                break
        self._cpu_s = time.thread_time()  # of this thread alone, since it began

    def wake(self) -> None:
        """End its rest now."""
        with contextlib.suppress(RuntimeError):  # it was woken already
            self._asleep.release()

    def stop(self) -> float:
        """End it and wait for it; returns the CPU seconds it took."""
        self._ended = True
        self.wake()
        # A driver call that hangs must not hang the program: the daemon thread is left behind.
        self._thread.join(timeout=10)
        return self._cpu_s
