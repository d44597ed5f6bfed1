"""Criteria against their definitions, one image and one unit at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hwprune import criteria
from hwprune.distortion import curves, curves_from_scores
from hwprune.statistics import calibrate
from hwprune.units import Scores, Units

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

KINDS = ["block", "head", "neuron", "qk", "vo"]
each_criterion = pytest.mark.parametrize("name", criteria.__all__)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=3,
        num_classes=5,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made.double().eval()


@pytest.fixture(scope="module")
def units(model: nn.Module) -> list[Units]:
    return timm_vit.find_units(model, KINDS, block=(7, 10))


def images(count: int = 4) -> list[Tensor]:
    return [torch.randn(count, 3, 16, 16, dtype=torch.float64)]


def known_probe(out: Tensor, classifier: bool, generator: torch.Generator) -> Tensor:
    return torch.linspace(-1, 1.5, out.shape[1], dtype=out.dtype).expand_as(out)


def per_image_sums(model: nn.Module, unit: Units, batch: Tensor) -> Tensor:
    """[N, U]: the sum of weight times gradient over what takes each unit out, by autograd."""
    part = unit.slices[0] if unit.kind in ("qk", "block") else unit.slices[-1]
    weight, rows = model.get_parameter(part.param), []
    for image in batch.split(1):
        out = model(image)
        scalar = (out * known_probe(out.detach(), True, torch.Generator())).sum()
        product = weight.detach() * torch.autograd.grad(scalar, weight)[0]
        if part.index is None:
            tiles = [t for row in product.split(7, 0) for t in row.split(10, 1)]
            rows.append(torch.stack([t.sum() for t in tiles]))
        else:
            own = [product.index_select(part.dim or 0, i).sum() for i in part.index]
            rows.append(torch.stack(own))
    return torch.stack(rows)


@each_criterion
def test_every_criterion_scores_every_unit_with_a_finite_number(
    name: str, model: nn.Module, units: list[Units]
) -> None:
    scores: Scores = getattr(criteria, name)(model, units, images(), seed=1)
    assert list(scores) == [u.name for u in units]
    for unit in units:
        assert tuple(scores[unit.name].shape) == unit.shape, unit.name
        assert bool(torch.isfinite(scores[unit.name]).all()), unit.name


@each_criterion
def test_every_criterion_gives_the_same_scores_for_the_same_seed(
    name: str, model: nn.Module, units: list[Units]
) -> None:
    batches = images()
    once = getattr(criteria, name)(model, units, batches, seed=1)
    again = getattr(criteria, name)(model, units, batches, seed=1)
    assert all(torch.equal(once[n], again[n]) for n in once)


@each_criterion
def test_every_criterion_leaves_the_model_as_it_was(
    name: str, model: nn.Module, units: list[Units]
) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    getattr(criteria, name)(model, units, images())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@each_criterion
def test_scores_of_every_criterion_become_curves(
    name: str, model: nn.Module, units: list[Units]
) -> None:
    found = curves_from_scores(units, getattr(criteria, name)(model, units, images()))
    for curve in found.values():
        assert bool((curve.distortion.diff() >= 0).all())


def test_magnitude_is_the_norm_of_all_a_unit_owns(model: nn.Module, units: list[Units]) -> None:
    scores = criteria.magnitude(model, units, [])
    for unit in units:
        if unit.kind == "block":
            continue
        for j in range(unit.count):
            own = [
                model.get_parameter(p.param).index_select(p.dim or 0, p.index[j]).flatten()
                for p in unit.slices
                if p.index is not None
            ]
            assert float(scores[unit.name][j]) == pytest.approx(
                torch.cat(own).norm().item(), rel=1e-5
            )


def test_magnitude_of_a_tile_is_its_norm_also_at_the_ragged_border(
    model: nn.Module, units: list[Units]
) -> None:
    scores = criteria.magnitude(model, units, [])["blocks.0.mlp.fc1:block"]
    weight = model.get_parameter("blocks.0.mlp.fc1.weight").detach()
    for r, row in enumerate(weight.split(7, 0)):
        for c, tile in enumerate(row.split(10, 1)):
            assert float(scores[r, c]) == pytest.approx(float(tile.norm()), rel=1e-5)


def test_random_scores_differ_between_seeds_and_lie_in_the_unit_interval(
    model: nn.Module, units: list[Units]
) -> None:
    a, b = (criteria.random(model, units, [], seed=s)["blocks.0.mlp:neuron"] for s in (1, 2))
    assert not torch.equal(a, b)
    assert float(a.min()) >= 0 and float(a.max()) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_is_the_mean_size_of_the_first_order_change(
    kind: str, model: nn.Module, units: list[Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hwprune.statistics._probe", known_probe)
    batches, mine = images(), [u for u in units if u.kind == kind]
    scores = criteria.taylor(model, mine, batches)
    for unit in mine:
        expected = per_image_sums(model, unit, batches[0]).abs().mean(0).view(unit.shape)
        torch.testing.assert_close(
            scores[unit.name], expected, rtol=1e-6, atol=1e-12, check_dtype=False
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_half_the_mean_square_of_the_first_order_change(
    kind: str, model: nn.Module, units: list[Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hwprune.statistics._probe", known_probe)
    batches, mine = images(), [u for u in units if u.kind == kind]
    scores = criteria.fisher(model, mine, batches)
    for unit in mine:
        expected = 0.5 * per_image_sums(model, unit, batches[0]).square().mean(0)
        torch.testing.assert_close(
            scores[unit.name],
            expected.view(unit.shape),
            rtol=1e-6,
            atol=1e-12,
            check_dtype=False,
        )


def test_obs_scores_rank_units_in_the_order_of_the_curves(
    model: nn.Module, units: list[Units]
) -> None:
    batches = images(16)
    scores = criteria.obs(model, units, batches, seed=3)
    found = curves(model, units, calibrate(model, units, batches, seed=3))
    for unit in units:
        ranked = scores[unit.name].flatten()[found[unit.name].order]
        assert bool((ranked.diff() >= 0).all()), unit.name
        expected = found[unit.name].distortion[1:].float()
        torch.testing.assert_close(ranked, expected, rtol=1e-6, atol=0)


def test_a_unit_that_does_nothing_scores_lowest_under_every_criterion_that_looks() -> None:
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=3,
        num_classes=5,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        made.blocks[0].mlp.fc2.weight[:, 17] = 0
        made.blocks[0].mlp.fc1.weight[17] = 0
    mine = timm_vit.find_units(made, ["neuron"])
    batches = [torch.randn(8, 3, 16, 16)]
    for name in ("magnitude", "taylor", "fisher", "obs"):
        scores = getattr(criteria, name)(made, mine, batches)["blocks.0.mlp:neuron"]
        assert int(scores.argmin()) == 17, name
