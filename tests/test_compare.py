"""`hwprune.measure` on a virtual clock: figures, ratios, energy, text and JSON, and what is refused at once."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from fakes.virtual import Board, FakeSource, Sensor, VirtualClock
from fakes.work import NO_SENSOR, Work, value, virtual_bench
from torch import Tensor, nn

import hwprune
from hwprune.meter import arms, compare, timing
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.measurement import Measurement


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    return virtual_bench(monkeypatch)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 6)


# --- what comes out ------------------------------------------------------------------------------


def test_one_model_gives_its_figures_and_a_ratio_of_one_to_itself(
    clock: VirtualClock, x: Tensor
) -> None:
    found = hwprune.measure(Work(clock, 0.02), x)
    assert value(found.latency_s) == pytest.approx(0.02)
    assert value(found.latency_p95_s) == pytest.approx(0.02)
    assert value(found.throughput_per_s) == pytest.approx(400)
    assert value(found.cpu_time_s) == pytest.approx(0.04)
    assert found.aa_ok and value(found.aa.latency) == pytest.approx(1)
    assert isinstance(found.energy_j, Unavailable) and found.energy_j.reason == NO_SENSOR.reason
    assert found.latency_s.n == 8  # type: ignore[union-attr]
    assert not found.warnings and not found.invalid and not found.model.flags


def test_a_ratio_is_that_of_the_true_times(clock: VirtualClock, x: Tensor) -> None:
    dense = Work(clock, 0.02, noise=0.02, seed=1)
    found = hwprune.measure(Work(clock, 0.014, noise=0.02, seed=2), x, against=dense)
    ratio = found.ratio("model", "dense")
    assert isinstance(ratio.latency, Estimate) and ratio.latency.contains(0.7)
    assert ratio.latency.half_width_rel <= 0.01
    assert ratio.latency_verdict == "lower"
    back = found.ratio("dense", "model")
    assert value(back.latency) == pytest.approx(1 / ratio.latency.value)
    assert value(ratio.cpu_time) == pytest.approx(0.7, rel=0.02)
    assert back.latency_verdict == "higher"


def test_rounds_go_on_until_the_ratios_are_tight(clock: VirtualClock, x: Tensor) -> None:
    few = hwprune.measure(Work(clock, 0.02, noise=0.001), x, against=Work(clock, 0.02, 0.001, 1))
    many = hwprune.measure(Work(clock, 0.02, noise=0.2), x, against=Work(clock, 0.02, 0.2, 1))
    assert few.latency_s.n == 8  # type: ignore[union-attr]
    assert few.ratio("model", "dense").latency_verdict == "same"
    assert many.latency_s.n == 32  # type: ignore[union-attr]
    assert many.ratio("model", "dense").latency_verdict == "ambiguous"
    assert any("not every latency ratio is known to ±1 %" in w for w in many.warnings)


@pytest.mark.parametrize("seconds", [50.0, 3600.0])
def test_time_ends_the_rounds_and_two_are_always_made(
    clock: VirtualClock, x: Tensor, seconds: float
) -> None:
    slow = hwprune.measure(Work(clock, seconds), x, seconds_per_arm=60)
    assert slow.latency_s.n == 2  # type: ignore[union-attr]
    assert "few_rounds" in slow.latency_s.flags  # type: ignore[union-attr]
    assert "short_warm_up" in slow.model.flags


def test_drift_that_meets_both_arms_cancels(clock: VirtualClock, x: Tensor) -> None:
    class Drifting(Work):
        def forward(self, x_BI: Tensor) -> Tensor:
            self.seconds = 0.02 * (1 + 0.5 * math.sin(self.clock.now_ns() / 7e9))
            return super().forward(x_BI)

    found = hwprune.measure(Drifting(clock, 1.0), x, against=Drifting(clock, 1.0))
    ratio = found.ratio("model", "dense").latency
    assert isinstance(ratio, Estimate) and ratio.contains(1.0)
    assert ratio.half_width_rel < 0.02, "though each arm moves by half"


def test_a_batch_is_what_the_user_says(clock: VirtualClock, x: Tensor) -> None:
    found = hwprune.measure(Work(clock, 0.02), (x,), batch=2)
    assert value(found.throughput_per_s) == pytest.approx(100)


def test_keywords_and_nests_are_inputs(clock: VirtualClock, x: Tensor) -> None:
    def work(x: Tensor, more: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        clock.sleep(0.01)
        return {"out": x * 2 + more["y"][0]}

    found = hwprune.measure(work, {"x": x, "more": {"y": [torch.ones(6)]}})
    assert value(found.latency_s) == pytest.approx(0.01)


def test_json_keys_that_scripts_rely_on(clock: VirtualClock, x: Tensor) -> None:
    found = hwprune.measure(Work(clock, 0.014), x, against={"dense": Work(clock, 0.02)})
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["latency_s"]["value"] == pytest.approx(0.014)
    assert {"value", "lo", "hi"} <= told["latency_s"].keys()
    assert told["energy_j"] == {"value": None, "reason": NO_SENSOR.reason}
    assert told["ratio"]["against"] == "dense"
    assert told["ratio"]["latency"]["value"] == pytest.approx(0.7)
    assert told["ratio"]["latency"]["verdict"] == "lower"
    assert told["ratio"]["energy"] == {"value": None, "reason": NO_SENSOR.reason}
    assert told["settings"]["seed"] == 0 and len(told["settings"]["inputs"]) == 16
    assert {"versions", "device", "commit", "started", "threads"} <= told["provenance"].keys()
    assert len(told["rounds"]["latency_s"]["A/A"]) == 8
    alone = hwprune.measure(Work(clock, 0.014), x).to_dict()["ratio"]
    assert alone["against"] is None and alone["latency"]["value"] is None
    assert "nothing to compare with" in alone["latency"]["reason"]


def test_text_is_within_100_columns_and_says_what_matters(clock: VirtualClock, x: Tensor) -> None:
    others = {f"other number {i}": Work(clock, 0.02) for i in range(4)}
    found = hwprune.measure(Work(clock, 0.014), x, against=others)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    for piece in ("14 ms ±0%", "0.7 ±", "A/A 1 ±", "energy unavailable: no sensor", "lower"):
        assert piece in text, text
    page = found._repr_html_()
    assert page.startswith("<table>") and "<td>14 ms" in page


def test_the_same_seed_gives_the_same_order_and_figures(clock: VirtualClock, x: Tensor) -> None:
    def run(seed: int) -> list[float]:
        arms = {"dense": Work(clock, 0.02, 0.05, 1)}
        found = hwprune.measure(Work(clock, 0.02, 0.05, 2), x, against=arms, seed=seed, rounds=8)
        return found.rounds_s["model"].ravel().tolist()  # type: ignore[no-any-return]

    assert run(4) == pytest.approx(run(4))
    assert run(4) != pytest.approx(run(5))


# --- what is refused at once ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": torch.zeros(8, 6)}, "every tensor holds one value only"),
        ({"inputs": torch.full((8, 6), 0.5)}, "pass allow_constant=True"),
        ({"inputs": torch.full((8, 6), math.nan)}, "holds NaN or Inf"),
        ({"inputs": torch.randn(0, 6)}, "an empty tensor"),
        ({"inputs": []}, "expected at least one tensor"),
        ({"inputs": "cats"}, "got str"),
        ({"inputs": torch.randn(8, 6, device="meta")}, "meta"),
        ({"mode": "graph"}, "mode graph replays a CUDA graph"),
        ({"mode": "fast"}, "expected one of eager, compile, graph"),
        ({"rounds": 1}, "one round gives no interval"),
        ({"batch": 0}, "at least 1 image"),
        ({"against": {"model": nn.Linear(6, 4)}}, "the name 'model' is taken"),
        ({"against": {"dense": "vit_tiny"}}, "dense: expected a model or a function, got str"),
        ({"against": nn.Linear(6, 4, device="meta")}, "meta device"),
        ({"equivalent": {"masked": "model"}}, "no arm 'masked'"),
        ({"seconds_per_arm": 0.0}, "positive"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    clock: VirtualClock, x: Tensor, changes: dict[str, Any], said: str
) -> None:
    model = Work(clock, 0.02)
    inputs = changes.pop("inputs", x)
    with pytest.raises(ValueError, match=said):
        hwprune.measure(model, inputs, **changes)
    assert not model.modes


def test_constant_inputs_can_be_asked_for_and_are_named(clock: VirtualClock) -> None:
    found = hwprune.measure(Work(clock, 0.02), torch.ones(8, 6), allow_constant=True)
    assert any("one value only" in w for w in found.warnings)


def test_an_unknown_arm_is_refused_by_name(clock: VirtualClock, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no arm 'sparse'; expected one of model, A/A"):
        hwprune.measure(Work(clock, 0.02), x).ratio("model", "sparse")


# --- energy --------------------------------------------------------------------------------------


class Drawing(Work):
    """Work that draws a known power."""

    def __init__(self, clock: VirtualClock, seconds: float, board: Board, watts: float) -> None:
        super().__init__(clock, seconds)
        self.board, self.watts = board, watts

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.board._w[-1] != self.watts:
            self.board.draw(self.watts)
        return super().forward(x_BI)


def metered(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch, foreign: tuple[int, ...] = ()
) -> tuple[Measurement, FakeSource]:
    board = Board(clock)
    source = FakeSource(Sensor(board))
    source.foreign_pids = foreign
    monkeypatch.setattr(compare, "open_source", lambda device: source)
    arms = (Drawing(clock, 0.004, board, 300.0), Drawing(clock, 0.004, board, 500.0))
    return hwprune.measure(arms[0], x, against=arms[1], seconds_per_arm=600), source


def test_energy_is_power_times_time_an_image(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, source = metered(clock, x, monkeypatch)
    assert value(found.energy_j) == pytest.approx(300 * 0.004 / 8, rel=0.005)
    assert value(found.average_power_w) == pytest.approx(300, rel=0.005)
    ratio = found.ratio("model", "dense")
    assert value(ratio.energy) == pytest.approx(0.6, rel=0.005)
    assert (ratio.energy_verdict, ratio.latency_verdict) == ("lower", "same")
    assert isinstance(found.aa.energy, Estimate) and found.aa_ok
    assert source.closed == 1
    text = str(found)
    assert "energy an image" in text and "model / it: energy" in text


def test_energy_not_asked_for_costs_nothing(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "open_source", lambda device: FakeSource(Sensor(Board(clock))))
    found = hwprune.measure(Work(clock, 0.02), x, energy=False)
    assert isinstance(found.energy_j, Unavailable) and "not asked for" in found.energy_j.reason
    assert not found.rounds_j


def test_energy_beside_another_process_is_no_figure(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = metered(clock, x, monkeypatch, foreign=(4711,))
    assert value(found.latency_s) == pytest.approx(0.004)
    for figure in (found.energy_j, found.average_power_w, found.ratio("model", "dense").energy):
        assert isinstance(figure, Unavailable)
        assert "another process computed on the device" in figure.reason
    assert {step for step, _, _ in found.discarded} == {"energy"}


def test_a_sensor_lost_on_the_way_leaves_the_latency(
    clock: VirtualClock, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(sensor: object, run: object, *, drain: object, clock: object) -> Unavailable:
        return Unavailable("GPU is lost")

    monkeypatch.setattr(compare, "energy_of", lost)
    found, source = metered(clock, x, monkeypatch)
    assert value(found.latency_s) == pytest.approx(0.004)
    assert isinstance(found.energy_j, Unavailable) and found.energy_j.reason == "GPU is lost"
    assert source.closed == 1


# --- for real ------------------------------------------------------------------------------------


def test_a_real_model_on_this_cpu_gives_a_whole_measurement(
    tiny_vit: nn.Module, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts structure alone: a time would be this machine's."""
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: (1 << 20, "sysfs"))
    monkeypatch.setattr(arms, "calls_per_block", lambda *given: 5)
    steps = []
    found = hwprune.measure(
        tiny_vit,
        tiny_images,
        against=copy.deepcopy(tiny_vit),
        rounds=3,
        energy=False,
        l2="cold",
        progress=lambda step, done, total: steps.append((step, done, total)),
    )
    assert value(found.latency_s) > 0 and value(found.cpu_time_s) > 0
    assert value(found.latency_p95_s) >= 0.5 * value(found.latency_s)
    assert isinstance(found.ratio("model", "dense").latency, Estimate)
    assert isinstance(found.aa.latency, Estimate)
    assert found.memory.peak_bytes > found.memory.weight_bytes > 0  # type: ignore[union-attr]
    assert all(value >= 0 for value in found.noise_rel)
    assert found.settings["flush_bytes"] > 0
    assert {step for step, _, _ in steps} == {"check outputs", "warm up", "latency"}
    assert all(0 <= done <= total for _, done, total in steps)
    assert steps[-1] == ("latency", 1000, 1000)
    json.dumps(found.to_dict(), allow_nan=False)
