"""Work for the energy meter in chunks, and the rounds of arms that come and go."""

from __future__ import annotations

import pytest
import torch
from fakes.virtual import VirtualClock

from hwprune.meter import schedule
from hwprune.meter.arms import Arm
from hwprune.meter.energy_window import Chunk
from hwprune.meter.estimate import Unavailable
from hwprune.meter.modes import Runnable
from hwprune.meter.rounds import Limits
from hwprune.meter.timing import CpuTimer
from hwprune.meter.validity import RoundWatch

CPU = torch.device("cpu")


def arm_of(clock: VirtualClock, name: str, seconds: float, log: list[str]) -> Arm:
    def call() -> None:
        log.append(name)
        clock.sleep(seconds)

    return Arm(name, call, runnable=Runnable(call), call_s=seconds, calls=5)


def run(
    clock: VirtualClock, arms: list[Arm], limits: Limits, steps: list[tuple[str, int, int]]
) -> schedule.Rounds:
    return schedule.latency_rounds(
        arms,
        CpuTimer(None, clock.now_ns, clock.now_ns),
        limits,
        reference=arms[0].name,
        seed=0,
        watch=RoundWatch(clock, lambda: 0, Unavailable("none")),
        clock=clock,
        progress=lambda *step: steps.append(step),
    )


def test_arms_take_turns_within_a_round_in_changing_order() -> None:
    clock, log = VirtualClock(), []
    found = run(clock, [arm_of(clock, name, 0.01, log) for name in "abc"], Limits(), [])
    assert found.ledger.kept == 8 and found.tight
    assert len(log) == 8 * 5 * 3
    turns = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}, "each arm once a turn"
    assert len(set(turns)) == 6, "in every order"
    assert found.ledger.values("a").shape == (8, 5)


def test_a_slow_arm_makes_the_turns_fewer_for_all() -> None:
    clock, log = VirtualClock(), []
    fast, slow = (arm_of(clock, name, 0.01, log) for name in ("fast", "slow"))
    fast.calls, slow.calls = 40, 2
    found = run(clock, [fast, slow], Limits(least=2, most=2), [])
    assert found.ledger.values("fast").shape == found.ledger.values("slow").shape == (2, 2)
    assert (log.count("fast"), log.count("slow")) == (2 * 40, 2 * 2)


def test_progress_never_goes_back_and_ends_full() -> None:
    clock, steps = VirtualClock(), []
    limits = Limits(least=4, most=50, seconds_per_arm=1.0)
    run(clock, [arm_of(clock, name, 0.02, []) for name in "ab"], limits, steps)
    done = [step[1] for step in steps]
    assert done == sorted(done) and done[-1] == 1000
    assert all(step[0] == "latency" and step[2] == 1000 for step in steps)


def test_a_chunk_on_the_cpu_is_fifty_milliseconds_of_calls() -> None:
    clock, log = VirtualClock(), []
    run_chunk, drain = schedule.chunks(arm_of(clock, "a", 0.004, log), CPU)
    assert run_chunk() == Chunk(12) and len(log) == 12
    drain()
    slow, _ = schedule.chunks(arm_of(clock, "b", 3.0, log), CPU)
    assert slow() == Chunk(1)


class FakeEvent:
    """A CUDA event of a device that runs behind the host."""

    device_ms = 0.0
    waited: list[float] = []  # noqa: RUF012 - of the one device

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = FakeEvent.device_ms

    def synchronize(self) -> None:
        FakeEvent.waited.append(self.at_ms)

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_a_chunk_on_a_gpu_is_counted_when_it_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def __init__(self, device: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    drained = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(torch.cuda, "synchronize", drained.append)
    FakeEvent.waited.clear()

    def call() -> None:
        FakeEvent.device_ms += 5.0

    device = torch.device("cuda", 0)
    arm = Arm("a", call, runnable=Runnable(call), call_s=0.005, calls=10)
    run_chunk, drain = schedule.chunks(arm, device)
    start = FakeEvent.device_ms
    assert run_chunk() == Chunk(0, 0.0), "handed over, not finished"
    assert not FakeEvent.waited
    assert run_chunk() == Chunk(10, pytest.approx(0.05))
    assert FakeEvent.waited == [start + 50.0], "it waits for the first, with the second queued"
    assert run_chunk() == Chunk(10, pytest.approx(0.05))
    drain()
    assert drained == [device]


def test_no_sensor_runs_nothing() -> None:
    clock, log = VirtualClock(), []
    found = schedule.energy_rounds(
        [arm_of(clock, "a", 0.01, log)],
        Unavailable("no GPU here"),
        lambda *given: Unavailable("not reached"),
        Limits(),
        images=1,
        device=CPU,
        reference="a",
        seed=0,
        clock=clock,
    )
    assert found.unavailable == "no GPU here" and not log
