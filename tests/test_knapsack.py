"""The optimum for every kind of budget against all combinations, and a looser budget that is never worse."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes.knapsacks import best_of_all, problem, spent
from torch import nn

from hwprune.allocate import Budget, Choices, UnreachableBudget, offer
from hwprune.cost import Structure, dense_structure, layer_macs
from hwprune.families import timm_vit
from hwprune.memory_cost import activation_bytes, plan_weight_bytes
from hwprune.predict import Prediction
from hwprune.pricing import MemoryPricer
from hwprune.units import Layer

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

IMAGE = torch.zeros(1, 3, 16, 16)


class MadeUpDevice:
    """Time and energy follow the work, each with a random factor of its own for every structure."""

    def __init__(self, seed: int, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.seed = seed
        dense = [self.price(model, layer, dense_structure(layer), 17) for layer in layers]
        # The rest of the model takes a tenth more.
        seconds, joules = (1.1 * sum(part) for part in zip(*dense, strict=True))
        self.dense = Prediction(seconds, seconds, seconds, joules, "hit")

    def price(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, float]:
        if keep.weights is not None and not keep.tiles:
            keep = dense_structure(layer)
        draw = random.Random(f"{self.seed} {layer.name} {keep}")
        work = layer_macs(model, layer, keep, tokens)
        return work * draw.uniform(0.7, 1.3), work * draw.uniform(0.7, 1.3)


def choices(
    kinds: tuple[str, ...], seed: int, *, depth: int = 2, round_to: int = 24, **given: Any
) -> Choices:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=depth,
        num_heads=3,
        num_classes=5,
    ).eval()
    units = timm_vit.find_units(model, kinds, block=(24, 24))
    curves, cost = problem(model, units, seed, IMAGE)
    layers, _ = timm_vit.find_layers(model)
    memory = MemoryPricer.fitted(model, layers, torch.zeros(1, 3, 16, 16))
    pricer: Any = MadeUpDevice(seed, model, layers)
    return offer(model, curves, cost, round_to=round_to, pricer=pricer, memory=memory, **given)


BUDGETS = [
    {"latency": 0.7},
    {"energy": 0.6},
    {"memory": 0.7},
    {"memory": 0.5},
    {"latency": 0.8, "energy": 0.7},
    {"memory": 0.75, "macs": 0.6},
    {"memory": 0.8, "latency": 0.75, "energy": 0.8, "params": 0.7, "macs": 0.7},
]


def value(table: Choices, budget: dict[str, float]) -> float:
    plan = table.plan(Budget(**budget))
    for metric, limit in plan.limits.items():
        found = {
            "macs": plan.macs,
            "params": plan.params,
            "latency": plan.latency_s,
            "energy": plan.energy_j,
            "memory": plan.memory_bytes,
        }[metric]
        assert found is not None and found <= limit * (1 + 1e-9), metric
    assert plan.energy_j is not None
    weighted = table.energy_weight * plan.energy_j / table.dense["energy"]
    fixed = table.energy_weight * table.fixed["energy"] / table.dense["energy"]
    assert plan.distortion + weighted - fixed == pytest.approx(plan.bound, rel=1e-9, abs=1e-12)
    return plan.bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_plan_is_the_best_of_all_combinations(
    budget: dict[str, float], weight: float, seed: int
) -> None:
    table = choices(("head", "neuron"), seed, energy_weight=weight)
    limits = Budget(**budget).limits(table.dense)
    assert value(table, budget) == pytest.approx(best_of_all(table, limits), rel=1e-5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("budget", [{"latency": 0.7}, {"memory": 0.8}, {"energy": 0.7}], ids=str)
def test_tiles_and_whole_units_compete_in_every_budget(budget: dict[str, float], seed: int) -> None:
    table = choices(("head", "neuron", "block"), seed, depth=1)
    limits = Budget(**budget).limits(table.dense)
    assert value(table, budget) == pytest.approx(best_of_all(table, limits), rel=1e-5)


@pytest.mark.parametrize("metric", ["macs", "params", "latency", "energy"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_lagrangian_finds_the_same_plan(metric: str, weight: float) -> None:
    table = choices(("head", "neuron", "qk", "vo"), 4, round_to=8, energy_weight=weight)
    for share in (0.95, 0.8, 0.6, 0.45):
        budget = Budget(**{metric: share})
        fast, exact = table.plan(budget, fast=True), table.plan(budget)
        assert fast.bound <= exact.bound * (1 + 1e-6)
        assert fast.distortion == pytest.approx(exact.distortion, rel=1e-3)


@pytest.mark.parametrize("metric", ["macs", "params", "latency", "energy", "memory"])
def test_a_looser_budget_never_gives_more_distortion(metric: str) -> None:
    draw = random.Random(metric)
    table = choices(("head", "neuron", "qk", "vo"), 7, round_to=16)
    shares = sorted(draw.uniform(0.45, 1.0) for _ in range(8))
    losses = [table.plan(Budget(**{metric: share})).distortion for share in shares]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-6)
    fast = [
        table.plan(Budget(**{metric: draw.uniform(0.45, 1.0)}), fast=metric != "memory")
        for _ in range(60 if metric != "memory" else 4)
    ]
    fast.sort(key=lambda plan: plan.limits[metric])
    for one, next_one in itertools.pairwise(fast):
        assert next_one.distortion <= one.distortion * (1 + 1e-9)


def test_a_second_limit_costs_nothing_where_it_does_not_bind_and_never_helps() -> None:
    table = choices(("head", "neuron"), 1)
    alone = table.plan(Budget(latency=0.7))
    assert table.plan(Budget(latency=0.7, memory=1.0)).distortion == alone.distortion
    assert table.plan(Budget(latency=0.7, memory=0.6)).distortion >= alone.distortion


def test_energy_is_saved_beyond_what_the_budget_asks_as_its_weight_grows() -> None:
    plans = [
        choices(("head", "neuron"), 2, energy_weight=weight).plan(Budget(macs=1.0))
        for weight in (0.0, 0.01, 1.0, 1e4)
    ]
    energies = [plan.energy_j for plan in plans]
    assert energies == sorted(energies, reverse=True) and energies[-1] < energies[0]
    assert [p.distortion for p in plans] == sorted(p.distortion for p in plans)
    assert (
        plans[0].distortion == 0
    )  # without a weight a budget that allows the dense model gives it


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_of_energy_is_a_number_of_at_least_0(weight: float) -> None:
    with pytest.raises(ValueError, match="energy_weight: expected a number of at least 0"):
        choices(("head",), 0, energy_weight=weight)


def test_a_weight_of_energy_without_figures_of_it_is_refused_with_the_next_step() -> None:
    torch.manual_seed(0)
    model, _ = timm_vit.example()
    units = timm_vit.find_units(model, ["head"])
    curves, cost = problem(model, units, 0, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="energy_weight: no device says what a layer costs"):
        offer(model, curves, cost, energy_weight=0.1)


def test_memory_is_the_weights_and_the_highest_peak_of_the_plan() -> None:
    """Against the counting of whole plans, which tests/test_memory_cost.py holds against measured models."""
    torch.manual_seed(0)
    model, _ = timm_vit.example()
    x = torch.zeros(4, 3, 32, 32)
    units = timm_vit.find_units(model, ["head", "neuron", "qk", "vo"])
    curves, cost = problem(model, units, 3, x[:1])
    layers, _ = timm_vit.find_layers(model)
    table = offer(model, curves, cost, memory=MemoryPricer.fitted(model, layers, x))
    whole = plan_weight_bytes(model, layers, {}) + activation_bytes(model, layers, {}, x)
    assert table.dense["memory"] == pytest.approx(whole, rel=1e-12)
    for share in (0.9, 0.7, 0.5):
        plan = table.plan(Budget(memory=share))
        assert plan.weight_bytes == plan_weight_bytes(model, layers, plan.structure)
        peak = activation_bytes(model, layers, plan.structure, x)
        assert plan.activation_bytes == pytest.approx(peak, rel=1e-12)
        assert plan.memory_bytes is not None and plan.memory_bytes <= share * whole


def test_layers_that_are_not_pruned_hold_the_peak_up() -> None:
    torch.manual_seed(0)
    model, _ = timm_vit.example()
    x = torch.zeros(64, 3, 32, 32)
    curves, cost = problem(model, timm_vit.find_units(model, ["head"]), 3, x[:1])
    layers, _ = timm_vit.find_layers(model)
    table = offer(model, curves, cost, memory=MemoryPricer.fitted(model, layers, x))
    mlps = {layer.name: Structure(heads=0, qk=16, v=16) for layer in layers[::2]}
    assert table.floor_bytes == activation_bytes(model, layers, mlps, x)
    with pytest.raises(UnreachableBudget, match="smaller batch helps"):
        table.plan(Budget(memory=0.8))


def test_limits_that_exclude_each_other_say_how_far_each_must_go() -> None:
    # On this device the narrowest q and k are not the quickest.
    table = choices(("qk",), 5)
    least: dict[str, float] = {}
    for metric in ("latency", "params"):
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            try:
                table.plan(Budget(**{metric: middle}), fast=True)
                high = middle
            except UnreachableBudget:
                low = middle
        least[metric] = high
    both = {metric: share * 1.0001 for metric, share in least.items()}
    limits = Budget(**both).limits(table.dense)
    assert best_of_all(table, limits) == float("inf")
    with pytest.raises(UnreachableBudget) as caught:
        table.plan(Budget(**both))
    assert "at once. With the others kept, the least of" in str(caught.value)
    for metric, other in (("latency", "params"), ("params", "latency")):
        (line,) = [t for t in str(caught.value).splitlines() if t.strip().startswith(metric)]
        share = float(line.split("(")[1].split(" of dense")[0])
        assert share > both[metric]
        table.plan(Budget(**{metric: share + 0.001, other: both[other]}))


def test_what_cannot_be_reached_in_memory_is_named() -> None:
    table = choices(("head", "neuron"), 0)
    with pytest.raises(UnreachableBudget) as caught:
        table.plan(Budget(memory=0.05))
    share = float(str(caught.value).split("allow is ")[1].split("(")[1].split(")")[0])
    assert table.plan(Budget(memory=share + 0.001)).memory_bytes
    with pytest.raises(UnreachableBudget):
        table.plan(Budget(memory=share - 0.002))


def test_a_scale_tightens_its_own_limit_only() -> None:
    table = choices(("head", "neuron"), 0)
    plan = table.plan(Budget(latency=0.8, macs=0.9), scale={"latency": 0.9})
    assert plan.latency_s is not None and plan.latency_s <= 0.72 * table.dense["latency"]
    assert plan.limits["latency"] == pytest.approx(0.8 * table.dense["latency"])
    same = table.plan(Budget(latency=0.72, macs=0.9))
    assert plan.keep == same.keep


def test_spent_is_what_the_plan_says() -> None:
    table = choices(("head", "neuron"), 0)
    plan = table.plan(Budget(memory=0.7, latency=0.8))
    chosen = [
        next(o for o in options if all(plan.keep[n] == k for n, k in o.keep.items()))
        for _, options in table.groups
    ]
    assert spent(table, chosen, "memory") == pytest.approx(plan.memory_bytes, rel=1e-12)
    assert spent(table, chosen, "latency") == pytest.approx(plan.latency_s, rel=1e-12)
    assert replace(plan, weight_bytes=None).memory_bytes is None
