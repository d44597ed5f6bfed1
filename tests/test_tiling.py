"""Tile sizes: offered where a device runs them fast, chosen a linear at a time, realised and opened again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.knapsacks import problem
from fakes.profiles import profile_of
from torch import nn

from hwprune.allocate import Budget, Choices, offer, select
from hwprune.block_options import block_groups, combined
from hwprune.checkpoint import describe_base, load, save
from hwprune.cost import Structure, dense_structure
from hwprune.families import timm_vit
from hwprune.layers import BlockSparseLinear
from hwprune.operations import count_operations, layer_operations
from hwprune.ops import Op
from hwprune.option import Option
from hwprune.predict import CostModel, Prediction
from hwprune.pricing import MemoryPricer
from hwprune.realise import masked, realise_
from hwprune.tiling import SIZES, find_units, in_use, linears_of, sizes_worth_it
from hwprune.units import Layer, full_mask

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

DIM, TOKENS, BATCH = 64, 17, 4
TILES = ((16, 16), (32, 16), (32, 32))
Speed = Callable[[Op], float]


def vit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=DIM,
        depth=depth,
        num_heads=4,
        num_classes=5,
    ).eval()
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def image(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Device:
    """Takes as long for an operation as it is told."""

    def __init__(self, seconds: Speed, model: nn.Module) -> None:
        self.seconds = seconds
        whole = sum(map(seconds, count_operations(model, image(BATCH), partly=True).ops))
        self.dense = Prediction(whole, whole, whole, None, "hit")
        self.without_energy = "FAKE has no energy figures"

    def price(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, None]:
        ops = layer_operations(model, layer, keep, images=BATCH, tokens=tokens, dtype="fp32")
        return sum(map(self.seconds, ops)), None


def table(model: nn.Module, seconds: Speed, kinds: tuple[str, ...] | None, seed: int) -> Choices:
    units = find_units(model, kinds, (32, 32), TILES)
    curves, cost = problem(model, units, seed, image())
    device: Any = Device(seconds, model)
    return offer(model, curves, cost, pricer=device)


def dear(op: Op) -> float:
    """Tiles at twice the price of dense work."""
    return op.macs * (2.0 if op.impl == "block_sparse" else 1.0)


def cheap(op: Op) -> float:
    """Tiles at half the price of dense work."""
    return op.macs * (0.5 if op.impl == "block_sparse" else 1.0)


def wide_is_cheap(op: Op) -> float:
    """Tiles pay only in the linears of the MLP."""
    mlp = 4 * DIM in op.shape[1:]
    return op.macs * ((0.4 if mlp else 3.0) if op.impl == "block_sparse" else 1.0)


def one_size_each(op: Op) -> float:
    """fc1 (n = 4 DIM) is quick in tiles of 32x32, fc2 (k = 4 DIM) in 32x16, everything else in 16x16."""
    if op.impl != "block_sparse":
        return op.macs
    _, n, k = op.shape
    quick = (32, 32) if n == 4 * DIM else (32, 16) if k == 4 * DIM else (16, 16)
    return op.macs * (0.4 if op.block == quick else 50.0)


@pytest.mark.parametrize("kinds", [None, ("head", "neuron"), ("block",)])
@pytest.mark.parametrize("latency", [0.8, 0.6])
def test_tiles_are_not_used_where_they_are_dear(
    kinds: tuple[str, ...] | None, latency: float
) -> None:
    model = vit()
    if kinds == ("block",):
        # Twice as dear, they pay only under a density of a half.
        plan = table(model, dear, kinds, 0).plan(Budget(latency=latency))
        whole = {name: model.get_submodule(name).weight.numel() for name in plan.tiles}
        for structure in plan.structure.values():
            for name in structure.tiles or {}:
                assert (structure.weights or {})[name] < 0.5 * whole[name]
        return
    plan = table(model, dear, kinds, 0).plan(Budget(latency=latency))
    alone = table_of_whole_units(model, dear, kinds).plan(Budget(latency=latency))
    assert plan.distortion <= alone.distortion * (1 + 1e-6)


def table_of_whole_units(
    model: nn.Module, seconds: Speed, kinds: tuple[str, ...] | None
) -> Choices:
    units = find_units(model, kinds, (32, 32))
    everything = find_units(model, kinds, (32, 32), TILES)
    curves, cost = problem(model, everything, 0, image())
    device: Any = Device(seconds, model)
    kept = {unit.name: curves[unit.name] for unit in units}
    return offer(model, kept, cost, pricer=device)


def test_tiles_that_cost_half_reach_half_the_time_at_next_to_no_loss() -> None:
    model = vit()
    both = table(model, cheap, None, 0).plan(Budget(latency=0.6))
    alone = table_of_whole_units(model, cheap, None).plan(Budget(latency=0.6))
    assert both.tiles
    assert both.distortion < 0.2 * alone.distortion


def test_tiles_are_used_exactly_where_they_pay() -> None:
    plan = table(vit(), wide_is_cheap, None, 1).plan(Budget(latency=0.6))
    used = set(plan.tiles)
    assert used and all(".mlp." in name for name in used)


def test_each_linear_takes_the_size_that_is_quick_for_it() -> None:
    for kinds in (("block",), None):
        plan = table(vit(), one_size_each, kinds, 2).plan(Budget(latency=0.5))
        # No tiles at all are as quick in every size.
        empty = {n for s in plan.structure.values() for n, w in (s.weights or {}).items() if not w}
        found = {name: size for name, size in plan.tiles.items() if name not in empty}
        sizes = {"fc1": (32, 32), "fc2": (32, 16), "qkv": (16, 16), "proj": (16, 16)}
        assert {name.rsplit(".", 1)[1] for name in found} >= {"fc1", "fc2"}
        assert all(size == sizes[name.rsplit(".", 1)[1]] for name, size in found.items())


def test_a_layer_of_several_sizes_is_realised_as_masked_and_opens_again(tmp_path: Path) -> None:
    model, x = vit(), image(3)
    base = describe_base(model)
    units = find_units(model, None, (32, 32), TILES)
    curves, cost = problem(model, units, 2, image())
    device: Any = Device(one_size_each, model)
    plan = offer(model, curves, cost, pricer=device).plan(Budget(latency=0.6))
    mask = {**full_mask(units), **select(curves, plan)}
    with masked(model, units, mask), torch.no_grad():
        expected = model(x)
    small = copy.deepcopy(model)
    shape = realise_(small, units, mask, plan.tiles)
    with torch.no_grad():
        assert torch.allclose(small(x), expected, atol=1e-5)
    found = {n: m.block for n, m in small.named_modules() if isinstance(m, BlockSparseLinear)}
    assert found == plan.tiles and len(set(found.values())) > 1
    few, few_mask = in_use(units, mask)
    again = copy.deepcopy(model)
    assert realise_(again, few, few_mask, plan.tiles) == shape
    seconds = sum(map(one_size_each, count_operations(small, image(BATCH), partly=True).ops))
    assert plan.latency_s == pytest.approx(seconds, rel=1e-9)
    small.hwprune_spec = {  # type: ignore[assignment]
        "version": 1,
        "base": base,
        "shape": shape,
        "kinds": ["block"],
        "report": {},
    }
    save(small, tmp_path / "out")
    opened = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(opened(x), small(x))


def test_bytes_of_several_sizes_are_those_of_the_realised_model() -> None:
    model = vit()
    units = find_units(model, ("neuron", "block"), (32, 32), TILES)
    curves, cost = problem(model, units, 3, image())
    layers, _ = timm_vit.find_layers(model)
    memory = MemoryPricer.fitted(model, layers, image(BATCH))
    plan = offer(model, curves, cost, memory=memory).plan(Budget(memory=0.7))
    realise_(model, units, {**full_mask(units), **select(curves, plan)})
    held = [*model.parameters(), *model.buffers()]
    assert plan.weight_bytes == sum(t.numel() * t.element_size() for t in held)


def test_units_in_use_are_those_cut_and_one_size_of_the_others() -> None:
    model = vit(depth=1)
    units = find_units(model, ("block",), (32, 32), TILES)
    mask = full_mask(units)
    mask["blocks.0.mlp.fc1:block32x16"][0, 0] = False
    few, few_mask = in_use(units, mask)
    assert [u.name for u in few] == [
        "blocks.0.attn.qkv:block16x16",
        "blocks.0.attn.proj:block16x16",
        "blocks.0.mlp.fc2:block16x16",
        "blocks.0.mlp.fc1:block32x16",
    ]
    assert list(few_mask) == [u.name for u in few]
    beside = find_units(model, ("neuron", "block"), (32, 32), TILES)
    left = [u.name for u in in_use(beside, full_mask(beside))[0]]
    assert "blocks.0.mlp:neuron" in left and not any(".mlp." in name for name in left)


def test_combinations_of_a_layer_hold_the_best_at_every_price() -> None:
    model = vit(depth=1)
    units = find_units(model, ("block",), (32, 32), ((32, 32), (64, 64)))
    curves, _ = problem(model, units, 4, image())
    mlp = [c for c in curves.values() if ".mlp." in c.units.name]
    groups = block_groups(model, mlp, {}, TOKENS)
    layer = timm_vit.find_layers(model)[0][1]
    whole = sum(group[-1].macs for group in groups)
    dense = Option(dense_structure(layer), {}, 0.0, whole, whole / TOKENS)
    found = combined(groups, dense, ["macs"])
    every = [
        (sum(o.distortion for o in c), sum(o.macs for o in c)) for c in itertools.product(*groups)
    ]
    assert any(o.macs == whole and o.distortion == 0 for o in found)
    for price in (0.0, *(10.0**p for p in range(-9, 2))):
        best = min(loss + price * macs for loss, macs in every)
        assert min(o.distortion + price * o.macs for o in found) == pytest.approx(best, rel=1e-9)
    for option in found:  # what it keeps is what it costs
        weights = option.structure.weights or {}
        assert option.macs == TOKENS * sum(weights.values())


# --- which sizes a profile says pay ----------------------------------------------------------------

DENSE = [Op("linear", (136, n, k), "fp32") for n, k in ((768, 256), (256, 768), (512, 256))]


def costs(per_mac: dict[tuple[int, int], float]) -> CostModel:
    """Dense work takes 1 ns a multiply-accumulate, tiles what is told of their size."""
    times = {}
    for n, k in itertools.product((128, 256, 512, 768, 1024), repeat=2):
        op = Op("linear", (136, n, k), "fp32")
        times[op] = op.macs * 1e-9
        for tile, rate in per_mac.items():
            grid = -(-n // tile[0]) * -(-k // tile[1])
            for kept in sorted({max(1, round(grid * d)) for d in (0.1, 0.25, 0.5, 0.75, 0.95, 1)}):
                tiles = Op.tiles((136, n, k), "fp32", tile, kept)
                times[tiles] = tiles.macs * rate * 1e-9
    return CostModel(profile_of(times))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, ()),
        ({(32, 32): 1.5, (64, 64): 1.2}, ()),
        ({(32, 32): 0.9, (64, 64): 0.9}, ((32, 32),)),
        ({(32, 32): 0.9, (64, 64): 0.6}, ((32, 32), (64, 64))),
        ({(32, 32): 1.5, (64, 64): 0.6}, ((64, 64),)),
        (
            {(32, 32): 0.9, (64, 32): 0.7, (64, 64): 0.7, (128, 64): 0.5},
            ((32, 32), (64, 32), (128, 64)),
        ),
    ],
    ids=str,
)
def test_a_size_is_offered_where_it_is_faster_than_dense_work_and_than_finer_tiles(
    rates: dict[tuple[int, int], float], expected: tuple[tuple[int, int], ...]
) -> None:
    assert sizes_worth_it(costs(rates), DENSE) == expected


def test_no_size_is_offered_for_nothing() -> None:
    assert sizes_worth_it(costs({(32, 32): 0.1}), []) == ()


def test_of_a_large_model_only_the_sizes_with_curves_in_minutes_are_offered() -> None:
    wide = [Op("linear", (1576, 3072, 768), "fp32"), Op("linear", (1576, 768, 3072), "fp32")] * 12
    found = sizes_worth_it(costs(dict.fromkeys(SIZES, 0.5) | {(64, 64): 0.4, (128, 64): 0.3}), wide)
    assert found == ((64, 32), (64, 64), (128, 64))


def test_the_linears_that_may_be_cut_are_those_of_the_layers() -> None:
    model = vit()
    layers, _ = timm_vit.find_layers(model)
    parts = count_operations(model, image(BATCH)).parts
    found = linears_of(parts, layers)
    assert len(found) == 8 and Op("linear", (BATCH * TOKENS, 4 * DIM, DIM), "fp32") in found
    assert len([op for _, op in parts if op.kind == "linear"]) == 10  # patches and the head beside
