"""How much of each layer to keep: a multiple-choice knapsack over measured curves.

Every layer offers options (a structure, its distortion, its cost); one is chosen in each, the summed
distortion is least, the summed costs stay within the budget. Solved exactly by HiGHS through scipy.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from hwprune.cost import ModelCost, Structure
from hwprune.distortion import Curve
from hwprune.options import Option, dense_option, option_groups
from hwprune.units import Layer, Mask

if TYPE_CHECKING:
    from hwprune.pricing import Pricer

METRICS = ("macs", "params", "latency", "energy")
FIELDS = {"macs": "macs", "params": "params", "latency": "latency_s", "energy": "energy_j"}
ON_A_DEVICE = ("latency", "energy")
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "latency": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
    "energy": {"": 1.0, "J": 1.0, "mJ": 1e-3, "kJ": 1e3},
}


class UnreachableBudget(ValueError):
    """No plan meets the budget; the message says what is reachable, layer by layer."""


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, relative to the dense one or absolute.

    macs and params are ratios up to 1 and counts above. latency and energy are ratios; an absolute value is
    a string with its unit, "4.2ms" or "0.9J".

    Attributes:
        macs: true multiply-accumulates of one image.
        params: parameters.
        latency: time of a batch on a device.
        energy: of a batch on a device.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    energy: float | str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty or non-positive budget."""
        if not self.given:
            raise ValueError(
                f"Budget: expected at least one of {', '.join(METRICS)}; e.g. Budget(macs=0.6)"
            )
        for metric, value in self.given.items():
            if not _amount(metric, value) > 0:
                raise ValueError(f"Budget: {metric} must be above 0, got {value}")
            if metric in ON_A_DEVICE and not isinstance(value, str) and value > 1:
                raise ValueError(
                    f"Budget: {metric}={value} is more than the dense model's; a ratio is at most 1, an "
                    f'absolute value has its unit: {metric}="4.2ms" or energy="0.9J"'
                )

    @property
    def given(self) -> dict[str, float | str]:
        """The metrics that are limited."""
        found = {metric: getattr(self, metric) for metric in METRICS}
        return {metric: value for metric, value in found.items() if value is not None}

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Budget:
        """From command-line words like "macs=0.6", "params=50M", "latency=0.7", "latency=4.2ms".

        Raises:
            ValueError: unknown metric, no number, or one metric twice.
        """
        found: dict[str, float | str] = {}
        for text in texts:
            metric, _, value = (part.strip() for part in text.partition("="))
            if metric not in METRICS or not value:
                raise ValueError(
                    f"budget: expected {' or '.join(m + '=NUMBER' for m in METRICS)}, with a unit where "
                    f"absolute (macs=0.6, params=50M, latency=4.2ms), got {text!r}"
                )
            if metric in found:
                raise ValueError(f"budget: {metric} given twice")
            amount = _amount(metric, value)
            found[metric] = value if metric in ON_A_DEVICE and _unit(value) else amount
        return cls(**found)  # type: ignore[arg-type]

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """metric -> absolute limit for a model whose dense costs are given."""
        found = {}
        for metric, value in self.given.items():
            amount = _amount(metric, value)
            relative = amount <= 1 if metric not in ON_A_DEVICE else not isinstance(value, str)
            found[metric] = amount * dense[metric] if relative else amount
        return found


def _unit(text: str) -> str:
    return text.lstrip("0123456789.eE+- ").strip()


def _amount(metric: str, value: float | str) -> float:
    """The number of a limit, its unit applied.

    Raises:
        ValueError: no number, or a unit that the metric does not have.
    """
    if not isinstance(value, str):
        return float(value)
    units = _UNITS[metric]
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"budget: {metric}: expected a number, or one with {known}, got {value!r}")
    try:
        return float(match[1]) * units[match[2]]
    except ValueError:
        raise ValueError(f"budget: {match[1]!r} is no number in {metric}={value}") from None


@dataclass(frozen=True)
class Plan:
    """How much of every layer is kept, and what that is predicted to cost.

    Attributes:
        keep: units name -> kept units.
        structure: layer name -> what is left of it (several linears of one layer merged).
        distortion: predicted, in the unit of the curves.
        macs, params: predicted, of the whole model.
        dense_macs, dense_params: of the dense model.
        limits: metric -> absolute limit.
        latency_s, energy_j: predicted for a batch, where a device was asked for; None otherwise.
        dense_latency_s, dense_energy_j: of the dense model.
    """

    keep: Mapping[str, int]
    structure: Mapping[str, Structure]
    distortion: float
    macs: float
    params: float
    dense_macs: float
    dense_params: float
    limits: Mapping[str, float] = field(default_factory=dict)
    latency_s: float | None = None
    energy_j: float | None = None
    dense_latency_s: float | None = None
    dense_energy_j: float | None = None

    @property
    def macs_ratio(self) -> float:
        """Kept fraction of the MACs."""
        return self.macs / self.dense_macs

    @property
    def params_ratio(self) -> float:
        """Kept fraction of the parameters."""
        return self.params / self.dense_params


def allocate(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    budget: Budget,
    *,
    round_to: int = 8,
    gain: Mapping[str, float] | None = None,
    pricer: Pricer | None = None,
    scale: Mapping[str, float] | None = None,
) -> Plan:
    """Solve the knapsack: least summed distortion within the budget.

    Args:
        model: the dense model (read for sizes only).
        curves: units name -> curve, from `hwprune.distortion.curves`.
        cost: from `hwprune.cost.model_cost`.
        budget: what may be spent; several limits at once are all kept.
        round_to: neurons are kept in multiples of this (8, 16, 64: what tensor cores like); head
            channels in multiples of 8.
        gain: kind -> factor on the curves of that kind, measured by `hwprune.gain`.
        pricer: latency and energy on a device, for budgets of them.
        scale: metric -> factor on its limit, where a plan before turned out dearer than predicted.

    Returns:
        Plan.

    Raises:
        UnreachableBudget: no combination of options is cheap enough.
        ValueError: a latency or energy is limited and there is no pricer, or its device has no sensor.
    """
    dense = {"macs": cost.macs, "params": float(cost.params)}
    if pricer is not None:
        dense["latency"] = pricer.dense.latency_s
        if pricer.dense.energy_j is not None:
            dense["energy"] = pricer.dense.energy_j
    for metric in budget.given:
        if metric not in dense:
            raise ValueError(
                f"budget {metric}: no device says what a layer costs"
                if pricer is None
                else f"budget {metric}: {pricer.network.costs.profile.name} has no {metric} figures"
            )
    limits = budget.limits(dense)
    limited = [FIELDS[metric] for metric in limits]
    groups = option_groups(
        model, curves, cost, round_to=round_to, gain=gain, pricer=pricer, limited=limited
    )
    tight = {metric: limit * (scale or {}).get(metric, 1.0) for metric, limit in limits.items()}
    chosen = _solve(groups, dense, tight)
    keep = {name: count for option in chosen for name, count in option.keep.items()}
    fixed = _fixed(groups, dense)
    spent = {m: fixed[m] + sum(getattr(o, FIELDS[m]) for o in chosen) for m in fixed}
    return Plan(
        keep,
        _structures(groups, chosen),
        sum(o.distortion for o in chosen),
        spent["macs"],
        spent["params"],
        cost.macs,
        float(cost.params),
        limits,
        spent.get("latency"),
        spent.get("energy"),
        dense.get("latency"),
        dense.get("energy"),
    )


def _fixed(
    groups: Sequence[tuple[Layer, list[Option]]], dense: Mapping[str, float]
) -> dict[str, float]:
    """Cost of everything the options do not cover: the dense model less the dense options."""
    return {
        metric: total - sum(getattr(dense_option(o), FIELDS[metric]) for _, o in groups)
        for metric, total in dense.items()
    }


def _structures(
    groups: Sequence[tuple[Layer, list[Option]]], chosen: Sequence[Option]
) -> dict[str, Structure]:
    """Layer name -> structure, the linears of one layer merged."""
    merged: dict[str, Structure] = {}
    for (layer, _), option in zip(groups, chosen, strict=True):
        before = merged.get(layer.name)
        if before is None or option.structure.weights is None:
            merged[layer.name] = option.structure
        else:
            merged[layer.name] = Structure(
                weights={**(before.weights or {}), **option.structure.weights}
            )
    return merged


def _solve(
    groups: Sequence[tuple[Layer, list[Option]]],
    dense: Mapping[str, float],
    limits: Mapping[str, float],
) -> list[Option]:
    """One option a group by mixed-integer programming."""
    fixed = _fixed(groups, dense)
    if all(limit >= dense[metric] for metric, limit in limits.items()):
        return [dense_option(options) for _, options in groups]
    for metric, limit in limits.items():
        least = fixed[metric] + sum(
            min(getattr(o, FIELDS[metric]) for o in options) for _, options in groups
        )
        if least > limit * (1 + 1e-9):
            raise UnreachableBudget(_reachable(groups, metric, least, limit, dense[metric]))
    choices = [options for _, options in groups]
    room = {metric: limit - fixed[metric] for metric, limit in limits.items()}
    cap = max(o.distortion for options in choices for o in options)
    refused: list[list[Option]] = []
    while True:
        chosen = _solve_once(choices, room, dense, cap, refused)
        if chosen is None:
            raise UnreachableBudget(
                f"no plan keeps {', '.join(f'{m} <= {v:.4g}' for m, v in limits.items())} at once; "
                "loosen one of the limits"
            )
        loss = sum(o.distortion for o in chosen)
        if any(sum(getattr(o, FIELDS[m]) for o in chosen) > limit for m, limit in room.items()):
            refused.append(chosen)  # HiGHS takes 0.999999 for 1, so a sum may be 1e-6 over
        elif loss >= cap / 10:
            return chosen
        else:
            cap = loss


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep what HiGHS's C++ prints (a debug line of 1.14's) out of standard output, where JSON may go."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _solve_once(
    groups: Sequence[Sequence[Option]],
    room: Mapping[str, float],
    dense: Mapping[str, float],
    cap: float,
    refused: Sequence[Sequence[Option]],
) -> list[Option] | None:
    """One run of HiGHS without options above `cap` and without plans refused; None if infeasible.

    HiGHS stops within 1e-6 of the objective's unit and of a row's: the units are small.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [option for options in groups for option in options]
    distortion = np.array([o.distortion for o in flat])
    owner = np.repeat(np.arange(len(groups)), [len(options) for options in groups])
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for metric, limit in room.items():
        unit = dense[metric] * 1e-6
        row = np.array([[getattr(o, FIELDS[metric]) / unit for o in flat]])
        constraints.append(LinearConstraint(row, -np.inf, limit / unit))
    for plan in refused:
        ids = {id(option) for option in plan}
        row = np.array([[float(id(option) in ids) for option in flat]])
        constraints.append(LinearConstraint(row, -np.inf, len(groups) - 1))
    with _quiet_stdout():
        result = milp(
            np.minimum(distortion, cap) * (1e3 / cap if cap else 1.0),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, distortion <= cap),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
        )
    if result.x is None:
        return None
    return [flat[i] for i in np.flatnonzero(result.x > 0.5)]


def _reachable(
    groups: Sequence[tuple[Layer, list[Option]]],
    metric: str,
    least: float,
    limit: float,
    dense: float,
) -> str:
    """The message of an unreachable budget: what each layer can be cut to."""
    lines = [
        f"budget {metric} <= {limit:.4g} ({limit / dense:.3f} of dense) is out of reach: the least these "
        f"units allow is {least:.4g} ({least / dense:.3f}). Layer by layer, least of dense:"
    ]
    for layer, options in groups:
        values = [getattr(o, FIELDS[metric]) for o in options]
        lines.append(f"  {layer.name}: {min(values) / max(max(values), 1e-30):.3f}")
    lines.append("Ask for more, or allow more kinds (--kinds head,neuron,qk,vo,block).")
    return "\n".join(lines)


def select(curves: Mapping[str, Curve], plan: Plan) -> Mask:
    """The mask a plan stands for: each curve's order, cut at the kept count.

    Raises:
        ValueError: the plan names units the curves do not have.
    """
    missing = [name for name in plan.keep if name not in curves]
    if missing:
        raise ValueError(
            f"{missing[0]}: in the plan but without a curve; allocate from these curves"
        )
    return {name: curves[name].kept(count) for name, count in plan.keep.items()}
