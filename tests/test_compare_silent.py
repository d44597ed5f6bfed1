"""Every way an arm or a machine can deceive `hwprune.measure`, and what measuring must leave as it was."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes.virtual import Board, FakeSource, Sensor, VirtualClock
from fakes.work import NO_SENSOR, Work, value, virtual_bench
from torch import Tensor, nn

import hwprune
from hwprune.meter import compare, timing, validity
from hwprune.meter.arms import Arm
from hwprune.meter.estimate import Unavailable
from hwprune.meter.modes import Runnable


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    return virtual_bench(monkeypatch)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 6)


# --- arms that are no arms -----------------------------------------------------------------------


class Broken(Work):
    """NaN in one output."""

    def forward(self, x_BI: Tensor) -> Tensor:
        out = super().forward(x_BI).clone()
        out[0, 0] = math.nan
        return out


class Raising(Work):
    def forward(self, x_BI: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more lines")


class Wider(Work):
    def forward(self, x_BI: Tensor) -> Tensor:
        return super().forward(x_BI).repeat(1, 2)


class Remembering(Work):
    """Keeps its first result, whatever it is given."""

    kept: Tensor | None = None

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = super().forward(x_BI)
        return self.kept


class Memoising(Work):
    """Keeps a result for each input it has seen."""

    kept: dict[float, Tensor]

    def forward(self, x_BI: Tensor) -> Tensor:
        self.kept = getattr(self, "kept", {})
        key = float(x_BI.double().sum())
        if key not in self.kept:
            self.kept[key] = super().forward(x_BI)
        return self.kept[key]


class Writing(Work):
    """Normalises its input in place: every call sees another one."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return super().forward(x_BI.sub_(1.0))


class Words(Work):
    def forward(self, x_BI: Tensor) -> Any:
        return "a cat"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Broken, "% of its output is NaN or Inf; a broken model is not timed"),
        (Raising, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (Wider, r"its output has the shapes [(8, 8)], that of model has [(8, 4)]"),
        (Remembering, "its output is the same for other inputs"),
        (Memoising, "it hands out the same tensor for the same input"),
        (Writing, "it writes to its inputs"),
        (Words, "expected tensors as output, got str"),
    ],
)
def test_an_arm_that_does_not_compute_is_not_timed_and_the_others_are(
    clock: VirtualClock, x: Tensor, kind: type[Work], said: str
) -> None:
    found = hwprune.measure(
        Work(clock, 0.02), x, against={"odd": kind(clock, 1e-4), "dense": Work(clock, 0.03)}
    )
    odd = found.arms["odd"]
    assert said in odd.error
    assert isinstance(odd.latency_s, Unavailable) and said in odd.latency_s.reason
    ratio = found.ratio("model", "odd")
    assert isinstance(ratio.latency, Unavailable) and ratio.latency_verdict == ""
    assert value(found.ratio("model", "dense").latency) == pytest.approx(2 / 3)
    assert "odd has no figures" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", [Broken, Raising, Remembering])
def test_a_broken_model_has_reasons_and_no_figures(
    clock: VirtualClock, x: Tensor, kind: type[Work]
) -> None:
    found = hwprune.measure(kind(clock, 0.02), x, against=Work(clock, 0.02))
    assert found.model.error
    for figure in (
        found.latency_s,
        found.energy_j,
        found.aa.latency,
        found.ratio("model", "dense").latency,
    ):
        assert isinstance(figure, Unavailable) and figure.reason
    assert not found.aa_ok
    json.dumps(found.to_dict(), allow_nan=False)
    assert "has no figures" in str(found)


def test_an_arm_declared_equal_must_be(clock: VirtualClock, x: Tensor) -> None:
    class Off(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            return super().forward(x_BI) * 1.01

    arms = {"masked": Work(clock, 0.02), "off": Off(clock, 0.02)}
    equal = {"masked": "model", "off": "model"}
    found = hwprune.measure(Work(clock, 0.02), x, against=arms, equivalent=equal)
    assert "differs from that of model by 1.00e-02 of its norm" in found.arms["off"].error
    assert not found.arms["masked"].error
    free = hwprune.measure(Work(clock, 0.02), x, against=arms, equivalent={"masked": "model"})
    assert not free.arms["off"].error, "a pruned model may differ from its dense one"


def test_an_arm_that_breaks_on_the_way_leaves_the_others(clock: VirtualClock, x: Tensor) -> None:
    class Dying(Work):
        calls = 0

        def forward(self, x_BI: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 60:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x_BI)

    found = hwprune.measure(Work(clock, 0.02), x, against={"dying": Dying(clock, 0.02)})
    assert found.arms["dying"].error == "out of GPU memory; use a smaller batch"
    assert value(found.latency_s) == pytest.approx(0.02)
    assert found.aa_ok


def test_an_output_that_changes_while_it_is_timed_is_flagged(
    clock: VirtualClock, x: Tensor
) -> None:
    class Decaying(Work):
        calls = 0

        def forward(self, x_BI: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x_BI) * (1.0 if self.calls < 60 else 0.5)

    assert "output_changed" in hwprune.measure(Decaying(clock, 0.02), x).model.flags


def test_a_model_that_draws_noise_is_measured(clock: VirtualClock, x: Tensor) -> None:
    class Noisy(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            return super().forward(x_BI) + torch.randn(len(x_BI), 4)

    found = hwprune.measure(Noisy(clock, 0.02), x).model
    assert not found.error and not found.flags


def test_a_model_that_cannot_take_other_inputs_is_measured(clock: VirtualClock, x: Tensor) -> None:
    class Picky(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            if not torch.equal(x_BI, x):
                raise ValueError("unheard of")
            return super().forward(x_BI)

    found = hwprune.measure(Picky(clock, 0.02), x).model
    assert not found.error and found.flags == ("inputs_not_varied",)


def test_a_busy_machine_is_told(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_cpu = lambda device, l2="hot": timing.CpuTimer(  # noqa: E731
        None, clock.now_ns, lambda: clock.now_ns() // 2
    )
    monkeypatch.setattr(compare, "make_timer", slow_cpu)
    found = hwprune.measure(Work(clock, 0.02), x)
    assert found.model.flags == ("preempted",)
    assert "other processes held the CPU" in str(found)


def test_a_model_that_turns_gradients_on_is_flagged(clock: VirtualClock, x: Tensor) -> None:
    class Greedy(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x_BI)

    found = hwprune.measure(Greedy(clock, 0.02), x)
    assert "grad_enabled" in found.model.flags
    assert "switches gradients on" in str(found)


# --- machines that deceive -----------------------------------------------------------------------


def test_a_bench_that_sees_differences_where_there_are_none_says_so(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower_again(arm: Arm) -> list[Arm]:
        def call() -> Tensor:
            clock.sleep(0.001)
            return arm.call()

        return [replace(arm, name="A/A", runnable=Runnable(call))]

    monkeypatch.setattr(compare, "_again", slower_again)
    found = hwprune.measure(
        Work(clock, 0.02), x, against={"near": Work(clock, 0.0206), "far": Work(clock, 0.04)}
    )
    assert not found.aa_ok and value(found.aa.latency) == pytest.approx(1.05)
    assert any("the model differs from itself" in w for w in found.warnings)
    assert found.ratio("model", "near").latency_verdict == "ambiguous", "3 % under a false 5 %"
    assert found.ratio("model", "far").latency_verdict == "lower"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_round_in_which_something_is_compiled_does_not_count(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    class Watch(validity.RoundWatch):
        def verdict(self) -> str:
            spoilt = self._round % round(1 / share) == 0
            return "something was compiled while it ran" if spoilt else super().verdict()

        _round = 0

        def begin(self) -> None:
            self._round += 1
            super().begin()

    monkeypatch.setattr(compare, "RoundWatch", Watch)
    found = hwprune.measure(Work(clock, 0.02, 0.2), x, against=Work(clock, 0.02, 0.2, 1))
    assert found.discarded and found.discarded[0][0] == "latency"
    assert "compiled" in found.discarded[0][2]
    if share > 0.2:
        assert "of" in found.invalid and isinstance(found.latency_s, Unavailable)
        assert any("nothing here counts" in w for w in found.warnings)
    else:
        assert not found.invalid and found.latency_s.n == 32  # type: ignore[union-attr]


def test_a_machine_that_slept_voids_the_round(clock: VirtualClock) -> None:
    watch = validity.RoundWatch(clock, lambda: 0, NO_SENSOR)
    watch.begin()
    clock.sleep(1.0)
    assert watch.verdict() == ""
    watch.begin()
    clock.wall_offset_ns += 3 * 10**9
    assert "the system's clock moved by 3000 ms" in watch.verdict()


def test_throttling_and_moving_clocks_void_the_round_unless_capped(clock: VirtualClock) -> None:
    source = FakeSource(Sensor(Board(clock)))
    watch = validity.RoundWatch(clock, lambda: 0, source)

    def verdict(change: Callable[[], None]) -> str:
        source.clock_mhz = 1980.0
        watch.begin()
        watch.block()
        change()
        watch.block()
        return watch.verdict()

    assert verdict(lambda: None) == ""
    assert "hot" in verdict(lambda: setattr(source, "thermal_ns", source.thermal_ns + 1))
    slower = lambda: setattr(source, "clock_mhz", 1800.0)  # noqa: E731
    assert "between 1800 and 1980 MHz" in verdict(slower)

    def capped() -> None:
        slower()
        source.capped_ns += 10**6

    assert verdict(capped) == "", "the power cap's doing is part of the result"


def test_a_clock_that_says_inf_or_nothing_gives_no_figure(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, call: Callable[[], object], calls: int) -> timing.Block:
        call()
        return timing.Block(torch.full((calls,), math.inf).numpy(), math.inf, None, 0.0)

    monkeypatch.setattr(timing.CpuTimer, "block", broken)
    found = hwprune.measure(Work(clock, 0.02), x)
    assert isinstance(found.latency_s, Unavailable) and "clock" in found.latency_s.reason


# --- what is measured stays as it was ------------------------------------------------------------


class Stateful(Work):
    """Counts in a buffer, draws random numbers, and has dropout."""

    def __init__(self, clock: VirtualClock, seconds: float) -> None:
        super().__init__(clock, seconds)
        self.register_buffer("seen", torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_BI: Tensor) -> Tensor:
        self.seen += 1
        torch.rand(3)
        return self.dropout(super().forward(x_BI))


@pytest.mark.parametrize("ends", ["well", "by an error", "by Ctrl-C"])
def test_measuring_changes_nothing(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    model = Stateful(clock, 0.02).train()
    model.fc.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, given = torch.get_rng_state(), x.clone()
    if ends != "well":
        error = KeyboardInterrupt() if ends == "by Ctrl-C" else ZeroDivisionError()

        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(compare, "latency_rounds", fail)
        with pytest.raises(type(error)):
            hwprune.measure(model, x)
    else:
        found = hwprune.measure(model, x)
        assert "was_training" in found.model.flags
        assert "writes_its_weights" not in found.model.flags
    assert model.modes == {False}, "it ran in eval mode"
    assert model.training and model.dropout.training and not model.fc.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, given)
    assert torch.is_grad_enabled() and gc.isenabled()


def test_a_model_that_writes_its_weights_is_named(clock: VirtualClock, x: Tensor) -> None:
    class Selfish(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            out = super().forward(x_BI)
            self.fc.weight.mul_(1.0)
            return out

    assert "writes_its_weights" in hwprune.measure(Selfish(clock, 0.02), x).model.flags


def test_another_dtype_is_measured_on_copies(clock: VirtualClock, x: Tensor) -> None:
    model = Work(clock, 0.02)
    found = hwprune.measure(model, x, dtype=torch.bfloat16)
    assert found.settings["dtype"] == "bfloat16"
    assert model.fc.weight.dtype == torch.float32 and model.modes == set()
