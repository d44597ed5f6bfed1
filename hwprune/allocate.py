"""How much of each layer to keep: a multiple-choice knapsack over measured curves.

Every layer offers options (a structure, its distortion, its cost); one is chosen in each, the summed
distortion is least, the summed costs stay within the budget. `offer` builds the options once; `Choices.plan`
solves them for any number of budgets: exactly, or for sweeps and searches in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from hwprune.budget import ON_A_DEVICE, Budget, UnreachableBudget, check_energy_weight
from hwprune.cost import ModelCost, Structure
from hwprune.distortion import Curve
from hwprune.knapsack import Floats, Knapsack, Limit, solve
from hwprune.lagrange import Lagrangian
from hwprune.option import Option, dense_option, pareto
from hwprune.options import all_options
from hwprune.plan import Plan, select
from hwprune.units import Layer

if TYPE_CHECKING:
    from hwprune.pricing import MemoryPricer, Pricer

# What goes in and what comes out, from one place.
__all__ = ["Budget", "Choices", "Plan", "UnreachableBudget", "allocate", "offer", "select"]

# The fields of an option that a metric adds up; memory takes the highest of another field too.
_SUMMED = {
    "macs": "macs",
    "params": "params",
    "latency": "latency_s",
    "energy": "energy_j",
    "memory": "weight_bytes",
}


@dataclass(frozen=True, eq=False)
class Choices:
    """Everything that plans are made of: built once, solved for any number of budgets.

    Attributes:
        groups: layer (or a linear of it, under blocks) -> its options.
        dense: metric -> cost of the dense model, for the metrics that can be limited.
        energy_weight: what the energy of the dense model's batch counts in the unit of the distortion.
        floor_bytes: peak of activations outside of these layers.
        refused: metric -> why it cannot be limited.
    """

    groups: Sequence[tuple[Layer, list[Option]]]
    dense: Mapping[str, float]
    energy_weight: float = 0.0
    floor_bytes: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)
    _problems: dict[tuple[str, ...], _Problem] = field(default_factory=dict)

    def plan(
        self, budget: Budget, *, scale: Mapping[str, float] | None = None, fast: bool = False
    ) -> Plan:
        """The plan of least distortion (plus weighted energy) within a budget.

        Args:
            budget: what may be spent; several limits at once are all kept.
            scale: metric -> factor on its limit, where a plan before turned out dearer than predicted.
            fast: by `hwprune.lagrange` where one sum is limited, in milliseconds where HiGHS takes seconds; at
                most 0.1 % from the best in the tests, and `Plan.bound` says how far it can be here. Several
                limits, and memory, are solved by HiGHS all the same.

        Raises:
            UnreachableBudget: no combination of options is cheap enough.
            ValueError: something is limited that nothing here has a price for.
        """
        for metric in budget.given:
            if metric not in self.dense:
                raise ValueError(f"budget {metric}: {self.refused[metric]}")
        limits = budget.limits(self.dense)
        tight = {metric: limit * (scale or {}).get(metric, 1.0) for metric, limit in limits.items()}
        loose = all(limit >= self.dense[metric] for metric, limit in tight.items())
        if loose and not self.energy_weight:
            return self._told(self.kept_dense, limits, 0.0)
        problem = self._problem(tuple(tight))
        knapsack = problem.within(tight)
        for metric, limit in knapsack.limits.items():
            if limit.least() > limit.room + 1e-9 * self.dense[metric]:
                raise UnreachableBudget(self._reachable(metric, limit, tight[metric]))
        (first, *others) = knapsack.limits.values()
        bound = None
        if fast and not others and first.peak is None:
            found = problem.lagrangian.solve(first.room)
            chosen = None if found is None else found.chosen
            bound = None if found is None or found.exact else found.bound
        else:
            chosen = solve(knapsack)
        if chosen is None:
            raise UnreachableBudget(self._together(knapsack, tight))
        return self._told(
            [options[i] for options, i in zip(problem.options, chosen, strict=True)],
            limits,
            knapsack.value(chosen) if bound is None else bound,
        )

    def _problem(self, metrics: tuple[str, ...]) -> _Problem:
        if metrics not in self._problems:
            self._problems[metrics] = _Problem(self, metrics)
        return self._problems[metrics]

    @cached_property
    def kept_dense(self) -> list[Option]:
        """The dense option of each group."""
        return [dense_option(options) for _, options in self.groups]

    @cached_property
    def fixed(self) -> dict[str, float]:
        """Metric -> cost of everything the options do not cover: the dense model less the dense options."""
        found = {}
        for metric, total in self.dense.items():
            whole = total - (self._peak(self.kept_dense) if metric == "memory" else 0.0)
            found[metric] = whole - sum(getattr(o, _SUMMED[metric]) for o in self.kept_dense)
        return found

    def _peak(self, chosen: Sequence[Option]) -> float:
        """Activations at the worst moment."""
        return max([self.floor_bytes, *(option.peak_bytes for option in chosen)])

    def _told(self, chosen: Sequence[Option], limits: Mapping[str, float], bound: float) -> Plan:
        spent = {m: self.fixed[m] + sum(getattr(o, _SUMMED[m]) for o in chosen) for m in self.dense}
        return Plan(
            {name: count for option in chosen for name, count in option.keep.items()},
            _structures(self.groups, chosen),
            sum(o.distortion for o in chosen),
            spent["macs"],
            spent["params"],
            self.dense["macs"],
            self.dense["params"],
            limits,
            spent.get("latency"),
            spent.get("energy"),
            self.dense.get("latency"),
            self.dense.get("energy"),
            spent.get("memory"),
            self._peak(chosen) if "memory" in spent else None,
            self.dense.get("memory"),
            bound,
        )

    def _reachable(self, metric: str, limit: Limit, asked: float) -> str:
        """The message of an unreachable budget: what each layer can be cut to."""
        dense, least = self.dense[metric], asked - limit.room + limit.least()
        lines = [
            f"budget {metric} <= {asked:.4g} ({asked / dense:.3f} of dense) is out of reach: the least these "
            f"units allow is {least:.4g} ({least / dense:.3f}). Layer by layer, least of dense:"
        ]
        for layer, options in self.groups:
            values = [getattr(o, _SUMMED[metric]) for o in options]
            lines.append(f"  {layer.name}: {min(values) / max(max(values), 1e-30):.3f}")
        if metric == "memory":
            lines.append(
                f"Activations outside of these layers take {self.floor_bytes:.4g}: a smaller batch helps."
            )
        lines.append("Ask for more, or allow more kinds (--kinds head,neuron,qk,vo,block).")
        return "\n".join(lines)

    def _together(self, knapsack: Knapsack, asked: Mapping[str, float]) -> str:
        """The message of limits that can be kept alone, but not together: how far each must be loosened."""
        told = ", ".join(f"{m} <= {v:.4g} ({v / self.dense[m]:.3f})" for m, v in asked.items())
        lines = [f"no plan keeps {told} at once. With the others kept, the least of"]
        for metric, limit in knapsack.limits.items():
            others = {m: other for m, other in knapsack.limits.items() if m != metric}
            low = solve(Knapsack(limit.spend, others)) if limit.peak is None else None
            if low is not None:
                least = asked[metric] - limit.room + limit.used(low)
                lines.append(
                    f"  {metric} is {least:.4g} ({least / self.dense[metric]:.3f} of dense)"
                )
        return "\n".join([*lines, "Loosen one of the limits."])


class _Problem:
    """The knapsack of some limits without their amounts: what does not depend on those is made once."""

    def __init__(self, choices: Choices, metrics: tuple[str, ...]) -> None:
        self.choices = choices
        fields = [_SUMMED[metric] for metric in metrics]
        fields += ["peak_bytes"] if "memory" in metrics else []
        fields += ["energy_j"] if choices.energy_weight else []
        self.options = [
            pareto(options, list(dict.fromkeys(fields))) for _, options in choices.groups
        ]
        self.losses = [np.array([o.distortion for o in options]) for options in self.options]
        if choices.energy_weight:
            each = choices.energy_weight / choices.dense["energy"]
            energies = self._column("energy_j")
            self.losses = [a + each * b for a, b in zip(self.losses, energies, strict=True)]
        self.spends = {metric: self._column(_SUMMED[metric]) for metric in metrics}
        self.peaks = self._column("peak_bytes")

    def _column(self, name: str) -> list[Floats]:
        return [np.array([getattr(o, name) for o in options]) for options in self.options]

    def within(self, limits: Mapping[str, float]) -> Knapsack:
        """The knapsack with its limits."""
        found = {}
        for metric, limit in limits.items():
            peaks = self.peaks if metric == "memory" else None
            room = limit - self.choices.fixed[metric]
            unit = self.choices.dense[metric]
            found[metric] = Limit(self.spends[metric], room, unit, peaks, self.choices.floor_bytes)
        return Knapsack(self.losses, found)

    @cached_property
    def lagrangian(self) -> Lagrangian:
        """For the only limit."""
        (spend,) = self.spends.values()
        return Lagrangian(self.losses, spend)


def offer(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    memory: MemoryPricer | None = None,
    energy_weight: float = 0.0,
) -> Choices:
    """The choices of a model, to be solved for any number of budgets.

    Args:
        model: the dense model (read for sizes only).
        curves: units name -> curve, from `hwprune.distortion.curves`.
        cost: from `hwprune.cost.model_cost`.
        round_to: neurons are kept in multiples of this (8, 16, 64: what tensor cores like); head
            channels in multiples of 8.
        gain: kind -> factor on the curves of that kind, measured by `hwprune.gain`.
        pricer: latency and energy on a device, for budgets of them.
        memory: bytes, for budgets of them.
        energy_weight: minimise distortion + energy_weight * (joules of a batch / joules of the dense model's).

    Raises:
        ValueError: a negative weight, or one of energy where no device has figures of it.
    """
    check_energy_weight(energy_weight)
    dense = {"macs": cost.macs, "params": float(cost.params)}
    refused = dict.fromkeys(ON_A_DEVICE, "no device says what a layer costs")
    refused["memory"] = "no batch says what activations take"
    if pricer is not None:
        dense["latency"] = pricer.dense.latency_s
        if pricer.dense.energy_j is not None:
            dense["energy"] = pricer.dense.energy_j
        else:
            refused["energy"] = pricer.without_energy
    if energy_weight and "energy" not in dense:
        raise ValueError(f"energy_weight: {refused['energy']}")
    groups = all_options(
        model, curves, cost, round_to=round_to, gain=gain, pricer=pricer, memory=memory
    )
    floor = 0.0
    if memory is not None:
        dense["memory"] = memory.dense_bytes
        floor = memory.floor({layer.name for layer, _ in groups})
    return Choices(groups, dense, energy_weight, floor, refused)


def allocate(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    budget: Budget,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    memory: MemoryPricer | None = None,
    energy_weight: float = 0.0,
) -> Plan:
    """Solve the knapsack once: `offer` with the same arguments, and the plan of a budget.

    Args:
        model: the dense model.
        curves: units name -> curve.
        cost: from `hwprune.cost.model_cost`.
        budget: what may be spent; several limits at once are all kept.
        round_to: neurons are kept in multiples of this.
        gain: kind -> factor on the curves of that kind.
        pricer: for budgets of latency and energy.
        memory: for budgets of memory.
        energy_weight: what the energy of the dense model's batch counts in the unit of the distortion.

    Raises:
        UnreachableBudget: no combination of options is cheap enough.
        ValueError: something is limited that nothing here has a price for.
    """
    table = offer(
        model,
        curves,
        cost,
        round_to=round_to,
        gain=gain,
        pricer=pricer,
        memory=memory,
        energy_weight=energy_weight,
    )
    return table.plan(budget)


def _structures(
    groups: Sequence[tuple[Layer, list[Option]]], chosen: Sequence[Option]
) -> dict[str, Structure]:
    """Layer name -> structure, the linears of one layer merged."""
    merged: dict[str, Structure] = {}
    for (layer, _), option in zip(groups, chosen, strict=True):
        before, found = merged.get(layer.name), option.structure
        if before is not None and found.weights is not None:
            weights = {**(before.weights or {}), **found.weights}
            found = Structure(
                weights=weights, tiles={**(before.tiles or {}), **(found.tiles or {})}
            )
        merged[layer.name] = found
    return merged
