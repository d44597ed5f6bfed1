"""Empirical refinement: other plans for the same budget are cut and run, and the truly best one is kept.

Curves are exact for small changes and summed up over layers. Further out softmax, norms and the layers after
make some kinds and depths cost more than predicted (ViT-Tiny at 0.55 of its MACs: ten times the sum), so each
curve gets a factor. Factors are drawn at random about the best ones found so far, the knapsack is solved
with them, and the plan is tried on images: SPDY's and ZipLM's search (arXiv 2206.01550, 2302.04089) over few
numbers, a factor a kind, a slope over depth, a little of each layer's own.

On ViT-Tiny at 0.70 of its MACs 24 plans brought the KL as tried from 0.361 to 0.317 on 64 calibration images
and from 0.598 to 0.549 on 217 others, but after the full repair 0.430 became 0.422 and top-1 0.899 +- 0.017 of
dense 0.874 +- 0.018 on 650: no gain over the gains measured by kind, without which KL is 0.57 for 0.44 (350
images). Terms between layers were not fitted as such. The truth is 5 times the sum at 0.70 and 7 at 0.55;
factors from the marginal cost of each kind and depth inside the plan (all its cross terms, at first order)
gave 3.1 where the plan without had 0.73 on held-out images, and 0.675 on a second pass: nothing to rely on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hwprune.budget import UnreachableBudget
from hwprune.distortion import Curve
from hwprune.plan import Plan, select
from hwprune.trial import Trials
from hwprune.units import Mask

Factors = dict[str, float]  # units name -> factor on its curve
Progress = Callable[[int, int], None]  # (done, total)

# Spread of the logarithms of the factors: of a kind, from the first block to the last, of each curve.
_KIND, _DEPTH, _OWN = 0.5, 0.4, 0.15


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
    seed: int = 0,
    start: Factors | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Search for the factors whose plan truly costs the least.

    Args:
        trials: run a mask.
        solve: factors to the plan of least distortion within the budget.
        predicted: distortion of a plan by the curves as they came.
        candidates: plans to try besides the one without factors.
        seed: of the draws.
        start: factors to try first, of another budget.
        progress: called with (plans tried, plans in all).
    """
    curves = trials.analysis.curves
    draw = random.Random(seed)
    tried: list[Tried] = []
    best: Tried | None = None
    seen: set[tuple[tuple[str, int], ...]] = set()
    for done in range(candidates + 1):
        if progress is not None:
            progress(done, candidates + 1)
        factors: Factors = {}
        if best is not None:
            about = best.factors
            if done == 1 and start is not None:
                factors = start
            else:
                # Wide about the best first, then half as wide.
                factors = _drawn(draw, curves, about, 1.0 if done <= candidates // 2 else 0.5)
        try:
            plan = solve(factors)
        except UnreachableBudget:
            if best is None:
                raise
            continue
        key = tuple(sorted(plan.keep.items()))
        if key in seen:
            continue
        seen.add(key)
        mask: Mask = select(curves, plan)
        found = trials.distortion(mask, None if best is None else best.true_N)
        one = Tried(plan, factors, predicted(plan), found, trials.images)
        tried.append(one)
        if best is None or (one.whole and one.true < best.true):
            best = one
    assert best is not None
    if progress is not None:
        progress(candidates + 1, candidates + 1)
    return Refined(best.factors, tuple(tried))


def _drawn(
    draw: random.Random, curves: Mapping[str, Curve], about: Factors, width: float
) -> Factors:
    """Factors near others."""
    kinds = {curve.units.kind: draw.gauss(0, _KIND * width) for curve in curves.values()}
    slope = draw.gauss(0, _DEPTH * width)
    last = max(curve.units.layer.stage for curve in curves.values())
    found = {}
    for name, curve in curves.items():
        depth = 2 * curve.units.layer.stage / max(last, 1) - 1
        step = kinds[curve.units.kind] + slope * depth + draw.gauss(0, _OWN * width)
        found[name] = about.get(name, 1.0) * math.exp(step)
    return found
