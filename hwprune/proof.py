"""Plans cut and measured until one keeps its budget, and the finished model measured once more.

A plan is tried on a copy; where it misses the budget, or leaves some of it unused, it is solved again with the
limit scaled by what was measured, a few times; what no plan keeps is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hwprune.budget import ON_A_DEVICE, UnreachableBudget
from hwprune.contract import ATTEMPTS, Contract, prove, weigh
from hwprune.meter.compare import in_type
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.plan import Plan
from hwprune.units import Mask

_CLOSE = 0.03  # of the budget left unused that is not worth another try


def settle(
    terms: Contract | None,
    solve: Callable[[Mapping[str, float]], tuple[Plan, Mask]],
    shaped: Callable[[Plan, Mask], nn.Module],
) -> tuple[Plan, Mask]:
    """A plan that keeps its budget as measured, and uses it: within 3 % where a few tries find one.

    Time and bytes depend on shapes, not on weights: each plan is tried on a copy that is cut but not re-fitted.

    Args:
        terms: of the budget; None, or nothing in it that can be measured here: the first plan is taken as
            predicted.
        solve: metric -> factor on its limit, to a plan and its mask.
        shaped: a throwaway model of that shape.

    Raises:
        UnreachableBudget: no plan tried keeps the budget on this machine; says what was reached.
    """
    scale: dict[str, float] = {}
    best: tuple[float, Plan, Mask] | None = None
    reached = ""
    for _ in range(ATTEMPTS):
        try:
            plan, mask = solve(scale)
        except UnreachableBudget:
            if best is None and not reached:
                raise
            break
        if terms is None or terms.dense is None:
            return plan, mask
        if is_dense(plan, mask):
            if not scale:
                return plan, mask
            break  # a limit loosened past the dense model's own cost, which keeps no budget
        proof = measured(shaped(plan, mask), terms, set(plan.limits))
        used = use(proof, plan)
        if not used:  # nothing could be measured, which the report says
            return plan, mask
        tightest = max(used.values())
        reached = ", ".join(f"{metric} {proof[metric].value:.3f} of dense" for metric in used)
        if kept(proof, plan) and (best is None or tightest > best[0]):
            best = tightest, plan, mask
        if best is not None and (best[0] >= 1 - _CLOSE or not kept(proof, plan)):
            break
        # A step past the limit by half of what is close enough, so that noise does not decide.
        scale = {m: scale.get(m, 1.0) * (1 - _CLOSE / 2) / share for m, share in used.items()}
    if best is None:
        raise UnreachableBudget(
            f"{ATTEMPTS} plans were cut and measured, and none keeps the budget on this machine; the last: "
            f"{reached}; loosen the budget"
            + (
                ", or measure the device again with `hwprune profile`"
                if terms and terms.timed
                else ""
            )
        )
    return best[1], best[2]


def measured(pruned: nn.Module, terms: Contract, metrics: set[str] | None = None) -> dict[str, Any]:
    """What this machine can measure of a contract: Estimates of ratios to dense, or Unavailable.

    Args:
        pruned: realised.
        terms: of the budget.
        metrics: those that are limited, of which nothing else is worth the time; None = all there are.
    """
    found: dict[str, Any] = {}
    pruned = in_type(pruned, terms.x.dtype)
    if terms.memory is not None and terms.weighs:
        found["memory"] = weigh(pruned, terms.memory, terms.x)
    if metrics is not None and not metrics & set(ON_A_DEVICE):
        return found
    if terms.timed and terms.dense is not None:
        energy = metrics is None or "energy" in metrics
        return prove(pruned, terms.dense, terms.x, terms.mode, energy=energy) | found
    reason = "; ".join(terms.notes) or "neither latency nor energy was asked for"
    return {metric: Unavailable(reason) for metric in ON_A_DEVICE} | found


def is_dense(plan: Plan, mask: Mask) -> bool:
    """Whether a plan leaves the model as it is: nothing is removed, and no linear runs another way."""
    return not plan.tiles and all(bool(grid.all()) for grid in mask.values())


def use(proof: Mapping[str, Any], plan: Plan) -> dict[str, float]:
    """Metric -> measured share of what its limit allows, for limits that were measured."""
    found = {}
    dense = {
        "latency": plan.dense_latency_s,
        "energy": plan.dense_energy_j,
        "memory": plan.dense_memory_bytes,
    }
    for metric, limit in plan.limits.items():
        figure, whole = proof.get(metric), dense.get(metric)
        if isinstance(figure, Estimate) and whole:
            found[metric] = figure.value * whole / limit
    return found


def kept(proof: Mapping[str, Any], plan: Plan) -> bool:
    """Whether no limit is exceeded by more than the interval: its lower end is within."""
    shares = use(proof, plan)
    return all(share * proof[m].lo <= proof[m].value for m, share in shares.items())


def proven(model: nn.Module, terms: Contract, plan: Plan) -> dict[str, Any] | None:
    """The finished model's measured ratios; None where nothing can be measured on this machine.

    Raises:
        UnreachableBudget: they are over the limit by more than the interval, where the plan tried before was
            not: the machine does not hold still.
    """
    if terms.dense is None:
        return None
    proof = measured(model, terms)
    if not kept(proof, plan):
        proof = measured(model, terms)  # one round of noise is no verdict
    if not kept(proof, plan):
        found = ", ".join(f"{m} {proof[m].value:.3f} of dense" for m in use(proof, plan))
        raise UnreachableBudget(
            f"the finished model is over its budget: {found}, though its plan was not; this machine is too "
            "noisy to keep a contract on: use a quieter one, or loosen the budget"
        )
    return proof
