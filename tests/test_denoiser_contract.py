"""Budgets of a denoiser's latency: what is priced, on this machine and on another, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hwprune

pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
)

from fakes.denoiser_device import (
    QUICK,
    Machine,
    pruned,
    put_elsewhere,
    put_here,
    refused,
    seconds_of,
)
from fakes.tiny_diffusion import stable_diffusion, tiny_dit

Budget, UnreachableBudget = hwprune.Budget, hwprune.UnreachableBudget


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Budgets are judged on the made-up device, which this machine is not."""
    return put_elsewhere(monkeypatch)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine is the made-up device."""
    return put_here(monkeypatch)


def test_a_latency_budget_is_kept_as_predicted_and_says_that_it_is_a_prediction(
    elsewhere: Machine,
) -> None:
    model, report = pruned(Budget(latency=0.8), profile="FAKE")
    told = report.to_dict()
    assert told["seconds_by_step"]["contract"] > 0
    value = told["predicted"]["latency_ratio"]["value"]
    assert 0.75 < value <= 0.8
    assert seconds_of(model) / seconds_of(tiny_dit()) == pytest.approx(value, rel=1e-6)
    assert told["measured"]["latency_ratio"] is None
    said = "predicted for FAKE-device, 1 thread(s), not measured: this machine is"
    assert said in told["measured"]["reason"]
    assert any(said in warning for warning in report.warnings)
    assert told["predicted"]["energy_ratio"] is None
    assert f"latency ratio predicted: {value:.3f}" in str(report)
    assert elsewhere.proofs == []


def test_neurons_are_left_in_multiples_of_eight(elsewhere: Machine) -> None:
    _, report = pruned(Budget(latency=0.85), profile="FAKE")
    counts = [row["kept"] for row in report.layers if row["kind"] == "neuron"]
    assert min(counts) < 96 and all(count % 8 == 0 for count in counts)


def test_what_is_dear_on_the_device_goes_first(elsewhere: Machine) -> None:
    # On this device a neuron's work costs twice that of a head: latency takes more of them than MACs do.
    kept = []
    for budget, profile in ((Budget(latency=0.75), "FAKE"), (Budget(macs=0.75), None)):
        _, report = pruned(budget, profile=profile, method="magnitude", repair=False)
        kept.append(sum(row["kept"] for row in report.layers if row["kind"] == "neuron"))
    assert kept[0] < kept[1]


def test_guidance_doubles_the_batch_that_is_priced(elsewhere: Machine) -> None:
    pruned(Budget(latency=0.9), profile="FAKE", guidance=2.0, updates=4)
    tokens = {op.shape[0] for op in elsewhere.costs.entries if op.kind == "attention"}
    assert tokens == {8}


def test_several_budgets_hold_at_once(here: Machine) -> None:
    for budget in (Budget(latency=0.9, params=0.75), Budget(latency=0.75, params=0.95)):
        _, report = pruned(budget, profile="FAKE")
        told = report.to_dict()
        assert told["measured"]["latency_ratio"]["value"] <= budget.given["latency"]
        assert told["params_ratio"] <= budget.given["params"]
        assert len(here.proofs) <= 4  # a budget of parameters that binds is not fought by timing on
        here.proofs.clear()
        counts = [row["kept"] for row in report.layers if row["kind"] == "neuron"]
        assert all(count % 8 == 0 for count in counts)


def test_depth_alone_is_enough(here: Machine) -> None:
    model, report = pruned(Budget(latency=0.75), profile="FAKE", kinds=["depth"])
    assert len(model.transformer_blocks) == 2  # type: ignore[arg-type]
    assert report.to_dict()["measured"]["latency_ratio"]["value"] <= 0.75


def test_an_absolute_latency_is_seconds_of_an_evaluation(elsewhere: Machine) -> None:
    limit_s = 0.8 * seconds_of(tiny_dit())
    model, _ = pruned(Budget(latency=f"{1e6 * limit_s:.4f}us"), profile="FAKE")
    assert 0.95 * limit_s < seconds_of(model) <= limit_s * 1.0001


def test_a_budget_of_the_dense_model_removes_nothing(here: Machine) -> None:
    model, report = pruned(Budget(latency=1.0), profile="FAKE")
    dense = tiny_dit().state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    told = report.to_dict()
    assert told["predicted"]["latency_ratio"]["value"] == 1 and here.proofs == []
    assert told["measured"] == {
        "latency_ratio": None,
        "energy_ratio": None,
        "reason": "nothing was removed, so nothing was timed",
    }


def test_energy_is_priced_where_the_profile_has_it_and_refused_where_not(
    elsewhere: Machine,
) -> None:
    match = r"budget energy: FAKE has no energy figures \(a test\); give a latency budget"
    refused(ValueError, match, Budget(energy=0.8), profile="FAKE")
    elsewhere.power_w = 20.0
    _, report = pruned(Budget(energy=0.8), profile="FAKE")
    assert 0.75 < report.to_dict()["predicted"]["energy_ratio"]["value"] <= 0.8


def test_latency_and_energy_hold_at_once_where_both_are_measured(here: Machine) -> None:
    here.power_w = 20.0
    _, report = pruned(Budget(energy=0.75, latency=0.9), profile="FAKE")
    told = report.to_dict()["measured"]
    assert 0.7 < told["energy_ratio"]["value"] == told["latency_ratio"]["value"] <= 0.75


def test_a_latency_out_of_reach_says_what_is_left(elsewhere: Machine) -> None:
    match = r"latency=0.100 is out of reach: with every head and neuron removed 0\.\d+ of the dense"
    refused(UnreachableBudget, match, Budget(latency=0.1), profile="FAKE")


def test_convolutions_are_the_rest_of_what_was_measured(here: Machine, tmp_path: Path) -> None:
    here.rest_s = 1e-4
    pipeline = stable_diffusion(tmp_path / "words")
    report = hwprune.prune_diffusion(
        pipeline,
        ["a cat"],
        Budget(latency=0.95),
        profile="FAKE",
        kinds=["head", "neuron", "depth"],
        **{**QUICK, "images": 4, "batch": 2},
    )
    told = report.to_dict()
    assert 0.92 < told["measured"]["latency_ratio"]["value"] <= 0.95
    # All that is priced is exact, so what is not is too.
    predicted = told["predicted"]["latency_ratio"]["value"]
    assert predicted == pytest.approx(told["measured"]["latency_ratio"]["value"], rel=1e-6)


def test_convolutions_cannot_be_predicted_for_another_machine(
    elsewhere: Machine, tmp_path: Path
) -> None:
    pipeline = stable_diffusion(tmp_path / "words")
    match = r"% of the multiply-accumulates of UNet2DConditionModel are such as no profile measures .*Conv2d"
    with pytest.raises(ValueError, match=match):
        hwprune.prune_diffusion(pipeline, ["a cat"], Budget(latency=0.95), profile="FAKE", **QUICK)


def test_a_profile_that_is_not_there_is_named() -> None:
    refused(ValueError, "budget latency: .*nowhere", Budget(latency=0.8), profile="nowhere")
