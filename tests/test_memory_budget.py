"""Budgets of memory end to end: predicted, measured by the allocator, solved again when missed, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import KINDS, images, vit

from hwprune import contract as contract_
from hwprune import opening
from hwprune import proof as proof_
from hwprune.allocate import Budget, UnreachableBudget
from hwprune.cli import main
from hwprune.digits import digits_model
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.memory import Memory, peak_memory
from hwprune.pruning import prune


def bytes_of(model: torch.nn.Module) -> int:
    """Weights and activations as the allocator has them."""
    (x,) = images()[:1]
    with torch.inference_mode():
        model(x)
        found = peak_memory(lambda: model(x), model, (), x.device)
    assert isinstance(found, Memory)
    return found.weight_bytes + found.activation_bytes


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_a_memory_budget_is_kept_as_the_allocator_counts(share: float) -> None:
    model = vit()
    whole = bytes_of(model)
    told = prune(model, images(), Budget(memory=share), kinds=KINDS, repair=False).to_dict()
    now = bytes_of(model)
    assert 0.9 * share < now / whole <= share
    assert told["measured"]["memory_ratio"]["value"] == pytest.approx(now / whole, rel=1e-9)
    predicted = told["predicted"]["memory_ratio"]
    assert predicted["lo"] <= now / whole <= predicted["hi"]
    assert told["measured"]["latency_ratio"] is None
    assert "neither latency nor energy was asked for" in told["measured"]["reason"]


def test_an_absolute_memory_is_bytes_of_the_timed_batch() -> None:
    model = vit()
    limit = 0.75 * bytes_of(model)
    prune(model, images(), Budget(memory=f"{limit / 1024:.3f}KiB"), kinds=KINDS, repair=False)
    assert bytes_of(model) <= limit * 1.0001


def test_memory_and_macs_hold_at_once() -> None:
    model = vit()
    whole = bytes_of(model)
    budget = Budget(memory=0.8, macs=0.5)
    report = prune(model, images(), budget, kinds=KINDS, repair=False)
    assert report.macs_ratio <= 0.5 and bytes_of(model) <= 0.8 * whole


def test_a_missed_memory_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def heavier(*given: Any) -> Estimate:
        found = contract_.weigh(*given)
        assert isinstance(found, Estimate)
        seen.append(found.value)
        return Estimate(found.value * 1.1, found.value * 1.1, found.value * 1.1, 1)

    monkeypatch.setattr(proof_, "weigh", heavier)
    told = prune(vit(), images(), Budget(memory=0.8), kinds=KINDS, repair=False).to_dict()
    assert seen[0] > 0.8 / 1.1 and len(seen) > 2
    assert told["measured"]["memory_ratio"]["value"] <= 0.8


def test_without_an_allocator_to_ask_the_figure_is_a_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "torch keeps no list of allocations in its profiler"
    monkeypatch.setattr(contract_, "peak_memory", lambda *_: Unavailable(reason))
    report = prune(vit(), images(), Budget(memory=0.8), kinds=KINDS, repair=False)
    told = report.to_dict()
    assert told["measured"]["memory_ratio"] is None and reason in told["measured"]["reason"]
    assert told["predicted"]["memory_ratio"]["value"] <= 0.8
    assert any("predicted, not measured" in warning for warning in report.warnings)


def test_a_memory_out_of_reach_is_refused_and_the_model_is_as_it_was() -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnreachableBudget, match=r"budget memory <= .* is out of reach"):
        prune(model, images(), Budget(memory=0.1), kinds=KINDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_budget_that_allows_the_dense_model_leaves_it() -> None:
    told = prune(vit(), images(), Budget(memory=1.0), kinds=KINDS).to_dict()
    assert told["macs_ratio"] == 1.0
    assert told["predicted"]["memory_ratio"]["value"] == 1.0
    assert "nothing was removed" in told["measured"]["reason"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("memory=0.7", Budget(memory=0.7)),
        ("memory=120MB", Budget(memory="120MB")),
        ("memory=1.5GiB", Budget(memory="1.5GiB")),
        (" memory = 3 kB", Budget(memory="3 kB")),
    ],
)
def test_a_memory_budget_is_read_from_words(word: str, expected: Budget) -> None:
    assert Budget.parse([word]) == expected


def test_units_of_memory() -> None:
    for text, amount in (("1.5GiB", 1.5 * 2**30), ("120MB", 120e6), ("4KiB", 4096), ("7 B", 7)):
        assert Budget(memory=text).limits({"memory": 1e9}) == {"memory": amount}
    assert Budget(memory="0.5").limits({"memory": 1e9}) == {"memory": 5e8}  # no unit: a ratio


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("memory=120", "memory=120.0 is more than the dense model's"),
        ("memory=120M", "memory: expected a number, or one with B, kB, MB, GB, KiB, MiB, GiB"),
        ("memory=0MB", "memory must be above 0"),
        ("memory=big", "expected a number, or one with B"),
    ],
)
def test_words_that_are_no_memory_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse([word])


def test_the_command_keeps_a_memory_budget_or_ends_with_3_and_what_can_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(
        opening, "digits_model", lambda progress=None: digits_model(pretrained=False)
    )
    words = ["prune", "digits", "--data", "digits", "--calibration", "16", "--no-repair"]

    def run(*more: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*words, *map(str, more)])
        return int(ended.value.code or 0)

    out, told = tmp_path / "out", tmp_path / "told.json"
    assert run("--budget", "memory=0.8", "--out", out, "--json", told) == 0
    found = json.loads(told.read_text())
    assert found["measured"]["memory_ratio"]["value"] <= 0.8
    assert "memory, of dense: " in capsys.readouterr().out
    assert run("--budget", "memory=9kB", "--out", tmp_path / "no") == 3
    said = capsys.readouterr().err
    assert "budget memory <= 9000" in said and "out of reach" in said
    assert not (tmp_path / "no").exists()
    assert run("--budget", "memory=12M", "--out", tmp_path / "no") == 2
    assert "one with B, kB, MB" in capsys.readouterr().err
    assert run("--budget", "macs=0.9", "--energy-weight", "-1", "--out", tmp_path / "no") == 2
    assert "energy_weight: expected a number of at least 0" in capsys.readouterr().err
