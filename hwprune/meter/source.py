"""What an energy sensor is: what it can answer, one reading of it, and the protocol it is read through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hwprune.meter.estimate import Unavailable

# What a sensor that nobody calibrated is off by, steadily: -8 to +13 % seen against an external meter,
# mostly within 5 % (Yang et al., arXiv 2312.02741). It cancels in a ratio taken on one board.
GAIN_UNCERTAINTY_REL = 0.05


@dataclass(frozen=True)
class Capabilities:
    """What a sensor can answer, decided once when it is opened.

    Attributes:
        backend: "nvml", "rapl" or "rocm".
        device: product name.
        scope: what the joules cover: "gpu", "module" (GPU, CPU and memory of a superchip) or "package".
        counter: there is an energy counter.
        instant: there is a power reading over a window of at most about 0.1 s.
        average: there is a power reading averaged over the trailing `average_window_s`.
        average_window_s: that window.
        refresh_s: the counter's refresh where the backend states it; None = it is learnt while measuring.
        continuous: the counter integrates true power. False or None (unknown): it may share the duty of a
            power sensor that looks a quarter of the time, and alias with slow periodic loads.
        cap_w: the power limit in force.
        identity: what tells this board from another (UUID, or the sysfs names).
        mapping: how it was found: "uuid", "pci", "single-device", "index".
        missing: what is not there -> why.
        notes: what a reader of the figures must know.
    """

    backend: str
    device: str
    scope: str
    counter: bool
    instant: bool
    average: bool
    average_window_s: float = 1.0
    refresh_s: float | None = None
    continuous: bool | None = None
    cap_w: float | None = None
    identity: str = ""
    mapping: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One look at a sensor. A field that could not be had is None, never zero, and `status` says why.

    Attributes:
        t_ns: monotonic time, the middle of the call.
        took_ns: how long the call took; the value is from t_ns +- took_ns / 2.
        energy_mj: energy counter.
        instant_mw, average_mw: power.
        capped_ns: time spent below the wanted clocks because of the power cap, cumulative.
        thermal_ns: the same because of temperature, software and hardware slowdown together.
        brake_ns: the same because of an external power brake.
        clock_sm_mhz, clock_mem_mhz, temperature_c: only in readings asked for with their state.
        reasons: bits of what holds the clocks down at this moment; with state only.
        epoch: the counter is comparable only between readings of one epoch.
        status: field -> why it is None.
        error: why the whole reading failed; "" where it did not.
        lost: nothing can be read from this device any more.
    """

    t_ns: int
    took_ns: int = 0
    energy_mj: float | None = None
    instant_mw: float | None = None
    average_mw: float | None = None
    capped_ns: int | None = None
    thermal_ns: int | None = None
    brake_ns: int | None = None
    clock_sm_mhz: float | None = None
    clock_mem_mhz: float | None = None
    temperature_c: float | None = None
    reasons: int | None = None
    epoch: int = 0
    status: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    lost: bool = False


class EnergySource(Protocol):
    """A sensor that was opened. Nothing here raises for what a sensor, driver or system does."""

    @property
    def caps(self) -> Capabilities:
        """What it can answer."""

    def read(self, state: bool = False) -> Reading:
        """One reading; `state` adds clocks, temperature and throttle reasons, which are slower calls."""

    def foreign(self) -> tuple[int, ...] | Unavailable:
        """Process ids, other than this one and its children, that compute on the device."""

    def close(self) -> None:
        """Give it back; harmless when repeated."""
