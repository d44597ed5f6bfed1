"""What measuring the energy of repeated work gives: the window, and what its flags mean."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# What a flag means, for a person. The first four make a window worth discarding with its round.
FLAGS = {
    "thermal_slowdown": "the board slowed down because it was hot",
    "hw_power_brake": "an external power brake slowed the board down",
    "clock_step": "the system's clock was set while it was measured",
    "foreign_process": "another process computed on the device",
    "unsteady": "power, clocks or temperature still moved after the longest warm-up",
    "sensor_disagreement": "the energy counter and the power sensors differ by more than 5 %",
    "no_cross_check": "the board has one sensor only, so nothing confirms it",
    "integrated_power": "no energy counter: power readings were added up",
    "aliasing_risk": "an iteration is longer than 5 ms, and the sensor may look a quarter of the time only",
    "unstable_idle": "idle power moved by more than 3 %, so somebody may use the device",
    "low_power": "so little power that the sensor's offset may matter; use a larger batch",
    "host_gaps": "the device waited for the host; its energy in the gaps is counted",
    "module_scope": "the counter covers the whole module: GPU, CPU and memory",
}
DISCARD = frozenset(list(FLAGS)[:4])


@dataclass(frozen=True)
class Chunk:
    """Work that has finished since the last call.

    Attributes:
        iterations: how many.
        device_s: their time on the device (from its own events); None where only the host's clock knows.
    """

    iterations: int
    device_s: float | None = None


@dataclass(frozen=True)
class EnergyWindow:
    """Energy of work over one steady window.

    Attributes:
        energy_j: gross energy of the window, idle part included: what the meter on the wall pays.
        duration_s: length of the window.
        average_power_w: the one over the other.
        iterations: iterations that fit into the window, at `time_per_iteration_s` each.
        time_per_iteration_s: of the device where its events are known and it never waited, else of the host.
        energy_per_iteration_j: average power times that.
        idle_power_w: as given by the caller; None where unknown.
        dynamic_energy_j: gross less idle power times duration; None without `idle_power_w`.
        method: "counter", "instant" or "average": what was read.
        scope: what the joules cover.
        uncertainty_rel: how well the window's ends are known. The sensor's gain (about 5 %, the same for
            everything measured on the board) and the wander of power between windows come on top.
        counter_power_w, instant_power_w, smoothed_power_w: the board's three answers; None where it has none.
        capped_fraction: share of the window below the wanted clocks because of the power cap.
        clock_sm_mhz, clock_mem_mhz, temperature_c: means over the window.
        refresh_s: of the counter, as seen.
        meter_cpu_s: CPU time of the polling, warm-up included.
        meter_share: the same by the time polled.
        flags: see `FLAGS`.
        status: "ok", "unsteady" or "discard".
    """

    energy_j: float
    duration_s: float
    average_power_w: float
    iterations: float
    time_per_iteration_s: float
    energy_per_iteration_j: float
    idle_power_w: float | None
    dynamic_energy_j: float | None
    method: str
    scope: str
    uncertainty_rel: float
    counter_power_w: float | None
    instant_power_w: float | None
    smoothed_power_w: float | None
    capped_fraction: float | None
    clock_sm_mhz: float | None
    clock_mem_mhz: float | None
    temperature_c: float | None
    refresh_s: float | None
    meter_cpu_s: float
    meter_share: float
    flags: tuple[str, ...]
    status: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self) | {"flags": list(self.flags)}
