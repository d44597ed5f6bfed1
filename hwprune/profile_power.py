"""The power of a profile's anchors: as many operations as the time allows, from idle hands to full load.

An energy window takes seconds where a time takes milliseconds, so few operations get one; the others' power is
interpolated between them (`predict_power`). Energy is power times latency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from hwprune.device import Entry
from hwprune.meter.arms import Arm, describe
from hwprune.meter.clock import Clock
from hwprune.meter.energy_window import EnergyWindow
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.idle import idle_power
from hwprune.meter.modes import Runnable
from hwprune.meter.schedule import chunks
from hwprune.meter.source import EnergySource
from hwprune.meter.window import energy_of
from hwprune.ops import Op

_ANCHOR_S = 6.0  # of an energy window with its ramp
_SETTLE_S = 4.0
_IDLE_S = 3.0
_CALL_S = 3e-3  # of a graph: above launch noise, below what aliases with a slow sensor
_FAILURES = 3  # in a row, after which the sensor is not asked again


@dataclass
class Anchors:
    """What was measured of power.

    Attributes:
        windows: operation -> its window.
        failed: operation -> why it has none.
        idle_w: of the device before, or None.
    """

    windows: dict[Op, EnergyWindow] = field(default_factory=dict)
    failed: dict[Op, str] = field(default_factory=dict)
    idle_w: float | None = None


def choose_anchors(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Evenly over the rates of work, which power follows, from the slowest to the quickest."""
    ranked = sorted(entries, key=lambda e: e.op.macs / e.latency_s)
    count = min(count, len(ranked))
    if count < 2:
        return ranked[:count]
    places = [round(i * (len(ranked) - 1) / (count - 1)) for i in range(count)]
    return [ranked[i] for i in dict.fromkeys(places)]


def measure_powers(
    entries: Sequence[Entry],
    source: EnergySource | Unavailable,
    device: torch.device,
    ready: Callable[[Op, float], Runnable],
    end_s: float,
    clock: Clock,
    progress: Callable[[str, int, int], None] | None,
) -> Anchors:
    """Measure the power of some operations until the time is up.

    Args:
        entries: all, with their latency.
        source: an opened sensor; nothing runs where there is none.
        device: where the operations run.
        ready: makes an operation ready to be called for about so many seconds a call.
        end_s: by the clock.
        clock: of the run.
        progress: called with ("energy", done, total).
    """
    found = Anchors()
    if isinstance(source, Unavailable) or end_s - clock.now_ns() / 1e9 < _IDLE_S + _ANCHOR_S:
        return found
    idle = idle_power(source, _IDLE_S, clock=clock)
    found.idle_w = idle.value if isinstance(idle, Estimate) else None
    anchors = choose_anchors(entries, int((end_s - clock.now_ns() / 1e9) / _ANCHOR_S))
    # From the middle outwards in halves, so that a run that is cut short has seen all sorts.
    order = sorted(range(len(anchors)), key=lambda i: int(f"{i:012b}"[::-1], 2))
    failures = 0
    for done, i in enumerate(order):
        entry = anchors[i]
        if clock.now_ns() / 1e9 > end_s - _ANCHOR_S or failures >= _FAILURES:
            break
        try:
            runs = ready(entry.op, _CALL_S)
            arm = Arm("op", runs.call, runnable=runs, call_s=entry.latency_s * runs.per_call)
            run_chunk, drain = chunks(arm, device)
            window = energy_of(source, run_chunk, drain=drain, settle_s=_SETTLE_S, clock=clock)
        except Exception as error:  # of a kernel or an allocation: the others are worth having
            found.failed[entry.op] = describe(error)
            continue
        if isinstance(window, Unavailable):
            found.failed[entry.op] = window.reason
            failures += 1
            continue
        failures = 0
        if window.status == "discard":
            found.failed[entry.op] = f"discarded: {', '.join(window.flags)}"
            continue
        found.windows[entry.op] = window
        if progress is not None:
            progress("energy", done + 1, len(anchors))
    return found


def with_power(entries: Sequence[Entry], anchors: Anchors) -> list[Entry]:
    """The entries, the anchors among them with their power and the energy of a call."""
    found = []
    for entry in entries:
        window = anchors.windows.get(entry.op)
        if window is not None:
            power_w = window.average_power_w
            status = entry.status if window.status == "ok" else window.status
            energy_j = power_w * entry.latency_s
            entry = replace(entry, power_w=power_w, energy_j=energy_j, status=status)
        found.append(entry)
    return found
