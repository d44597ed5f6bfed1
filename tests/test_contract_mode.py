"""The mode a contract is about: that of its profile, in every timing, and refused where it is not known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import contract as contract_
from hwprune import proof as proof_
from hwprune.allocate import Budget
from hwprune.contract import contract, device_costs
from hwprune.device import DeviceProfile, Entry
from hwprune.meter.estimate import Estimate
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
