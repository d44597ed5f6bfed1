"""Gates multiply what masks zero; their gradient is that of the function; prices are what cutting saves."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoiser_cost import DenoiserCost, denoiser_cost
from hwprune.denoisers import Denoiser
from hwprune.families.denoiser import find_layers, find_units
from hwprune.gates import ramp
from hwprune.gating import Layout, gated
from hwprune.prices import Multiplier, keep_within, linear_price, table_price
from hwprune.realise import masked
from hwprune.solvers import Solver
from hwprune.trajectory import sample
from hwprune.units import Units, expand

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).resolve().parent.parent / "hwprune" / "families"
TINY: dict[str, Callable[[], Any]] = {}
for path in sorted(FOLDER.glob("*.py")):
    if "\ndef tiny(" in path.read_text():
        module = importlib.import_module(f"hwprune.families.{path.stem}")
        for function, make in inspect.getmembers(module, inspect.isfunction):
            if function.startswith("tiny"):
                TINY[f"{path.stem}.{function}"] = make
each_model = pytest.mark.parametrize("which", TINY)
ALL = ["head", "neuron", "depth"]


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return {k: doubled(v) for k, v in value.items()} if isinstance(value, dict) else value


def opened(which: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, latent, inputs = TINY[which]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.double().requires_grad_(False)
    latent, inputs, time = latent.double(), doubled(inputs), torch.tensor([0.3, 0.7])
    return model, lambda: model(latent, timestep=time, **inputs, return_dict=False)[0]


def binary(layout: Layout, seed: int = 0) -> Tensor:
    return torch.rand(layout.count, generator=torch.Generator().manual_seed(seed)) < 0.7


@each_model
def test_gates_of_0_and_1_are_what_masked_computes(which: str) -> None:
    model, call = opened(which)
    units = find_units(model, ALL)
    layout = Layout(units)
    keep = binary(layout)
    with torch.no_grad():
        dense = call()
        ones = torch.ones(layout.count, dtype=torch.float64)
        with masked(model, units, layout.mask(keep)):
            expected = call()
        with gated(model, units) as gating:
            assert torch.equal(call(), dense)  # no gates in force
            gating.set(keep.double())
            got = call()
            gating.set(ones)
            assert float((call() - dense).abs().max()) < 1e-12
        assert torch.equal(call(), dense)  # no hooks left
    assert float((expected - dense).abs().max()) > 1e-3
    assert float((got - expected).abs().max()) < 1e-12


@each_model
def test_the_gradient_of_gates_is_that_of_scaled_weights(which: str) -> None:
    model, call = opened(which)
    units = find_units(model, ALL)
    layout = Layout(units)
    flat = torch.rand(layout.count, dtype=torch.float64, requires_grad=True)
    with gated(model, units) as gating:
        gating.set(flat)
        out = call()
        (gradient,) = torch.autograd.grad(out.square().mean(), flat)
    # The same function by other means: output weights (and, for depth, biases) times the gates.
    scaled = dict(model.named_parameters())
    for unit, gates in zip(units, layout.split(flat).values(), strict=True):
        for part in unit.slices:
            if unit.kind == "depth" or part.dim == 1:
                weight = scaled[part.param]
                scaled[part.param] = weight * expand(gates, part, weight.shape)
    for name, value in scaled.items():
        parent, _, key = name.rpartition(".")
        del model.get_submodule(parent)._parameters[key]
        setattr(model.get_submodule(parent), key, value)
    other = call()
    (expected,) = torch.autograd.grad(other.square().mean(), flat)
    assert float((out - other).abs().max()) < 1e-12
    assert float((gradient - expected).norm() / expected.norm()) < 1e-6  # some norms are in float32
    idle = {name for name, part in layout.split(gradient).items() if not bool(part.any())}
    # The last text MLP of Qwen-Image feeds a stream that nothing reads any more.
    assert idle == ({"transformer_blocks.1.txt_mlp:neuron"} if "qwen" in which else set())


@each_model
def test_gates_for_each_image_take_their_gradients_apart(which: str) -> None:
    model, call = opened(which)
    units = find_units(model, ALL)
    layout = Layout(units)
    flat = torch.rand(2, layout.count, dtype=torch.float64, requires_grad=True)
    with gated(model, units) as gating:
        gating.set(flat)
        out = call()
        rows = []
        for row in flat.detach():
            gating.set(row)
            rows.append(call())
    for image in range(2):
        assert float((out[image] - rows[image][image]).abs().max()) < 1e-12
    (gradient,) = torch.autograd.grad(out[1].square().sum(), flat)
    assert float(gradient[0].abs().max()) == 0 < float(gradient[1].abs().max())


def test_gates_of_images_go_through_guidance_and_those_of_steps_through_time() -> None:
    model, latent, inputs = TINY["dit.tiny"]()
    model.requires_grad_(False)
    units = find_units(model)
    layout = Layout(units)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    solver = Solver(scheduler)
    empty = {"class_labels": torch.tensor([10, 10])}
    denoise = Denoiser(model, inputs, empty, guidance=3.0)
    keep = binary(layout).float()
    with gated(model, units) as gating:
        one = sample(gating.wrap(denoise, keep), solver, latent)
        images = sample(gating.wrap(denoise, keep.repeat(2, 1)), solver, latent)
        steps = sample(gating.wrap(denoise, keep.repeat(3, 1), solver.timesteps), solver, latent)
        assert torch.equal(one, steps)
        torch.testing.assert_close(one, images, rtol=0, atol=1e-5)
        rows = torch.rand(3, layout.count, requires_grad=True)
        found = []
        for checkpoint in (True, False):  # the step's own row is in force when it is taken again
            call = gating.wrap(denoise, rows, solver.timesteps)
            final = sample(call, solver, latent, parameters=[rows], checkpoint=checkpoint)
            found.append(torch.autograd.grad(final.square().mean(), rows)[0])
        assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-5
        assert bool((found[0].norm(dim=1) > 0).all())


@pytest.mark.parametrize("which", ["dit.tiny", "unet.tiny"])
def test_gates_compose_with_the_models_own_gradient_checkpointing(which: str) -> None:
    found = []
    for nested in (False, True):
        model, latent, inputs = TINY[which]()
        model.requires_grad_(False)
        if nested:
            model.enable_gradient_checkpointing()
        units = find_units(model)
        scheduler = diffusers.UniPCMultistepScheduler()
        scheduler.set_timesteps(4)
        solver = Solver(scheduler)
        flat = torch.full((Layout(units).count,), 0.5, requires_grad=True)
        with gated(model, units) as gating:
            call = gating.wrap(Denoiser(model, inputs), flat)
            final = sample(call, solver, latent, parameters=[flat])
            found.append(torch.autograd.grad(final.square().mean(), flat)[0])
            assert gating.now is None
    assert torch.equal(found[0], found[1])


def test_gates_keep_activations_in_the_models_own_type() -> None:
    model, latent, inputs = TINY["dit.tiny"]()
    model.to(torch.bfloat16).requires_grad_(False)
    units = find_units(model)
    seen = []
    model.transformer_blocks[0].ff.net[2].register_forward_hook(
        lambda m, a, o: seen.append(a[0].dtype)
    )
    flat = torch.ones(Layout(units).count, requires_grad=True)
    with gated(model, units) as gating:
        gating.set(flat)
        out = model(latent.bfloat16(), timestep=torch.tensor([3, 7]), **inputs).sample
    out.float().sum().backward()
    assert seen == [torch.bfloat16]
    assert flat.grad is not None and flat.grad.dtype == torch.float32


def costed(which: str, kinds: list[str]) -> tuple[list[Units], DenoiserCost]:
    model, call = opened(which)
    return find_units(model, kinds), denoiser_cost(model, find_layers(model)[0], call, 2)


@each_model
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_prices_of_masks_are_what_realised_models_cost(which: str, metric: Any) -> None:
    units, cost = costed(which, ALL)
    layout = Layout(units)
    price = linear_price(layout, cost, metric)
    for seed in range(3):
        keep = binary(layout, seed)
        for (
            unit
        ) in units:  # where nothing is left of a layer some norms go too, which a price leaves out
            keep[layout.places[unit.name]][0] = True if unit.kind != "depth" else keep[0]
        macs, params = cost.of(layout.mask(keep))
        expected = macs / cost.macs if metric == "macs" else params / cost.params
        assert float(price(keep.double())) == pytest.approx(expected, rel=1e-9)
    assert float(price(torch.ones(layout.count))) == 1.0


def test_the_expected_price_is_the_mean_over_draws() -> None:
    units, cost = costed("mmdit.tiny", ALL)
    layout = Layout(units)
    price = linear_price(layout, cost)
    p = torch.rand(layout.count, generator=torch.Generator().manual_seed(2))
    draws = [price((torch.rand(layout.count) < p).double()) for _ in range(2000)]
    mean, error = torch.stack(draws).mean(), torch.stack(draws).std() / 2000**0.5
    assert abs(float(price(p) - mean)) < 4 * float(error)


def test_a_share_of_the_units_counts_them_alone() -> None:
    units, cost = costed("dit.tiny", ["head", "neuron"])
    layout = Layout(units)
    price = linear_price(layout, cost, "params", "units")
    assert float(price(torch.zeros(layout.count))) == pytest.approx(0, abs=1e-12)
    assert float(price(torch.full((layout.count,), 0.25))) == pytest.approx(0.25)


def test_a_table_price_is_read_between_its_counts_and_has_a_slope() -> None:
    units, _ = costed("dit.tiny", ["neuron"])
    layout = Layout(units)
    table = torch.cat(
        [torch.zeros(1), torch.arange(96) // 32 + 1.0]
    )  # steps of 32, as a GPU's tiles
    price = table_price(layout, {units[0].name: table}, dense=10.0)
    keep = torch.ones(layout.count, dtype=torch.float64)
    keep[:31] = 0
    keep.requires_grad_()
    assert float(price(keep)) == pytest.approx((10 - 3 + 3) / 10)
    keep = keep.detach()
    keep[31] = 0.5
    keep.requires_grad_()
    found = price(keep)
    assert float(found) == pytest.approx((7 + 2.5) / 10)
    (slope,) = torch.autograd.grad(found, keep)
    # Of the hull, a 32nd of a tile's cost for a unit: of the staircase it would be 0.1 here and 0 elsewhere.
    assert float(slope[0]) == pytest.approx(0.1 / 32) and float(slope[-1]) == 0
    with pytest.raises(ValueError, match="one entry for each number of kept units"):
        table_price(layout, {units[0].name: table[1:]}, dense=10.0)
    with pytest.raises(ValueError, match="never falls as units are added"):
        table_price(layout, {units[0].name: table.flip(0)}, dense=10.0)


def test_as_many_units_are_kept_as_the_budget_allows() -> None:
    units, cost = costed("unet.tiny", ALL)
    layout = Layout(units)
    price = linear_price(layout, cost, "macs")
    order = torch.randperm(layout.count)
    keep = keep_within(price, order, 0.8, layout.count)
    assert float(price(keep.double())) <= 0.8 + 1e-9
    following = keep.clone()
    following[order[int(keep.sum())]] = True
    assert float(price(following.double())) > 0.8
    with pytest.raises(
        ValueError, match=r"budget 0\.1 cannot be reached: with every unit removed the"
    ):
        keep_within(price, order, 0.1, layout.count)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("steps", [100, 400])
def test_a_multiplier_drives_a_price_to_its_budget_whatever_the_loss(
    scale: float, steps: int
) -> None:
    logit = torch.full((50,), 3.0, requires_grad=True)
    multiplier, optimizer = Multiplier(), torch.optim.Adam([logit], lr=0.1)
    worth = torch.linspace(0, 1, 50) * scale
    for step in range(steps):
        p = torch.sigmoid(logit)
        (g,) = torch.autograd.grad((worth * (1 - p)).mean(), logit, retain_graph=True)
        (c,) = torch.autograd.grad(p.mean(), logit)
        excess = float(p.detach().mean()) - ramp(step, steps, 0.4)
        logit.grad = g + multiplier.weight(excess, float(g.norm()), float(c.norm())) * c
        optimizer.step()
    assert float(torch.sigmoid(logit).mean()) == pytest.approx(0.4, abs=0.02)
    assert float(logit[-15:].min()) > float(logit[:15].max())  # what is worth more is kept


def test_units_of_another_kind_of_model_and_wrong_numbers_are_refused() -> None:
    timm = pytest.importorskip("timm")
    from hwprune.families import timm_vit

    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3
    )
    with pytest.raises(ValueError, match="expected a unit of a denoiser; vision transformers are"):
        Layout(timm_vit.find_units(vit))
    with pytest.raises(ValueError, match="expected units of a denoiser, got none"):
        Layout([])
    model, _ = opened("dit.tiny")
    units = find_units(model)
    with (
        gated(model, units) as gating,
        pytest.raises(ValueError, match=f"expected a flat tensor of {Layout(units).count}, got "),
    ):
        gating.set(torch.ones(3))
