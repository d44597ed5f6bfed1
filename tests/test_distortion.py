"""Predicted curves against the distortion measured on models where second order is exact."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hwprune.distortion import Curve, curves, curves_from_scores
from hwprune.obs import damped_inverse
from hwprune.statistics import Statistics, calibrate, output_distance
from hwprune.units import MlpLayer, Rows, Slice, Units

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

HIDDEN, OUTPUTS = 6, 3


class Ending(nn.Module):
    """tanh units and an output linear that is the model's output. float64, one token an image."""

    def __init__(self, num_classes: int, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fc1, self.fc2 = nn.Linear(4, HIDDEN), nn.Linear(HIDDEN, OUTPUTS, bias)
        self.num_classes = num_classes
        self.double()
        with torch.no_grad():
            self.fc2.weight.mul_(scale)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


def neurons() -> list[Units]:
    layer = MlpLayer("mlp", 0, (Rows("fc1", 0, HIDDEN),), "fc2", HIDDEN)
    index = torch.arange(HIDDEN)[:, None]
    parts = (Slice("fc1.weight", 0, index), Slice("fc2.weight", 1, index))
    return [Units("mlp:neuron", layer, "neuron", (HIDDEN,), parts)]


def tiles(rows: int, cols: int) -> list[Units]:
    layer = MlpLayer("mlp", 0, (Rows("fc1", 0, HIDDEN),), "fc2", HIDDEN)
    grid = (-(-OUTPUTS // rows), -(-HIDDEN // cols))
    part = Slice("fc2.weight", None, None, (rows, cols))
    return [Units("fc2:block", layer, "block", grid, (part,))]


def every_sign(out: Tensor, classifier: bool, generator: torch.Generator) -> Tensor:
    """The probe with all 8 sign vectors in turn, so that its covariance is met without sampling."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=OUTPUTS)), dtype=out.dtype)
    sign = signs.repeat(len(out) // len(signs), 1)
    if not classifier:
        return sign
    root = out.softmax(-1).sqrt()
    return root * sign - out.softmax(-1) * (root * sign).sum(-1, keepdim=True)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sampling in the probe and (almost) no damping: nothing but the formula is left."""
    monkeypatch.setattr("hwprune.statistics._probe", every_sign)
    tiny = partial(damped_inverse, damping=1e-12)
    monkeypatch.setattr("hwprune.distortion.damped_inverse", tiny)


def inputs() -> Tensor:
    """[800, 4]: 100 points, each once for every sign vector."""
    return torch.randn(100, 4, dtype=torch.float64).repeat_interleave(8, 0)


def refitted(model: Ending, x: Tensor, keep: Tensor) -> Tensor:
    """Outputs after the kept units, and the bias, are re-fitted by least squares from scratch."""
    with torch.no_grad():
        design = model.hidden(x)[:, keep]
        if model.fc2.bias is not None:
            design = torch.cat([design, torch.ones(len(x), 1).double()], 1)
        return design @ torch.linalg.lstsq(design, model(x)).solution


@pytest.mark.parametrize("bias", [True, False])
def test_a_curve_of_neurons_is_the_feature_distance_after_the_best_re_fit(
    exact: None, bias: bool
) -> None:
    model, x, units = Ending(num_classes=0, bias=bias), inputs(), neurons()
    (curve,) = curves(model, units, calibrate(model, units, [x])).values()
    for kept in range(HIDDEN + 1):
        out = refitted(model, x, curve.kept(kept))
        measured = output_distance(out, model(x), classifier=False).mean()
        predicted = curve.distortion[HIDDEN - kept]
        torch.testing.assert_close(predicted, measured, rtol=1e-6, atol=1e-9)


def test_a_curve_of_neurons_is_the_divergence_for_small_changes_of_logits(exact: None) -> None:
    model, x, units = Ending(num_classes=OUTPUTS, scale=1e-3), inputs(), neurons()
    (curve,) = curves(model, units, calibrate(model, units, [x])).values()
    for kept in range(HIDDEN):
        out = refitted(model, x, curve.kept(kept))
        measured = output_distance(out, model(x), classifier=True).mean()
        predicted = curve.distortion[HIDDEN - kept]
        # Third order: logits move by about 1e-3.
        torch.testing.assert_close(predicted, measured, rtol=2e-2, atol=0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 2), (2, 2), (2, 4), (3, 4)])
def test_a_curve_of_tiles_is_the_feature_distance_after_the_best_re_fit(
    exact: None, rows: int, cols: int
) -> None:
    model, x, units = Ending(num_classes=0), inputs(), tiles(rows, cols)
    (curve,) = curves(model, units, calibrate(model, units, [x])).values()
    h, weight = model.hidden(x).detach(), model.fc2.weight.detach()
    for kept in range(curve.units.count + 1):
        grid = curve.kept(kept)
        error = 0.0
        for o in range(OUTPUTS):  # the bias is re-fitted too, so the design has a constant
            columns = [i for i in range(HIDDEN) if grid[o // rows, i // cols]]
            target = (h @ weight[o])[:, None]
            design = torch.cat([h[:, columns], torch.ones_like(target)], 1)
            fit = design @ torch.linalg.lstsq(design, target).solution
            error += 0.5 * float((target - fit).square().mean())
        predicted = curve.distortion[curve.units.count - kept]
        assert float(predicted) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_the_first_tile_removed_is_the_cheapest_of_all(exact: None) -> None:
    model, x, units = Ending(num_classes=0), inputs(), tiles(2, 2)
    (curve,) = curves(model, units, calibrate(model, units, [x])).values()
    h, weight = model.hidden(x).detach(), model.fc2.weight.detach()
    loss = torch.zeros(2, 3)
    for r, c in itertools.product(range(2), range(3)):
        rest = [i for i in range(HIDDEN) if i // 2 != c]
        target = h @ weight[2 * r : 2 * r + 2].T
        design = torch.cat([h[:, rest], torch.ones(len(h), 1, dtype=h.dtype)], 1)
        fit = design @ torch.linalg.lstsq(design, target).solution
        loss[r, c] = 0.5 * (target - fit).square().sum(1).mean()
    assert int(curve.order[0]) == int(loss.argmin())
    assert float(curve.distortion[1]) == pytest.approx(float(loss.min()), rel=1e-5)


@pytest.fixture(scope="module")
def analysed() -> tuple[nn.Module, list[Units], Statistics, dict[str, Curve]]:
    """A tiny float64 ViT with curves of every kind."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = model.double().eval()
    kinds = ["block", "head", "neuron", "qk", "vo"]
    units = timm_vit.find_units(model, kinds, block=(10, 7))
    statistics = calibrate(model, units, [torch.randn(24, 3, 16, 16, dtype=torch.float64)])
    return model, units, statistics, curves(model, units, statistics)


Analysed = tuple[nn.Module, list[Units], Statistics, dict[str, Curve]]


def test_every_group_of_units_has_a_curve(analysed: Analysed) -> None:
    _, units, _, found = analysed
    assert list(found) == [u.name for u in units]


def test_every_curve_starts_at_zero_and_never_falls(analysed: Analysed) -> None:
    for name, curve in analysed[3].items():
        assert float(curve.distortion[0]) == 0, name
        assert bool((curve.distortion.diff() >= 0).all()), name
        assert float(curve.distortion[-1]) > 0, name


def test_every_order_names_each_unit_once(analysed: Analysed) -> None:
    for name, curve in analysed[3].items():
        assert curve.distortion.shape == (curve.units.count + 1,), name
        assert sorted(curve.order.tolist()) == list(range(curve.units.count)), name


def test_removing_all_neurons_costs_the_whole_damped_energy_of_the_layer(
    analysed: Analysed,
) -> None:
    model, _, statistics, found = analysed
    moments = statistics.linear["blocks.0.mlp.fc2"]
    weight = model.get_parameter("blocks.0.mlp.fc2.weight").detach()
    damped = torch.linalg.inv(damped_inverse(moments.centred))
    energy = 0.5 * torch.trace(moments.metric @ weight @ damped @ weight.T)
    got = found["blocks.0.mlp:neuron"].distortion[-1]
    torch.testing.assert_close(got, energy, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1", "blocks.1.attn.proj"])
def test_removing_all_tiles_costs_the_damped_energy_of_each_row_of_tiles(
    name: str, analysed: Analysed
) -> None:
    model, _, statistics, found = analysed
    moments = statistics.linear[name]
    weight = model.get_parameter(f"{name}.weight").detach()
    damped = torch.linalg.inv(damped_inverse(moments.centred))
    energy = 0.0
    for start in range(0, len(weight), 10):  # tiles are (10, 7); the rows of one share a metric
        own = slice(start, start + 10)
        left = weight[own] @ damped @ weight[own].T
        energy += 0.5 * float(torch.trace(moments.metric[own, own] @ left))
    assert float(found[f"{name}:block"].distortion[-1]) == pytest.approx(energy, rel=1e-4)


def test_removing_one_head_costs_its_schur_complement(analysed: Analysed) -> None:
    model, _, statistics, found = analysed
    curve = found["blocks.1.attn:head"]
    moments = statistics.linear["blocks.1.attn.proj"]
    weight = model.get_parameter("blocks.1.attn.proj.weight").detach()
    damped = torch.linalg.inv(damped_inverse(moments.centred))
    costs = []
    for head in range(3):
        own = torch.arange(24) // 8 == head
        cross = damped[own][:, ~own] @ torch.linalg.solve(
            damped[~own][:, ~own], damped[~own][:, own]
        )
        left = weight[:, own] @ (damped[own][:, own] - cross) @ weight[:, own].T
        costs.append(float(0.5 * torch.trace(moments.metric @ left)))
    assert int(curve.order[0]) == costs.index(min(costs))
    assert float(curve.distortion[1]) == pytest.approx(min(costs), rel=1e-4)


def test_channels_leave_from_the_tail_of_the_rotated_basis(analysed: Analysed) -> None:
    for name, curve in analysed[3].items():
        if curve.units.kind in ("qk", "vo"):
            assert curve.rotation is not None
            assert curve.order.tolist() == [7, 6, 5, 4, 3, 2, 1, 0], name
        else:
            assert curve.rotation is None, name


def test_the_curve_of_q_and_k_adds_up_the_tails_of_all_heads(analysed: Analysed) -> None:
    curve = analysed[3]["blocks.0.attn:qk"]
    assert curve.rotation is not None
    for kept in range(9):
        expected = curve.rotation.tail[:, kept].sum()
        torch.testing.assert_close(curve.distortion[8 - kept], expected, rtol=1e-9, atol=0)


def test_the_curve_of_v_is_the_schur_complement_of_channels_cut_in_all_heads(
    analysed: Analysed,
) -> None:
    model, _, statistics, found = analysed
    curve = found["blocks.0.attn:vo"]
    assert curve.rotation is not None
    moments = statistics.linear["blocks.0.attn.proj"]
    turn = torch.block_diag(*curve.rotation.first)
    back = torch.block_diag(*curve.rotation.second)
    weight = model.get_parameter("blocks.0.attn.proj.weight").detach() @ back
    damped = torch.linalg.inv(damped_inverse(turn @ moments.centred @ turn.T))
    for kept in range(1, 9):
        gone = torch.arange(24) % 8 >= kept
        cross = damped[gone][:, ~gone] @ torch.linalg.solve(
            damped[~gone][:, ~gone], damped[~gone][:, gone]
        )
        left = weight[:, gone] @ (damped[gone][:, gone] - cross) @ weight[:, gone].T
        expected = 0.5 * torch.trace(moments.metric @ left)
        torch.testing.assert_close(curve.distortion[8 - kept], expected, rtol=1e-4, atol=1e-12)


def test_a_grid_keeps_the_number_asked_for_and_smaller_grids_lie_inside(
    analysed: Analysed,
) -> None:
    for curve in analysed[3].values():
        before = curve.kept(curve.units.count)
        assert bool(before.all())
        for count in range(curve.units.count - 1, -1, -7):
            grid = curve.kept(count)
            assert tuple(grid.shape) == curve.units.shape and int(grid.sum()) == count
            assert not bool((grid & ~before).any())
            before = grid


def test_curves_of_units_that_were_not_calibrated_are_refused_by_name(analysed: Analysed) -> None:
    model, units, _, _ = analysed
    few = [u for u in units if u.kind == "head"]
    found = calibrate(model, few, [torch.randn(2, 3, 16, 16, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp:neuron: no statistics; calibrate with"):
        curves(model, [u for u in units if u.kind == "neuron"], found)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn:qk: no statistics"):
        curves(model, [u for u in units if u.kind == "qk"], found)


def test_moments_that_are_not_finite_name_the_units(analysed: Analysed) -> None:
    model, units, _, _ = analysed
    mine = [u for u in units if u.name == "blocks.1.mlp:neuron"]
    found = calibrate(model, mine, [torch.randn(2, 3, 16, 16, dtype=torch.float64)])
    found.linear["blocks.1.mlp.fc2"].centred[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp:neuron: .*not positive definite"):
        curves(model, mine, found)


def test_progress_counts_groups_of_units(analysed: Analysed) -> None:
    model, units, statistics, _ = analysed
    few, seen = [u for u in units if u.kind == "qk"], []
    curves(model, few, statistics, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_scores_become_a_curve_in_ascending_order_with_summed_losses() -> None:
    units = tiles(2, 2)
    scores = torch.tensor([[0.5, 0.1, 3.0], [0.2, -7.0, 1.0]])
    (curve,) = curves_from_scores(units, {"fc2:block": scores}).values()
    assert curve.order.tolist() == [4, 1, 3, 0, 5, 2]
    expected = torch.tensor([0, 0, 0.1, 0.3, 0.8, 1.8, 4.8], dtype=torch.float64)
    torch.testing.assert_close(curve.distortion, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, r"mlp:neuron: expected scores of shape \(6,\), got None"),
        (
            {"mlp:neuron": torch.zeros(7)},
            r"mlp:neuron: expected scores of shape \(6,\), got \(7,\)",
        ),
        ({"mlp:neuron": torch.full((6,), float("nan"))}, "mlp:neuron: scores hold NaN or Inf"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_name(scores: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        curves_from_scores(neurons(), scores)
