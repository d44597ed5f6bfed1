"""The plan of a budget: what is best kept, by curves (refined where asked) or as LPViT chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hwprune.allocate import Choices, offer
from hwprune.analysis import Analysis, StepProgress
from hwprune.budget import Budget
from hwprune.contract import Contract
from hwprune.lpvit_plan import lpvit_plan
from hwprune.plan import Plan, select
from hwprune.refine import Factors, factored, refine
from hwprune.trial import Trials, spread
from hwprune.units import Mask, full_mask


class Planner:
    """Solves one budget, for limits as given or scaled.

    Args:
        model: dense.
        analysis: of it.
        budget: what may be spent.
        terms: of a budget on a device; None otherwise.
        round_to: neurons are kept in multiples of this.
        repair: whether weights will be re-fitted.
        energy_weight: what the energy of the dense model's batch counts in the unit of the distortion.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: Analysis,
        budget: Budget,
        terms: Contract | None,
        *,
        round_to: int,
        repair: bool,
        energy_weight: float = 0.0,
    ) -> None:
        """Keep the arguments."""
        self.model, self.analysis, self.budget, self.terms = model, analysis, budget, terms
        self.round_to, self.repair, self.energy_weight = round_to, repair, energy_weight
        self.factors: Factors = {}

    def offered(self, factors: Factors) -> Choices:
        """The options with factors on their curves."""
        analysis, terms = self.analysis, self.terms
        return offer(
            self.model,
            factored(analysis.curves, factors) if factors else analysis.curves,
            analysis.cost,
            round_to=self.round_to,
            gain=analysis.gain,
            pricer=None if terms is None else terms.pricer,
            memory=None if terms is None else terms.memory,
            energy_weight=self.energy_weight,
        )

    @cached_property
    def plain(self) -> Choices:
        """The options by the curves as they came."""
        return self.offered({})

    @cached_property
    def chosen(self) -> Choices:
        """The options with the factors found."""
        return self.offered(self.factors) if self.factors else self.plain

    def solve(self, scale: Mapping[str, float]) -> tuple[Plan, Mask]:
        """The plan and its mask.

        Args:
            scale: metric -> factor on its limit.

        Raises:
            UnreachableBudget: nothing is cheap enough.
        """
        analysis = self.analysis
        if analysis.lpvit is not None:
            return lpvit_plan(
                self.model,
                analysis.units,
                analysis.lpvit,
                analysis.statistics,
                analysis.cost,
                self.budget,
                repair=self.repair,
            )
        plan = self.chosen.plan(self.budget, scale=scale)
        if self.factors:
            plan = replace(plan, distortion=self.predicted(plan))
        return plan, {**full_mask(analysis.units), **select(analysis.curves, plan)}

    def predicted(self, plan: Plan) -> float:
        """Distortion of a plan by the curves as they came, whatever factors it was solved with."""
        total = 0.0
        for losses in self._losses:
            total += next(loss for keep, loss in losses if keep <= plan.keep.items())
        return total

    @cached_property
    def _losses(self) -> list[list[tuple[Set[tuple[str, int]], float]]]:
        """What each option keeps, and its distortion by the curves as they came."""
        return [
            [(option.keep.items(), option.distortion) for option in options]
            for _, options in self.plain.groups
        ]

    def refined(
        self, batches: Sequence[Tensor], candidates: int, seed: int, progress: StepProgress | None
    ) -> tuple[Mapping[str, Any], ...]:
        """Try other plans; from now on the best one's factors are used.

        Args:
            batches: calibration images, some of which plans are tried on.
            candidates: plans to try besides the first.
            seed: of the draws.
            progress: called with ("refine", done, total).

        Returns:
            A row for each plan tried (`Refined.rows`); none where the budget allows the dense model.
        """
        first, mask = self.solve({})
        if all(bool(grid.all()) for grid in mask.values()):
            return ()
        trials = Trials.of(self.model, self.analysis, spread(batches))

        def plan_of(factors: Factors) -> Plan:
            return self.offered(factors).plan(self.budget, fast=True) if factors else first

        found = refine(
            trials,
            plan_of,
            self.predicted,
            candidates,
            seed=seed,
            start=dict(self.analysis.factors),
            progress=None if progress is None else (lambda d, t: progress("refine", d, t)),
        )
        self.factors = found.factors
        return tuple(found.rows())
