"""Empirical refinement: other plans for the same budget are cut, repaired and run, and the truly best is kept.

Curves are exact for small changes and summed up over layers. Further out softmax, norms and the layers after
make some kinds and depths cost more than predicted (ViT-Tiny at 0.55 of its MACs: ten times the sum), so each
curve gets a factor. The knapsack is solved with them and the plan is tried on images after the real repair:
SPDY's and ZipLM's search (arXiv 2206.01550, 2302.04089) over few numbers, one a kind and slopes over depth.
Whole plans are tried, so what layers cost together counts; it is not fitted pairwise. Factors from the
marginal cost of each kind and depth inside the plan (all its cross terms, at first order) were nothing to rely
on: 3.1 nats where the plan without had 0.73.

On ViT-Tiny, calibrated on 256 images, judged on 744 others (KL to dense; top-1 of dense, +- 0.02):
latency 0.50, tiles, 16 plans: 1.138 became 1.068, top-1 0.665 became 0.681; latency 0.65, whole units, 12
plans: 1.189 became 1.151, 0.636 became 0.660. Searching by a quick re-fit in place of the repair made plans
worse (see `hwprune.trial`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from hwprune.budget import UnreachableBudget
from hwprune.distortion import Curve
from hwprune.plan import Plan, select
from hwprune.trial import Trials
from hwprune.units import AttentionLayer, Mask

Factors = dict[str, float]  # units name -> factor on its curve
Progress = Callable[[int, int], None]  # (done, total)
Outcome = Literal["better", "worse", "same"]

_STEP = 0.5  # of the logarithm of a factor: 1.6 times as much, or as little
_LEAST_STEP = 0.1
_FARTHEST = 4  # steps that may leave the plan as it is


@dataclass(frozen=True, eq=False)
class Tried:
    """A plan that was cut and run.

    Attributes:
        plan: what was kept.
        factors: that it was solved with.
        predicted: its distortion by the curves as they came.
        true_N: distortion of each image, of the first ones where it was dropped early.
        images: how many there are.
    """

    plan: Plan
    factors: Factors
    predicted: float
    true_N: Tensor
    images: int

    @property
    def true(self) -> float:
        """Mean over the images run."""
        return float(self.true_N.mean())

    @property
    def whole(self) -> bool:
        """Whether it ran on all images."""
        return len(self.true_N) == self.images


@dataclass(frozen=True, eq=False)
class Refined:
    """What the search found.

    Attributes:
        factors: of the best plan.
        tried: every plan, the one without refinement first.
    """

    factors: Factors
    tried: tuple[Tried, ...]

    @property
    def best(self) -> int:
        """Index of the best plan."""
        return min(
            (i for i, one in enumerate(self.tried) if one.whole), key=lambda i: self.tried[i].true
        )

    @property
    def winner(self) -> Tried:
        """The best plan."""
        return self.tried[self.best]

    def rows(self) -> list[dict[str, Any]]:
        """One row a plan for a report: predicted and true distortion, images, MACs, whether it won.

        The row of the winner has its factors too.
        """
        return [
            {
                "predicted": one.predicted,
                "true": one.true,
                "true_se": float(one.true_N.std() / len(one.true_N) ** 0.5),
                "images": len(one.true_N),
                "macs": one.plan.macs,
                "won": i == self.best,
                **({"factors": one.factors} if i == self.best else {}),
            }
            for i, one in enumerate(self.tried)
        ]


def factored(curves: Mapping[str, Curve], factors: Mapping[str, float]) -> dict[str, Curve]:
    """The curves, each times its factor."""
    return {
        name: replace(curve, distortion=curve.distortion * factors.get(name, 1.0))
        for name, curve in curves.items()
    }


def refine(
    trials: Trials,
    solve: Callable[[Factors], Plan],
    predicted: Callable[[Plan], float],
    candidates: int,
    *,
    start: Factors | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Search for the factors whose plan truly costs the least.

    Args:
        trials: run a mask.
        solve: factors to the plan of least distortion within the budget.
        predicted: distortion of a plan by the curves as they came.
        candidates: plans to try besides the one without factors.
        start: factors to try first, of another budget.
        progress: called with (plans tried, plans in all).
    """
    curves = trials.analysis.curves
    tried: list[Tried] = []
    seen: set[tuple[tuple[str, int], ...]] = set()

    def attempt(factors: Factors) -> Outcome:
        """How they do beside the best so far; a plan that was seen before is not run again."""
        if progress is not None:
            progress(len(tried), candidates + 1)
        plan = solve(factors)
        key = _key(plan)
        best = Refined({}, tuple(tried)).winner if tried else None
        if best is not None and key == _key(best.plan):
            return "same"
        if key in seen:
            return "worse"
        seen.add(key)
        mask: Mask = select(curves, plan)
        found = trials.distortion(mask, None if best is None else best.true_N)
        one = Tried(plan, factors, predicted(plan), found, trials.images)
        tried.append(one)
        return "better" if best is None or (one.whole and one.true < best.true) else "worse"

    attempt({})
    moves = _Moves(curves, start or {})
    while len(tried) <= candidates and (factors := moves.next()) is not None:
        try:
            outcome = attempt(factors)
        except UnreachableBudget:
            outcome = "worse"
        moves.took(outcome)
    if progress is not None:
        progress(candidates + 1, candidates + 1)
    found = Refined({}, tuple(tried))
    return replace(found, factors=found.winner.factors)


def _key(plan: Plan) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(plan.keep.items()))


class _Moves:
    """Pattern search (Hooke and Jeeves) over few numbers: a factor a kind, and slopes over depth.

    Each coordinate is tried up, then down, from the best factors; what helps is tried once more the same way,
    and what leaves the plan as it is twice and four times as far. A round in which nothing helps halves the
    steps.

    Args:
        curves: that get factors.
        start: to try first.
    """

    def __init__(self, curves: Mapping[str, Curve], start: Factors) -> None:
        """Begin at factors of one."""
        self.best: Factors = {}
        self.coordinates = _coordinates(curves)
        self.step, self.at, self.way, self.far = _STEP, 0, 1, 1
        self.helped = self.again = False  # in this round; on this coordinate
        self.given = bool(start)  # they come first, before any move
        self.now: Factors | None = dict(start) if start else None

    def next(self) -> Factors | None:
        """Factors to try, or None when the steps have become too small to matter."""
        if self.now is None and self.coordinates and self.step >= _LEAST_STEP:
            move = self.coordinates[self.at]
            step = self.way * self.far * self.step
            self.now = {
                name: self.best.get(name, 1.0) * math.exp(step * move.get(name, 0.0))
                for name in {**self.best, **move}
            }
        return self.now

    def took(self, outcome: Outcome) -> None:
        """How the last factors did."""
        assert self.now is not None
        tried, self.now = self.now, None
        if outcome == "better":
            self.best, self.helped, self.again, self.far = tried, True, not self.given, 1
        elif self.given:
            pass
        elif outcome == "same" and self.far < _FARTHEST:
            self.far *= 2
        elif self.way == 1 and not self.again:
            self.way, self.far = -1, 1
        else:  # both ways are done, or the way that helped does no longer
            self.way, self.far, self.again, self.at = 1, 1, False, self.at + 1
        self.given = False
        if self.at == len(self.coordinates):
            self.step, self.at = self.step if self.helped else self.step / 2, 0
            self.helped = False


def _coordinates(curves: Mapping[str, Curve]) -> list[dict[str, float]]:
    """What moves together: units name -> how much, in units of a step.

    Each kind, that with most to remove first; then depth, of attention and of the rest each by itself, from
    -1 in the first block to 1 in the last. Of two kinds one would do, but a step of it may be too small.
    """
    counts: Counter[str] = Counter()
    for curve in curves.values():
        counts[curve.units.kind] += curve.units.count
    found = [
        {name: 1.0 for name, curve in curves.items() if curve.units.kind == kind}
        for kind, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        if len(counts) > 1
    ]
    last = max((curve.units.layer.stage for curve in curves.values()), default=0)
    for attention in (True, False) if last else ():
        found.append(
            {
                name: 2 * curve.units.layer.stage / last - 1
                for name, curve in curves.items()
                if isinstance(curve.units.layer, AttentionLayer) == attention
            }
        )
    return [move for move in found if any(move.values())]
