"""What a window of energy promises: no zero, no negative, every doubt flagged, every failure told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from fakes.virtual import Board, FakeSource, Sensor, VirtualClock

import hwprune
from hwprune.meter.energy_window import DISCARD, FLAGS, Chunk, EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Reading
from hwprune.meter.window import energy_of


class Bench:
    """A board, its source and a load of constant power in iterations of one length."""

    def __init__(
        self,
        watts: float = 400.0,
        *,
        iteration_s: float = 0.004,
        twist: Callable[[Reading], Reading] = lambda r: r,
        sensor: dict[str, Any] | None = None,
        **source: Any,
    ) -> None:
        self.clock = VirtualClock()
        self.board = Board(self.clock)
        self.sensor = Sensor(self.board, **({"phase_s": 0.0317} | (sensor or {})))
        self.source = FakeSource(self.sensor, twist=twist, **source)
        self.watts, self.iteration_s = watts, iteration_s

    def work(self) -> Chunk:
        self.board.draw(self.watts)
        self.clock.sleep(self.iteration_s)
        return Chunk(1, self.iteration_s)

    def measure(self, **options: Any) -> EnergyWindow | Unavailable:
        return energy_of(self.source, self.work, clock=self.clock, **options)

    def window(self, **options: Any) -> EnergyWindow:
        found = self.measure(**options)
        assert isinstance(found, EnergyWindow), found
        assert set(found.flags) <= set(FLAGS), "a flag nobody explains"
        return found

    def refused(self, *pieces: str, **options: Any) -> None:
        found = self.measure(**options)
        assert isinstance(found, Unavailable), found
        assert not [piece for piece in pieces if piece not in found.reason], found.reason


def test_constant_power_without_a_counter_is_power_times_time() -> None:
    found = Bench(300.0, counter=False).window()
    assert found.method == "instant" and found.flags == ("integrated_power",)
    assert found.duration_s >= 10
    assert found.energy_j == pytest.approx(300 * found.duration_s, rel=1e-5)


def test_one_reading_in_the_block_is_enough_for_constant_power() -> None:
    bench = Bench(counter=False, average=False)
    bench.board.draw(300.0)
    bench.clock.sleep(1)
    read, held = bench.source.read, []

    def once(state: bool = False) -> Reading:  # all later ones are taken much later
        held.append(read(state))
        return held[0]

    bench.source.read = once  # type: ignore[method-assign]
    with hwprune.measure_energy("board", source=bench.source, clock=bench.clock) as e:
        bench.clock.sleep(5)
    assert e.energy_j == pytest.approx(1500.0, rel=1e-6)
    assert e.method == "instant" and "integrated_power" in e.flags


def test_a_one_second_average_is_refused_for_a_window_of_one_second() -> None:
    only_average = {"counter": False, "instant": False}
    Bench(**only_average).refused("averaged over 1 s", "at least 3 s", min_window_s=1.0)
    found = Bench(250.0, **only_average).window()
    assert found.method == "average"
    assert found.average_power_w == pytest.approx(250.0, rel=1e-3)
    bench = Bench(**only_average)
    with hwprune.measure_energy("board", source=bench.source, clock=bench.clock) as e:
        bench.work()
    assert e.energy_j is None and "at least 3 s" in e.reason and e.duration_s is not None


@pytest.mark.parametrize(
    ("ratio", "flagged"), [(1.0, False), (1.04, False), (1.07, True), (1.74, True)]
)
@pytest.mark.parametrize("field", ["instant_mw", "average_mw"])
def test_a_counter_that_disagrees_with_power_is_flagged(
    ratio: float, flagged: bool, field: str
) -> None:
    def stretch(reading: Reading) -> Reading:
        return dataclasses.replace(reading, **{field: getattr(reading, field) * ratio})

    found = Bench(twist=stretch).window()
    assert ("sensor_disagreement" in found.flags) == flagged
    assert found.average_power_w == pytest.approx(400, rel=1e-3)


def test_what_nothing_confirms_is_flagged() -> None:
    found = Bench(instant=False, average=False).window()
    assert found.flags == ("no_cross_check",) and found.instant_power_w is None
    assert found.average_power_w == pytest.approx(400, rel=1e-3)


def test_idle_power_is_in_the_gross_and_not_in_the_dynamic_energy() -> None:
    found = {}
    for idle in (80.0, 100.0):
        for load in (200.0, 400.0):
            found[idle, load] = Bench(idle + load).window(idle_w=idle)
    for load in (200.0, 400.0):
        low, high = found[80.0, load], found[100.0, load]
        assert high.energy_j - low.energy_j == pytest.approx(20 * low.duration_s, rel=0.02)
        assert low.dynamic_energy_j is not None and high.dynamic_energy_j is not None
        assert high.dynamic_energy_j / high.duration_s == pytest.approx(
            low.dynamic_energy_j / low.duration_s, rel=2e-3
        )
    gross = [
        found[i, 200.0].average_power_w / found[i, 400.0].average_power_w for i in (80.0, 100.0)
    ]
    assert gross[0] < gross[1] < 1
    assert Bench().window().dynamic_energy_j is None


def test_a_gain_cancels_in_a_ratio_and_an_offset_does_not() -> None:
    def ratio(**sensor: float) -> float:
        low, high = (Bench(watts, sensor=sensor).window() for watts in (90.0, 300.0))
        assert "low_power" in low.flags and "low_power" not in high.flags
        return low.average_power_w / high.average_power_w

    assert ratio(gain=1.07) == pytest.approx(0.3, rel=1e-3)
    assert abs(ratio(offset_w=-15.0) / 0.3 - 1) > 0.1
    capped = Bench(150.0, cap_w=700.0).window()  # a quarter of the cap, where it is known
    assert "low_power" in capped.flags
    assert "low_power" not in Bench(60.0, cap_w=70.0).window().flags


@pytest.mark.parametrize(("period_s", "risky"), [(0.05, True), (0.1, True), (0.005, False)])
def test_slow_iterations_may_alias_with_the_sensor(period_s: float, risky: bool) -> None:
    assert ("aliasing_risk" in Bench(iteration_s=period_s).window().flags) == risky
    assert "aliasing_risk" not in Bench(iteration_s=period_s, continuous=True).window().flags


def test_a_duty_that_aliases_is_wrong_where_the_counter_samples() -> None:
    """Why the flag is there: half duty at the sensor's own period, seen a quarter of the time."""
    clock = VirtualClock()
    board = Board(clock)
    source = FakeSource(Sensor(board, continuous=False, phase_s=0.03))

    def half_duty() -> Chunk:
        for watts in (500.0, 100.0):
            board.draw(watts)
            clock.sleep(0.05)
        return Chunk(1, 0.1)

    found = energy_of(source, half_duty, clock=clock)
    assert isinstance(found, EnergyWindow) and "aliasing_risk" in found.flags
    assert abs(found.average_power_w / 300 - 1) > 0.5


@pytest.mark.parametrize("moment_s", [2.3, 3.1, 4.4])
def test_a_counter_that_goes_back_gives_no_figure(moment_s: float) -> None:
    bench = Bench()

    def reset() -> Chunk:
        if bench.clock.now_ns() > (1000 + moment_s) * 1e9:
            bench.sensor.lost_mj = 50e6
        return bench.work()

    found = energy_of(bench.source, reset, clock=bench.clock)
    assert isinstance(found, Unavailable) and "went back from" in found.reason
    bench = Bench()
    with hwprune.measure_energy("board", source=bench.source, clock=bench.clock) as e:
        bench.clock.sleep(1)
        bench.sensor.lost_mj = 50e6
        bench.clock.sleep(1)
    assert e.energy_j is None and "went back from" in e.reason


def test_a_counter_that_loses_its_continuity_gives_no_figure() -> None:
    bench = Bench(twist=lambda r: dataclasses.replace(r, epoch=int(r.t_ns > 1003.3e9)))
    bench.refused("lost its continuity")


def test_a_counter_that_stands_still_is_not_zero() -> None:
    stuck = Bench(300.0, twist=lambda r: dataclasses.replace(r, energy_mj=5))
    found = stuck.window()
    assert found.method == "instant" and "integrated_power" in found.flags
    assert found.average_power_w == pytest.approx(300, rel=1e-5)
    alone = Bench(twist=lambda r: dataclasses.replace(r, energy_mj=5), instant=False, average=False)
    alone.refused("did not move")
    with hwprune.measure_energy("board", source=alone.source, clock=alone.clock) as e:
        alone.clock.sleep(3)
    assert e.energy_j is None and "does not move" in e.reason


def test_a_source_without_sensors_is_refused_with_its_reasons() -> None:
    nothing = {"counter": False, "instant": False, "average": False}
    bench = Bench(**nothing, missing={"energy_mj": "not supported"})
    bench.refused("neither energy nor power", "energy_mj: not supported")
    assert bench.clock.now_ns() == 1000 * 10**9, "work was run for nothing"
    assert energy_of(Unavailable("no board"), bench.work) == Unavailable("no board")


def test_a_dropped_reading_inside_the_window_invalidates_it_and_one_before_does_not() -> None:
    def drop(reading: Reading) -> Reading:
        if not start <= reading.t_ns / 1e9 < start + 0.05:
            return reading
        return dataclasses.replace(reading, energy_mj=None, status={"energy_mj": "Timeout"})

    start = 1000.5
    assert Bench(twist=drop).window().status == "ok"
    start = 1003.0
    Bench(twist=drop).refused("energy_mj could not be read", "Timeout")


def test_power_that_never_settles_is_flagged() -> None:
    bench = Bench()
    start = bench.clock.now_ns()

    def heating() -> Chunk:
        bench.watts = 300 + 20 * (bench.clock.now_ns() - start) / 1e9
        return bench.work()

    found = energy_of(bench.source, heating, clock=bench.clock)
    assert isinstance(found, EnergyWindow)
    assert found.status == "unsteady" and "unsteady" in found.flags
    assert bench.clock.now_ns() - start > 15e9


def test_a_late_steady_state_is_waited_for() -> None:
    bench = Bench()
    start = bench.clock.now_ns()

    def settling() -> Chunk:
        bench.watts = 400 - 100 * max(0.0, 1 - (bench.clock.now_ns() - start) / 5e9)
        return bench.work()

    found = energy_of(bench.source, settling, clock=bench.clock)
    assert isinstance(found, EnergyWindow) and found.status == "ok"
    assert found.average_power_w == pytest.approx(400, rel=5e-3)


def test_a_board_that_warms_up_is_waited_for() -> None:
    bench = Bench()
    start = bench.clock.now_ns()

    def warming() -> Chunk:
        bench.source.temperature_c = 40 + min(20.0, 2.5 * (bench.clock.now_ns() - start) / 1e9)
        return bench.work()

    found = energy_of(bench.source, warming, clock=bench.clock)
    assert isinstance(found, EnergyWindow) and found.status == "ok"
    assert found.temperature_c == pytest.approx(60, abs=0.5)


def test_throttling_foreign_work_and_clock_steps_make_a_window_worth_discarding() -> None:
    hot = Bench()

    def throttled() -> Chunk:
        hot.source.thermal_ns += 1000
        return hot.work()

    def stepped() -> Chunk:
        if step.clock.now_ns() > 1002e9:
            step.clock.wall_offset_ns = 0
        return step.work()

    shared, step = Bench(), Bench()
    shared.source.foreign_pids = (4711,)
    for bench, work, flag in (
        (hot, throttled, "thermal_slowdown"),
        (shared, shared.work, "foreign_process"),
        (step, stepped, "clock_step"),
    ):
        found = energy_of(bench.source, work, clock=bench.clock)
        assert isinstance(found, EnergyWindow)
        assert found.flags == (flag,) and found.status == "discard" and flag in DISCARD
    assert set(FLAGS) > DISCARD


def test_the_capped_share_of_the_window_is_told() -> None:
    bench = Bench()

    def capped() -> Chunk:
        bench.source.capped_ns += int(0.25 * bench.iteration_s * 1e9)
        return bench.work()

    found = energy_of(bench.source, capped, clock=bench.clock)
    assert isinstance(found, EnergyWindow)
    assert found.capped_fraction == pytest.approx(0.25, abs=0.01) and found.status == "ok"


def test_time_comes_from_the_device_unless_it_waited_for_the_host() -> None:
    bench = Bench(iteration_s=0.004)

    def work(device_s: float | None) -> Callable[[], Chunk]:
        def once() -> Chunk:
            bench.work()
            return Chunk(1, device_s)

        return once

    for device_s, expected, gaps in (
        (0.00399, 0.00399, False),
        (0.003, 0.004, True),
        (None, 0.004, False),
    ):
        found = energy_of(bench.source, work(device_s), clock=bench.clock)
        assert isinstance(found, EnergyWindow)
        assert found.time_per_iteration_s == pytest.approx(expected, rel=1e-3)
        assert ("host_gaps" in found.flags) == gaps
        assert found.iterations == pytest.approx(found.duration_s / expected, rel=1e-3)


def test_work_that_never_finishes_or_times_that_make_no_sense_are_the_callers_errors() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="expected run_chunk to finish work"):
        energy_of(bench.source, lambda: (bench.work(), Chunk(0))[1], clock=bench.clock)
    with pytest.raises(ValueError, match="min_window_s > 0"):
        bench.measure(min_window_s=0)
    with pytest.raises(ValueError, match="ramp_s <= settle_s"):
        bench.measure(ramp_s=20)


def test_an_error_of_the_work_ends_the_polling_and_drains_the_queue() -> None:
    bench, drained = Bench(), []

    def failing() -> Chunk:
        if bench.clock.now_ns() > 1001e9:
            raise RuntimeError("out of memory")
        return bench.work()

    with pytest.raises(RuntimeError, match="out of memory"):
        energy_of(bench.source, failing, clock=bench.clock, drain=lambda: drained.append(1))
    assert drained == [1]
    assert not bench.clock.beside_count


def test_a_source_that_breaks_its_promise_is_told_and_does_not_raise() -> None:
    def broken(reading: Reading) -> Reading:
        if reading.t_ns > 1003e9:
            raise KeyError("oops")
        return reading

    Bench(twist=broken).refused("the sensor's own code failed", "KeyError")


def test_a_window_is_json() -> None:
    import json

    written = json.loads(json.dumps(Bench().window().to_dict(), allow_nan=False))
    assert written["energy_j"] > 0 and written["dynamic_energy_j"] is None
