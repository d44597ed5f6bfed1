"""The mode a contract is about: that of its profile, in every timing, and refused where it is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune import contract as contract_
from hwprune import proof as proof_
from hwprune import pruning as pruning_
from hwprune.allocate import Budget
from hwprune.cli import main
from hwprune.contract import contract, device_costs
from hwprune.device import DeviceProfile, Entry
from hwprune.judging import Gauge
from hwprune.meter.estimate import Estimate
from hwprune.network import NetworkModel
from hwprune.operations import count_operations
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.proof import measured
from hwprune.pruning import prune

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

KEY = "FAKE-gpu"


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=5,
    ).eval()
    return model


def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def profile(*modes: str) -> DeviceProfile:
    """A board on which everything takes a microsecond and as much again for its work, in those modes."""
    ops: list[Op] = list(dict.fromkeys(count_operations(vit(), images(), partly=True).ops))
    entries = [
        Entry(op, 1e-6, 0.99e-6, 1.01e-6, 8, mode=mode) for mode in modes for op in sorted(ops)
    ]
    sensor = {"source": None, "reason": "this device is made up"}
    device = {"type": "cuda", "name": KEY}
    return DeviceProfile("FAKE", device, {}, sensor, tuple(entries), {}, synthetic=True)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """This machine is the board; (what was timed, mode or energy) of each timing."""
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(contract_, "load_device", lambda _: profile("graph"))
    monkeypatch.setattr(contract_, "this_device", lambda _: profile("graph").key)

    def latency_s(model: nn.Module, x: Tensor, mode: str) -> float:
        seen.append(("dense", mode))
        return 1e-4

    def prove(pruned: nn.Module, dense: nn.Module, x: Tensor, mode: str, *, energy: bool) -> Any:
        seen.append(("energy" if energy else "latency", mode))
        return {"latency": Estimate(0.7, 0.69, 0.71, 8)}

    monkeypatch.setattr(contract_, "latency_s", latency_s)
    monkeypatch.setattr(proof_, "prove", prove)
    return seen


def test_every_timing_is_in_the_mode_of_the_profile(timings: list[tuple[str, Any]]) -> None:
    terms = contract(vit(), Budget(latency=0.7), "FAKE", images())
    assert terms is not None and terms.mode == "graph" and terms.notes == ()
    measured(vit(), terms, {"latency"})
    measured(vit(), terms)
    assert timings == [("dense", "graph"), ("latency", "graph"), ("energy", "graph")]


def test_energy_is_metered_while_settling_only_where_it_is_limited(
    timings: list[tuple[str, Any]],
) -> None:
    terms = contract(vit(), Budget(latency=0.7), "FAKE", images())
    assert terms is not None
    measured(vit(), terms, {"energy", "macs"})
    assert timings[-1] == ("energy", "graph")


def test_a_model_no_graph_takes_is_timed_eagerly_and_the_report_says_so(
    timings: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def latency_s(model: nn.Module, x: Tensor, mode: str) -> float:
        if mode == "graph":
            raise ValueError("the dense model cannot be timed: it synchronises")
        return 1e-4

    monkeypatch.setattr(contract_, "latency_s", latency_s)
    terms = contract(vit(), Budget(latency=0.7), "FAKE", images())
    assert terms is not None and terms.mode == "eager"
    assert terms.notes == (
        "timed eagerly: as a graph the dense model cannot be timed: it synchronises",
    )
    with pytest.raises(ValueError, match="it synchronises"):
        contract(vit(), Budget(latency=0.7), "FAKE", images(), mode="graph")


@pytest.mark.parametrize(("there", "asked"), [("graph", "eager"), ("eager", "graph")])
def test_a_mode_the_profile_was_not_measured_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: str, asked: Any
) -> None:
    monkeypatch.setattr(contract_, "load_device", lambda _: profile(there))
    expected = rf"mode='{asked}': FAKE was measured in mode {there}; leave mode out"
    with pytest.raises(ValueError, match=expected):
        device_costs("FAKE", torch.device("cpu"), "latency", mode=asked)
    both = profile("eager", "graph")
    monkeypatch.setattr(contract_, "load_device", lambda _: both)
    found = device_costs("FAKE", torch.device("cpu"), "latency", mode=asked)
    assert isinstance(found, CostModel) and found.mode == asked


def test_a_machine_without_a_profile_in_that_mode_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract_, "profile_here", lambda *_: None)
    with pytest.raises(ValueError, match="has no profile measured in mode graph; measure it"):
        prune(vit(), [images()], Budget(latency=0.7), mode="graph")


def test_a_mode_means_nothing_to_a_budget_of_macs() -> None:
    with pytest.raises(ValueError, match=r"mode='eager': budgets macs, params and memory do not"):
        prune(vit(), [images()], Budget(macs=0.7), mode="eager")


def test_what_is_timed_and_weighed_has_the_type_it_will_run_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model pruned in fp32 for bf16: its operations, its bytes and its proof are bf16's."""
    ops = count_operations(vit().bfloat16(), images().bfloat16(), partly=True).ops
    assert {op.dtype for op in ops} == {"bf16"}
    entries = [Entry(op, 1e-6, 0.99e-6, 1.01e-6, 8) for op in sorted(set(ops))]
    device = {"type": "cpu", "name": KEY, "threads": 1}
    sensor = {"source": None, "reason": "this device is made up"}
    board = DeviceProfile("FAKE", device, {}, sensor, tuple(entries), {}, synthetic=True)
    monkeypatch.setattr(contract_, "load_device", lambda _: board)
    seen: list[torch.dtype] = []

    def prove(pruned: nn.Module, dense: nn.Module, x: Tensor, mode: str, *, energy: bool) -> Any:
        seen.extend(next(part.parameters()).dtype for part in (pruned, dense))
        seen.append(x.dtype)
        return {"latency": Estimate(0.7, 0.69, 0.71, 8)}

    monkeypatch.setattr(contract_, "this_device", lambda _: board.key)
    monkeypatch.setattr(contract_, "latency_s", lambda *_: 1e-4)
    monkeypatch.setattr(proof_, "prove", prove)
    model = vit()
    budget = Budget(latency=0.7, memory=0.9)
    terms = contract(model, budget, "FAKE", images(), dtype=torch.bfloat16)
    assert terms is not None and terms.memory is not None and terms.pricer is not None
    assert terms.pricer.dtype == terms.memory.dtype == "bf16"
    whole = contract(model, Budget(memory=0.9), None, images())
    assert whole is not None and whole.memory is not None
    assert whole.model is model, "no copy where the type is its own"
    assert terms.memory.weights == whole.memory.weights / 2
    measured(model, terms, {"latency"})
    assert seen == [torch.bfloat16] * 3
    assert next(model.parameters()).dtype == torch.float32


def test_the_command_judges_the_type_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dtype bf16 --budget memory=...`: of the model that is written, not of the fp32 one it is made from."""
    made: list[Any] = []

    def spied(*args: Any, **options: Any) -> Any:
        made.append(contract(*args, **options))
        return made[-1]

    monkeypatch.setattr(pruning_, "contract", spied)
    words = ["prune", "digits", "--data", "digits", "--calibration", "16", "--batch", "8"]
    words += ["--dtype", "bf16", "--budget", "memory=0.9", "--out", str(tmp_path / "m")]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    (terms,) = made
    saved = list(hwprune.load(tmp_path / "m").parameters())
    dense = list(terms.model.parameters())
    assert {p.dtype for p in (*saved, *dense)} == {torch.bfloat16}
    assert terms.memory.weights == sum(2 * p.numel() for p in dense)


def test_a_front_is_gauged_in_the_type_it_will_run_in() -> None:
    """fp32 points of a sweep, beside a board that knows bf16 alone."""
    ops = count_operations(vit().bfloat16(), images().bfloat16(), partly=True).ops
    entries = [Entry(op, 1e-6, 0.99e-6, 1.01e-6, 8) for op in sorted(set(ops))]
    device = {"type": "cpu", "name": KEY, "threads": 1}
    sensor = {"source": None, "reason": "this device is made up"}
    board = DeviceProfile("FAKE", device, {}, sensor, tuple(entries), {}, synthetic=True)
    network = NetworkModel(CostModel(board))
    for x, known in ((images(), False), (images().bfloat16(), True)):
        gauge = Gauge(network, x, network.predict(ops))
        assert (gauge.ratios(vit())["latency_ratio"] is not None) == known
