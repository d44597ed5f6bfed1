"""The plan of a budget: what is best kept, by curves (refined where asked) or as LPViT chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from hwprune.statistics import frozen
from hwprune.trial import Trials
from hwprune.units import Layer, Mask, full_mask


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
        self.weighed: Choices | None = None  # with the factors of the best plan that was tried

    def offered(self, factors: Factors) -> Choices:
        """The options with factors on their curves."""
        analysis, terms = self.analysis, self.terms
        return offer(
            self.model if terms is None else terms.model,
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
        # Refined plans come from the fast solver, and so does the one that is kept: the plan that was tried.
        choices = self.plain if self.weighed is None else self.weighed
        plan = choices.plan(self.budget, scale=scale, fast=self.weighed is not None)
        if self.weighed is not None:
            plan = replace(plan, distortion=self.predicted(plan))
        return plan, {**full_mask(analysis.units), **select(analysis.curves, plan)}

    def predicted(self, plan: Plan) -> float:
        """Distortion of a plan by the curves as they came, whatever factors it was solved with."""
        total = 0.0
        for layer, options in self.plain.groups:
            same = (o.distortion for o in options if o.keep.items() <= plan.keep.items())
            # Tiles of several linears are offered together in combinations that depend on the factors.
            found = next(same, None)
            total += self._tiles_lost(layer, plan) if found is None else found
        return total

    def _tiles_lost(self, layer: Layer, plan: Plan) -> float:
        total = 0.0
        for curve in self.analysis.curves.values():
            if curve.units.layer.name == layer.name and curve.units.kind == "block":
                gone = curve.units.count - plan.keep[curve.units.name]
                total += float(curve.distortion[gone]) * self.analysis.gain.get("block", 1.0)
        return total

    def refined(
        self, batches: Sequence[Tensor], candidates: int, progress: StepProgress | None
    ) -> tuple[Mapping[str, Any], ...]:
        """Try other plans; from now on the best one's factors are used.

        Args:
            batches: calibration images, some of which plans are tried on.
            candidates: plans to try besides the first.
            progress: called with ("refine", done, total).

        Returns:
            A row for each plan tried (`Refined.rows`); none where the budget allows the dense model.
        """
        first, mask = self.solve({})
        if all(bool(grid.all()) for grid in mask.values()):
            return ()

        def plan_of(factors: Factors) -> Plan:
            return self.offered(factors).plan(self.budget, fast=True) if factors else first

        with frozen(self.model):  # no dropout, and all as it was afterwards
            found = refine(
                Trials.of(self.model, self.analysis, batches, repair=self.repair),
                plan_of,
                self.predicted,
                candidates,
                start=dict(self.analysis.factors),
                progress=None if progress is None else (lambda d, t: progress("refine", d, t)),
            )
        self.weighed = self.offered(found.factors) if found.factors else None
        return tuple(found.rows())
