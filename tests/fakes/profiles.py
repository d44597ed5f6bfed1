"""Profiles with made-up figures, for tests: marked synthetic, so that nothing takes them for measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwprune.device import DeviceProfile, Entry
from hwprune.ops import Op


def entry_of(op: Op, seconds: float, **given: Any) -> Entry:
    """One operation, known within a percent."""
    fields: dict[str, Any] = {"lo_s": 0.99 * seconds, "hi_s": 1.01 * seconds, "rounds": 9}
    return Entry(op, seconds, **{**fields, **given})


def profile_of(
    times: Mapping[Op, float],
    *,
    name: str = "fake",
    device: Mapping[str, Any] | None = None,
    power_w: float | None = None,
    **given: Any,
) -> DeviceProfile:
    """A profile in which each operation takes its seconds and draws the same power."""
    energy = {op: None if power_w is None else power_w * s for op, s in times.items()}
    entries = [
        entry_of(op, s, power_w=power_w, energy_j=energy[op], **given) for op, s in times.items()
    ]
    return DeviceProfile(
        name,
        device or {"type": "cpu", "name": "FAKE-CPU", "threads": 1},
        {},
        {"source": None, "reason": "a test"},
        tuple(entries),
        {},
        synthetic=True,
    )
