"""Bytes under a plan: weights as the realised state holds them, peak activations near the measured ones."""

from __future__ import annotations

import copy

import pytest
import torch
from test_network import BLOCK, KINDS, MODELS, POSSIBLE, images, some_mask, structures
from torch import nn

from hwprune.cost import Structure
from hwprune.families import timm_vit
from hwprune.memory_cost import (
    activation_bytes,
    layer_weight_bytes,
    plan_weight_bytes,
    weight_bytes,
)
from hwprune.meter.memory import Memory, peak_memory
from hwprune.realise import realise_

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

TOLERANCE = 0.15  # of the measured peak


def state_bytes(model: nn.Module) -> int:
    """An oracle: what a file of the model holds, and buffers that are not saved."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("name", "kind"),
    [(m, k) for m in MODELS for k in POSSIBLE.get(m, (*KINDS, "all", "block"))],
)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_model_it_becomes(
    name: str, kind: str, empty: bool, dtype: torch.dtype
) -> None:
    model = MODELS[name]().to(dtype)
    units = timm_vit.find_units(model, None if kind == "all" else (kind,), block=BLOCK)
    mask = some_mask(units, seed=3, empty=empty)
    layers, _ = timm_vit.find_layers(model)
    planned = plan_weight_bytes(model, layers, structures(units, mask, BLOCK))
    realised = copy.deepcopy(model)
    realise_(realised, units, mask)
    assert planned == state_bytes(realised) == weight_bytes(realised)
    assert plan_weight_bytes(model, layers, {}) == state_bytes(model)


def test_ragged_tiles_and_whole_grids() -> None:
    """fc1 is 192 x 48: 3 x 1 tiles of 64 x 64, the columns padded."""
    model = MODELS["vit"]()
    mlp = timm_vit.find_layers(model)[0][1]
    whole = layer_weight_bytes(model, mlp, Structure(neurons=192))
    tiles = {"blocks.0.mlp.fc1": (64, 64)}
    keep = Structure(weights={"blocks.0.mlp.fc1": 2 * 64 * 64}, tiles=tiles)
    cut = layer_weight_bytes(model, mlp, keep)
    assert cut - whole == 4 * (2 * 64 * 64 - 192 * 48) + 4 * (3 + 4 + 3)
    every = Structure(weights={"blocks.0.mlp.fc1": 3 * 64 * 64}, tiles=tiles)
    stored = layer_weight_bytes(model, mlp, every)
    assert stored - whole == 4 * (3 * 64 * 64 - 192 * 48) + 4 * (4 + 4 + 3)
    dense = Structure(weights={"blocks.0.mlp.fc1": 192 * 48}, tiles={})  # no whole number of tiles
    assert layer_weight_bytes(model, mlp, dense) == whole
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1: expected 0 to 3 whole tiles"):
        layer_weight_bytes(model, mlp, Structure(weights={"blocks.0.mlp.fc1": 5}, tiles=tiles))


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 4 * 64


@pytest.mark.parametrize("name", ["vit", "packed SwiGLU"])
@pytest.mark.parametrize("kind", ["dense", "neuron", "head", "all", "block"])
@pytest.mark.parametrize("batch", [4, 16])
def test_the_peak_of_activations_is_near_the_measured_one(name: str, kind: str, batch: int) -> None:
    model, x = MODELS[name](), images(batch)
    layers, _ = timm_vit.find_layers(model)
    keep, realised = {}, model
    if kind != "dense":
        units = timm_vit.find_units(model, None if kind == "all" else (kind,), block=BLOCK)
        mask = some_mask(units, seed=3)
        keep, realised = structures(units, mask, BLOCK), copy.deepcopy(model)
        realise_(realised, units, mask)
    with torch.no_grad():
        realised(x)
        measured = peak_memory(lambda: realised(x), realised, (x,), torch.device("cpu"))
    assert isinstance(measured, Memory)
    estimate = activation_bytes(model, layers, keep, x)
    assert estimate == pytest.approx(measured.activation_bytes, rel=TOLERANCE)
    assert weight_bytes(realised) == measured.weight_bytes
