"""A made-up device that has measured every operation a tiny denoiser can be cut to, and measures models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from fakes.profiles import profile_of
from fakes.tiny_diffusion import flow, tiny_dit
from torch import Tensor, nn

import hwprune
from hwprune import denoiser_contract, denoiser_proof
from hwprune.denoiser_operations import evaluation_operations, layer_parts
from hwprune.denoisers import Denoiser
from hwprune.families.denoiser import find_layers
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.operations import Counted
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.units import CoupledLayer

QUICK: dict[str, Any] = {"steps": 2, "updates": 8, "images": 8, "batch": 4}
NO_SENSOR = Unavailable("no sensor")


def truth_s(op: Op) -> float:
    """A launch, and the work, of neurons twice as dear as of heads; norms and activations by their size."""
    dear = 2.0 if op.kind == "linear" and max(op.shape[1:]) > 32 else 1.0
    return 1e-6 + dear * op.macs * 1e-11


def counted_in(model: nn.Module, latent: Tensor, inputs: Mapping[str, Any]) -> Counted:
    """The operations of one evaluation."""
    denoise = Denoiser(model, inputs)
    return evaluation_operations(model, lambda: denoise(latent, torch.tensor(500)))


def operations_in_reach(model: nn.Module, counted: Counted) -> Iterator[Op]:
    """Those of the dense model and of every layer at every count, one layer at a time."""
    yield from counted.ops
    layers = [layer for layer in find_layers(model)[0] if isinstance(layer, CoupledLayer)]
    for layer in layers:
        for part in layer_parts(layer, counted, layers):
            cuts = (part.cut(gone) for gone in range(layer.count + 1))
            yield from (op for op in cuts if op is not None)


def costs_for(
    model: nn.Module,
    counted: Counted,
    truth: Callable[[Op], float] = truth_s,
    power_w: float | None = None,
) -> CostModel:
    """A cost model that knows all of them verbatim."""
    times = {op: truth(op) for op in set(operations_in_reach(model, counted))}
    device = {"type": "cpu", "name": "FAKE-device", "threads": 1}
    return CostModel(profile_of(times, name="FAKE", device=device, power_w=power_w))


class Machine:
    """A made-up device: what it has measured, and what it measures of models that are run on it.

    Attributes:
        off: what a model takes really, of what its operations say.
        rest_s: of what is no operation.
        power_w: of every operation; None = it was never measured.
        sensor: whether energy can be measured now.
        costs: what it has measured: the operations of the last model that was counted.
        proofs: ratios measured so far.
        next: ratios to give instead of the truth, the first one first.
    """

    def __init__(self) -> None:
        self.off: Callable[[float], float] = lambda ratio: ratio
        self.rest_s = 0.0
        self.power_w: float | None = None
        self.sensor = True
        self.costs: CostModel
        self.proofs: list[float] = []
        self.next: list[float] = []
        self.widths: list[int] = []

    def seconds(self, model: nn.Module, inputs: Any) -> float:
        """Of one call."""
        counted = evaluation_operations(model, lambda: model(**inputs))
        return self.rest_s + sum(map(truth_s, counted.ops))

    def prove(self, pruned: nn.Module, dense: nn.Module, inputs: Any) -> dict[str, Any]:
        """As `hwprune.contract.prove`."""
        assert not any(m._forward_pre_hooks for m in pruned.modules())
        ratio = self.off(self.seconds(pruned, inputs) / self.seconds(dense, inputs))
        ratio = self.next.pop(0) if self.next else ratio
        self.proofs.append(ratio)
        self.widths.append(sum(p.numel() for p in pruned.parameters()))
        latency = Estimate(ratio, 0.99 * ratio, 1.01 * ratio, 8)
        energy = Estimate(ratio, ratio, ratio, 8) if self.power_w and self.sensor else NO_SENSOR
        return {"latency": latency, "energy": energy}


class Late(CostModel):
    """The costs of a machine, known once the model has been counted."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine.costs, name)

    def predict(self, op: Op) -> Any:
        return self._machine.costs.predict(op)


def put_elsewhere(patch: pytest.MonkeyPatch) -> Machine:
    """Budgets are judged on the made-up device, which this machine is not."""
    machine = Machine()
    real = denoiser_contract.evaluation_operations

    def counting(model: nn.Module, call: Callable[[], object]) -> Counted:
        counted = real(model, call)
        machine.costs = costs_for(model, counted, power_w=machine.power_w)
        return counted

    patch.setattr(denoiser_contract, "evaluation_operations", counting)
    patch.setattr(denoiser_contract, "device_costs", lambda *_: Late(machine))
    return machine


def put_here(patch: pytest.MonkeyPatch) -> Machine:
    """This machine is the made-up device."""
    machine = put_elsewhere(patch)
    patch.setattr(denoiser_contract, "this_device", lambda _: "FAKE-device, 1 thread(s)")
    patch.setattr(denoiser_contract, "latency_s", machine.seconds)
    patch.setattr(denoiser_proof, "prove", machine.prove)
    return machine


def pruned(budget: hwprune.Budget, **asked: Any) -> tuple[nn.Module, Any]:
    """A tiny DiT, pruned, and the report."""
    model = tiny_dit()
    given = {**QUICK, "scheduler": flow(), **asked}
    return model, hwprune.prune_diffusion(model, [1, 2, 3], budget, **given)


def seconds_of(model: nn.Module, batch: int = 4) -> float:
    """On the made-up device, of one evaluation."""
    inputs = {
        "hidden_states": torch.randn(batch, 1, 8, 8),
        "timestep": torch.tensor(500).expand(batch),
        "class_labels": torch.zeros(batch, dtype=torch.long),
    }
    return Machine().seconds(model, inputs)


def refused(error: type[Exception], match: str, budget: hwprune.Budget, **asked: Any) -> None:
    """A DiT whose pruning is refused is as it was."""
    model = tiny_dit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        hwprune.prune_diffusion(model, [1], budget, **{**QUICK, "scheduler": flow(), **asked})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
