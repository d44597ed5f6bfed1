"""The arms that tell a saving by structure from one by values: masked and random beside pruned and dense.

A GPU at its power cap runs faster on zeros, so a model with zeros in it may look cheaper although nothing
was removed. Dense with its own weights, the dense shapes with the pruned model's weights (zeros where
something was removed), the pruned model, and the pruned shapes with random weights separate the two.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hwprune import families
from hwprune.densify import dense_state
from hwprune.timm_base import create, create_empty, written_cfg

# `measure(..., against=split_arms(...), equivalent=EQUIVALENT)`: the two compute the same function.
EQUIVALENT = {"masked": "model"}


def split_arms(pruned: nn.Module, dense: nn.Module, *, seed: int = 0) -> dict[str, nn.Module]:
    """What to measure a pruned model against to split its saving; the models are unchanged.

    Args:
        pruned: by `hwprune.prune`, or opened with `hwprune.load`.
        dense: the model it was pruned from, with its own weights.
        seed: of the random weights.

    Returns:
        {"dense", "masked", "random"}, on the device and in the types of `pruned`.

    Raises:
        ValueError: nothing was removed, the dense shapes cannot hold what the pruned model computes, or
            `dense` is not of the architecture the pruned model came from.
    """
    spec = getattr(pruned, "hwprune_spec", None)
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"split: {type(pruned).__name__} was not pruned by hwprune, so its dense form is not known; "
            "prune it with hwprune.prune or open a folder of it"
        )
    if not spec["shape"]:
        raise ValueError(
            "split: no layer of the model is smaller than in the dense one (nothing was removed, or it was "
            "saved in dense form), so there is no structure to time"
        )
    expected = {name: tuple(t.shape) for name, t in masked_form(pruned).state_dict().items()}
    given = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))[0][0]
        raise ValueError(
            f"split: {odd} of the dense model is {given.get(odd)}, and the pruned one came from a model where "
            f"it is {expected.get(odd)}; give the model it was pruned from"
        )
    return {"dense": dense, "masked": masked_form(pruned), "random": random_form(pruned, seed)}


def masked_form(pruned: nn.Module) -> nn.Module:
    """The dense shapes with the pruned model's weights and zeros: the same function at the dense cost.

    Args:
        pruned: with `hwprune_spec`; unchanged.

    Raises:
        ValueError: a bias of the pruned model has no place in the dense layer.
    """
    spec: Mapping[str, Any] = vars(pruned)["hwprune_spec"]
    cfg = written_cfg(pruned, spec)
    empty = create_empty(spec, cfg)
    layers, _ = families.of(empty).find_layers(empty)
    state = dense_state(pruned, empty, layers, spec["shape"])
    with torch.random.fork_rng(devices=[]):
        model = create(spec, cfg)
    weight = next(t for t in state.values() if t.is_floating_point())
    model.to(device=weight.device, dtype=weight.dtype)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def random_form(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose parameters are drawn anew, each tensor with the mean and deviation it had.

    Args:
        model: unchanged.
        seed: of the draw.
    """
    copied = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in copied.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        old = parameter.float()
        parameter.copy_(drawn.to(parameter.device) * old.std() + old.mean())
    return copied
