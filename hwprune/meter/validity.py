"""Whether a round counts: what happened to the machine while it ran."""

from __future__ import annotations

from collections.abc import Callable

from hwprune.meter.clock import Clock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import EnergySource, Reading

_CLOCK_STEP_NS = 1_000_000  # wall against monotonic time: a set clock, or a machine that slept
_SLEW = 5e-4  # NTP may slow or hasten the wall clock by so much without a step
_CLOCK_REL = 0.03  # core clock between the arms of one round


class RoundWatch:
    """Looks at the clocks, the compilers and, where there is one, the sensor's throttle counters."""

    def __init__(
        self,
        clock: Clock,
        compilations: Callable[[], int],
        source: EnergySource | Unavailable,
    ) -> None:
        self._clock, self._compilations, self._source = clock, compilations, source

    def begin(self) -> None:
        """A round starts."""
        self._compiled = self._compilations()
        self._start_ns, self._wall_ns = self._clock.now_ns(), self._clock.wall_ns()
        self._readings = [self._look()]

    def block(self) -> None:
        """A block of it has ended."""
        self._readings.append(self._look())

    def verdict(self) -> str:
        """Why the round that ends now does not count; "" where it does."""
        if self._compilations() != self._compiled:
            return "something was compiled while it ran"
        elapsed_ns = self._clock.now_ns() - self._start_ns
        moved_ns = abs(self._clock.wall_ns() - self._wall_ns - elapsed_ns)
        if moved_ns > _CLOCK_STEP_NS + _SLEW * elapsed_ns:
            return f"the system's clock moved by {moved_ns / 1e6:.0f} ms, or the machine slept"
        readings = [r for r in self._readings if r is not None and not r.error]
        if len(readings) < 2:
            return ""
        for name, what in (
            ("thermal_ns", "the board slowed down because it was hot"),
            ("brake_ns", "an external power brake slowed the board down"),
        ):
            if _grew(readings, name):
                return what
        clocks = [r.clock_sm_mhz for r in readings[1:] if r.clock_sm_mhz]
        moved = len(clocks) > 1 and max(clocks) > (1 + _CLOCK_REL) * min(clocks)
        # Under the power cap the clock follows the work: that is part of what is measured.
        if moved and not _grew(readings, "capped_ns"):
            return f"the core clock moved between {min(clocks):.0f} and {max(clocks):.0f} MHz"
        return ""

    def _look(self) -> Reading | None:
        return None if isinstance(self._source, Unavailable) else self._source.read(state=True)


def _grew(readings: list[Reading], name: str) -> bool:
    seen = [value for r in readings if (value := getattr(r, name)) is not None]
    return len(seen) > 1 and seen[-1] > seen[0]
