"""Prices of a denoiser's layers: what the realised model's own operations add up to, for every mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoiser_cost import module_macs
from hwprune.denoiser_operations import evaluation_operations
from hwprune.denoiser_price import LayerTables, Prices, layer_tables, worthwhile
from hwprune.denoiser_reach import denoiser_ops
from hwprune.denoisers import Denoiser
from hwprune.families import dit, mmdit, qwen_image, sana, unet
from hwprune.families.denoiser import find_layers, find_units
from hwprune.gating import Layout
from hwprune.network import NetworkModel
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.prices import Price, lower_hull, table_price
from hwprune.realise import realise_

pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
)

from fakes.denoiser_device import costs_for, counted_in, truth_s
from fakes.profiles import profile_of

FAMILIES = [
    dit.tiny,
    dit.tiny_pixart,
    unet.tiny,
    mmdit.tiny,
    mmdit.tiny_sd3,
    sana.tiny,
    qwen_image.tiny,
]
ALL = ["head", "neuron", "depth"]


def priced(
    made: tuple[nn.Module, Tensor, dict[str, Any]],
    truth: Callable[[Op], float] = truth_s,
    kinds: list[str] | None = None,
    rest_s: float = 0.0,
) -> tuple[Layout, LayerTables, Price, float]:
    """Layout, tables, the price by them, and what the dense model's operations take."""
    model, latent, inputs = made
    counted = counted_in(model, latent, inputs)
    prices = Prices(NetworkModel(costs_for(model, counted, truth)))
    tables = layer_tables(prices, find_layers(model)[0], counted)
    layout = Layout(find_units(model, kinds or ALL))
    whole = sum(map(truth, counted.ops)) + rest_s
    seconds, blocks = tables.of("latency")
    mine = {name: table for name, table in seconds.items() if name in layout.places}
    return layout, tables, table_price(layout, mine, whole, blocks), whole


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_operations_and_what_is_named_beside_them_are_all_that_multiplies(make: Any) -> None:
    model, latent, inputs = make()
    denoise = Denoiser(model, inputs)

    def call() -> Tensor:
        return denoise(latent, torch.tensor(500))

    counted = evaluation_operations(model, call)
    # Cross-attention of 16 by 5 tokens counts as self-attention of 9: by the unrounded number it is equal.
    crossed = sum(abs(op.macs) for op in counted.ops if op.kind == "attention")
    ours = sum(op.macs for op in counted.ops if op.kind in ("linear", "attention"))
    ours += sum(counted.left_out.values())
    assert ours == pytest.approx(module_macs(model, call, 1)[""], abs=0.05 * crossed + 1)
    convolutions = [name for name in counted.left_out if "conv" in name]
    assert bool(convolutions) == (make in (unet.tiny, sana.tiny))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [dit.tiny, unet.tiny, mmdit.tiny_sd3, qwen_image.tiny])
def test_a_price_is_the_sum_of_the_realised_models_operations(make: Any) -> None:
    made = make()
    model, latent, inputs = made
    rest_s = 3e-5  # of what is no operation: convolutions, additions
    layout, tables, price, whole = priced(made, rest_s=rest_s)
    draw = torch.Generator().manual_seed(0)
    for trial in range(6):
        keep = torch.ones(layout.count, dtype=torch.bool)
        for unit in layout.units:
            place = layout.places[unit.name]
            if unit.kind == "depth":
                keep[place] = trial < 3 or bool(torch.rand(1, generator=draw) < 0.7)
                continue
            count = int(torch.randint(0, unit.count + 1, (1,), generator=draw))
            count = int(tables.steps[unit.name][count])  # what a mask is filled up to
            keep[place] = torch.randperm(unit.count, generator=draw) < count
        small = copy.deepcopy(model)
        realise_(small, layout.units, layout.mask(keep))
        found = sum(map(truth_s, counted_in(small, latent, inputs).ops)) + rest_s
        assert float(price(keep.double())) == pytest.approx(found / whole, rel=1e-9)


def test_what_heads_and_neurons_share_is_shared_out_between_them() -> None:
    model, latent, inputs = made = mmdit.tiny()  # FLUX's single blocks: one projection reads both
    layout, _, price, whole = priced(made, kinds=["head", "neuron"])
    keep = torch.zeros(layout.count, dtype=torch.bool)
    small = copy.deepcopy(model)
    realise_(small, layout.units, layout.mask(keep))
    found = sum(map(truth_s, counted_in(small, latent, inputs).ops))
    # The launches of the shared projections are nobody's: 1 us each, in two blocks.
    assert float(price(keep.double())) == pytest.approx(found / whole, abs=2.1e-6 / whole)
    assert float(price(torch.ones(layout.count).double())) == pytest.approx(1)


def test_prices_never_fall_and_no_count_is_worth_it_that_a_larger_one_beats() -> None:
    def stepped(op: Op) -> float:
        """Tiles of 32: a number of neurons that no tile divides costs a third more than the next."""
        if op.kind != "linear":
            return truth_s(op)
        m, n, k = op.shape
        odd = 4 / 3 if max(n, k) % 32 else 1.0
        return odd * (1e-6 + m * -(-n // 32) * -(-k // 32) * 32 * 32 * 1e-11)

    layout, tables, price, _ = priced(dit.tiny(), stepped)
    name = "transformer_blocks.1.ff:neuron"
    table, steps = tables.seconds[name], tables.steps[name]
    assert bool((table.diff() >= 0).all()) and len(table) == 97
    assert bool((steps >= torch.arange(97)).all())
    good = sorted({*steps.tolist()})
    assert good[0] == 0 and good[-1] == 96 and all(count % 8 == 0 for count in good)
    for count in good[1:-1]:
        assert all(table[count] < table[more] for more in good if more > count)
    assert {32, 64} <= set(good) and 88 not in good
    keep = torch.zeros(layout.count, dtype=torch.float64)
    before = float(price(keep))
    for unit in torch.randperm(layout.count, generator=torch.Generator().manual_seed(0)).tolist():
        keep[unit] = 1
        now = float(price(keep))
        assert now >= before - 1e-12
        before = now


def test_units_of_a_removed_block_cost_nothing_and_a_block_costs_all_of_it() -> None:
    layout, _, price, whole = priced(dit.tiny())
    keep = torch.ones(layout.count, dtype=torch.float64)
    block = layout.places["transformer_blocks.2:depth"]
    keep[block] = 0
    gone = float(price(keep))
    keep[layout.places["transformer_blocks.2.ff:neuron"]] = 0
    assert float(price(keep)) == gone
    model, latent, inputs = dit.tiny()
    counted = counted_in(model, latent, inputs)
    inside = sum(truth_s(op) for name, op in counted.parts if ".2." in name)
    assert gone == pytest.approx(1 - inside / whole)
    keep = torch.ones(layout.count, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(price(keep), keep)
    assert float(slope[block]) == pytest.approx(inside / whole)
    assert bool((slope > 0).all())  # nothing looks free, though seven of eight neurons are


def test_energy_is_priced_where_the_device_has_it() -> None:
    model, latent, inputs = dit.tiny()
    counted = counted_in(model, latent, inputs)
    layers = find_layers(model)[0]
    with_power = layer_tables(
        Prices(NetworkModel(costs_for(model, counted, power_w=30.0))), layers, counted
    )
    for name, seconds in with_power.seconds.items():
        torch.testing.assert_close(with_power.of("energy")[0][name], 30 * seconds)
    without = layer_tables(Prices(NetworkModel(costs_for(model, counted))), layers, counted)
    assert without.joules is None


@pytest.mark.parametrize("make", [dit.tiny, unet.tiny, mmdit.tiny])
def test_a_profile_for_one_denoiser_is_enough_to_price_every_count(make: Any) -> None:
    made = model, latent, inputs = make()
    denoise = Denoiser(model, inputs)
    ops = denoiser_ops(model, lambda: denoise(latent, torch.tensor(500)))
    assert len(ops) == len(set(ops)) < 250
    _, exact, _, _ = priced(made)
    costs = CostModel(profile_of({op: truth_s(op) for op in ops}))
    found = layer_tables(Prices(NetworkModel(costs)), find_layers(model)[0], counted_in(*made))
    for name, table in exact.seconds.items():
        torch.testing.assert_close(found.seconds[name], table, rtol=0.1, atol=0)


def test_a_row_is_worth_it_where_each_column_is_below_all_later_ones() -> None:
    costs = torch.tensor([[0.0, 0.0], [3.0, 1.0], [2.0, 3.0], [2.5, 2.0], [4.0, 4.0]])
    assert worthwhile(costs).tolist() == [True, False, False, True, True]
    assert worthwhile(torch.ones(3, 1)).tolist() == [False, False, True]


def test_the_lower_hull_is_the_largest_convex_function_below() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = torch.rand(12, generator=draw).double().cumsum(0)
        hull = lower_hull(table)
        assert bool((hull <= table + 1e-12).all())
        assert bool((hull.diff().diff() >= -1e-12).all())
        # At each place it is the lowest chord between any two points around it.
        for i in range(12):
            chords = [
                table[a] + (table[b] - table[a]) * (i - a) / max(1, b - a)
                for a in range(i + 1)
                for b in range(i, 12)
            ]
            assert float(hull[i]) == pytest.approx(float(min(chords)))
