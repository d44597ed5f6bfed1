"""What holds while a denoiser is pruned, and is as it was afterwards: modes, gradients, places, weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hwprune.coupled import weight_module
from hwprune.trajectory_scores import readers
from hwprune.units import Units


@contextmanager
def frozen_model(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for weights; both as they were on exit."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trained = any(
        flags.values()
    )  # of what has a new name afterwards: constants, blocks after a removed one
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, trained))


@contextmanager
def others_on_the_cpu(pipeline: Any, model: nn.Module, whole: bool) -> Iterator[None]:
    """Encoders and VAE wait on the CPU while a denoiser on a GPU learns; they are back on exit."""
    away: list[tuple[nn.Module, torch.device]] = []
    for other in pipeline.components.values() if whole else ():
        first = next(other.parameters(), None) if isinstance(other, nn.Module) else None
        if other is not model and first is not None and first.device.type == "cuda":
            away.append((other, first.device))
    try:
        for other, _ in away:
            other.to("cpu")
        yield
    finally:
        for other, where in away:
            other.to(where)


@contextmanager
def weights_back(model: nn.Module, units: Sequence[Units]) -> Iterator[None]:
    """After a failure, the projections a repair may have written to are as they were."""
    modules = {name: weight_module(model, name) for name in readers(units)}
    saved = {
        name: (m.weight.detach().clone(), m.bias.detach().clone() if m.bias is not None else None)
        for name, m in modules.items()
    }
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, (weight, bias) in saved.items():
                modules[name].weight.copy_(weight)
                held = modules[name].bias
                if bias is not None and held is not None:
                    held.copy_(bias)
        raise


def hookless(model: nn.Module) -> nn.Module:
    """A copy without hooks, in eval mode."""
    found = copy.deepcopy(model).eval()
    for module in found.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found
