"""A contract on a denoiser's latency or energy: what layers cost on a device profile, and what is allowed.

What is counted and timed is one evaluation for the batch in use, with guidance the doubled one. What is
no operation of a profile, a UNet's convolutions, is the rest of what was measured; where nothing can be
measured it is refused. Masks are judged by `hwprune.denoiser_proof`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.budget import ON_A_DEVICE, Budget
from hwprune.contract import device_costs, latency_s
from hwprune.denoiser_operations import evaluation_operations
from hwprune.denoiser_price import LayerTables, Prices, layer_tables
from hwprune.denoisers import floating_dtype
from hwprune.families.denoiser import find_layers
from hwprune.gating import Layout
from hwprune.guards import hookless
from hwprune.meter.compare import measure
from hwprune.meter.estimate import Estimate
from hwprune.network import NetworkModel, costs_of
from hwprune.operations import Counted
from hwprune.ops import NAMES
from hwprune.predict import CostModel, UnknownOp
from hwprune.prices import Price, table_price
from hwprune.profiling import this_device
from hwprune.remembered import Remembered
from hwprune.teacher import Batch, Sampler, key_of

_SLIGHT = 0.01  # share of the multiply-accumulates that may go unpriced on another machine
_BEYOND = 0.05  # share of the time beyond the sizes of the profile that is not worth a word
_GAINS = 0.05, 20.0  # what a measured saving may be of the predicted one


@dataclass(frozen=True, eq=False)
class DenoiserContract:
    """What a budget of latency or energy is judged by.

    Attributes:
        profile: name of the device profile.
        tables: what layers cost on it.
        whole: metric -> seconds, joules of the dense model for an evaluation.
        shares: metric asked for -> what is allowed of that.
        inputs: of the evaluation, by name.
        place: where models run.
        dense: a copy of the dense model to measure against, on the CPU; None where this machine is not the
            profile's device, and nothing can be measured.
        notes: what the user should know.
        gains: metric -> what is really saved of a predicted saving, from a cut that was timed.
        known: what was measured of the dense model and of that cut.
    """

    profile: str
    tables: LayerTables
    whole: Mapping[str, float]
    shares: Mapping[str, float]
    inputs: Mapping[str, Any]
    place: torch.device
    dense: nn.Module | None
    notes: tuple[str, ...] = ()
    gains: Mapping[str, float] = field(default_factory=dict)
    known: Remembered = field(default_factory=lambda: Remembered(None))

    def predicted(self, layout: Layout, metric: str) -> Price:
        """The price of gates by the profile alone."""
        tables, blocks = self.tables.of(metric)
        mine = {name: table for name, table in tables.items() if name in layout.places}
        return table_price(layout, mine, self.whole[metric], blocks)

    def timed(self, layout: Layout) -> dict[str, tuple[Price, float]]:
        """Metric -> (price set right by what was timed, the dense model's cost)."""

        def corrected(price: Price, gain: float) -> Price:
            return lambda keep: 1 - gain * (1 - price(keep))

        return {
            metric: (
                corrected(self.predicted(layout, metric), self.gains.get(metric, 1.0)),
                self.whole[metric],
            )
            for metric in self.shares
        }

    def kept(self, proof: Mapping[str, Any]) -> bool:
        """Whether no limit is exceeded by more than the interval: its lower end is within."""
        return all(proof[metric].lo <= share for metric, share in self.seen(proof).items())

    def use(self, proof: Mapping[str, Any]) -> float:
        """The largest measured share of what a limit allows; 0 where nothing could be measured."""
        seen = self.seen(proof)
        return max((proof[metric].value / share for metric, share in seen.items()), default=0.0)

    def seen(self, proof: Mapping[str, Any]) -> dict[str, float]:
        """The shares of what could be measured."""
        return {m: share for m, share in self.shares.items() if isinstance(proof[m], Estimate)}

    def corrected(self, layout: Layout, keep: Tensor, proof: Mapping[str, Any]) -> DenoiserContract:
        """The same with prices that agree with what a mask was measured at."""
        gains = dict(self.gains)
        for metric in self.seen(proof):
            saving = 1 - float(self.predicted(layout, metric)(keep.double()))
            if saving > 1e-6:
                least, most = _GAINS
                gains[metric] = min(most, max(least, (1 - proof[metric].value) / saving))
        return replace(self, gains=gains)


def denoiser_contract(
    sampler: Sampler,
    batch: Batch,
    budget: Budget,
    profile: str | None,
    folder: Path | None = None,
) -> DenoiserContract | None:
    """Make a contract for a budget; None where it needs no device.

    Args:
        sampler: of the dense denoiser.
        batch: whose evaluation is timed.
        budget: what is asked.
        profile: its name or file; None = that of this very machine.
        folder: keeps what was measured; None = nowhere.

    Raises:
        ValueError: a budget that denoisers do not have; no profile, one that cannot price this model, or one
            for a budget that needs none.
    """
    asked = [metric for metric in budget.given if metric in ON_A_DEVICE]
    strange = [metric for metric in budget.given if metric not in ("macs", "params", *ON_A_DEVICE)]
    if strange:
        raise ValueError(
            f"budget {strange[0]}: diffusion models are pruned to params, macs, latency and energy"
        )
    if not asked:
        if profile is not None:
            raise ValueError(
                f"profile={profile!r}: budgets macs and params need no device profile; leave profile out"
            )
        return None
    model, place = sampler.model, sampler.device
    costs = device_costs(profile, place, asked[0], "profile")
    dtype = floating_dtype(model, torch.float32)
    if dtype not in NAMES:
        raise ValueError(f"budget {asked[0]}: expected fp32, fp16 or bf16 weights, got {dtype}")
    denoise = sampler.denoise(batch)
    latent = batch.start.to(place)

    def call() -> Tensor:
        return denoise(latent, sampler.solver.timesteps[0])

    inputs = _arguments(model, call)
    counted = _in_known_types(evaluation_operations(model, call), costs, NAMES[dtype])
    here = costs.profile.key == this_device(place)
    notes: list[str] = []
    known = Remembered(_file(folder, sampler, batch, budget, costs))
    try:
        network, seconds = _network(model, inputs, counted, costs, here, known)
        prices = Prices(network)
        tables = layer_tables(prices, find_layers(model)[0], counted)
        beyond = prices.beyond(counted.ops)
    except UnknownOp as error:
        raise ValueError(f"budget {asked[0]}: {error}") from None
    if not here:
        notes.append(
            f"predicted for {costs.profile.key}, not measured: this machine is {this_device(place)}"
        )
    if beyond > _BEYOND:
        notes.append(
            f"{costs.profile.name} was measured at other sizes: {beyond:.0%} of the time of the denoiser's "
            "operations is extrapolated"
        )
    whole = {"latency": seconds}
    if "energy" in asked:
        whole["energy"] = _joules(model, inputs, counted, network, tables, here, known)
    wanted = Budget(latency=budget.latency, energy=budget.energy)
    limits = wanted.limits(whole)
    return DenoiserContract(
        costs.profile.name,
        tables,
        whole,
        {metric: limits[metric] / whole[metric] for metric in asked},
        inputs,
        place,
        hookless(model).to("cpu") if here else None,
        tuple(notes),
        known=known,
    )


def _file(
    folder: Path | None, sampler: Sampler, batch: Batch, budget: Budget, costs: CostModel
) -> Path | None:
    """Where figures are kept, under a name made of all they depend on."""
    if folder is None:
        return None
    said = [key_of(sampler, [batch]), asdict(budget), costs.profile.key]
    return folder / f"contract-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]}.json"


def _arguments(model: nn.Module, call: Callable[[], object]) -> dict[str, Any]:
    """What the model is called with, by name."""
    found: dict[str, Any] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(model.forward).parameters
        found.update(zip(names, args, strict=False))
        found.update(kwargs)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            call()
    finally:
        handle.remove()
    return found


def _in_known_types(counted: Counted, costs: CostModel, dtype: str) -> Counted:
    """Operations in a type of their own (norms in fp32) in the model's, where the profile has that alone."""
    known = {key[3] for key in (op.family for op in costs.entries)}
    parts = tuple(
        (name, op if op.dtype in known else replace(op, dtype=dtype)) for name, op in counted.parts
    )
    return Counted(parts, counted.left_out)


def _unpriced(counted: Counted) -> float:
    """Share of the multiply-accumulates that no operation stands for."""
    left = sum(counted.left_out.values())
    priced = sum(op.macs for op in counted.ops if op.kind in ("linear", "attention"))
    return left / (left + priced) if left else 0.0


def _network(
    model: nn.Module,
    inputs: Mapping[str, Any],
    counted: Counted,
    costs: CostModel,
    here: bool,
    known: Remembered,
) -> tuple[NetworkModel, float]:
    """The model of operations in this network, and seconds of the dense evaluation.

    Raises:
        ValueError: it can be neither measured nor predicted.
    """
    unpriced = _unpriced(counted)
    if not here:
        if unpriced > _SLIGHT:
            name = max(counted.left_out, key=lambda key: counted.left_out[key])
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(
                f"{unpriced:.0%} of the multiply-accumulates of {type(model).__name__} are such as no profile "
                f"measures (the most in {name}, {kind}), so its time on {costs.profile.key} cannot be "
                "predicted; prune it on that machine, where it is measured"
            )
        network = NetworkModel(costs)
        return network, network.predict(counted.ops).latency_s
    seconds = float(known.once("latency_s", lambda: latency_s(model, dict(inputs))))
    if unpriced <= _SLIGHT:
        return NetworkModel.fitted(costs, [(counted.ops, seconds)]), seconds
    # What is left after the priced operations is the convolutions': they cannot take more than there is.
    return NetworkModel(
        costs, scale=min(1.0, seconds / costs_of(costs, counted.ops).latency_s)
    ), seconds


def _joules(
    model: nn.Module,
    inputs: Mapping[str, Any],
    counted: Counted,
    network: NetworkModel,
    tables: LayerTables,
    here: bool,
    known: Remembered,
) -> float:
    """Of one evaluation of the dense model.

    Raises:
        ValueError: the device has no energy figures.
    """
    profile = network.costs.profile
    predicted = network.predict(counted.ops).energy_j
    if tables.joules is None or predicted is None:
        reason = profile.sensor.get("reason")
        raise ValueError(
            f"budget energy: {profile.name} has no energy figures{f' ({reason})' if reason else ''}; give a "
            "latency budget, or a profile measured where there is a sensor"
        )
    if not here or _unpriced(counted) <= _SLIGHT:
        return predicted

    def measured() -> float:
        found = measure(model, dict(inputs), rounds=8, seconds_per_arm=10.0)
        if not isinstance(found.model.energy_j, Estimate):
            raise ValueError(
                f"budget energy: the dense model's cannot be measured: {found.model.energy_j.reason}"
            )
        return found.model.energy_j.value * float(found.settings["batch"])

    return float(known.once("energy_j", measured))
