"""Measuring a device, on a virtual clock: time kept, failures survived, stopped runs gone on with, energy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes.machine import CPU, NONE, OPS, Machine, seconds
from torch import Tensor

from hwprune import profiling
from hwprune.device import read_profile
from hwprune.ops import Op, Pool
from hwprune.profile_state import State, claimed
from hwprune.profiling import FEWEST_ROUNDS, MOST_ROUNDS, measure_device, this_device


def test_what_is_measured_is_what_ran() -> None:
    machine = Machine()
    found = machine.measure()
    assert [e.op for e in found.entries] == OPS
    for entry in found.entries:
        assert entry.latency_s == pytest.approx(seconds(entry.op), rel=1e-6)
        assert entry.lo_s <= entry.latency_s <= entry.hi_s
        assert entry.p95_s == pytest.approx(seconds(entry.op), rel=1e-6)
        assert (entry.mode, entry.l2, entry.values, entry.status) == (
            "eager",
            "hot",
            "normal",
            "ok",
        )
        assert entry.rounds == MOST_ROUNDS and entry.energy_j is None
    assert found.sensor == {"source": None, "reason": NONE.reason}


def test_cpu_time_counts_where_it_is_asked_for() -> None:
    machine = Machine()
    found = machine.measure(bench=replace(machine.bench(), by_cpu_time=True))
    assert found.entries[0].latency_s == pytest.approx(2 * seconds(OPS[0]), rel=1e-6)
    assert found.provenance["clock"] == "thread CPU time"


def test_noise_gives_intervals_and_what_is_unsure_says_so() -> None:
    sure, unsure = Machine(noise=0.02).measure(), Machine(noise=0.6).measure()
    assert {e.status for e in sure.entries} == {"ok"}
    assert "ambiguous" in {e.status for e in unsure.entries}
    assert all(e.lo_s < e.hi_s for e in sure.entries)


@pytest.mark.parametrize("minutes", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("count", [12, 400])
def test_the_time_is_kept_and_the_most_useful_come_first(minutes: float, count: int) -> None:
    ops = [Op("linear", (8, 8 + i, 64), "fp32") for i in range(count)]
    machine = Machine()
    start = machine.now_s
    found = machine.measure(minutes, ops=ops)
    assert machine.now_s - start <= 60 * minutes * 1.05 + 1
    reached = [e.op for e in found.entries]
    assert reached == ops[: len(reached)] and len(reached) >= 8
    assert found.provenance["not_reached"] == count - len(reached)
    assert found.provenance["rounds"] >= FEWEST_ROUNDS


def test_a_machine_that_slows_down_costs_the_least_useful_ones() -> None:
    """Three times slower after the first pass: fewer operations, not none."""
    machine = Machine()
    ops = [Op("linear", (8, 8 + i, 64), "fp32") for i in range(200)]
    make = machine.make

    def slowing(op: Op, pool: Pool) -> Callable[[], Tensor]:
        call = make(op, pool)

        def slower() -> Tensor:
            if machine.calls[op] > 8:
                machine.clock.sleep(2 * seconds(op))
            return call()

        return slower

    start = machine.now_s
    found = machine.measure(0.3, ops=ops, bench=replace(machine.bench(), make=slowing))
    assert machine.now_s - start < 60 * 0.3 * 2
    assert 10 < len(found.entries) < len(ops)
    assert {e.op for e in found.entries} <= set(ops[: len(found.entries) + 60])


def test_an_operation_that_fails_ends_nothing_else() -> None:
    def fails(op: Op, calls: int) -> None:
        if op == OPS[2]:
            raise RuntimeError("no such kernel\nsecond line")
        if op == OPS[3] and calls > 40:
            raise torch.cuda.OutOfMemoryError("later")

    found = Machine(fails=fails).measure()
    assert [e.op for e in found.entries] == [op for op in OPS if op not in OPS[2:4]]
    told = found.provenance["failed"]
    assert [Op.from_dict(f) for f in told] == OPS[2:4]
    assert told[0]["reason"] == "RuntimeError: no such kernel"
    assert found.provenance["not_reached"] == 0


def test_where_everything_fails_the_reason_is_told() -> None:
    def fails(op: Op, calls: int) -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(ValueError, match=r"no operation 5 rounds.*the device is gone"):
        Machine(fails=fails).measure()


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_no_time_is_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match="minutes > 0"):
        Machine().measure(minutes)
    with pytest.raises(ValueError, match="expected operations"):
        Machine().measure(ops=[])


def test_too_little_time_is_said() -> None:
    with pytest.raises(ValueError, match=r"give more with --minutes"):
        Machine().measure(1e-4)


def test_an_operation_that_would_eat_the_time_is_left_out() -> None:
    slow = Op("linear", (8000, 1000, 1000), "fp32")  # 8 s a call
    found = Machine().measure(ops=[OPS[0], slow, OPS[1]])
    assert [e.op for e in found.entries] == OPS[:2]


def test_what_is_compiled_at_first_is_not_taken_for_slow() -> None:
    """Every operation compiles for four seconds; later calls take milliseconds."""
    machine = Machine()

    def fails(op: Op, calls: int) -> None:
        if calls == 1:
            machine.clock.sleep(4.0)

    machine.fails = fails
    assert [e.op for e in machine.measure(5.0).entries] == OPS


# --- stopped runs --------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    partial, notes = tmp_path / ".p.json", []

    def stop(step: str, done: int, total: int) -> None:
        if (step, done) == ("rounds", 3):
            raise KeyboardInterrupt

    first = Machine()
    with pytest.raises(KeyboardInterrupt):
        first.measure(partial=partial, progress=stop)
    assert partial.is_file() and [p.name for p in tmp_path.iterdir()] == [".p.json"]
    second = Machine()
    found = second.measure(partial=partial, note=notes.append)
    assert notes == ["goes on after 3 round(s) with 12 operations"]
    assert found.provenance["rounds"] == MOST_ROUNDS
    whole = Machine()
    whole.measure()
    assert sum(second.calls.values()) < 0.9 * sum(whole.calls.values())
    assert not list(tmp_path.iterdir())  # nothing stays when it is done


def test_a_run_stopped_in_its_first_pass_has_kept_something(tmp_path: Path) -> None:
    ops = [Op("linear", (8, 8 + i, 64), "fp32") for i in range(100)]

    def fails(op: Op, calls: int) -> None:
        if op == ops[70]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Machine(fails=fails).measure(ops=ops, partial=tmp_path / "p")
    assert len(json.loads((tmp_path / "p").read_text())["ops"]) == 64


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"key": 3}',
        '{"key": KEY, "rounds": -1, "ops": []}',
        '{"key": KEY, "rounds": 2, "ops": [{"op": {}, "times_s": [1], "worst_s": 1}]}',
        '{"key": KEY, "rounds": 2, "ops": [{"op": OP, "times_s": [NaN], "worst_s": 1}]}',
        '{"key": KEY, "rounds": 2, "ops": [{"op": OP, "times_s": [-1], "worst_s": 1}]}',
        '{"key": KEY, "rounds": 2, "ops": [{"op": OP, "times_s": [], "worst_s": 1}]}',
    ],
)
def test_a_damaged_state_is_left_aside_with_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p"
    path.write_text(content.replace("KEY", '"k"').replace("OP", json.dumps(OPS[0].to_dict())))
    state, line = State.load(path, "k")
    assert not state.times_s and "p is left aside and the run starts anew" in line
    assert "\n" not in line
    notes: list[str] = []
    assert len(Machine().measure(partial=path, note=notes.append).entries) == len(OPS)
    assert len(notes) == 1


def test_the_state_of_another_device_or_version_is_left_aside(tmp_path: Path) -> None:
    state = State()
    state.add(OPS[0], 1e-3, 2e-3)
    state.save(tmp_path / "p", "torch 1")
    assert State.load(tmp_path / "p", "torch 1")[0] == state
    found, line = State.load(tmp_path / "p", "torch 2")
    assert found == State() and "another device or other versions" in line
    assert State.load(tmp_path / "none", "torch 1") == (State(), "")


def test_two_runs_do_not_measure_into_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no fcntl on this system, so runs are not told apart")
    partial = tmp_path / "p"
    with claimed(partial):
        with pytest.raises(ValueError, match=r"another run is measuring into p"):
            Machine().measure(partial=partial)
        assert len(Machine().measure(partial=tmp_path / "q").entries) == len(OPS)
    assert Machine().measure(partial=partial).entries
    assert not list(tmp_path.iterdir())


# --- provenance ----------------------------------------------------------------------------------


def test_the_provenance_is_complete_and_comes_back_from_disk(tmp_path: Path) -> None:
    found = Machine().measure(command="hwprune profile", seed=7)
    found.save(tmp_path / "fake.json")
    again = read_profile(tmp_path / "fake.json")
    told = again.provenance
    assert (told["command"], told["seed"], told["clock"]) == ("hwprune profile", 7, "wall")
    assert told["rounds"] == MOST_ROUNDS and told["noise_rel"] == [0.01, 0.01]
    assert told["aa_ratio_latency"] == {
        "median": 1.0,
        "median_abs_error": pytest.approx(0, abs=1e-6),
    }
    for name in ("started", "finished", "seconds", "load_average", "commit", "cpu", "backend"):
        assert name in told
    assert again.software["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "os", "cuda", "triton", "driver", "hwprune"} <= set(again.software)
    assert again.key == this_device(CPU) and again.device["threads"] == torch.get_num_threads()


def test_the_aa_ratio_tells_a_machine_that_does_not_hold_still() -> None:
    quiet, noisy = Machine(noise=0.01).measure(), Machine(noise=0.3).measure()
    errors = [p.provenance["aa_ratio_latency"]["median_abs_error"] for p in (quiet, noisy)]
    assert errors[0] < 0.02 < errors[1]


def test_the_order_of_rounds_is_random_and_seeded() -> None:
    def order(seed: int) -> list[Op]:
        seen: list[Op] = []
        machine = Machine(fails=lambda op, calls: seen.append(op))
        machine.measure(seed=seed)
        return list(dict.fromkeys(seen[len(OPS) * 30 :]))

    assert order(0) == order(0) != order(1)


def test_real_instruments_measure_something() -> None:
    """The only one on this machine's clock; no figure of it is asserted."""
    found = measure_device(
        [Op("gelu", (8, 8), "fp32"), Op("linear", (8, 8, 8), "fp32")],
        CPU,
        name="real",
        minutes=1.0,
    )
    assert len(found.entries) == 2 and all(e.latency_s > 0 for e in found.entries)
    assert profiling.make_bench(CPU).capture is None
