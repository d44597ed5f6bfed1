"""A made-up device that has measured every operation a tiny denoiser can be cut to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fakes.profiles import profile_of
from torch import Tensor, nn

from hwprune.denoiser_operations import evaluation_operations, layer_parts
from hwprune.denoisers import Denoiser
from hwprune.families.denoiser import find_layers
from hwprune.operations import Counted
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.units import CoupledLayer


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
