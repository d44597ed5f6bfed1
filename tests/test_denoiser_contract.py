"""Budgets of a denoiser's latency: priced on a device, proven by measuring, tightened, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hwprune
from hwprune import denoiser_contract as contract_
from hwprune import denoiser_proof as proof_
from hwprune.cli import main
from hwprune.denoiser_operations import evaluation_operations
from hwprune.gating import Layout
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.predict import CostModel

pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
)

from fakes.denoiser_device import costs_for, truth_s
from fakes.tiny_diffusion import flow, stable_diffusion, tiny_dit

Budget, UnreachableBudget = hwprune.Budget, hwprune.UnreachableBudget
QUICK: dict[str, Any] = {"steps": 2, "updates": 8, "images": 8, "batch": 4}
NO_SENSOR = Unavailable("no sensor")


class Machine:
    """A made-up device: what it has measured, and what it measures of models that are run on it.

    Attributes:
        off: what a model takes really, of what its operations say.
        rest_s: of what is no operation.
        power_w: of every operation; None = there is no sensor.
        costs: what it has measured: the operations of the last model that was counted.
        proofs: ratios measured so far.
        next: ratios to give instead of the truth, the first one first.
    """

    def __init__(self) -> None:
        self.off: Callable[[float], float] = lambda ratio: ratio
        self.rest_s = 0.0
        self.power_w: float | None = None
        self.costs: CostModel
        self.proofs: list[float] = []
        self.next: list[float] = []
        self.widths: list[int] = []

    def seconds(self, model: nn.Module, inputs: Any) -> float:
        """Of one call."""
        counted = evaluation_operations(model, lambda: model(**inputs))
        return self.rest_s + sum(map(truth_s, counted.ops))

    def prove(self, pruned: nn.Module, dense: nn.Module, inputs: Any) -> dict[str, Any]:
        """As `hwprune.contract.prove`."""
        assert not any(m._forward_pre_hooks for m in pruned.modules())
        ratio = self.off(self.seconds(pruned, inputs) / self.seconds(dense, inputs))
        ratio = self.next.pop(0) if self.next else ratio
        self.proofs.append(ratio)
        self.widths.append(sum(p.numel() for p in pruned.parameters()))
        latency = Estimate(ratio, 0.99 * ratio, 1.01 * ratio, 8)
        energy = NO_SENSOR if self.power_w is None else Estimate(ratio, ratio, ratio, 8)
        return {"latency": latency, "energy": energy}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Budgets are judged on the made-up device, which this machine is not."""
    machine = Machine()
    real = contract_.evaluation_operations

    def counting(model: nn.Module, call: Callable[[], object]) -> Any:
        counted = real(model, call)
        machine.costs = costs_for(model, counted, power_w=machine.power_w)
        return counted

    class Late(CostModel):
        """Known once the model has been counted: this device has measured just what it takes."""

        def __init__(self) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(machine.costs, name)

        def predict(self, op: Any) -> Any:
            return machine.costs.predict(op)

    monkeypatch.setattr(contract_, "evaluation_operations", counting)
    monkeypatch.setattr(contract_, "device_costs", lambda *_: Late())
    return machine


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, elsewhere: Machine) -> Machine:
    """This machine is the made-up device."""
    monkeypatch.setattr(contract_, "this_device", lambda _: "FAKE-device, 1 thread(s)")
    monkeypatch.setattr(contract_, "latency_s", elsewhere.seconds)
    monkeypatch.setattr(proof_, "prove", elsewhere.prove)
    return elsewhere


def pruned(budget: Budget, **asked: Any) -> tuple[nn.Module, Any]:
    model = tiny_dit()
    given = {**QUICK, "scheduler": flow(), **asked}
    return model, hwprune.prune_diffusion(model, [1, 2, 3], budget, **given)


def seconds_of(model: nn.Module, batch: int = 4) -> float:
    """On the made-up device, of one evaluation."""
    inputs = {
        "hidden_states": torch.randn(batch, 1, 8, 8),
        "timestep": torch.tensor(500).expand(batch),
        "class_labels": torch.zeros(batch, dtype=torch.long),
    }
    return Machine().seconds(model, inputs)


def refused(error: type[Exception], match: str, budget: Budget, **asked: Any) -> None:
    model = tiny_dit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        hwprune.prune_diffusion(model, [1], budget, **{**QUICK, "scheduler": flow(), **asked})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_latency_budget_is_kept_as_predicted_and_says_that_it_is_a_prediction(
    elsewhere: Machine,
) -> None:
    model, report = pruned(Budget(latency=0.8), profile="FAKE")
    told = report.to_dict()
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


@pytest.mark.parametrize("method", ["ours", "top-k", "ecodiff", "magnitude", "random", "obs"])
def test_every_method_ends_within_a_budget_that_was_measured(here: Machine, method: str) -> None:
    model, report = pruned(Budget(latency=0.8), profile="FAKE", method=method)
    told = report.to_dict()
    measured = told["measured"]["latency_ratio"]["value"]
    assert measured == pytest.approx(seconds_of(model) / seconds_of(tiny_dit()))
    assert 0.7 < measured <= 0.8
    assert told["measured"]["energy_ratio"] is None and told["measured"]["reason"] == "no sensor"


def test_a_device_that_gains_less_than_predicted_gets_a_smaller_model(here: Machine) -> None:
    here.off = lambda ratio: 1 - 0.5 * (1 - ratio)  # half of every saving
    _, report = pruned(Budget(latency=0.85), profile="FAKE")
    told = report.to_dict()
    assert 0.82 < told["measured"]["latency_ratio"]["value"] <= 0.85
    assert told["predicted"]["latency_ratio"]["value"] <= 0.7
    # A uniform cut, the mask that was learned, the finished model: learning aimed right at once.
    assert len(here.proofs) == 3


def test_a_mask_that_misses_is_tightened_in_the_order_of_the_gates(here: Machine) -> None:
    here.next = [0.8, 0.9]  # the uniform cut was as predicted, the learned mask is not
    here.off = lambda ratio: 1 - 0.6 * (1 - ratio)
    _, report = pruned(Budget(latency=0.8), profile="FAKE")
    assert report.to_dict()["measured"]["latency_ratio"]["value"] <= 0.8
    assert here.widths[2] < here.widths[1]


def test_a_budget_left_unused_is_spent(here: Machine) -> None:
    here.next = [0.8]
    here.off = lambda ratio: 1 - 1.5 * (1 - ratio)
    _, report = pruned(Budget(latency=0.8), profile="FAKE")
    assert 0.77 < report.to_dict()["measured"]["latency_ratio"]["value"] <= 0.8
    assert here.proofs[1] < 0.75 and here.widths[2] > here.widths[1]


def test_a_budget_that_measuring_never_confirms_is_refused(here: Machine) -> None:
    here.next = [0.8, *([0.95] * proof_.ATTEMPTS)]
    refused(UnreachableBudget, r"none keeps the budget on this machine; the last: latency 0\.950",
            Budget(latency=0.9), profile="FAKE")  # fmt: skip


def test_a_finished_model_over_its_budget_is_refused_after_a_second_look(here: Machine) -> None:
    here.next = [0.8, 0.79, 0.9, 0.9]
    refused(UnreachableBudget, r"the finished model is over its budget: latency 0\.900 of dense",
            Budget(latency=0.8), profile="FAKE")  # fmt: skip
    here.next = [0.8, 0.79, 0.9, 0.79]
    pruned(Budget(latency=0.8), profile="FAKE")
    assert here.next == []


def test_a_miss_within_the_interval_is_no_miss(here: Machine) -> None:
    here.next = [0.8, 0.805, 0.805]  # their lower ends are 0.797
    pruned(Budget(latency=0.8), profile="FAKE")
    assert here.next == []


def test_several_budgets_hold_at_once(here: Machine) -> None:
    for budget in (Budget(latency=0.9, params=0.75), Budget(latency=0.75, params=0.95)):
        _, report = pruned(budget, profile="FAKE")
        told = report.to_dict()
        assert told["measured"]["latency_ratio"]["value"] <= budget.given["latency"]
        assert told["params_ratio"] <= budget.given["params"]
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


def test_a_uniform_cut_takes_the_same_share_of_every_layer() -> None:
    from hwprune.families.denoiser import find_units

    layout = Layout(find_units(tiny_dit(), ["head", "neuron"]))
    order = proof_.uniform_order(layout)
    keep = torch.zeros(layout.count, dtype=torch.bool)
    keep[order[: layout.count // 3]] = True
    for name, part in layout.split(keep).items():
        assert float(part.double().mean()) == pytest.approx(1 / 3, abs=0.02), name
    blocks = Layout(find_units(tiny_dit(), ["head", "depth"]))
    first = proof_.uniform_order(blocks)[:2].tolist()
    names = [name for name, place in blocks.places.items() if place.start in first]
    assert all(name.endswith(":depth") for name in names)


def test_a_profile_that_is_not_there_is_named() -> None:
    refused(ValueError, "budget latency: .*nowhere", Budget(latency=0.8), profile="nowhere")


def test_kept_units_come_before_the_others_and_each_by_worth() -> None:
    keep = torch.tensor([True, False, True, False])
    wanted = torch.tensor([1.0, 9.0, 2.0, 3.0])
    assert proof_.ordered(keep, wanted).tolist() == [2, 0, 1, 3]


def ran(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `hwprune prune-diffusion` on a folder of a tiny DiT."""
    if not folder.exists():
        hwprune.save(tiny_dit(), folder / "transformer")
        flow().save_pretrained(folder / "scheduler")
    quick = (
        "--steps",
        "2",
        "--updates",
        "8",
        "--images",
        "4",
        "--device",
        "cpu",
        "--labels",
        "0-3",
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["prune-diffusion", str(folder), *quick, "--out", f"{folder}-out", *words])
    assert isinstance(ended.value.code, int)
    return (ended.value.code, *capsys.readouterr())


def test_the_command_tells_what_was_measured_and_predicted(
    here: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    words = ("--budget", "latency=0.8", "--profile", "FAKE", "--json", str(file))
    code, out, err = ran(capsys, tmp_path / "dit", *words)
    assert (code, err) == (0, "")
    found = json.loads(file.read_text())
    ratio = found["measured"]["latency_ratio"]["value"]
    assert ratio <= 0.8 and found["budget"] == {"latency": 0.8}
    assert f"latency, of dense: {ratio:.3f}" in out and "measured" in out and "predicted" in out
    written = json.loads((tmp_path / "dit-out" / "report.json").read_text())
    assert written["measured"] == found["measured"]


def test_the_command_ends_with_3_where_the_budget_cannot_be_kept(
    here: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here.next = [0.8, *([0.95] * proof_.ATTEMPTS)]
    words = ("--budget", "latency=0.9", "--profile", "FAKE")
    code, out, err = ran(capsys, tmp_path / "dit", *words)
    assert (code, out) == (3, "") and err.count("\n") == 1
    assert "none keeps the budget on this machine" in err and not (tmp_path / "dit-out").exists()


def test_the_command_refuses_a_profile_for_a_budget_that_needs_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = ran(capsys, tmp_path / "dit", "--budget", "params=0.8", "--profile", "FAKE")
    assert code == 2 and "budgets macs and params need no device profile" in err
    code, _, err = ran(capsys, tmp_path / "dit", "--budget", "memory=0.8")
    assert code == 2 and "diffusion models are pruned to params, macs, latency and energy" in err
