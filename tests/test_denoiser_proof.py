"""Budgets of a denoiser's latency proven by measuring: aimed at, tightened, loosened, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hwprune
from hwprune import denoiser_contract as contract_
from hwprune import denoiser_proof as proof_
from hwprune.cli import main
from hwprune.gating import Layout
from hwprune.meter import arms

pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
)

from fakes.denoiser_device import Machine, pruned, put_elsewhere, put_here, refused, seconds_of
from fakes.tiny_diffusion import flow, tiny_dit
from test_diffusion_families import opened

Budget, UnreachableBudget = hwprune.Budget, hwprune.UnreachableBudget


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Budgets are judged on the made-up device, which this machine is not."""
    return put_elsewhere(monkeypatch)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine is the made-up device."""
    return put_here(monkeypatch)


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


def test_a_killed_run_goes_on_with_the_figures_it_had(here: Machine, tmp_path: Path) -> None:
    def killed(progress: Any) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    expected, _ = pruned(Budget(latency=0.8), profile="FAKE")
    with pytest.raises(KeyboardInterrupt):
        pruned(Budget(latency=0.8), profile="FAKE", folder=tmp_path, watch=killed)
    here.rest_s, here.proofs = 1e-3, []  # the machine has become another: what is known of it stays
    here.next = [0.8, 0.8]
    got, _ = pruned(Budget(latency=0.8), profile="FAKE", folder=tmp_path)
    assert len(here.proofs) == 2  # of the mask and of the model; the uniform cut was known
    pairs = zip(expected.parameters(), got.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (file,) = tmp_path.glob("contract-*.json")
    file.write_text("{")
    here.next = [0.8, 0.8, 0.8]
    pruned(Budget(latency=0.8), profile="FAKE", folder=tmp_path)
    assert len(here.proofs) == 5 and json.loads(file.read_text())["latency_s"] > 1e-3


def test_a_miss_within_the_interval_is_no_miss(here: Machine) -> None:
    # Their lower ends are 0.797: a smaller mask is looked for, and where none is better they will do.
    here.next = [0.8, *[0.805] * (proof_.ATTEMPTS + 1)]
    _, report = pruned(Budget(latency=0.8), profile="FAKE")
    assert report.to_dict()["measured"]["latency_ratio"]["value"] == 0.805
    assert len(here.proofs) > 3


def test_what_cannot_be_measured_is_said(here: Machine) -> None:
    here.sensor = False
    here.power_w = 20.0
    _, report = pruned(Budget(energy=0.8), profile="FAKE")
    assert report.to_dict()["measured"]["energy_ratio"] is None
    assert "energy could not be measured (no sensor): its budget is kept" in report.warnings[0]


def test_factors_of_the_modulation_are_in_what_is_measured(here: Machine) -> None:
    # Two linears for one are slower on this device; what is proven has them, so what is tried has them too.
    kinds = ["head", "neuron", "modulation"]
    model, report = pruned(Budget(latency=0.85), profile="FAKE", kinds=kinds)
    found = seconds_of(model) / seconds_of(tiny_dit())
    assert report.to_dict()["measured"]["latency_ratio"]["value"] == pytest.approx(found)
    assert found <= 0.85 and any(row["kind"] == "modulation" for row in report.layers)


@pytest.mark.parametrize("which", ["dit.tiny_pixart", "mmdit.tiny", "mmdit.tiny_sd3", "sana.tiny"])
def test_other_families_keep_a_budget_as_measured(here: Machine, which: str) -> None:
    here.rest_s = 2e-5
    model, conditions = opened(which)
    asked = {"updates": 6, "images": 4, "batch": 2, "kinds": ["head", "neuron", "depth"]}
    report = hwprune.prune_diffusion(
        model, conditions, Budget(latency=0.8), profile="FAKE", **asked
    )
    assert 0.7 < report.to_dict()["measured"]["latency_ratio"]["value"] <= 0.8


def test_this_machine_measures_for_real(
    elsewhere: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract_, "this_device", lambda _: "FAKE-device, 1 thread(s)")
    monkeypatch.setattr(arms, "calls_per_block", lambda *given: 5)
    monkeypatch.setattr(arms, "warm_up", lambda timer, call, count: (0.001, ()))
    # One block of three is removed: a quarter of the work, so 5 % are saved whatever the noise.
    model, report = pruned(Budget(latency=0.95), profile="FAKE", kinds=["depth"])
    ratio = report.to_dict()["measured"]["latency_ratio"]
    assert 0.3 < ratio["lo"] <= 0.95 and ratio["lo"] <= ratio["value"] <= ratio["hi"]
    assert len(model.transformer_blocks) < 3  # type: ignore[arg-type]
    assert report.to_dict()["measured"]["arms"].keys() == {"model", "dense"}


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
