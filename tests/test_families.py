"""Every family's own examples, cut in every way they offer, refused by name in the others, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import families
from hwprune.allocate import Budget
from hwprune.checkpoint import load, save
from hwprune.cost import (
    Structure,
    count_macs,
    dense_structure,
    layer_macs,
    layer_params,
    model_cost,
)
from hwprune.distortion import curves
from hwprune.families.vision_units import linears_of
from hwprune.memory_cost import plan_weight_bytes, weight_bytes
from hwprune.operations import count_operations, layer_operations
from hwprune.pruning import prune
from hwprune.realise import masked, realise_, reshape_
from hwprune.statistics import calibrate, model_output
from hwprune.units import KINDS, AttentionLayer, Layer, Mask, Units, get_linear

pytest.importorskip("timm")

EXAMPLES = {
    f"{family}.{name}": (module, build)
    for family, module in families.every()
    for name, build in module.examples().items()
}
each_example = pytest.mark.parametrize("example", sorted(EXAMPLES))
each_kind = pytest.mark.parametrize("kind", KINDS)


def opened(example: str) -> tuple[Any, nn.Module, Tensor]:
    module, build = EXAMPLES[example]
    try:
        model, x = build()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return module, model.double(), x.double()


def units_of(module: Any, model: nn.Module, kind: str) -> list[Units]:
    """The units of a kind; where a layer refuses it, none, and by name."""
    layers, left = module.find_layers(model)
    reasons = {x.name: x.refused[kind] for x in layers if kind in x.refused}
    if kind != "block" and all(isinstance(x, AttentionLayer) == (kind == "neuron") for x in layers):
        with pytest.raises(ValueError, match=f"no layer of .* kinds {kind}: ") as caught:
            module.find_units(model, [kind])
        assert left and left[0] in str(caught.value)
        return []
    if not reasons:
        found: list[Units] = module.find_units(model, [kind], block=(20, 24))
        return found
    with pytest.raises(ValueError, match="cannot be removed exactly") as caught:
        module.find_units(model, [kind])
    assert any(
        name in str(caught.value) and why in str(caught.value) for name, why in reasons.items()
    )
    return []


def random_mask(units: list[Units]) -> Mask:
    generator, mask = torch.Generator().manual_seed(3), {}
    for unit in units:
        grid = torch.rand(unit.shape, generator=generator) < 0.6
        grid.view(-1)[0], grid.view(-1)[-1] = True, False
        mask[unit.name] = grid
    return mask


def test_each_family_is_a_file_with_examples_and_takes_its_own_alone() -> None:
    assert {example.partition(".")[0] for example in EXAMPLES} == {n for n, _ in families.every()}
    assert "timm_vit.vit" in EXAMPLES
    for example in EXAMPLES:
        module, model, _ = opened(example)
        assert (
            [f for _, f in families.every() if f.takes(model)] == [module] == [families.of(model)]
        )


def test_a_model_of_no_family_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"Linear is of no family .* expected one of") as caught:
        families.of(nn.Linear(2, 2))
    assert all(module.TAKES in str(caught.value) for _, module in families.every())


@each_example
def test_an_example_is_small_and_the_same_every_time(example: str) -> None:
    (_, first, x), (_, second, y) = opened(example), opened(example)
    assert torch.equal(x, y)
    assert sum(p.numel() for p in first.parameters()) < 1_000_000
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@each_example
@each_kind
def test_zeroed_and_realised_examples_agree(example: str, kind: str) -> None:
    module, model, x = opened(example)
    units = units_of(module, model, kind)
    if not units:
        return
    mask = random_mask(units)
    with torch.no_grad():
        dense = model_output(model, x)
        with masked(model, units, mask):
            zeroed = model_output(model, x)
        realise_(model, units, mask)
        realised = model_output(model, x)
    assert float((zeroed - dense).abs().max()) > 1e-6  # a hundred times what may differ
    torch.testing.assert_close(realised, zeroed, rtol=0, atol=1e-8)


@each_example
def test_examples_without_a_head_or_a_neuron_in_one_layer_agree(example: str) -> None:
    module, model, x = opened(example)
    units = [u for u in module.find_units(model) if u.kind in ("head", "neuron")]
    first = {kind: next(u for u in units if u.kind == kind) for kind in {u.kind for u in units}}
    mask = {u.name: torch.zeros(u.shape, dtype=torch.bool) for u in first.values()}
    with torch.no_grad():
        with masked(model, units, mask):
            zeroed = model_output(model, x)
        realise_(model, units, mask)
        torch.testing.assert_close(model_output(model, x), zeroed, rtol=0, atol=1e-8)


@each_example
@each_kind
def test_curves_of_an_example_rise_from_zero(example: str, kind: str) -> None:
    module, model, x = opened(example)
    units = units_of(module, model, kind)
    if not units:
        return
    for name, curve in curves(model, units, calibrate(model, units, [x])).items():
        assert float(curve.distortion[0]) == 0, name
        assert bool((curve.distortion.diff() >= 0).all()), name
        assert 0 < float(curve.distortion[-1]) < float("inf"), name


@each_example
@each_kind
def test_a_reshaped_example_loads_the_pruned_weights_and_computes_the_same(
    example: str, kind: str
) -> None:
    module, model, x = opened(example)
    units = units_of(module, model, kind)
    if not units:
        return
    shape = realise_(model, units, random_mask(units))
    _, fresh, _ = opened(example)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    reshape_(fresh, module.find_layers(fresh)[0], shape)
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model_output(fresh, x), model_output(model, x))


@each_example
def test_the_linears_of_layers_are_there_and_the_stages_hold_them(example: str) -> None:
    module, model, _ = opened(example)
    layers, _ = module.find_layers(model)
    assert layers
    stages = module.stages(model)
    for layer in layers:
        inside = {id(m) for m in stages[layer.stage].modules()}
        assert id(model.get_submodule(layer.name)) in inside
        for name in linears_of(layer):
            assert id(get_linear(model, name)) in inside


@each_example
@each_kind
def test_no_entry_of_a_parameter_belongs_to_two_units_of_one_kind(example: str, kind: str) -> None:
    module, model, _ = opened(example)
    for unit in units_of(module, model, kind):
        for part in unit.slices:
            if part.index is not None:
                flat = part.index.flatten().tolist()
                assert len(flat) == len(set(flat)), unit.name


def structure(layer: Layer, units: list[Units], mask: Mask) -> Structure:
    """What a mask of whole units leaves of a layer."""
    kept = {u.kind: int(mask[u.name].sum()) for u in units if u.layer.name == layer.name}
    dense = dense_structure(layer)
    if isinstance(layer, AttentionLayer):
        heads, qk = kept.get("head", dense.heads), kept.get("qk", dense.qk)
        return Structure(heads=heads, qk=qk, v=kept.get("vo", dense.v))
    return Structure(neurons=kept.get("neuron", dense.neurons))


@each_example
def test_the_costs_of_cut_layers_are_what_torch_counts_of_the_realised_example(
    example: str,
) -> None:
    module, model, x = opened(example)
    _, dense, _ = opened(example)
    layers, units = module.find_layers(model)[0], module.find_units(model)
    cost, mask = model_cost(model, layers, x), random_mask(units)
    assert cost.fixed_macs >= 0 and cost.fixed_params >= 0
    realise_(model, units, mask)
    kept = {layer.name: structure(layer, units, mask) for layer in layers}
    macs = [layer_macs(dense, y, kept[y.name], cost.tokens[y.name]) for y in layers]
    params = [layer_params(dense, y, kept[y.name]) for y in layers]
    assert count_macs(model, x[:1]) == cost.fixed_macs + sum(macs)
    assert sum(p.numel() for p in model.parameters()) == cost.fixed_params + sum(params)
    assert weight_bytes(model) == plan_weight_bytes(dense, layers, kept)


@each_example
def test_the_operations_of_a_cut_example_are_known_before_it_is_realised(example: str) -> None:
    module, model, x = opened(example)
    dense, model, x = opened(example)[1].float(), model.float(), x.float()
    layers, units = module.find_layers(model)[0], module.find_units(model)
    mask = random_mask(units)
    kept = {layer.name: structure(layer, units, mask) for layer in layers}
    realise_(model, units, mask)
    found = count_operations(model, x, partly=True).parts
    for layer in layers:
        inside = [op for name, op in found if f"{name}.".startswith(f"{layer.name}.")]
        whole = count_operations(dense, x, partly=True).parts
        first = next(op for name, op in whole if name.startswith(f"{layer.name}."))
        ops = layer_operations(
            dense, layer, kept[layer.name], images=2, tokens=first.shape[0] // 2, dtype="fp32"
        )
        assert sorted(map(str, inside)) == sorted(map(str, ops)), layer.name


@each_example
def test_an_example_goes_the_whole_road_to_a_folder_and_back(example: str, tmp_path: Path) -> None:
    _, model, x = opened(example)
    model, x = model.float(), x.float()
    report = prune(model, [x, x.flip(0)], Budget(macs=0.75), round_to=4)
    assert report.macs <= 0.75 * report.dense_macs * 1.001
    save(model, tmp_path / "pruned")
    again = load(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(model_output(again, x), model_output(model.eval(), x))


@pytest.mark.parametrize("example", ["hf_vit.clip", "swin.v1", "timm_vit.deit distilled"])
def test_lpvit_s_objective_takes_every_family(example: str) -> None:
    _, model, x = opened(example)
    model, x = model.float(), x.float()
    report = prune(model, [x], Budget(macs=0.75), objective="lpvit", block=(8, 12))
    assert 0.7 < report.macs_ratio <= 0.75
