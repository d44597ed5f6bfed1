"""A contract on latency or energy: priced on a device profile, proven by measuring, tightened when missed.

The knapsack spends predicted time; the realised model is then measured against the dense one on the machine
at hand, in interleaved rounds. Where it misses the budget, or leaves some of it unused, it is solved again with
the limit scaled by what was measured, a few times; what no plan keeps is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.allocate import ON_A_DEVICE, Budget, Plan, UnreachableBudget
from hwprune.device import ProfileError, load_device
from hwprune.meter.compare import measure
from hwprune.meter.estimate import Estimate
from hwprune.network import NetworkModel
from hwprune.operations import count_operations
from hwprune.ops import DTYPES
from hwprune.predict import CostModel
from hwprune.pricing import Pricer
from hwprune.profiling import this_device
from hwprune.route import profile_here
from hwprune.units import Mask

ATTEMPTS = 4
_CLOSE = 0.03  # of the budget left unused that is not worth another try
_BEYOND = 0.05  # share of the time beyond the sizes of the profile that is not worth a word
_TYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Contract:
    """What a budget of latency or energy is judged by.

    Attributes:
        pricer: predicts on the profile.
        x: the batch that is timed.
        dense: a copy of the dense model to measure against; None where this machine is not the profile's
            device, and nothing can be measured.
        notes: what the user should know.
    """

    pricer: Pricer
    x: Tensor
    dense: nn.Module | None
    notes: tuple[str, ...] = ()


def contract(
    model: nn.Module,
    budget: Budget,
    device: str | None,
    x: Tensor,
    block: tuple[int, int],
) -> Contract | None:
    """Make a contract for a budget; None where it needs no device.

    Args:
        model: dense.
        budget: what is asked.
        device: a profile's name or file; None = the profile of this very machine.
        x: the batch that is to be timed, on the model's device and in its type.
        block: tile size of block options.

    Raises:
        ValueError: no profile, one that cannot price this model, or a device for a budget without one.
    """
    asked = [metric for metric in budget.given if metric in ON_A_DEVICE]
    if not asked:
        if device is not None:
            raise ValueError(
                f"device={device!r}: budgets macs and params need no device profile; leave device out"
            )
        return None
    costs = device_costs(device, x.device, asked[0])
    here = costs.profile.key == this_device(x.device)
    if x.dtype not in _TYPES:
        raise ValueError(f"budget {asked[0]}: expected fp32, fp16 or bf16 weights, got {x.dtype}")
    counted = count_operations(model, x, partly=True)
    notes = []
    network = NetworkModel(costs)
    if here:
        seconds = latency_s(model, x)
        network = NetworkModel.fitted(costs, [(counted.ops, seconds)])
    else:
        notes.append(
            f"predicted for {costs.profile.key}, not measured: this machine is {this_device(x.device)}"
        )
    dense = network.predict(counted.ops)
    beyond = [p for p in map(costs.predict, counted.ops) if p.tier == "extrapolated"]
    share = sum(p.latency_s for p in beyond) / dense.latency_s
    if share > _BEYOND:
        notes.append(
            f"{costs.profile.name} was measured at other sizes: {share:.0%} of the time of {tuple(x.shape)} "
            "is extrapolated"
        )
    pricer = Pricer(network, len(x), _TYPES[x.dtype], dense, block)
    return Contract(pricer, x, copy.deepcopy(model).eval() if here else None, tuple(notes))


def timed_images(batches: Sequence[Tensor], count: int) -> Tensor:
    """A batch of `count` images: the first ones, repeated where there are fewer."""
    if count < 1:
        raise ValueError(f"timed_batch: expected at least 1 image, got {count}")
    if not batches:
        raise ValueError("calibration: expected at least one image, got none")
    images = torch.cat([b[:count] for b in batches])[:count]
    return torch.cat([images] * -(-count // len(images)))[:count]


def device_costs(device: str | None, place: torch.device, metric: str) -> CostModel:
    """The cost model of a profile by name or file; None = of the profile of this very machine.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    mode = "graph" if place.type == "cuda" else "eager"
    if device is None:
        found = profile_here(place, mode)
        if found is None:
            raise ValueError(
                f"budget {metric}: this machine ({this_device(place)}) has no profile; measure it once with "
                "`hwprune profile` and give it with device=FILE (--device FILE), or name another device's"
            )
        return found
    try:
        profile = load_device(device)
    except ProfileError as error:
        raise ValueError(f"budget {metric}: {error}") from None
    mode = "graph" if profile.device.get("type", "cpu") != "cpu" else "eager"
    return CostModel(profile, mode)


def latency_s(model: nn.Module, inputs: object) -> float:
    """Seconds of a call of the dense model; CPU time of a single thread, like the profile's.

    Args:
        model: to time.
        inputs: as `hwprune.measure` takes them.
    """
    found = measure(model, inputs, energy=False, rounds=8, seconds_per_arm=10.0).model
    figure = found.cpu_time_s if _single_thread(model) else found.latency_s
    if not isinstance(figure, Estimate):
        raise ValueError(f"the dense model cannot be timed: {found.error or figure.reason}")
    return figure.value


def _single_thread(model: nn.Module) -> bool:
    """Whether a model runs on one thread of a CPU, whose CPU time is the steadier figure."""
    return next(model.parameters()).device.type == "cpu" and torch.get_num_threads() == 1


def prove(pruned: nn.Module, dense: nn.Module, inputs: object) -> dict[str, Any]:
    """Measured ratios of the pruned to the dense model: Estimates, or Unavailable with the reason.

    Beside them what each was by itself ("arms", "settings"), for the report.
    """
    found = measure(pruned, inputs, against={"dense": dense}, seconds_per_arm=20.0)
    ratio = found.ratio("model", "dense")
    return {
        "latency": ratio.cpu_time if _single_thread(dense) else ratio.latency,
        "energy": ratio.energy,
        "arms": {name: arm.to_dict() for name, arm in found.arms.items()},
        "settings": dict(found.settings),
    }


def settle(
    terms: Contract | None,
    solve: Callable[[Mapping[str, float]], tuple[Plan, Mask]],
    shaped: Callable[[Mask], nn.Module],
) -> tuple[Plan, Mask]:
    """A plan that keeps its budget as measured, and uses it: within 3 % where a few tries find one.

    Time depends on shapes, not on weights: each plan is tried on a copy that is cut but not re-fitted.

    Args:
        terms: of the budget; None, or another machine's: the first plan is taken as predicted.
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
        if terms is None or terms.dense is None or all(bool(grid.all()) for grid in mask.values()):
            return plan, mask
        proof = prove(shaped(mask), terms.dense, terms.x)
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
            f"{ATTEMPTS} plans were cut and timed, and none keeps the budget on this machine; the last: "
            f"{reached}; loosen the budget, or measure the device again with `hwprune profile`"
        )
    return best[1], best[2]


def use(proof: Mapping[str, Any], plan: Plan) -> dict[str, float]:
    """Metric -> measured share of what its limit allows, for limits of the device that were measured."""
    found = {}
    dense = {"latency": plan.dense_latency_s, "energy": plan.dense_energy_j}
    for metric, limit in plan.limits.items():
        measured, whole = proof.get(metric), dense.get(metric)
        if isinstance(measured, Estimate) and whole:
            found[metric] = measured.value * whole / limit
    return found


def kept(proof: Mapping[str, Any], plan: Plan) -> bool:
    """Whether no limit is exceeded by more than the interval: its lower end is within."""
    shares = use(proof, plan)
    return all(share * proof[m].lo <= proof[m].value for m, share in shares.items())


def proven(model: nn.Module, terms: Contract, plan: Plan) -> dict[str, Any] | None:
    """The finished model's measured ratios; None where this machine is not the device.

    Raises:
        UnreachableBudget: they are over the limit by more than the interval, where the plan tried before was
            not: the machine does not hold still.
    """
    if terms.dense is None:
        return None
    proof = prove(model, terms.dense, terms.x)
    if not kept(proof, plan):
        proof = prove(model, terms.dense, terms.x)  # one round of noise is no verdict
    if not kept(proof, plan):
        found = ", ".join(f"{m} {proof[m].value:.3f} of dense" for m in use(proof, plan))
        raise UnreachableBudget(
            f"the finished model is over its budget: {found}, though its plan was not; this machine is too "
            "noisy to keep a contract on: use a quieter one, or loosen the budget"
        )
    return proof


def told(terms: Contract, plan: Plan, proof: dict[str, Any] | None) -> dict[str, Any]:
    """The keys `predicted` and `measured` of a report: figures, or null with a reason."""
    spread = terms.pricer.spread_rel()
    predicted: dict[str, Any] = {}
    for metric, got, whole in (
        ("latency", plan.latency_s, plan.dense_latency_s),
        ("energy", plan.energy_j, plan.dense_energy_j),
    ):
        if got is None or not whole:
            predicted[f"{metric}_ratio"] = None
            predicted["reason"] = (
                f"{terms.pricer.network.costs.profile.name} has no {metric} figures"
            )
        else:
            ratio = got / whole
            ends = {"lo": ratio * (1 - spread), "hi": ratio * (1 + spread)}
            predicted[f"{metric}_ratio"] = {"value": ratio, **ends}
    return {"predicted": predicted, "measured": measured_keys(proof, terms.notes)}


def measured_keys(proof: Mapping[str, Any] | None, notes: Sequence[str]) -> dict[str, Any]:
    """The key `measured` of a report.

    Args:
        proof: from `prove`; None where nothing was measured.
        notes: why that is.
    """
    measured: dict[str, Any] = {f"{metric}_ratio": None for metric in ON_A_DEVICE}
    if proof is None:
        measured["reason"] = "; ".join(notes) or "nothing was removed, so nothing was timed"
        return measured
    measured |= {part: proof[part] for part in ("arms", "settings") if part in proof}
    for metric in ON_A_DEVICE:
        figure = proof[metric]
        if isinstance(figure, Estimate):
            measured[f"{metric}_ratio"] = figure.to_dict()
        else:
            measured["reason"] = figure.reason
    return measured
