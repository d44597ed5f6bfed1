"""Budgets of latency: priced on a device, proven by measuring, solved again when missed, or refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import contract as contract_
from hwprune import proof as proof_
from hwprune.allocate import Budget, UnreachableBudget, allocate
from hwprune.device import DeviceProfile, Entry
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.network import NetworkModel
from hwprune.operations import count_operations
from hwprune.ops import Op
from hwprune.options import option_groups
from hwprune.predict import CostModel
from hwprune.pricing import Pricer
from hwprune.pruning import analyse, prune

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

DIM, HEADS, HIDDEN, TOKENS = 48, 4, 96, 17


def vit() -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": HEADS}
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, mlp_ratio=2, **args
    ).eval()
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)]


def truth_s(op: Op) -> float:
    """A device of this file's own: linear in the work, MLPs twice as dear as attention, a launch each."""
    dear = 2.0 if op.kind == "linear" and HIDDEN in op.shape[1:] else 1.0
    return 1e-6 + dear * op.macs * 1e-11


def entries() -> Iterator[Entry]:
    """Every operation that a plan of this small model can have."""
    widths = range(1, 3 * DIM + 1)
    ops = {Op("linear", (136, n, DIM), "fp32") for n in widths}
    ops |= {Op("linear", (136, DIM, k), "fp32") for k in widths}
    ops |= {Op("linear", (136, n, k), "fp32") for n, k in ((HIDDEN, DIM), (DIM, HIDDEN))}
    ops |= {Op("gelu", (136, n), "fp32") for n in range(1, HIDDEN + 1)}
    ops |= {Op("layer_norm", (136, DIM), "fp32"), Op("linear", (8, 5, DIM), "fp32")}
    ops.add(Op("linear", (128, DIM, 3 * 4 * 4), "fp32"))  # the patch embedding
    for h, d, e in itertools.product(range(1, HEADS + 1), range(1, 13), range(1, 13)):
        ops.add(Op("attention", (8, h, TOKENS, d, e), "fp32"))
    for op in sorted(ops):
        yield Entry(op, truth_s(op), 0.99 * truth_s(op), 1.01 * truth_s(op), 8)


@pytest.fixture(scope="module")
def costs() -> CostModel:
    device = {"type": "cpu", "name": "FAKE-device", "threads": 1}
    sensor = {"source": None, "reason": "this device is made up"}
    profile = DeviceProfile("FAKE", device, {}, sensor, tuple(entries()), {}, synthetic=True)
    return CostModel(profile)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, costs: CostModel) -> None:
    """Budgets are judged on the made-up device, which this machine is not."""
    monkeypatch.setattr(contract_, "device_costs", lambda *_, **__: costs)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, elsewhere: None) -> list[dict[str, Any]]:
    """This machine is the made-up device; what is measured there is in the list, one proof a plan."""
    proofs: list[dict[str, Any]] = []
    monkeypatch.setattr(contract_, "this_device", lambda _: "FAKE-device, 1 thread(s)")
    monkeypatch.setattr(
        contract_,
        "latency_s",
        lambda model, x, mode: (
            1e-4 + sum(map(truth_s, count_operations(model, x, partly=True).ops))
        ),
    )
    monkeypatch.setattr(proof_, "prove", lambda *_, **__: proofs.pop(0))
    return proofs


def proof(value: float) -> dict[str, Any]:
    return {
        "latency": Estimate(value, value * 0.99, value * 1.01, 8),
        "energy": Unavailable("no sensor"),
    }


def pricer(model: nn.Module, costs: CostModel) -> Pricer:
    ops = count_operations(model, images()[0], partly=True).ops
    network = NetworkModel(costs)
    return Pricer(network, 8, "fp32", network.predict(ops))


KINDS = ("head", "neuron", "qk", "vo")


def test_a_latency_budget_is_kept_as_predicted_and_says_that_it_is_a_prediction(
    elsewhere: None,
) -> None:
    model = vit()
    report = prune(model, images(), Budget(latency=0.7), kinds=KINDS, device="FAKE")
    told = report.to_dict()
    assert 0.5 < told["predicted"]["latency_ratio"]["value"] <= 0.7
    assert told["measured"]["latency_ratio"] is None
    assert "predicted for FAKE-device, 1 thread(s), not measured" in told["measured"]["reason"]
    assert any("not measured" in warning for warning in report.warnings)
    dense = sum(map(truth_s, count_operations(vit(), images()[0], partly=True).ops))
    after = sum(map(truth_s, count_operations(model, images()[0], partly=True).ops))
    assert after / dense == pytest.approx(told["predicted"]["latency_ratio"]["value"], rel=1e-6)


def test_the_cheapest_loss_on_the_device_is_not_the_cheapest_in_macs(elsewhere: None) -> None:
    # On this device MLPs are dear: a latency budget takes more of them than a MACs budget does.
    kept = []
    for budget in (Budget(latency=0.75), Budget(macs=0.75)):
        model = vit()
        prune(model, images(), budget, kinds=KINDS, repair=False)
        kept.append(sum(b.mlp.fc1.out_features for b in model.blocks if hasattr(b.mlp, "fc1")))
    assert kept[0] < kept[1]


def test_the_knapsack_finds_the_best_plan_of_all(costs: CostModel) -> None:
    model = vit()
    analysis = analyse(model, images(), kinds=("neuron",))
    price = pricer(model, costs)
    groups = option_groups(
        model, analysis.curves, analysis.cost, round_to=8, pricer=price, limited=["latency_s"]
    )
    fixed = price.dense.latency_s - sum(max(o.latency_s for o in options) for _, options in groups)
    for share in (0.95, 0.8, 0.7):
        limit = share * price.dense.latency_s
        plans = list(itertools.product(*(options for _, options in groups)))
        fitting = [p for p in plans if fixed + sum(o.latency_s for o in p) <= limit]
        best = min(sum(o.distortion for o in p) for p in fitting)
        plan = allocate(model, analysis.curves, analysis.cost, Budget(latency=share), pricer=price)
        assert plan.distortion == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert plan.latency_s is not None and plan.latency_s <= limit * (1 + 1e-9)


def test_a_looser_budget_never_costs_more(costs: CostModel) -> None:
    model = vit()
    analysis = analyse(model, images(), kinds=KINDS)
    price = pricer(model, costs)
    losses = [
        allocate(model, analysis.curves, analysis.cost, Budget(latency=r), pricer=price).distortion
        for r in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


def test_several_budgets_are_kept_at_once(elsewhere: None) -> None:
    report = prune(
        vit(), images(), Budget(latency=0.8, macs=0.7, params=0.9), kinds=KINDS, repair=False
    )
    assert report.macs_ratio <= 0.7 and report.params_ratio <= 0.9
    assert report.to_dict()["predicted"]["latency_ratio"]["value"] <= 0.8


def test_an_absolute_latency_is_seconds_of_a_batch(costs: CostModel) -> None:
    model = vit()
    analysis = analyse(model, images(), kinds=("neuron",))
    price = pricer(model, costs)
    limit_us = 0.8 * price.dense.latency_s * 1e6
    plan = allocate(
        model, analysis.curves, analysis.cost, Budget(latency=f"{limit_us:.3f}us"), pricer=price
    )
    relative = allocate(model, analysis.curves, analysis.cost, Budget(latency=0.8), pricer=price)
    assert plan.latency_s is not None and plan.latency_s <= limit_us * 1e-6
    assert plan.keep == relative.keep


def test_what_was_measured_is_in_the_report(here: list[dict[str, Any]]) -> None:
    here.extend([proof(0.69), proof(0.692)])  # of the plan, and of the finished model
    report = prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    told = report.to_dict()
    assert told["measured"]["latency_ratio"] == proof(0.692)["latency"].to_dict()
    assert told["measured"]["energy_ratio"] is None
    assert told["measured"]["reason"] == "no sensor"
    assert "latency ratio measured: 0.692 [0.685, 0.699]" in str(report)


def test_a_missed_budget_is_solved_again_with_what_was_measured(here: list[dict[str, Any]]) -> None:
    here.extend([proof(0.84), proof(0.70), proof(0.70)])
    report = prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert here == []
    # 0.84 measured where 0.70 was promised: the next plan aims at 0.7 * 0.7 / 0.84, less 1.5 %.
    assert report.to_dict()["predicted"]["latency_ratio"]["value"] <= 0.7 * 0.7 / 0.84


def test_a_budget_left_unused_is_spent(here: list[dict[str, Any]]) -> None:
    here.extend([proof(0.60), proof(0.69), proof(0.69)])
    report = prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert here == []
    assert 0.7 < report.to_dict()["predicted"]["latency_ratio"]["value"] <= 0.7 * 0.7 / 0.60


def test_the_best_plan_that_keeps_the_budget_is_taken(here: list[dict[str, Any]]) -> None:
    here.extend(
        [proof(0.60), proof(0.80), proof(0.60)]
    )  # the second goes too far: back to the first
    report = prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert here == []
    assert report.to_dict()["predicted"]["latency_ratio"]["value"] <= 0.7


def test_a_budget_that_measuring_never_confirms_is_refused_and_the_model_is_as_it_was(
    here: list[dict[str, Any]],
) -> None:
    here.extend(proof(0.9) for _ in range(contract_.ATTEMPTS))
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnreachableBudget, match=r"none keeps the budget on this machine; the last: "
    ):
        prune(model, images(), Budget(latency=0.79), kinds=KINDS, repair=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_a_finished_model_over_its_budget_is_refused_after_a_second_look(
    here: list[dict[str, Any]],
) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    here.extend([proof(0.69), proof(0.8), proof(0.8)])
    with pytest.raises(UnreachableBudget, match=r"over its budget: latency 0\.800 of dense"):
        prune(model, images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    here.extend([proof(0.69), proof(0.8), proof(0.7)])
    prune(model, images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert here == []


def test_a_miss_within_the_interval_is_no_miss(here: list[dict[str, Any]]) -> None:
    here.extend([proof(0.705), proof(0.705)])  # their lower ends are 0.698
    prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    assert here == []


def test_energy_on_a_device_without_figures_is_refused(elsewhere: None) -> None:
    with pytest.raises(ValueError, match="budget energy: FAKE has no energy figures"):
        prune(vit(), images(), Budget(energy=0.7), kinds=KINDS)


def test_a_latency_out_of_reach_says_what_is_reachable(elsewhere: None) -> None:
    with pytest.raises(UnreachableBudget, match=r"budget latency <= .* is out of reach"):
        prune(vit(), images(), Budget(latency=0.01), kinds=KINDS)


def test_a_machine_without_a_profile_is_told_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract_, "profile_here", lambda *_: None)
    with pytest.raises(ValueError, match=r"has no profile; measure it once with `hwprune profile`"):
        prune(vit(), images(), Budget(latency=0.7))


@pytest.mark.parametrize("timed_batch", [0, -1])
def test_a_batch_without_images_is_refused(timed_batch: int) -> None:
    with pytest.raises(ValueError, match="timed_batch: expected at least 1"):
        prune(vit(), images(), Budget(macs=0.7), timed_batch=timed_batch)


def test_the_timed_batch_has_the_size_asked_for() -> None:
    for count in (1, 8, 16, 40):
        assert len(contract_.timed_images(images(), count)) == count


def test_the_command_prints_what_was_measured_and_predicted(
    here: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from hwprune.terminal import show_report

    here.extend([proof(0.69), proof(0.69)])
    report = prune(vit(), images(), Budget(latency=0.7), kinds=KINDS, repair=False)
    show_report({**report.to_dict(), "model": "m", "out": "o", "format": "pruned"}, "next")
    said = " ".join(capsys.readouterr().out.split())
    assert "latency, of dense: 0.690 [0.683, 0.697] measured, 0." in said and "predicted" in said
    assert "energy, of dense" not in said
