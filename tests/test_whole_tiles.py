"""Linears that keep every tile because a device runs them faster so: nothing lost, counted, saved, opened."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.knapsacks import problem
from fakes.profiles import profile_of
from test_tiling import BATCH, DIM, TILES, Device, cheap, image, vit
from torch import nn

from hwprune import contract as contract_
from hwprune.allocate import Budget, Plan, offer, select
from hwprune.checkpoint import describe_base, load, save
from hwprune.cost import count_macs
from hwprune.families import timm_vit
from hwprune.layers import BlockSparseLinear
from hwprune.memory_cost import plan_weight_bytes
from hwprune.operations import count_operations
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.pruning import prune
from hwprune.realise import masked, realise_
from hwprune.structure import describe
from hwprune.tiling import find_units
from hwprune.units import Mask, full_mask

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")


def padded(op: Op) -> float:
    """Tiles of one size alone pay, at half the price of dense work; it fits no width of a cut layer."""
    if op.impl != "block_sparse":
        return op.macs
    return op.macs * (0.5 if op.block == (32, 16) else 9.0)


def planned(
    model: nn.Module, seconds: Any, budget: Budget, kinds: Any = None
) -> tuple[Plan, Mask, Any]:
    units = find_units(model, kinds, (32, 32), TILES)
    curves, cost = problem(model, units, 0, image())
    for curve in curves.values():  # dropping a tile costs more than dropping whole units
        if curve.units.kind == "block":
            curve.distortion.mul_(1e4)
    device: Any = Device(seconds, model)
    plan = offer(model, curves, cost, pricer=device).plan(budget)
    return plan, {**full_mask(units), **select(curves, plan)}, units


def test_a_budget_that_tiles_alone_reach_removes_nothing() -> None:
    model, x = vit(), image(3)
    plan, mask, units = planned(model, cheap, Budget(latency=0.7))
    assert plan.distortion == 0 and all(bool(grid.all()) for grid in mask.values())
    assert plan.tiles
    with torch.no_grad():
        expected = model(x)
        shape = realise_(model, units, mask, plan.tiles)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert set(shape) == set(plan.tiles)
    ops = count_operations(model, image(BATCH), partly=True).ops
    assert sum(map(cheap, ops)) == pytest.approx(plan.latency_s, rel=1e-9)


@pytest.mark.parametrize("latency", [0.4, 0.35])
def test_what_whole_units_leave_runs_as_tiles_and_costs_what_is_said(
    latency: float, tmp_path: Path
) -> None:
    model, x = vit(), image(3)
    base = describe_base(model)
    plan, mask, units = planned(model, padded, Budget(latency=latency))
    cut = [s for s in plan.structure.values() if s.weights is None and s.tiles]
    assert any(s.neurons is not None and s.neurons < 4 * DIM for s in cut)
    assert any(s.heads is not None and s.heads < 4 for s in cut)
    with masked(model, units, mask), torch.no_grad():
        expected = model(x)
    small = copy.deepcopy(model)
    shape = realise_(small, units, mask, plan.tiles)
    with torch.no_grad():
        assert torch.allclose(small(x), expected, atol=1e-5)
    found = {n: m.block for n, m in small.named_modules() if isinstance(m, BlockSparseLinear)}
    assert found == plan.tiles
    ops = count_operations(small, image(BATCH), partly=True).ops
    assert sum(map(padded, ops)) == pytest.approx(plan.latency_s, rel=1e-9)
    assert plan.macs == count_macs(small, x[:1])
    assert plan.params == sum(p.numel() for p in small.parameters())
    layers, _ = timm_vit.find_layers(model)
    held = [*small.parameters(), *small.buffers()]
    stored = sum(t.numel() * t.element_size() for t in held)
    assert plan_weight_bytes(model, layers, plan.structure) == stored

    spec = {"version": 1, "base": base, "shape": shape, "kinds": ["head"], "report": {}}
    small.hwprune_spec = spec  # type: ignore[assignment]
    save(small, tmp_path / "tiles")
    save(small, tmp_path / "dense", format="dense")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "tiles")(x), small(x))
        assert torch.allclose(load(tmp_path / "dense")(x), expected, atol=1e-5)
    rows = {row["layer"]: row for row in describe(tmp_path / "tiles")["layers"]}
    for name, structure in plan.structure.items():
        if structure.neurons is not None:
            assert rows[name]["neurons"] == [structure.neurons, 4 * DIM]
        elif structure.weights is None:
            assert rows[name]["heads"][0] == structure.heads


def test_a_linear_of_a_layer_that_went_cannot_be_stored_as_tiles() -> None:
    model = vit()
    units = timm_vit.find_units(model, ["neuron"])
    mask = full_mask(units)
    mask["blocks.0.mlp:neuron"][:] = False
    with pytest.raises(AttributeError, match="fc1"):
        realise_(model, units, mask, {"blocks.0.mlp.fc1": (32, 32)})


# --- end to end ----------------------------------------------------------------------------------


def operations() -> Iterator[Op]:
    """All that a plan of this model may have, in both implementations."""
    m, inputs = 8 * 17, 3 * 4 * 4
    for n, k in itertools.product(range(8, 4 * DIM + 1, 8), repeat=2):
        if DIM in (n, k):
            yield Op("linear", (m, n, k), "fp32")
    yield Op("linear", (m - 8, DIM, inputs), "fp32")
    yield Op("linear", (8, 5, DIM), "fp32")
    for tile in ((32, 32), (64, 64)):
        for n, k in (
            (4 * DIM, DIM),
            (DIM, 4 * DIM),
            (3 * DIM, DIM),
            (DIM, DIM),
            (128, 128),
            (32, 64),
        ):
            grid = -(-n // tile[0]) * -(-k // tile[1])
            for kept in range(1, grid + 1):
                yield Op.tiles((m, n, k), "fp32", tile, kept)
    for h, d, e in itertools.product(range(1, 5), range(2, 17, 2), range(2, 17, 2)):
        yield Op("attention", (8, h, 17, d, e), "fp32")
    for n in range(8, 4 * DIM + 1, 8):
        yield Op("gelu", (m, n), "fp32")
    yield Op("layer_norm", (m, DIM), "fp32")


@pytest.mark.parametrize(("rate", "pays"), [(0.4, True), (1.3, False)])
def test_prune_takes_tiles_exactly_where_the_profile_says_that_they_pay(
    rate: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(op: Op) -> float:
        return op.macs * 1e-9 * (rate if op.impl == "block_sparse" else 1.0)

    costs = CostModel(profile_of({op: seconds(op) for op in set(operations())}))
    monkeypatch.setattr(contract_, "device_costs", lambda *_, **__: costs)
    model = vit()
    batches = [
        torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    report = prune(model, batches, Budget(latency=0.6), device="fake", repair=False)
    assert ("block" in report.kinds) == pays
    tiled = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert bool(tiled) == pays
    told = report.to_dict()
    assert told["predicted"]["latency_ratio"]["value"] <= 0.6
    # Half the latency is in the tiles: with them next to nothing has to go.
    assert (report.macs_ratio > 0.9) == pays
    structured = vit()
    kinds = ("head", "neuron", "qk", "vo")
    alone = prune(
        structured, batches, Budget(latency=0.6), device="fake", kinds=kinds, repair=False
    )
    assert not any(isinstance(m, BlockSparseLinear) for m in structured.modules())
    assert report.distortion["predicted"] <= alone.distortion["predicted"] * (1 + 1e-6)
