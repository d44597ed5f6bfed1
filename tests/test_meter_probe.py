"""The probe of an unknown board, on simulated boards whose properties are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes.virtual import Board as Truth
from fakes.virtual import FakeSource, Sensor, VirtualClock

from hwprune.meter.energy_window import Chunk
from hwprune.meter.gemm_load import GemmLoad
from hwprune.meter.idle import idle_power
from hwprune.meter.probe import Board, aa_power, gemm_values, refreshes, run_probe, square_waves

IDLE_W = 90.0
DRAWS = {"random": 600.0, "zeros": 400.0, "masked": 520.0}


class FakeLoad:
    """Draws power by the values it multiplies; idle in between."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth

    def busy(self, seconds: float) -> None:
        self.truth.draw(600.0)
        self.truth.clock.sleep(seconds)
        self.truth.draw(IDLE_W)

    def chunks(self, values: str) -> tuple[Callable[[], Chunk], Callable[[], None]]:
        def run_chunk() -> Chunk:
            self.truth.draw(DRAWS[values])
            self.truth.clock.sleep(0.004)
            return Chunk(2)

        return run_chunk, lambda: self.truth.draw(IDLE_W)


def made(refresh_s: float = 0.1, source: dict[str, Any] | None = None, **sensor: Any) -> Board:
    clock = VirtualClock()
    truth = Truth(clock, IDLE_W)
    sensed = Sensor(truth, refresh_s=refresh_s, phase_s=0.013, **sensor)
    return Board(
        FakeSource(sensed, **(source or {})),
        FakeLoad(truth),
        clock,
        refresh_s=4,
        wave_s=3,
        window_s=3,
    )


@pytest.mark.parametrize("refresh_s", [0.01, 0.02, 0.1])
def test_the_counter_s_refresh_is_found(refresh_s: float) -> None:
    found = refreshes(made(refresh_s, jitter_s=0.02 * refresh_s))
    assert found["energy_mj"]["median_s"] == pytest.approx(refresh_s, rel=0.1)
    assert (
        found["energy_mj"]["p5_s"] <= found["energy_mj"]["median_s"] <= found["energy_mj"]["p95_s"]
    )
    # Constant power gives constant readings: their refresh cannot be told, and is not made up.
    assert found["instant_mw"]["value"] is None and "changed" in found["instant_mw"]["reason"]


def test_a_field_that_is_not_answered_is_null_with_a_reason() -> None:
    found = refreshes(made(source={"average": False}))
    assert found["average_mw"] == {"value": None, "reason": "it is not answered"}


@pytest.mark.parametrize("continuous", [True, False])
def test_a_counter_that_samples_is_told_from_one_that_integrates(continuous: bool) -> None:
    found = square_waves(made(continuous=continuous), periods_s=(0.05,))
    assert found["continuous"] == continuous
    assert len(found["phases"]) == 4
    if continuous:
        for wave in [*found["phases"], *found["periods"]]:
            assert wave["counter_w"] == pytest.approx((600 + IDLE_W) / 2, rel=0.03)


def test_without_a_counter_continuity_is_unknown() -> None:
    found = square_waves(made(source={"counter": False}), periods_s=())
    assert found["continuous"] is None and found["reason"]


def test_the_same_work_twice_gives_a_ratio_of_one() -> None:
    found = aa_power(made())
    assert found["ratio"]["lo"] <= 1 <= found["ratio"]["hi"]
    assert found["ratio"]["value"] == pytest.approx(1, rel=2e-3)
    assert len(found["a_w"]) == len(found["b_w"]) == 8


def test_zeros_draw_less_and_the_probe_sees_it() -> None:
    found = gemm_values(made())
    for values, watts in DRAWS.items():
        assert found[values]["average_power_w"] == pytest.approx(watts, rel=2e-3)
        assert found[values]["time_per_iteration_s"] == pytest.approx(0.002, rel=1e-3)


def test_a_whole_probe_is_json_and_says_what_is_missing() -> None:
    board, seen = made(), []
    found = run_probe(board, seen.append)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert seen == ["idle_before_w", "refresh", "square_wave", "after_load", "aa", "gemm_values"]
    assert found["idle_before_w"]["value"] == pytest.approx(IDLE_W, rel=0.02)
    assert found["after_load"]["context_idle_w"]["value"] == pytest.approx(IDLE_W, rel=0.02)
    assert found["capabilities"]["counter"] is True
    nothing = made(source={"counter": False, "instant": False, "average": False})
    found = run_probe(nothing)
    assert json.dumps(found, allow_nan=False)
    assert found["idle_before_w"]["value"] is None and found["aa"]["value"] is None
    assert all(found["gemm_values"][v]["reason"] for v in DRAWS)


def test_a_load_that_fails_leaves_its_reason_and_the_probe_goes_on() -> None:
    board = made()

    def out_of_memory(values: str) -> None:
        raise RuntimeError("out of memory")

    board.load.chunks = out_of_memory  # type: ignore[method-assign,assignment]
    found = run_probe(board)
    assert found["refresh"]["value"] is None and "out of memory" in found["gemm_values"]["reason"]
    assert found["square_wave"]["continuous"] is True


def test_nvml_is_asked_call_by_call() -> None:
    pytest.importorskip(
        "pynvml", reason="nvidia-ml-py is not installed: pip install hwprune[power]"
    )
    from fakes.nvml_library import FakeBoard, FakeLibrary, install

    from hwprune.meter.nvml import NvmlSource, open_nvml
    from hwprune.meter.nvml_answers import answers

    clock = VirtualClock()
    board = FakeBoard(Sensor(Truth(clock, 300.0)), fields=(83, 186, 74))
    with install(FakeLibrary([board])):
        source = open_nvml("nvml:0", clock)
        assert isinstance(source, NvmlSource)
        found = answers(source)
        source.close()
    assert json.dumps(found, allow_nan=False)
    assert found["nvmlSystemGetDriverVersion"] == {"value": "FAKE-570.00"}
    assert found["nvmlDeviceGetEnforcedPowerLimit"] == {"value": 700_000}
    assert found["nvmlDeviceGetMemoryInfo"]["value"]["total"] == board.memory_bytes
    assert found["nvmlDeviceGetVbiosVersion"]["value"] is None
    assert found["nvmlDeviceGetVbiosVersion"]["reason"] == "Function Not Found"
    assert found["fields"]["instant_mw"]["value"] == 300_000
    assert found["fields"]["average_mw"] == {"value": None, "reason": "Not Supported"}


# --- idle power ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [{}, {"counter": False}, {"counter": False, "instant": False}])
def test_idle_power_is_that_of_the_idle_board(source: dict[str, bool]) -> None:
    board = made(source=source)
    found = idle_power(board.source, clock=board.clock)
    assert found and found.value == pytest.approx(IDLE_W, rel=0.011) and not found.flags
    assert found.contains(IDLE_W) or not source.get("counter", True)


def test_an_idle_that_moves_is_flagged() -> None:
    board = made()

    def busy_in_the_middle() -> Any:
        while True:
            board.load.busy(0.1)
            yield 1.9 if board.clock.now_ns() < 1005e9 else 1e6

    beside = board.clock.beside(busy_in_the_middle())
    found = idle_power(board.source, clock=board.clock)
    beside.stop()
    assert found and found.flags == ("unstable_idle",)
    with pytest.raises(ValueError, match="at least 2 s"):
        idle_power(board.source, 1)


# --- the real load -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 100, 30])
def test_the_products_are_of_what_they_say(n: int) -> None:
    load = GemmLoad(torch.device("cpu"), n, torch.float32)
    for values in ("random", "zeros", "masked"):
        run_chunk, drain = load.chunks(values)
        assert run_chunk().iterations > 0
        drain()
        out = load._out
        assert bool(out.any()) == (values != "zeros") or values == "masked"
        if values == "random":
            torch.testing.assert_close(out, load._a @ load._b)
    share = load._mask.float().mean().item()
    assert 0 <= share <= 1 and load._mask.shape == (n, n)
    load.busy(0.01)
