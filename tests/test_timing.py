"""Timers, caches, warm-up, modes and memory; by a clock of the test's own wherever a time is asserted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.virtual import VirtualClock
from torch import nn

from hwprune.meter import modes, timing
from hwprune.meter.estimate import Unavailable
from hwprune.meter.inputs import prepare_inputs
from hwprune.meter.memory import peak_memory
from hwprune.meter.timing import Block, CpuTimer, calls_per_block, warm_up

CPU = torch.device("cpu")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def timer_of(clock: VirtualClock, flush: object = None) -> CpuTimer:
    return CpuTimer(flush, clock.now_ns, lambda: clock.now_ns() // 2)  # type: ignore[arg-type]


def block(times_s: list[float], wall_s: float, host_s: float | None = None) -> Block:
    return Block(np.asarray(times_s), wall_s, host_s, 0.0)


# --- blocks --------------------------------------------------------------------------------------


def test_each_call_gets_its_own_time(clock: VirtualClock) -> None:
    durations = iter([0.1, 0.2, 0.4])
    found = timer_of(clock).block(lambda: clock.sleep(next(durations)), 3)
    assert found.times_s == pytest.approx([0.1, 0.2, 0.4])
    assert found.median_s == pytest.approx(0.2)
    assert found.wall_s == pytest.approx(0.7)
    assert found.cpu_s == pytest.approx(0.35)
    assert found.gap_rel == pytest.approx(0, abs=1e-6)
    assert found.host_s is None


def test_flushing_is_outside_the_time_of_a_call(clock: VirtualClock) -> None:
    found = timer_of(clock, flush=lambda: clock.sleep(1.0)).block(lambda: clock.sleep(0.1), 4)
    assert found.times_s == pytest.approx([0.1] * 4)
    assert found.cpu_s == pytest.approx(0.2)
    assert found.wall_s == pytest.approx(4.4)
    assert found.gap_rel == 0, "flushes are no gap to warn of"


def test_gaps_between_calls_are_seen() -> None:
    assert block([0.1, 0.1], 0.25).gap_rel == pytest.approx(0.2)


def test_a_device_that_waits_for_the_host_is_seen() -> None:
    assert block([0.1, 0.1], 0.2, host_s=0.19).launch_share == pytest.approx(0.95)
    assert block([0.1, 0.1], 0.2, host_s=None).launch_share == 0


def test_a_process_that_waited_for_a_core_is_seen() -> None:
    waited = Block(np.asarray([0.1, 0.1]), 0.2, None, 0.1)
    assert waited.ran_share == pytest.approx(0.5)
    assert Block(waited.times_s, 0.2, 0.01, 0.001).ran_share == 1, "a GPU works meanwhile"


def test_joined_blocks_add_up() -> None:
    found = Block.joined([block([1.0], 1.5, 0.5), block([2.0, 3.0], 5.5, 1.0)])
    assert list(found.times_s) == [1, 2, 3]
    assert (found.wall_s, found.host_s) == (7.0, 1.5)


class FakeEvent:
    """A CUDA event on a virtual device that works behind the host."""

    device_ns = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ns = FakeEvent.device_ns

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at_ns - self.at_ns) / 1e6


def test_cuda_times_come_from_events_and_not_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)

    class Here:
        def __init__(self, device: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Here)

    def call() -> None:
        FakeEvent.device_ns += 3_000_000  # 3 ms of the device, none of the host

    device = torch.device("cuda", 0)
    found = timing.CudaTimer(device).block(call, 5)
    assert found.times_s == pytest.approx([0.003] * 5)
    assert synchronised == [device, device], "before the first and after the last"
    assert found.host_s is not None and 0 < found.host_s <= found.wall_s < 1


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("32768K", 32 << 20), ("48M", 48 << 20)])
def test_cache_size_is_the_largest_the_system_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, size: int
) -> None:
    for index, told in enumerate(("32K", text)):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(told + "\n")
    monkeypatch.setattr(timing, "_CPU_CACHES", tmp_path)
    assert timing.last_level_cache_bytes(CPU) == (size, "sysfs")
    assert timing.CacheFlush(CPU).bytes == 2 * size


def test_a_cache_nobody_tells_of_is_assumed_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "_CPU_CACHES", tmp_path / "none")
    monkeypatch.setattr(timing.os, "sysconf_names", {})
    assert timing.last_level_cache_bytes(CPU) == (64 << 20, "assumed")


def test_a_flush_writes_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: (1024, "sysfs"))
    flush = timing.CacheFlush(CPU)
    flush()
    flush()
    assert flush._buffer.tolist() == [2] * 2048


def test_unknown_devices_and_words_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'hot' or 'cold', got 'warm'"):
        timing.make_timer(CPU, "warm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a cuda or cpu device, got mps"):
        timing.make_timer(torch.device("mps"))


# --- warm-up and blocks --------------------------------------------------------------------------


def counting(
    clock: VirtualClock, seconds: Callable[[int], float]
) -> tuple[list[int], Callable[[], None]]:
    made: list[int] = []

    def call() -> None:
        made.append(len(made))
        clock.sleep(seconds(len(made)))

    return made, call


@pytest.mark.parametrize("call_s", [1e-4, 0.01, 0.05, 0.4])
def test_warm_up_is_half_a_second_and_twenty_calls(clock: VirtualClock, call_s: float) -> None:
    made, call = counting(clock, lambda n: call_s)
    start = clock.now_ns()
    found, flags = warm_up(timer_of(clock), call, lambda: 0)
    assert found == pytest.approx(call_s) and flags == ()
    assert len(made) >= 20
    assert 0.5 <= (clock.now_ns() - start) / 1e9 <= 0.65 + 20 * call_s


def test_time_spent_compiling_is_no_warm_up(clock: VirtualClock) -> None:
    """The first call compiles for a minute: the calls after it are still warmed up."""
    made, call = counting(clock, lambda n: 60.0 if n == 1 else 0.01)
    found, flags = warm_up(timer_of(clock), call, lambda: min(len(made), 1))
    assert found == pytest.approx(0.01) and flags == ()
    assert len(made) >= 21


def test_what_compiles_in_every_call_is_flagged(clock: VirtualClock) -> None:
    made, call = counting(clock, lambda n: 0.01)
    assert warm_up(timer_of(clock), call, lambda: len(made))[1] == ("compiles_all_the_time",)


def test_a_call_of_minutes_is_not_made_twenty_times(clock: VirtualClock) -> None:
    made, call = counting(clock, lambda n: 100.0)
    _, flags = warm_up(timer_of(clock), call, lambda: 0)
    assert (len(made), flags) == (2, ("short_warm_up",))


def test_a_clock_that_stands_still_is_an_error(clock: VirtualClock) -> None:
    with pytest.raises(ValueError, match="the clock says"):
        warm_up(timer_of(clock), lambda: None, lambda: 0)


@pytest.mark.parametrize(
    ("call_s", "device", "calls"),
    [(1e-3, "cpu", 200), (0.15, "cpu", 5), (3.0, "cpu", 1), (100.0, "cpu", 1), (5e-3, "cuda", 10),
     (0.4, "cuda", 3), (1e-6, "cpu", 10_000)],
)  # fmt: skip
def test_blocks_are_long_enough_and_fit_into_the_time(
    call_s: float, device: str, calls: int
) -> None:
    assert calls_per_block(call_s, torch.device(device), 60.0) == calls


def test_noise_of_a_steady_machine_is_none_and_of_another_its_deviation(
    clock: VirtualClock,
) -> None:
    class Steps:
        device, flush = CPU, None

        def __init__(self, times_s: list[float]) -> None:
            self.times_s = times_s

        def block(self, call: Callable[[], object], calls: int) -> Block:
            call()
            return block((self.times_s * calls)[:calls], 1.0)

    assert timing.noise_rel(Steps([0.01])) == pytest.approx(0)  # type: ignore[arg-type]
    assert timing.noise_rel(Steps([0.9, 1.1])) == pytest.approx(0.1, rel=0.01)  # type: ignore[arg-type]


# --- modes ---------------------------------------------------------------------------------------


def test_a_graph_without_cuda_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match="mode graph replays a CUDA graph, and the model is on cpu"
    ):
        modes.check_mode("graph", CPU)
    with pytest.raises(ValueError, match="expected one of eager, compile, graph, got 'fast'"):
        modes.check_mode("fast", CPU)


def test_short_calls_are_timed_several_at_once() -> None:
    calls = []
    once = modes.Runnable(lambda: calls.append(1))
    longer = modes.lengthened(once, 1e-5, "eager", once.call, CPU, cold=False)
    assert longer.per_call == 10
    longer.call()
    assert len(calls) == 10
    assert modes.lengthened(once, 1e-5, "eager", once.call, CPU, cold=True) is once
    assert modes.lengthened(once, 1e-3, "eager", once.call, CPU, cold=False) is once


def test_compilations_of_torch_and_triton_are_counted() -> None:
    runtime = pytest.importorskip("triton").knobs.runtime
    seen = []
    before = runtime.jit_post_compile_hook
    watch = modes.CompileWatch()
    runtime.jit_post_compile_hook = lambda *args, **kwargs: seen.append(args)
    try:
        with watch.watching():
            start = watch.count()
            runtime.jit_post_compile_hook(key="x")
            assert watch.count() == start + 1
        assert len(seen) == 1, "the hook that was there is still called"
    finally:
        runtime.jit_post_compile_hook = before


def test_a_compiled_model_says_the_same_and_what_it_compiles_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The graph is captured as ever; only turning it into C++ is left out, which takes ten seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    inputs = prepare_inputs(torch.randn(2, 8))
    watch = modes.CompileWatch()
    with watch.watching(), torch.no_grad():
        start = watch.count()
        with modes.limits_that_fail("compile"):
            runnable = modes.make_runnable(model, inputs, "compile", CPU)
            out = runnable.call()
            assert watch.count() == start + 1
            runnable.call()
        assert watch.count() == start + 1
        torch.testing.assert_close(out, model(*inputs.args))


def test_a_model_that_torch_gave_up_compiling_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would run the ninth model of a class eagerly, and it would be timed as compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    class Own(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)

        def forward(self, x_BW: torch.Tensor) -> torch.Tensor:
            return self.fc(x_BW)

    def compiled(width: int) -> object:
        inputs = prepare_inputs(torch.randn(2, width))
        return modes.make_runnable(Own(width).eval(), inputs, "compile", CPU).call()

    with torch.no_grad(), modes.limits_that_fail("compile"):
        for width in range(4, 14):
            compiled(width)  # more than torch's own 8
        monkeypatch.setattr(modes, "RECOMPILES", 2)
    limited = (torch.no_grad(), modes.limits_that_fail("compile"))
    with limited[0], limited[1], pytest.raises(Exception, match="recompile_limit"):
        compiled(20)
    torch._dynamo.reset()


# --- memory --------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_tensors_alive_at_once() -> None:
    x = torch.randn(1000, 100)

    def call() -> torch.Tensor:
        return (x + 1) + (x + 2)  # three of them at the worst moment

    found = peak_memory(call, None, [x], CPU)
    assert not isinstance(found, Unavailable)
    assert found.activation_bytes == 3 * x.nbytes
    assert found.peak_bytes == 4 * x.nbytes
    assert found.weight_bytes == 0


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        found = peak_memory(lambda: model(torch.ones(1, 16)), model, [], CPU)
    assert not isinstance(found, Unavailable)
    assert found.weight_bytes == 16 * 16 * 4


def test_watching_memory_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, None, [], CPU)
    assert "KINETO_LOG_LEVEL" not in timing.os.environ


# --- a real device -------------------------------------------------------------------------------


def test_a_real_cpu_gives_times_that_are_times() -> None:
    found = timing.make_timer(CPU).block(lambda: torch.randn(64, 64) @ torch.randn(64, 64), 20)
    assert found.times_s.shape == (20,)
    assert (found.times_s > 0).all() and math.isfinite(found.wall_s)
    assert found.times_s.sum() <= found.wall_s


@pytest.mark.gpu
def test_a_graph_replays_what_the_model_computes() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().cuda()
    inputs = prepare_inputs(torch.randn(8, 64, device="cuda"))
    with torch.no_grad():
        graph = modes.make_runnable(model, inputs, "graph", torch.device("cuda", 0))
        torch.testing.assert_close(graph.call(), model(*inputs.args))
        several = modes.capture(lambda: model(*inputs.args), torch.device("cuda", 0), 50)
        assert several.per_call == 50
        torch.testing.assert_close(several.call(), model(*inputs.args))
        with inputs.varied() as changed:
            assert changed
            torch.testing.assert_close(graph.call(), model(*inputs.args))


@pytest.mark.gpu
def test_a_real_gpu_gives_event_times_within_the_wall_time() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(4096, 4096, device=device)
    for l2 in ("hot", "cold"):
        found = timing.make_timer(device, l2).block(lambda: x @ x, 20)
        assert (found.times_s > 0).all()
        assert found.times_s.sum() <= found.wall_s
