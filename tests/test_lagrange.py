"""The Lagrangian against every combination, and against HiGHS on knapsacks shaped like DeiT-S and DeiT-B."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hwprune.knapsack import Floats, Knapsack, Limit, solve
from hwprune.lagrange import Lagrangian


def best_of_all(loss: list[Floats], spend: list[Floats], room: float) -> float:
    return min(
        (
            sum(loss[g][i] for g, i in enumerate(chosen))
            for chosen in itertools.product(*(range(len(group)) for group in loss))
            if sum(spend[g][i] for g, i in enumerate(chosen)) <= room
        ),
        default=math.inf,
    )


def random_groups(
    draw: np.random.Generator, whole: bool, ties: bool
) -> tuple[list[Floats], list[Floats]]:
    loss, spend = [], []
    for _ in range(draw.integers(1, 6)):
        count = int(draw.integers(1, 7))
        loss.append(np.round(draw.random(count), 1) if ties else draw.random(count))
        spend.append(draw.integers(0, 12, count) * 1.0 if whole else draw.random(count))
    return loss, spend


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_small_knapsacks_are_solved_exactly(whole: bool, ties: bool) -> None:
    draw = np.random.default_rng(int(whole) + 2 * int(ties))
    for _ in range(120):
        loss, spend = random_groups(draw, whole, ties)
        prepared = Lagrangian(loss, spend)
        for share in (0.1, 0.4, 0.7, 1.0):
            room = share * sum(group.max() for group in spend)
            best, found = best_of_all(loss, spend, room), prepared.solve(room)
            if found is None:
                assert best == math.inf
                continue
            assert sum(spend[g][i] for g, i in enumerate(found.chosen)) <= room
            assert found.value == pytest.approx(best, abs=1e-12)
            assert found.exact and found.bound <= best + 1e-12


def test_a_group_of_one_option_and_options_that_cost_nothing() -> None:
    loss = [np.array([0.5]), np.array([0.0, 1.0]), np.array([0.3, 0.0])]
    spend = [np.array([0.0]), np.array([1.0, 0.0]), np.array([0.0, 0.0])]
    prepared = Lagrangian(loss, spend)
    first, second = prepared.solve(0.0), prepared.solve(1.0)
    assert first is not None and first.chosen == [0, 1, 1]
    assert second is not None and second.chosen == [0, 0, 1]
    assert prepared.solve(-1e-9) is None


def vit_shaped(
    draw: np.random.Generator, heads: int, neurons: int
) -> tuple[list[Floats], list[Floats]]:
    """12 blocks of attention (heads x q/k width x v width) and MLP, sizes and bends as curves have them."""
    loss, spend = [], []
    for _ in range(12):
        size, bend = 10 ** draw.uniform(-2, 0.5), draw.uniform(1.2, 4)
        h, q, v = np.meshgrid(
            np.arange(1, heads + 1) / heads, np.arange(1, 9) / 8, np.arange(1, 9) / 8, indexing="ij"
        )
        lost = size * ((1 - h) ** bend + 0.3 * h * ((1 - q) ** 2 + (1 - v) ** 2))
        cost = (
            h * (0.35 * q + 0.65 * v) * (1 + 0.05 * draw.random(h.shape))
        )  # as steps of a profile
        loss.append(np.append(lost.ravel(), 2 * size))
        spend.append(np.append(cost.ravel(), 0.0))
        kept = np.arange(0, neurons + 1, 8) / neurons
        size, bend = 10 ** draw.uniform(-2, 0.5), draw.uniform(1.2, 4)
        loss.append(size * (1 - kept) ** bend * (1 + 0.01 * draw.random(kept.shape) * (kept < 1)))
        spend.append(2 * kept * (1 + 0.05 * draw.random(kept.shape)))
    return loss, spend


@pytest.mark.parametrize(("heads", "neurons"), [(6, 1536), (12, 3072)], ids=["DeiT-S", "DeiT-B"])
def test_it_is_within_a_thousandth_of_highs_on_real_shapes(heads: int, neurons: int) -> None:
    draw = np.random.default_rng(heads)
    for share in (0.85, 0.6, 0.4):
        loss, spend = vit_shaped(draw, heads, neurons)
        total = float(sum(group.max() for group in spend))
        found = Lagrangian(loss, spend).solve(share * total)
        problem = Knapsack(loss, {"latency": Limit(spend, share * total, total)})
        chosen = solve(problem)
        assert found is not None and chosen is not None
        assert found.value <= problem.value(chosen) * (1 + 1e-3)
        assert found.bound <= problem.value(chosen) * (1 + 1e-6)
        assert problem.fits(found.chosen)
        assert found.gap_rel < 0.02


def test_the_bound_holds_and_is_close_over_many_limits() -> None:
    draw = np.random.default_rng(5)
    loss, spend = vit_shaped(draw, 6, 1536)
    prepared, total = Lagrangian(loss, spend), float(sum(group.max() for group in spend))
    found = [prepared.solve(share * total) for share in np.linspace(0.3, 1.0, 60)]
    values = [choice.value for choice in found if choice is not None]
    assert len(values) == 60 and all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    assert all(choice is not None and choice.bound <= choice.value for choice in found)


def test_a_program_cut_short_says_so_and_keeps_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwprune.lagrange._STATES", 3)
    draw = np.random.default_rng(1)
    inexact = 0
    for _ in range(40):
        loss = [draw.random(30) for _ in range(8)]
        spend = [draw.random(30) for _ in range(8)]
        room = 2.5
        found, best = Lagrangian(loss, spend).solve(room), None
        assert found is not None
        inexact += not found.exact
        best = solve(Knapsack(loss, {"x": Limit(spend, room, 8.0)}))
        assert best is not None
        value = sum(loss[g][i] for g, i in enumerate(best))
        assert sum(spend[g][i] for g, i in enumerate(found.chosen)) <= room
        assert found.bound <= value + 1e-9 <= found.value + 2e-6
    assert inexact
