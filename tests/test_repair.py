"""Re-fits against least squares on collected activations, and against doing nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hwprune.distortion import curves
from hwprune.realise import masked, zero_
from hwprune.repair import repair_
from hwprune.rotate import rotate_
from hwprune.statistics import Statistics, Weighting, calibrate, output_distance
from hwprune.units import Mask, Units, full_mask

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

HIDDEN = 96


def vit(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    """A tiny float64 ViT whose every weight matters."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model(name, **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def images(batches: int = 4, size: int = 16) -> list[Tensor]:
    """Smooth images of many sizes of contrast: activations that are correlated, as real ones are."""
    noise = torch.randn(batches * size, 3, 4, 4, dtype=torch.float64)
    smooth = nn.functional.interpolate(noise, 16, mode="bilinear")
    return list(smooth.split(size))


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """[N * T, I] what enters a linear."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: kept.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(kept)


def repaired(
    model: nn.Module, units: list[Units], mask: Mask, statistics: Statistics, batches: list[Tensor]
) -> nn.Module:
    fresh = copy.deepcopy(model)
    repair_(fresh, units, mask, statistics, batches, timm_vit.stages(fresh))
    return fresh


def distortion(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        parts = [output_distance(model(b), dense(b), classifier=True) for b in batches]
    return float(torch.cat(parts).mean())


def ridge_of(gram: Tensor, cross: Tensor, fitted: Tensor, prior: Tensor) -> float:
    """The r for which `fitted` solves (gram + r) fitted = cross + r prior; checks that there is one.

    This is what a least-squares fit with a ridge towards the old weights must satisfy, whatever r is.
    """
    residual, pull = cross - gram @ fitted, fitted - prior
    r = float((residual * pull).sum() / pull.square().sum())
    torch.testing.assert_close(residual, r * pull, rtol=1e-5, atol=1e-8 * float(cross.abs().max()))
    return r


@pytest.mark.parametrize("bias", [True, False])
def test_one_cut_layer_is_re_fitted_by_least_squares_over_all_tokens(bias: bool) -> None:
    model, batches, name = vit(proj_bias=bias), images(), "blocks.0.mlp.fc2"
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches, weighting="uniform")
    keep = torch.arange(HIDDEN) % 3 > 0
    fresh = repaired(model, units, {"blocks.0.mlp:neuron": keep}, statistics, batches)

    x = inputs_of(model, name, batches)
    old, new = model.get_submodule(name), fresh.get_submodule(name)
    target = x @ old.weight.detach().T
    means = (x.mean(0), target.mean(0)) if bias else (torch.zeros_like(x[0]), target[0] * 0)
    x_kept, target = (x - means[0])[:, keep], target - means[1]
    gram, cross = x_kept.T @ x_kept / len(x), x_kept.T @ target / len(x)
    fitted, prior = new.weight.detach()[:, keep].T, old.weight.detach()[:, keep].T
    r = ridge_of(gram, cross, fitted, prior)
    assert 0 < r <= float(gram.diagonal().mean())
    assert not bool(new.weight[:, ~keep].any())
    if bias:
        expected = old.bias + means[1] - new.weight @ means[0]
        torch.testing.assert_close(new.bias, expected, rtol=1e-9, atol=1e-9)
    else:
        assert new.bias is None


def test_the_output_of_a_cut_layer_keeps_its_mean() -> None:
    model, batches, name = vit(), images(), "blocks.0.mlp.fc2"
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches, weighting="uniform")
    fresh = repaired(
        model, units, {"blocks.0.mlp:neuron": torch.arange(HIDDEN) < 20}, statistics, batches
    )
    x = inputs_of(model, name, batches)
    before, after = model.get_submodule(name)(x), fresh.get_submodule(name)(x)
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_a_second_layer_is_fitted_on_what_the_cut_first_one_gives_it(architecture: str) -> None:
    model, batches, name = vit(architecture), images(), "blocks.1.mlp.fc2"
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches, weighting="uniform")
    keep = torch.arange(HIDDEN) % 3 > 0
    mask = {u.name: keep for u in units}
    fresh = repaired(model, units, mask, statistics, batches)
    first = repaired(model, units, {"blocks.0.mlp:neuron": keep}, statistics, batches)

    x = inputs_of(first, name, batches)  # the second layer still dense, the first one cut
    target = x @ model.get_submodule(name).weight.detach().T
    x_kept = (x - x.mean(0))[:, keep]
    target = target - target.mean(0)
    fitted = fresh.get_submodule(name).weight.detach()[:, keep].T
    prior = model.get_submodule(name).weight.detach()[:, keep].T
    r = ridge_of(x_kept.T @ x_kept / len(x), x_kept.T @ target / len(x), fitted, prior)
    assert r > 0


def test_an_emptied_layer_leaves_its_mean_output_as_bias() -> None:
    model, batches, name = vit(), images(), "blocks.0.mlp.fc2"
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches, weighting="uniform")
    empty = {"blocks.0.mlp:neuron": torch.zeros(HIDDEN, dtype=torch.bool)}
    fresh = repaired(model, units, empty, statistics, batches)
    linear = model.get_submodule(name)
    expected = linear(inputs_of(model, name, batches)).mean(0)
    torch.testing.assert_close(fresh.get_submodule(name).bias, expected, rtol=1e-8, atol=1e-8)


def test_a_biasless_layer_stays_biasless_and_loses_less_than_unrepaired() -> None:
    model, batches = vit(proj_bias=False), images()
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches)
    mask = {u.name: torch.arange(HIDDEN) % 2 > 0 for u in units}
    fresh = repaired(model, units, mask, statistics, batches)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    with masked(model, units, mask):
        zeroed = copy.deepcopy(model)
    assert distortion(fresh, model, batches) < 0.5 * distortion(zeroed, model, batches)


def with_and_without(kind: str, weighting: Weighting, *, unseen: bool) -> tuple[float, float]:
    """Distortion when the cheapest 30 % of the units are zeroed, and when the rest is re-fitted."""
    model, batches = vit(), images(8)
    units = timm_vit.find_units(model, [kind], block=(8, 8))
    statistics = calibrate(model, units, batches, weighting=weighting)
    found = curves(model, units, statistics)
    mask = {n: c.kept(round(0.7 * c.units.count)) for n, c in found.items()}
    rotated = copy.deepcopy(model)
    for curve in found.values():
        if curve.rotation is not None:
            rotate_(rotated, curve.units.layer, curve.units.kind, curve.rotation)
    fresh = repaired(rotated, units, mask, statistics, batches)
    zero_(rotated, units, mask)
    judged = images(2) if unseen else batches
    return distortion(rotated, model, judged), distortion(fresh, model, judged)


@pytest.mark.parametrize("kind", ["head", "neuron", "vo", "block"])
@pytest.mark.parametrize("weighting", ["gradient", "uniform"])
def test_a_re_fit_loses_less_than_zeroing_alone_on_images_it_has_not_seen(
    kind: str, weighting: Weighting
) -> None:
    zeroed, fresh = with_and_without(kind, weighting, unseen=True)
    assert fresh < 0.8 * zeroed


def test_a_re_fit_behind_narrower_queries_and_keys_loses_less_on_the_images_it_saw() -> None:
    # Of what is lost in the attention's weights little can be made good behind them.
    zeroed, fresh = with_and_without("qk", "uniform", unseen=False)
    assert fresh < zeroed


@pytest.mark.parametrize("kind", ["head", "neuron", "qk", "vo", "block"])
def test_what_the_mask_drops_is_zero_after_the_re_fit(kind: str) -> None:
    model, batches = vit(), images(2)
    units = timm_vit.find_units(model, [kind], block=(8, 8))
    generator = torch.Generator().manual_seed(0)
    mask = {u.name: torch.rand(u.shape, generator=generator) < 0.7 for u in units}
    fresh = repaired(model, units, mask, calibrate(model, units, batches), batches)
    before = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    zero_(fresh, units, mask)
    assert all(torch.equal(p, before[n]) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv:block", "blocks.0.mlp.fc1:block"])
def test_a_linear_behind_an_emptied_one_is_not_blown_up_by_rounding(name: str) -> None:
    model, batches = vit().float(), [b.float() for b in images()]
    units = timm_vit.find_units(model, ["block"], block=(8, 8))
    (unit,) = (u for u in units if u.name == name)
    mask = full_mask(units) | {name: torch.zeros(unit.shape, dtype=torch.bool)}
    fresh = repaired(model, units, mask, calibrate(model, units, batches), batches)
    with masked(model, units, mask):
        zeroed = copy.deepcopy(model)
    assert distortion(fresh, model, batches) < distortion(zeroed, model, batches)
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    assert max(float(p.detach().abs().max()) for p in fresh.parameters()) < 10 * largest


def test_layers_that_are_not_cut_keep_their_weights_bit_for_bit() -> None:
    model, batches = vit(), images(2)
    units = timm_vit.find_units(model, ["neuron"])
    mask = full_mask(units) | {"blocks.1.mlp:neuron": torch.arange(HIDDEN) < 50}
    fresh = repaired(model, units, mask, calibrate(model, units, batches), batches)
    for parameter, after in model.named_parameters():
        same = torch.equal(after, fresh.get_parameter(parameter))
        assert same == (not parameter.startswith("blocks.1.mlp.")), parameter


def test_a_mask_that_keeps_everything_changes_nothing() -> None:
    model, batches = vit(), images(1)
    units = timm_vit.find_units(model)
    fresh = repaired(model, units, full_mask(units), calibrate(model, units, batches), batches)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_a_re_fit_is_the_same_every_time() -> None:
    model, batches = vit(), images(4)
    units = timm_vit.find_units(model, ["head", "neuron"])
    statistics = calibrate(model, units, batches)
    mask = {u.name: torch.arange(u.count) > 0 for u in units}
    once = repaired(model, units, mask, statistics, batches).state_dict()
    again = repaired(model, units, mask, statistics, batches).state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_re_fit_restores_mode_and_flags_and_leaves_no_hooks() -> None:
    model, batches = vit(), images(1)
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches)
    model.train()
    model.get_parameter("head.weight").requires_grad_(False)
    fresh = repaired(
        model, units, {u.name: torch.arange(HIDDEN) < 60 for u in units}, statistics, batches
    )
    assert all(m.training for m in fresh.modules())
    assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert not [m for m in fresh.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_progress_counts_the_stages() -> None:
    model, batches = vit(), images(1)
    units, seen = timm_vit.find_units(model, ["neuron"]), []
    mask = {u.name: torch.arange(HIDDEN) < 60 for u in units}
    repair_(
        model,
        units,
        mask,
        calibrate(model, units, batches),
        batches,
        timm_vit.stages(model),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_no_images_are_refused() -> None:
    model = vit()
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, images(1))
    with pytest.raises(ValueError, match="repair: expected calibration images, got none"):
        repair_(model, units, full_mask(units), statistics, [], timm_vit.stages(model))


def test_blocks_that_do_not_form_a_plain_column_are_refused() -> None:
    model, batches = vit(), images(1)
    units = timm_vit.find_units(model, ["neuron"])
    statistics = calibrate(model, units, batches)
    mask = {u.name: torch.arange(HIDDEN) < 60 for u in units}
    stages = timm_vit.stages(model)[::-1]
    with pytest.raises(
        ValueError, match=r"stage \d takes something else than the output .*repair=False"
    ):
        repair_(model, units, mask, statistics, batches, stages)
