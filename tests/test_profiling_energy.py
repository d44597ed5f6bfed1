"""Profiling with a sensor and with graphs, on a CPU and a virtual clock: the road a GPU takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes.machine import OPS, Machine, seconds
from fakes.virtual import FakeSource, Sensor

from hwprune.ops import Op
from hwprune.profile_power import choose_anchors


def watts(op: Op) -> float:
    return 200 + 300 * op.macs / 3.4e7


def powered(**caps: Any) -> tuple[Machine, FakeSource]:
    machine = Machine(watts=watts)
    return machine, FakeSource(Sensor(machine.board), **caps)


def test_graphs_are_captured_long_enough_and_timed_per_call() -> None:
    machine = Machine()
    found = machine.measure(bench=machine.bench(graphs=True))
    assert {e.mode for e in found.entries} == {"graph"}
    assert found.entries[0].latency_s == pytest.approx(seconds(OPS[0]), rel=1e-6)
    assert set(machine.captured) == {1, 2}  # of 2 ms a replay, calls of 1 ms and more


def test_anchors_have_power_and_energy_and_the_rest_is_null() -> None:
    machine, source = powered(cap_w=700.0)
    start = machine.now_s
    found = machine.measure(1.0, bench=machine.bench(source, graphs=True))
    anchors = [e for e in found.entries if e.power_w is not None]
    assert 4 <= len(anchors) < len(found.entries)
    for entry in anchors:
        assert entry.power_w == pytest.approx(watts(entry.op), rel=0.01)
        assert entry.energy_j == pytest.approx(entry.power_w * entry.latency_s)
    assert all(e.energy_j is None for e in found.entries if e.power_w is None)
    assert found.sensor["source"] == "fake" and found.sensor["power_cap_w"] == 700.0
    assert source.closed == 1
    assert machine.now_s - start <= 60 * 1.0 * 1.1
    assert found.provenance["backend"] == "fake" and found.provenance["energy_failed"] == []


def test_a_sensor_that_fails_leaves_null_and_the_reason() -> None:
    machine, source = powered()
    source._twist = lambda reading: replace(reading, energy_mj=None, error="gone", lost=True)
    found = machine.measure(1.5, bench=machine.bench(source, graphs=True))
    assert len(found.entries) == len(OPS)
    assert all(e.energy_j is None and e.power_w is None for e in found.entries)
    assert found.sensor["idle_w"] is None and "gone" in found.sensor["reason"]
    assert len(found.provenance["energy_failed"]) == 3  # then it is not asked again
    assert source.closed == 1


def test_a_foreign_process_voids_the_power_not_the_latency() -> None:
    machine, source = powered()
    source.foreign_pids = (4711,)
    found = machine.measure(1.5, bench=machine.bench(source, graphs=True))
    assert len(found.entries) == len(OPS) and all(e.power_w is None for e in found.entries)
    assert "foreign_process" in found.provenance["energy_failed"][0]["reason"]


def test_the_sensor_is_given_back_after_an_error() -> None:
    machine, source = powered()
    with pytest.raises(ValueError, match="--minutes"):
        machine.measure(1e-4, bench=machine.bench(source, graphs=True))
    assert source.closed == 1


def test_too_little_time_for_energy_is_said() -> None:
    machine, source = powered()
    found = machine.measure(0.2, bench=machine.bench(source))
    assert found.sensor["reason"] == "no time was left for energy"


def test_anchors_spread_over_all_rates_of_work() -> None:
    entries = Machine().measure().entries
    rates = [e.op.macs / e.latency_s for e in choose_anchors(entries, 4)]
    every = [e.op.macs / e.latency_s for e in entries]
    assert rates == sorted(rates) and (rates[0], rates[-1]) == (min(every), max(every))
    assert len(choose_anchors(entries, 100)) == len(entries)
    assert [len(choose_anchors(entries, n)) for n in (0, 1, 2)] == [0, 1, 2]
