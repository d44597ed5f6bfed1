"""Trying plans for real: what a trial measures, the search, what a report tells."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.allocate import Budget, Plan, UnreachableBudget, allocate, select
from hwprune.analysis import GAIN, Analysis, analyse
from hwprune.cutting import cut_
from hwprune.pruning import prune
from hwprune.refine import Factors, factored, refine
from hwprune.statistics import calibrate
from hwprune.trial import FIT, JUDGE, Trials, hopeless, shared_out
from hwprune.units import Mask, full_mask

timm = pytest.importorskip("timm")


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
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
    return model.eval()


def images(count: int = 24, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, 3, 16, 16, generator=generator).split(size))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """Of `vit()` on `images()`, every token counted alike."""
    model = vit()
    found = analyse(model, images())
    uniform = calibrate(model, found.units, images(), weighting="uniform")
    return replace(found, statistics=uniform)


def drop(analysis: Analysis, name: str, kept: int) -> Mask:
    return {**full_mask(analysis.units), name: analysis.curves[name].kept(kept)}


@pytest.mark.parametrize("repair", [True, False])
def test_a_trial_measures_what_prune_would_give_and_leaves_the_dense_model(
    analysis: Analysis, repair: bool
) -> None:
    """The same road by hand: cut and repaired on the first images, judged on the others."""
    model = vit()
    before = copy.deepcopy(model.state_dict())
    mask = {**drop(analysis, "blocks.0.mlp:neuron", 24), **drop(analysis, "blocks.1.attn:qk", 4)}
    mask["blocks.0.mlp:neuron"] = analysis.curves["blocks.0.mlp:neuron"].kept(24)
    trials = Trials.of(model, analysis, images(), repair=repair)
    found = trials.distortion(mask)
    fit, judge = shared_out(images(), FIT, JUDGE)
    by_hand = copy.deepcopy(model)
    cut_(by_hand, analysis, mask, fit, repair, {}, None)
    with torch.no_grad():
        x = torch.cat(judge)
        log_p, log_q = model(x).double().log_softmax(1), by_hand(x).double().log_softmax(1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert found.dtype == torch.float64 and trials.images == len(found) == len(x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_repair_counts_in_a_trial(analysis: Analysis) -> None:
    mask = drop(analysis, "blocks.0.mlp:neuron", 24)
    fitted, bare = (
        Trials.of(vit(), analysis, images(), repair=repair).distortion(mask)
        for repair in (True, False)
    )
    assert fitted.mean() < 0.8 * bare.mean()


def test_a_mask_that_keeps_everything_costs_nothing(analysis: Analysis) -> None:
    assert not Trials.of(vit(), analysis, images()).distortion({}).any()


def test_a_mask_behind_the_best_one_is_dropped_after_the_first_batch(analysis: Analysis) -> None:
    trials = Trials.of(vit(), analysis, images())
    mask = drop(analysis, "blocks.0.mlp:neuron", 8)
    whole = trials.distortion(mask)
    assert len(whole) == 16
    assert len(trials.distortion(mask, torch.zeros(16, dtype=torch.float64))) == 8
    assert torch.equal(trials.distortion(mask, whole), whole), "as good as the best: run to the end"
    assert not hopeless(torch.tensor([9.0]), torch.zeros(3)), "one image tells nothing"


class Made(Trials):
    """Trials with a made-up truth: neurons cost nothing, everything else what it predicts."""

    def distortion(self, mask: Mask, best_N: Tensor | None = None) -> Tensor:
        total = 0.0
        for name, curve in self.analysis.curves.items():
            if curve.units.kind != "neuron":
                total += float(curve.distortion[int((~mask[name]).sum())])
        return torch.full((24,), total, dtype=torch.float64)


def made(analysis: Analysis) -> Made:
    x = images()
    return Made(vit(), analysis, (), x, x, True)


def test_the_search_finds_what_the_curves_do_not_know(analysis: Analysis) -> None:
    model, trials = vit(), made(analysis)
    plans: list[Plan] = []

    def solve(factors: Factors) -> Plan:
        curves = factored(analysis.curves, factors)
        plans.append(allocate(model, curves, analysis.cost, Budget(macs=0.6), gain=GAIN))
        return plans[-1]

    found = refine(trials, solve, lambda plan: plan.distortion, 24)
    first, best = found.tried[0], found.tried[found.best]
    assert first.factors == {} and first.plan is plans[0]
    assert best.true < 0.5 * first.true
    neurons = [
        sum(p.keep[n] for n in p.keep if n.endswith(":neuron")) for p in (first.plan, best.plan)
    ]
    assert neurons[1] < neurons[0]
    assert all(plan.macs <= 0.6 * plan.dense_macs * (1 + 1e-9) for plan in plans)
    assert len({tuple(sorted(one.plan.keep.items())) for one in found.tried}) == len(found.tried)
    again = refine(trials, solve, lambda plan: plan.distortion, 24)
    assert again.factors == found.factors
    warm = refine(trials, solve, lambda plan: plan.distortion, 1, start=found.factors)
    assert warm.tried[warm.best].true == best.true


def test_without_candidates_the_first_plan_stands(analysis: Analysis) -> None:
    model, trials = vit(), made(analysis)

    def solve(factors: Factors) -> Plan:
        return allocate(model, factored(analysis.curves, factors), analysis.cost, Budget(macs=0.6))

    found = refine(trials, solve, lambda plan: plan.distortion, 0)
    assert (len(found.tried), found.best, found.factors) == (1, 0, {})
    with pytest.raises(UnreachableBudget):
        refine(
            trials,
            lambda f: allocate(model, analysis.curves, analysis.cost, Budget(macs=1e-5)),
            lambda plan: plan.distortion,
            3,
        )


def test_prune_tells_what_it_tried_and_which_won() -> None:
    model = vit()
    report = prune(model, images(), Budget(macs=0.6), refine=6)
    rows = report.plans
    assert 2 <= len(rows) <= 7 and sum(row["won"] for row in rows) == 1
    (won,) = (row for row in rows if row["won"])
    assert won["true"] <= rows[0]["true"]
    assert report.calibration["images"] == 24
    assert won["images"] == rows[0]["images"] == 16, "a third of them served the repair"
    assert report.macs == pytest.approx(won["macs"]) and report.macs_ratio <= 0.6
    assert report.distortion["predicted"] == pytest.approx(won["predicted"])
    assert report.to_dict()["plans"] == [dict(row) for row in rows]
    assert "refine" in report.seconds


def test_tiles_beside_whole_units_are_refined_too() -> None:
    model = vit()
    kinds = ("block", "head", "neuron")
    report = prune(model, images(), Budget(macs=0.5), kinds=kinds, block=(6, 8), refine=5)
    assert len(report.plans) >= 2 and report.macs_ratio <= 0.5
    (won,) = (row for row in report.plans if row["won"])
    assert report.distortion["predicted"] == pytest.approx(won["predicted"])


def test_dropout_of_a_model_in_training_does_not_reach_the_trials() -> None:
    found = []
    for training in (False, True):
        model = vit()
        for block in model.blocks:
            block.mlp.drop1 = nn.Dropout(0.5)
        model.train(training)
        found.append(prune(model, images(), Budget(macs=0.6), refine=2, round_to=16).plans)
        assert model.training == training and all(p.requires_grad for p in model.parameters())
    assert [row["true"] for row in found[0]] == [row["true"] for row in found[1]]


def test_without_refinement_the_plan_is_that_of_the_curves_alone() -> None:
    found = analyse(vit(), images())
    plan = allocate(vit(), found.curves, found.cost, Budget(macs=0.6), gain=GAIN)
    model, again = vit(), vit()
    report = prune(model, images(), Budget(macs=0.6), refine=0)
    assert report.plans == () and report.calibration["images"] == 24
    assert report.distortion["predicted"] == plan.distortion
    mask = select(found.curves, plan)
    shape = model.hwprune_spec["shape"]
    for name, entry in shape.items():
        if entry["type"] == "mlp":
            assert entry["neurons"] == int(mask[f"{name}:neuron"].sum())
    prune(again, images(), Budget(macs=0.6), refine=0, analysis=found)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_nothing_is_tried_where_the_budget_allows_the_dense_model() -> None:
    model = vit()
    report = prune(model, images(), Budget(macs=1.0), refine=5)
    assert report.plans == ()
    assert all(torch.equal(t, vit().state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 192, 256, 1000])
def test_images_to_repair_on_and_to_judge_by_are_others_and_spread_evenly(count: int) -> None:
    batches = list(torch.arange(float(count))[:, None].split(32))
    fit, judge = (torch.cat(part).flatten() for part in shared_out(batches, 64, 128))
    assert 1 <= len(fit) <= 64 and 1 <= len(judge) <= 128
    assert len(fit) == min(64, max(1, round(count / 3)))
    if count > 1:
        assert not set(fit.tolist()) & set(judge.tolist())
    for part in (fit, judge):
        steps = part.diff()
        assert bool((steps > 0).all())
        assert len(part) < 3 or steps.max() <= 2 * -(-count // len(part))
    assert len(shared_out(batches, 64, 128)[0]) <= 8


def test_a_number_of_plans_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="refine: expected a number of plans"):
        prune(vit(), images(), Budget(macs=0.6), refine=-1)
