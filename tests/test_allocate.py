"""The knapsack against brute force over every combination."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from hwprune.allocate import Budget, UnreachableBudget, allocate, select
from hwprune.cost import ModelCost, Structure, dense_structure, layer_macs, model_cost
from hwprune.distortion import Curve
from hwprune.options import Option, levels, option_groups, pareto
from hwprune.realise import realise_
from hwprune.units import full_mask, layers_of

timm = pytest.importorskip("timm")

from fakes.knapsacks import made_up  # noqa: E402

from hwprune.families import timm_vit  # noqa: E402 - needs timm

IMAGE = torch.zeros(1, 3, 16, 16)


def vit(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model(name, **{**args, "num_classes": 5, **changes}).eval()


def problem(
    kinds: Sequence[str] | None, seed: int = 0, block: tuple[int, int] = (12, 12), **changes: object
) -> tuple[nn.Module, dict[str, Curve], ModelCost]:
    model = vit(**changes)
    units = timm_vit.find_units(model, kinds, block=block)
    return model, made_up(units, seed), model_cost(model, layers_of(units), IMAGE)


def totals(
    groups: Sequence[tuple[object, Sequence[Option]]], cost: ModelCost, chosen: Sequence[Option]
) -> dict[str, float]:
    """MACs and parameters of a choice, counted from the dense model downwards."""
    dense = [max(options, key=lambda o: (o.macs, o.params)) for _, options in groups]
    return {
        "macs": cost.macs - sum(o.macs for o in dense) + sum(o.macs for o in chosen),
        "params": cost.params - sum(o.params for o in dense) + sum(o.params for o in chosen),
    }


def dense_costs(cost: ModelCost) -> dict[str, float]:
    return {"macs": cost.macs, "params": float(cost.params)}


def brute_force(
    model: nn.Module,
    curves: Mapping[str, Curve],
    cost: ModelCost,
    limits: Mapping[str, float],
    round_to: int,
) -> float:
    """The least distortion of all combinations within the limits; inf where there is none."""
    groups = option_groups(model, curves, cost, round_to=round_to)
    best = math.inf
    for chosen in itertools.product(*(options for _, options in groups)):
        spent = totals(groups, cost, chosen)
        if all(spent[m] <= limit * (1 + 1e-12) for m, limit in limits.items()):
            best = min(best, sum(o.distortion for o in chosen))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [{"macs": 0.7}, {"params": 0.6}, {"macs": 0.6, "params": 0.75}])
def test_the_plan_is_the_best_of_all_combinations(limits: dict[str, float], seed: int) -> None:
    model, curves, cost = problem(["head", "neuron"], seed)
    budget = Budget(**limits)
    plan = allocate(model, curves, cost, budget, round_to=16)
    best = brute_force(model, curves, cost, budget.limits(dense_costs(cost)), 16)
    assert plan.distortion == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_best_of_all_combinations_of_heads_and_channels(seed: int) -> None:
    model, curves, cost = problem(["head", "qk", "vo", "neuron"], seed, depth=1)
    budget = Budget(macs=0.55, params=0.6)
    plan = allocate(model, curves, cost, budget, round_to=8)
    best = brute_force(model, curves, cost, budget.limits(dense_costs(cost)), 8)
    assert plan.distortion == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_best_of_all_combinations_of_tiles(seed: int) -> None:
    model, curves, cost = problem(["block"], seed, (24, 12), depth=1)
    plan = allocate(model, curves, cost, Budget(macs=0.5))
    best = brute_force(model, curves, cost, {"macs": 0.5 * cost.macs}, 8)
    assert plan.distortion == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_one_curve_far_above_the_others_does_not_blur_them(seed: int) -> None:
    model, curves, cost = problem(["head", "neuron"], seed)
    huge = curves["blocks.0.attn:head"]
    curves["blocks.0.attn:head"] = Curve(huge.units, huge.order, huge.distortion * 1e12)
    budget = Budget(macs=0.8)
    plan = allocate(model, curves, cost, budget, round_to=16)
    best = brute_force(model, curves, cost, budget.limits(dense_costs(cost)), 16)
    assert plan.distortion == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_a_limit_one_mac_below_a_plan_excludes_that_plan(seed: int) -> None:
    model, curves, cost = problem(["head", "neuron"], seed)
    layers = layers_of(c.units for c in curves.values())
    tokens = 10_007  # one MAC of 1e9 is less than what a solver rounds off
    macs = sum(layer_macs(model, layer, dense_structure(layer), tokens) for layer in layers)
    cost = replace(cost, macs=macs, tokens=dict.fromkeys(cost.tokens, tokens), fixed_macs=0)
    first = allocate(model, curves, cost, Budget(macs=0.7), round_to=8)
    second = allocate(model, curves, cost, Budget(macs=first.macs - 1), round_to=8)
    assert second.macs <= first.macs - 1


def test_a_limit_equal_to_a_plan_allows_that_plan() -> None:
    model, curves, cost = problem(["head", "neuron"])
    first = allocate(model, curves, cost, Budget(macs=0.7))
    exact = Budget(macs=first.macs, params=first.params)
    again = allocate(model, curves, cost, exact)
    assert again.distortion == pytest.approx(first.distortion, rel=1e-6)


def test_the_least_that_can_be_reached_is_reached() -> None:
    model, curves, cost = problem(None)
    groups = option_groups(model, curves, cost)
    cheapest = [min(options, key=lambda o: o.macs) for _, options in groups]
    least = totals(groups, cost, cheapest)["macs"]
    assert allocate(model, curves, cost, Budget(macs=least)).macs == least
    with pytest.raises(UnreachableBudget):
        allocate(model, curves, cost, Budget(macs=least - 1))


def test_a_looser_budget_is_never_worse() -> None:
    model, curves, cost = problem(None, 3)
    losses = [
        allocate(model, curves, cost, Budget(macs=macs)).distortion
        for macs in (0.3, 0.4, 0.55, 0.7, 0.85, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0 < losses[0]


def test_a_second_limit_is_never_better_than_one_alone() -> None:
    model, curves, cost = problem(None, 3)
    one = allocate(model, curves, cost, Budget(macs=0.6)).distortion
    both = allocate(model, curves, cost, Budget(macs=0.6, params=0.5))
    assert both.distortion >= one
    assert both.macs <= 0.6 * cost.macs and both.params <= 0.5 * cost.params


@pytest.mark.parametrize("kinds", [None, ["head"], ["block"], ["neuron"], ["qk", "vo"]])
def test_a_budget_that_allows_the_dense_model_gives_the_dense_model(
    kinds: list[str] | None,
) -> None:
    model, curves, cost = problem(kinds)
    for budget in (Budget(macs=1.0), Budget(macs=1.0, params=1.0), Budget(params=1e12)):
        plan = allocate(model, curves, cost, budget)
        assert all(bool(grid.all()) for grid in select(curves, plan).values())
        assert (plan.macs, plan.params, plan.distortion) == (cost.macs, cost.params, 0)


def test_dead_units_stay_where_the_budget_allows_the_dense_model() -> None:
    model, curves, cost = problem(["neuron"])
    dead = curves["blocks.0.mlp:neuron"]
    free = dead.distortion.clone()
    free[:41] = 0
    curves["blocks.0.mlp:neuron"] = Curve(dead.units, dead.order, free)
    plan = allocate(model, curves, cost, Budget(macs=1.0))
    assert plan.keep["blocks.0.mlp:neuron"] == 96
    assert plan.macs == cost.macs


def test_dead_units_leave_first_and_their_cost_is_counted_right() -> None:
    model, curves, cost = problem(["neuron"])
    dead = curves["blocks.0.mlp:neuron"]
    free = dead.distortion.clone()
    free[:41] = 0
    curves["blocks.0.mlp:neuron"] = Curve(dead.units, dead.order, free)
    plan = allocate(model, curves, cost, Budget(params=0.95))
    assert plan.distortion == 0
    units = [c.units for c in curves.values()]
    realise_(model, units, {**full_mask(units), **select(curves, plan)})
    assert plan.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("round_to", [8, 16, 64])
def test_kept_neurons_are_a_multiple_of_the_rounding_or_all(round_to: int) -> None:
    model, curves, cost = problem(["neuron"], mlp_ratio=300 / 24, embed_dim=24)
    for macs in (0.4, 0.6, 0.8, 0.9):
        plan = allocate(model, curves, cost, Budget(macs=macs), round_to=round_to)
        for name, count in plan.keep.items():
            assert count % round_to == 0 or count == 300, name
        assert plan.macs < cost.macs


def test_levels_step_finer_on_grids_too_small_for_the_rounding() -> None:
    assert levels(24, 8) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert levels(3, 8) == [0, 1, 2, 3]
    assert levels(100, 16) == [0, 16, 32, 48, 64, 80, 96, 100]


def option(distortion: float, macs: float, params: float) -> Option:
    return Option(Structure(), {}, distortion, macs, params)


def test_an_option_beaten_on_all_three_counts_is_dropped_and_no_other() -> None:
    dense, cheap, beaten = option(0, 10, 10), option(1, 5, 5), option(2, 6, 6)
    few_macs, few_params = option(3, 2, 9), option(3, 9, 2)
    kept = pareto([beaten, dense, few_macs, cheap, few_params])
    assert sorted(map(id, kept)) == sorted(map(id, (dense, cheap, few_macs, few_params)))


def test_dropping_beaten_options_never_changes_the_best_plan() -> None:
    draw = random.Random(5)
    for _ in range(30):
        groups = [
            [option(0, 9, 9)]
            + [option(draw.random(), draw.randint(0, 8), draw.randint(0, 8)) for _ in range(6)]
            for _ in range(3)
        ]

        def best(groups: Sequence[Sequence[Option]], macs: int, params: int) -> float:
            return min(
                (
                    sum(o.distortion for o in chosen)
                    for chosen in itertools.product(*groups)
                    if sum(o.macs for o in chosen) <= macs
                    and sum(o.params for o in chosen) <= params
                ),
                default=math.inf,
            )

        limits = draw.randint(3, 27), draw.randint(3, 27)
        assert best([pareto(g) for g in groups], *limits) == best(groups, *limits)


def test_a_layer_is_never_cut_by_tiles_and_whole_units_at_once() -> None:
    model, curves, cost = problem(["head", "neuron", "block"], 4, (16, 10))
    for macs in (0.35, 0.5, 0.65, 0.8):
        keep = allocate(model, curves, cost, Budget(macs=macs)).keep
        for layer in layers_of(c.units for c in curves.values()):
            cut = {
                curves[name].units.kind == "block"
                for name, count in keep.items()
                if curves[name].units.layer is layer and count < curves[name].units.count
            }
            assert len(cut) <= 1, layer.name


def test_an_unreachable_budget_says_what_is_reachable_layer_by_layer() -> None:
    model, curves, cost = problem(["neuron"])
    with pytest.raises(UnreachableBudget) as caught:
        allocate(model, curves, cost, Budget(macs=0.1))
    text = str(caught.value)
    assert "budget macs <=" in text and "(0.100 of dense) is out of reach" in text
    least = allocate(model, curves, cost, Budget(macs=least_macs(model, curves, cost)))
    assert f"{least.macs_ratio:.3f}" in text
    assert "blocks.0.mlp: 0.000" in text and "blocks.1.mlp: 0.000" in text
    assert "--kinds" in text


def least_macs(model: nn.Module, curves: Mapping[str, Curve], cost: ModelCost) -> float:
    groups = option_groups(model, curves, cost)
    return totals(groups, cost, [min(o, key=lambda x: x.macs) for _, o in groups])["macs"]


def test_the_least_of_both_limits_is_reachable_at_once() -> None:
    model, curves, cost = problem(["block"], 0, (16, 10), depth=1)
    groups = option_groups(model, curves, cost)
    least = {
        m: totals(groups, cost, [min(o, key=lambda x, m=m: getattr(x, m)) for _, o in groups])[m]
        for m in ("macs", "params")
    }
    plan = allocate(model, curves, cost, Budget(**least))
    assert (plan.macs, plan.params) == (least["macs"], least["params"])


def test_heads_alone_can_empty_an_attention() -> None:
    model, curves, cost = problem(["head"])
    groups = option_groups(model, curves, cost)
    assert all({o.structure.heads for o in options} == {0, 1, 2, 3} for _, options in groups)


def test_an_emptied_attention_costs_only_its_bias() -> None:
    model, curves, cost = problem(["head", "qk", "vo"])
    for _, options in option_groups(model, curves, cost):
        empty = [o for o in options if o.structure.heads == 0]
        assert [(o.macs, o.params) for o in empty] == [(0.0, 24)]


def test_no_option_keeps_heads_without_q_and_k_or_without_v() -> None:
    model, curves, cost = problem(["head", "qk", "vo"])
    for _, options in option_groups(model, curves, cost):
        for o in options:
            assert not o.structure.heads or (o.structure.qk and o.structure.v)


def test_a_gain_scales_the_distortion_of_its_kind_only() -> None:
    model, curves, cost = problem(["head", "neuron"], 1)
    plain = option_groups(model, curves, cost)
    scaled = option_groups(model, curves, cost, gain={"neuron": 3.0})
    for (_, before), (_, after) in zip(plain, scaled, strict=True):
        factor = 3.0 if before[0].structure.neurons is not None else 1.0
        assert [o.distortion * factor for o in before] == pytest.approx(
            [o.distortion for o in after]
        )


def test_the_mask_keeps_the_last_of_each_order_as_many_as_planned() -> None:
    model, curves, cost = problem(None, 2)
    plan = allocate(model, curves, cost, Budget(macs=0.5))
    for name, grid in select(curves, plan).items():
        curve = curves[name]
        kept = curve.order[curve.units.count - plan.keep[name] :].tolist()
        assert sorted(kept) == grid.flatten().nonzero()[:, 0].tolist()


def test_a_plan_of_other_curves_is_refused_by_name() -> None:
    model, curves, cost = problem(["head"])
    plan = allocate(model, curves, cost, Budget(macs=0.8))
    del curves["blocks.1.attn:head"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn:head: in the plan but without a curve"):
        select(curves, plan)


def test_a_ratio_is_of_the_dense_model_and_a_larger_number_is_absolute() -> None:
    cost = ModelCost(1e9, 5_000_000, {}, 0.0, 0)
    assert Budget(macs=0.6, params=3e6).limits(dense_costs(cost)) == {"macs": 0.6e9, "params": 3e6}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["macs=0.6"], Budget(macs=0.6)),
        (["params=50M"], Budget(params=50e6)),
        (["macs=2.1G", " params = 300K "], Budget(macs=2.1e9, params=300e3)),
        (["macs=1.5e-1"], Budget(macs=0.15)),
        (["macs=1T"], Budget(macs=1e12)),
        (["latency=0.7", "macs=0.9"], Budget(latency=0.7, macs=0.9)),
        (["latency=4.2 ms"], Budget(latency="4.2 ms")),
    ],
)
def test_a_budget_is_read_from_words(texts: list[str], expected: Budget) -> None:
    assert Budget.parse(texts) == expected


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["speed=0.6"], "expected macs=NUMBER or params=NUMBER or .* got 'speed=0.6'"),
        (["latency=1.4"], "latency=1.4 is more than the dense model's"),
        (["energy=4ms"], "energy: expected a number, or one with J, mJ, kJ, got '4ms'"),
        (["macs=fast"], "macs: expected a number, or one with K, M, G, T, got 'fast'"),
        (["macs=-0.5"], "got '-0.5'"),
        (["macs=1.2.3"], "'1.2.3' is no number"),
        (["macs=0.5", "macs=0.6"], "macs given twice"),
        (["macs=0"], "macs must be above 0, got 0"),
        ([], "expected at least one of macs, params"),
    ],
)
def test_words_that_are_no_budget_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Budget.parse(texts)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="params must be above 0"):
        Budget(params=value)
