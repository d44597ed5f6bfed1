"""AdaLN modulation as a unit kind: factors equal the dense map, components go for good, files open."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune.denoiser_cost import denoiser_cost
from hwprune.factored import (
    is_factored,
    modulation_linears,
    most_components,
    put_factors_,
)
from hwprune.families.denoiser import find_layers, find_units
from hwprune.modulation import factors
from hwprune.realise import masked, realise_, reshape_
from hwprune.trajectory_scores import Moments

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, tiny_dit  # noqa: E402

KINDS = ["head", "neuron", "modulation"]
QUICK: dict[str, Any] = {"steps": 2, "updates": 8, "images": 8, "batch": 4}
each_family = pytest.mark.parametrize(
    "which", ["dit.tiny", "mmdit.tiny", "mmdit.tiny_sd3", "qwen_image.tiny"]
)


def tiny(which: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A tiny model in float64 whose every weight matters, and how to call it or a copy."""
    family, _, name = which.partition(".")
    module = importlib.import_module(f"hwprune.families.{family}")
    made = dict(inspect.getmembers(module, inspect.isfunction)).get(name)
    if made is None:
        pytest.skip(f"{which}: this family has no such example")
    model, latent, inputs = made()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            time = torch.tensor([0.3, 0.7])
            out: Tensor = model(latent.double(), timestep=time, **inputs, return_dict=False)[0]
        return out

    return model.double(), call


def factor_(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Factor by what two timesteps show."""
    names = modulation_linears(model)
    moments = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        moments[name] = Moments(linear)
        linear.register_forward_pre_hook(lambda _, args, own=moments[name]: own.add(args[0], 1.0))
    call(model)
    for name in names:
        put_factors_(model, name, *factors(model.get_submodule(name), moments[name]))


@each_family
def test_factors_with_every_component_are_the_dense_map_where_they_were_made(which: str) -> None:
    model, call = tiny(which)
    dense = call(model)
    names = modulation_linears(model)
    assert names and all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    before = sum(p.numel() for p in model.parameters())
    factor_(model, call)
    assert all(is_factored(model, name) for name in names)
    assert sum(p.numel() for p in model.parameters()) <= before
    # Components left out carry the directions held at 1e-6 of the variance, and little of the others.
    assert float((call(model) - dense).norm() / dense.norm()) < 1e-6


@each_family
@pytest.mark.parametrize("share", [0.4, 0.0])
def test_masked_equals_realised_and_costs_are_exact(which: str, share: float) -> None:
    model, call = tiny(which)
    factor_(model, call)
    units = find_units(model, KINDS)
    draw = torch.Generator().manual_seed(3)
    mask = {u.name: torch.rand(u.shape, generator=draw) < share for u in units}
    cost = denoiser_cost(model, find_layers(model)[0], lambda: call(model), 2)
    with masked(model, units, mask):
        zeroed = call(model)
    fresh, _ = tiny(which)
    shape = realise_(model, units, mask)
    torch.testing.assert_close(call(model), zeroed, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) == cost.of(mask)[1]
    assert {name for name, e in shape.items() if e["type"] == "factored"} == {
        u.layer.name for u in units if u.kind == "modulation"
    }
    reshape_(fresh, find_layers(fresh)[0], shape)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(call(fresh), call(model))


def test_components_come_by_what_they_bring_to_the_output() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 40).double()
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    moments = Moments(linear)
    moments.add(x, 1.0)
    first_KI, first_K, second_OK, second_O = factors(linear, moments)
    assert len(first_K) == most_components(linear) == 40 * 12 // (12 + 1 + 40)
    want, errors = linear(x), []
    for kept in range(len(first_K) + 1):
        inner = x @ first_KI[:kept].T + first_K[:kept]
        errors.append(float((inner @ second_OK[:, :kept].T + second_O - want).square().sum()))
    # The least squares error of any affine map of that rank: the tail of the singular values.
    singular = torch.linalg.svdvals((want - want.mean(0)).detach())
    best = [float(singular[kept:].square().sum()) for kept in range(len(first_K) + 1)]
    assert errors == pytest.approx(best, rel=2e-2)  # directions are held at 1e-4 of the variance


def test_pruning_with_modulation_keeps_the_budget_and_opens_with_stock_diffusers(
    tmp_path: Path,
) -> None:
    model = tiny_dit()
    dense = sum(p.numel() for p in model.parameters())
    report = hwprune.prune_diffusion(
        model, [1, 2, 3], hwprune.Budget(params=0.8), kinds=KINDS, scheduler=flow(), **QUICK
    )
    assert report.dense_params == dense
    assert report.params == sum(p.numel() for p in model.parameters())
    assert 0.75 < report.params_ratio <= 0.8
    assert "modulation" in report.kinds
    hwprune.save(model, tmp_path / "x")
    stock = type(model).from_pretrained(tmp_path / "x")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="is pruned already"):
        hwprune.prune_diffusion(
            model, [1], hwprune.Budget(params=0.5), kinds=KINDS, scheduler=flow(), **QUICK
        )


def test_modulation_alone_can_go_and_heads_stay() -> None:
    model = tiny_dit()
    report = hwprune.prune_diffusion(
        model,
        [1, 2, 3],
        hwprune.Budget(params=0.93),
        kinds=["modulation"],
        scheduler=flow(),
        **QUICK,
    )
    assert report.params_ratio <= 0.93
    assert report.kinds == ("modulation",)
    assert report.macs_ratio > 0.97  # parameters, not arithmetic


def test_a_failure_brings_the_dense_linears_back() -> None:
    model = tiny_dit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(hwprune.UnreachableBudget):
        hwprune.prune_diffusion(
            model, [1, 2, 3], hwprune.Budget(params=0.01), kinds=KINDS, scheduler=flow(), **QUICK
        )
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_budget_that_allows_the_dense_model_leaves_it_as_it_was() -> None:
    model = tiny_dit()
    before = copy.deepcopy(model.state_dict())
    report = hwprune.prune_diffusion(
        model, [1, 2, 3], hwprune.Budget(params=1.0), kinds=KINDS, scheduler=flow(), **QUICK
    )
    assert list(model.state_dict()) == list(before)
    assert report.params_ratio == 1 and "nothing was removed" in report.warnings[0]


def test_a_unet_has_no_modulation_and_says_so() -> None:
    from hwprune.families import unet

    model, _, _ = unet.tiny()
    with pytest.raises(ValueError, match="no layer of UNet2DConditionModel has units of the kinds"):
        find_units(model, ["modulation"])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"type": "factored", "kept": 10_000}, "expected kept of 0 to"),
        ({"type": "factored", "kept": True}, "expected kept of 0 to"),
        ({"type": "factored"}, "expected kept of 0 to"),
    ],
)
def test_factors_of_a_file_that_do_not_fit_are_refused(entry: dict[str, Any], said: str) -> None:
    model = tiny_dit()
    name = modulation_linears(model)[0]
    with pytest.raises(ValueError, match=said):
        reshape_(model, find_layers(model)[0], {name: entry})
    with pytest.raises(ValueError, match="fit no modulation linear"):
        reshape_(model, find_layers(model)[0], {"transformer_blocks.0.attn1": {**entry}})
