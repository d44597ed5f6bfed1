"""Settling a contract: plans are cut and measured until one keeps the budget; no other is taken."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hwprune import proof
from hwprune.budget import UnreachableBudget
from hwprune.meter.estimate import Estimate
from hwprune.plan import Plan
from hwprune.units import Mask

DENSE_S = 2.0


def plan_of(latency_s: float, limit_s: float) -> tuple[Plan, Mask]:
    """A plan predicted to take some time; the dense model where that is all of it."""
    whole = latency_s >= DENSE_S
    plan = Plan(
        {"layer:neuron": 8 if whole else 4},
        {},
        0.0,
        1.0,
        1.0,
        1.0,
        1.0,
        limits={"latency": limit_s},
        latency_s=latency_s,
        dense_latency_s=DENSE_S,
    )
    return plan, {"layer:neuron": torch.arange(8) < (8 if whole else 4)}


def settled(
    monkeypatch: pytest.MonkeyPatch, ratio: Any, limit: float
) -> tuple[Plan, Mask, list[float]]:
    """Settle where a plan really takes `ratio(predicted)` of the dense model's time."""
    asked: list[float] = []

    def solve(scale: Mapping[str, float]) -> tuple[Plan, Mask]:
        predicted = min(1.0, limit * scale.get("latency", 1.0))
        asked.append(predicted)
        return plan_of(predicted * DENSE_S, limit * DENSE_S)

    def measured(model: nn.Module, *_: Any) -> dict[str, Any]:
        value = ratio(float(model.weight))  # type: ignore[arg-type]
        return {"latency": Estimate(value, value * 0.99, value * 1.01, 8)}

    def shaped(plan: Plan, mask: Mask) -> nn.Module:
        cut = nn.Linear(1, 1, bias=False)
        assert plan.latency_s is not None
        nn.init.constant_(cut.weight, plan.latency_s / DENSE_S)
        return cut

    monkeypatch.setattr(proof, "measured", measured)
    terms: Any = SimpleNamespace(dense=nn.Identity(), timed=True)
    plan, mask = proof.settle(terms, solve, shaped)
    return plan, mask, asked


def test_a_plan_that_misses_is_solved_again_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, _, asked = settled(monkeypatch, lambda predicted: 1.2 * predicted, 0.6)
    assert len(asked) == 2 and asked[1] < 0.6 / 1.2 < asked[0]
    assert plan.latency_s == pytest.approx(asked[1] * DENSE_S)


def test_a_budget_left_unused_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, asked = settled(monkeypatch, lambda predicted: 0.8 * predicted, 0.6)
    assert asked[0] == 0.6 and plan.latency_s is not None
    assert 0.97 * 0.6 <= 0.8 * plan.latency_s / DENSE_S <= 0.6


def test_a_limit_loosened_past_the_dense_model_does_not_end_with_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles in every layer took 0.65 where 0.8 was asked: the next limit allowed the dense model, at 1.0."""
    plan, mask, asked = settled(monkeypatch, lambda predicted: 0.65, 0.8)
    assert asked[-1] == 1.0
    assert not bool(mask["layer:neuron"].all())
    assert plan.latency_s is not None and plan.latency_s < DENSE_S


def test_the_dense_model_is_the_answer_where_the_budget_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, mask, asked = settled(monkeypatch, lambda predicted: predicted, 1.0)
    assert bool(mask["layer:neuron"].all()) and asked == [1.0]


def test_what_no_plan_keeps_is_refused_with_what_was_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnreachableBudget, match=r"none keeps the budget.*latency 0\.900 of dense"):
        settled(monkeypatch, lambda predicted: 0.9, 0.6)
