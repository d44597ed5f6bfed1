"""A contract on latency, energy or memory: what a budget is judged by, and what was predicted and measured.

The knapsack spends predicted time, joules and bytes; the realised model is then measured against the dense one
on the machine at hand (`hwprune.proof`). What this machine cannot measure is said to be a prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hwprune.budget import ON_A_DEVICE, Budget, check_energy_weight
from hwprune.device import ProfileError, load_device
from hwprune.meter.compare import in_type, measure
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.memory import Memory, peak_memory
from hwprune.meter.modes import Mode
from hwprune.network import NetworkModel
from hwprune.operations import Counted, count_operations
from hwprune.ops import DTYPES
from hwprune.plan import Plan
from hwprune.predict import CostModel
from hwprune.pricing import MemoryPricer, Pricer
from hwprune.profiling import this_device
from hwprune.route import profile_here
from hwprune.tiling import linears_of, sizes_worth_it
from hwprune.units import Layer

ATTEMPTS = 4  # plans that are cut and measured before a budget is refused
_BEYOND = 0.05  # share of the time beyond the sizes of the profile that is not worth a word
_ACTIVATIONS_OFF = (
    0.15  # how far estimated peaks are from measured ones at most (tests/test_memory_cost.py)
)
_TYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Contract:
    """What a budget of latency, energy or memory is judged by.

    Attributes:
        x: the batch that is run, in the type it is run in.
        model: the dense model in that type; not a copy where that is its own.
        pricer: predicts time and energy on the profile; None where neither is asked for.
        memory: predicts bytes; None where they are not asked for.
        dense: a copy of the dense model to measure against; None where nothing can be measured.
        timed: whether this machine is the profile's device.
        weighs: bytes can be measured here.
        mode: how the model is run when it is timed: "eager", or "graph" (CUDA graph).
        tiles: tile sizes that pay on the profile, (rows, columns); empty where whole units are as fast.
        notes: what the user should know.
    """

    x: Tensor
    model: nn.Module
    pricer: Pricer | None
    memory: MemoryPricer | None
    dense: nn.Module | None
    timed: bool = False
    weighs: bool = False
    mode: Mode = "eager"
    tiles: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def contract(
    model: nn.Module,
    budget: Budget,
    device: str | None,
    x: Tensor,
    layers: Sequence[Layer] = (),
    *,
    energy_weight: float = 0.0,
    mode: Mode | None = None,
    dtype: torch.dtype | None = None,
) -> Contract | None:
    """Make a contract for a budget; None where it needs none.

    Args:
        model: dense.
        budget: what is asked.
        device: a profile's name or file; None = the profile of this very machine.
        x: the batch that is to be run, on the model's device and in its type.
        layers: all prunable layers of the model.
        energy_weight: other than 0, energy is needed whatever the budget.
        mode: "eager" or "graph"; None = as GPUs' profiles are measured, and CPUs': a graph on a GPU.
        dtype: of the model and the batch when they are run; None = as they are.

    Raises:
        ValueError: no profile, one that cannot price this model or has no energy where that is asked for, or
            a device or mode for a budget without one.
    """
    check_energy_weight(energy_weight)
    asked = [metric for metric in budget.given if metric in ON_A_DEVICE]
    asked += ["energy"] if energy_weight else []
    if not asked and device is not None:
        raise ValueError(
            f"device={device!r}: budgets macs, params and memory need no device profile; leave device out"
        )
    if not asked and mode is not None:
        raise ValueError(
            f"mode={mode!r}: budgets macs, params and memory do not depend on it; leave mode out"
        )
    if not asked and "memory" not in budget.given:
        return None
    if dtype is not None and dtype != x.dtype:
        model, x = in_type(model, dtype), x.to(dtype)
    if x.dtype not in _TYPES:
        first = asked[0] if asked else "memory"
        raise ValueError(f"budget {first}: expected fp32, fp16 or bf16 weights, got {x.dtype}")
    notes: list[str] = []
    pricer, timed = None, False
    run: Mode = "eager"
    tiles: tuple[tuple[int, int], ...] = ()
    if asked:
        pricer, timed, counted, run = _timing(model, device, x, asked[0], mode, notes)
        if "energy" in asked and pricer.without_energy:  # before the long work
            word = "budget energy" if "energy" in budget.given else "energy_weight"
            raise ValueError(f"{word}: {pricer.without_energy}")
        tiles = sizes_worth_it(pricer.network.costs, linears_of(counted.parts, layers))
    memory, weighs = None, False
    if "memory" in budget.given:
        found = _memory(model, x)
        weighs = isinstance(found, Memory)
        if isinstance(found, Memory):
            memory = MemoryPricer.fitted(model, layers, x, found.activation_bytes)
        else:
            memory = MemoryPricer.fitted(model, layers, x)
            notes.append(f"peak activations are predicted, not measured: {found.reason}")
    dense = copy.deepcopy(model).eval() if timed or weighs else None
    return Contract(x, model, pricer, memory, dense, timed, weighs, run, tiles, tuple(notes))


def _timing(
    model: nn.Module,
    device: str | None,
    x: Tensor,
    metric: str,
    mode: Mode | None,
    notes: list[str],
) -> tuple[Pricer, bool, Counted, Mode]:
    """Prices of time and energy; whether this machine is the device; the operations; how they are run.

    Adds to the notes.
    """
    costs = device_costs(device, x.device, metric, mode=mode)
    run = cast("Mode", costs.mode)
    here = costs.profile.key == this_device(x.device)
    counted = count_operations(model, x, partly=True)
    network = NetworkModel(costs)
    if here:
        try:
            seconds = latency_s(model, x, run)
        except ValueError as error:
            if mode is not None or run == "eager":
                raise
            notes.append(f"timed eagerly: as a {run} {error}")
            run = "eager"
            seconds = latency_s(model, x, run)
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
    return Pricer(network, len(x), _TYPES[x.dtype], dense), here, counted, run


def timed_images(batches: Sequence[Tensor], count: int) -> Tensor:
    """A batch of `count` images: the first ones, repeated where there are fewer."""
    if count < 1:
        raise ValueError(f"timed_batch: expected at least 1 image, got {count}")
    if not batches:
        raise ValueError("calibration: expected at least one image, got none")
    images = torch.cat([b[:count] for b in batches])[:count]
    return torch.cat([images] * -(-count // len(images)))[:count]


def device_costs(
    device: str | None,
    place: torch.device,
    metric: str,
    argument: str = "device",
    *,
    mode: Mode | None = None,
) -> CostModel:
    """The cost model of a profile by name or file; None = of the profile of this very machine.

    Args:
        device: the profile.
        place: where the model is.
        metric: what is asked, for the message.
        argument: how the caller calls `device`, for the message.
        mode: how the model will be run; None = a graph on a GPU, eager on a CPU.

    Raises:
        ValueError: there is none, or it cannot be read, or was not measured in that mode.
    """
    if device is None:
        found = profile_here(place, mode or ("graph" if place.type == "cuda" else "eager"))
        if found is None:
            of_mode = "" if mode is None else f" measured in mode {mode}"
            raise ValueError(
                f"budget {metric}: this machine ({this_device(place)}) has no profile{of_mode}; measure it "
                f"once with `hwprune profile` and give it with {argument}=FILE (--{argument} FILE), or name "
                "another device's"
            )
        return found
    try:
        profile = load_device(device)
    except ProfileError as error:
        raise ValueError(f"budget {metric}: {error}") from None
    usual: Mode = "graph" if profile.device.get("type", "cpu") != "cpu" else "eager"
    try:
        return CostModel(profile, mode or usual)
    except ValueError as error:
        if mode is None:
            raise
        there = ", ".join(sorted({entry.mode for entry in profile.entries}))
        raise ValueError(
            f"mode={mode!r}: {profile.name} was measured in mode {there}; leave mode out, or name another "
            "device"
        ) from error


def latency_s(model: nn.Module, inputs: object, mode: Mode = "eager") -> float:
    """Seconds of a call of the dense model; CPU time of a single thread, like the profile's.

    Args:
        model: to time.
        inputs: as `hwprune.measure` takes them.
        mode: how it is run.

    Raises:
        ValueError: it cannot be timed, or not in that mode.
    """
    found = measure(model, inputs, energy=False, mode=mode, rounds=8, seconds_per_arm=10.0).model
    figure = found.cpu_time_s if _single_thread(model) else found.latency_s
    if not isinstance(figure, Estimate):
        raise ValueError(f"the dense model cannot be timed: {found.error or figure.reason}")
    return figure.value


def _single_thread(model: nn.Module) -> bool:
    """Whether a model runs on one thread of a CPU, whose CPU time is the steadier figure."""
    return next(model.parameters()).device.type == "cpu" and torch.get_num_threads() == 1


@torch.inference_mode()
def _memory(model: nn.Module, x: Tensor) -> Memory | Unavailable:
    """Weights and the peak of activations of one forward in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model(x)
        return peak_memory(lambda: model(x), model, (), x.device)
    finally:
        for module, mode in modes:
            module.training = mode


def prove(
    pruned: nn.Module,
    dense: nn.Module,
    inputs: object,
    mode: Mode = "eager",
    *,
    energy: bool = True,
) -> dict[str, Any]:
    """Measured ratios of the pruned to the dense model: Estimates, or Unavailable with the reason.

    Beside them what each was by itself ("arms", "settings"), for the report.

    Args:
        pruned: to time.
        dense: to time in turns with it.
        inputs: as `hwprune.measure` takes them.
        mode: how they are run.
        energy: whether to meter it, where there is a sensor; it takes longer than the time.
    """
    found = measure(
        pruned, inputs, against={"dense": dense}, mode=mode, energy=energy, seconds_per_arm=20.0
    )
    ratio = found.ratio("model", "dense")
    return {
        "latency": ratio.cpu_time if _single_thread(dense) else ratio.latency,
        "energy": ratio.energy,
        "arms": {name: arm.to_dict() for name, arm in found.arms.items()},
        "settings": dict(found.settings),
    }


def weigh(pruned: nn.Module, memory: MemoryPricer, x: Tensor) -> Estimate | Unavailable:
    """Measured bytes of the pruned model, weights and activations, by those of the dense one."""
    found = _memory(pruned, x)
    if isinstance(found, Unavailable):
        return found
    ratio = (found.weight_bytes + found.activation_bytes) / memory.dense_bytes
    return Estimate(ratio, ratio, ratio, 1)  # an allocator repeats itself


def told(terms: Contract, plan: Plan, proof: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys `predicted` and `measured` of a report: figures, or null with a reason."""
    predicted: dict[str, Any] = {}
    for metric in (*ON_A_DEVICE, *(["memory"] if terms.memory is not None else [])):
        figure = _predicted(terms, plan, metric)
        predicted[f"{metric}_ratio"] = None if isinstance(figure, str) else figure
        if isinstance(figure, str):
            predicted["reason"] = figure
    absent = {} if terms.memory is None else {"memory_ratio": None}
    return {"predicted": predicted, "measured": absent | measured_keys(proof, terms.notes)}


def measured_keys(proof: Mapping[str, Any] | None, notes: Sequence[str]) -> dict[str, Any]:
    """The key `measured` of a report.

    Args:
        proof: from `prove`, with the memory if that was asked for; None where nothing was measured.
        notes: why that is.
    """
    measured: dict[str, Any] = {f"{metric}_ratio": None for metric in ON_A_DEVICE}
    if proof is None:
        measured["reason"] = "; ".join(notes) or "nothing was removed, so nothing was timed"
        return measured
    measured |= {part: proof[part] for part in ("arms", "settings") if part in proof}
    for metric in (m for m in (*ON_A_DEVICE, "memory") if m in proof):
        figure = proof[metric]
        if isinstance(figure, Estimate):
            measured[f"{metric}_ratio"] = figure.to_dict()
        else:
            measured |= {f"{metric}_ratio": None, "reason": figure.reason}
    return measured


def _predicted(terms: Contract, plan: Plan, metric: str) -> dict[str, float] | str:
    """A predicted ratio with its interval, or why there is none."""
    if metric == "memory":
        assert plan.weight_bytes is not None and plan.activation_bytes is not None
        assert plan.dense_memory_bytes
        lo, value, hi = (
            (plan.weight_bytes + factor * plan.activation_bytes) / plan.dense_memory_bytes
            for factor in (1 - _ACTIVATIONS_OFF, 1, 1 + _ACTIVATIONS_OFF)
        )
        return {"value": value, "lo": lo, "hi": hi}
    if terms.pricer is None:
        return "neither latency nor energy was asked for"
    got, whole = (
        (plan.latency_s, plan.dense_latency_s)
        if metric == "latency"
        else (plan.energy_j, plan.dense_energy_j)
    )
    if got is None or not whole:
        return f"{terms.pricer.network.costs.profile.name} has no {metric} figures"
    spread = terms.pricer.spread_rel()
    ratio = got / whole
    return {"value": ratio, "lo": ratio * (1 - spread), "hi": ratio * (1 + spread)}
