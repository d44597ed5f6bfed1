"""A realised model against the same model with zeros: every kind, every family of timm ViT we cut."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hwprune.layers import BlockSparseLinear, ConstantBranch, SlimAttention
from hwprune.realise import Shape, masked, realise_, reshape_
from hwprune.units import Mask, Units

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

PLAIN = "vit_tiny_patch16_224"
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": (PLAIN, {}),
    "layer scale": (PLAIN, {"init_values": 0.1}),
    "qk-norm": (PLAIN, {"qk_norm": True}),
    "norm in the mlp": (PLAIN, {"scale_mlp_norm": True}),
    "norm in the attention": (PLAIN, {"scale_attn_norm": True}),
    "registers": (PLAIN, {"reg_tokens": 3, "no_embed_class": True}),
    "average pool": (PLAIN, {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "attention pool": (PLAIN, {"global_pool": "map", "class_token": False}),
    "no biases": (PLAIN, {"qkv_bias": False, "proj_bias": False}),
    "features": (PLAIN, {"num_classes": 0}),
    "dropout": (PLAIN, {"attn_drop_rate": 0.25, "proj_drop_rate": 0.5}),
    "ragged heads": (PLAIN, {"embed_dim": 33, "num_heads": 3}),
    "one head": (PLAIN, {"num_heads": 1}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {}),
    "gated mlp, packed": ("vit_giant_patch14_dinov2", {}),
    "gated mlp, apart": ("vit_small_plus_patch16_dinov3", {}),
    "gated mlp, attention unfused": ("eva02_tiny_patch14_224", {}),
    "rotary": ("vit_small_patch16_rope_224", {}),
    "rotary, absolute too": ("vit_small_patch16_rope_ape_224", {}),
    "rotary, unfused": ("vit_small_patch16_rope_224", {"qkv_fused": False}),
    "rotary, learned per head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, by halves": ("vit_small_patch16_rope_224", {"rope_rotate_half": True}),
    "rotary of PE": ("vit_pe_core_tiny_patch16_384", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "position biases": ("vit_relpos_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "talking heads": ("cait_xxs24_224", {}),
}
PAIRS = list(itertools.combinations(["head", "neuron", "qk", "vo"], 2))
each_model = pytest.mark.parametrize("which", MODELS)


def build(which: str = "plain", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A small model with weights that all matter, and two images."""
    name, changes = MODELS[which]
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model(name, **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype).eval(), torch.randn(2, 3, 16, 16, dtype=dtype)


def kinds_of(model: nn.Module) -> list[str]:
    return sorted({u.kind for u in timm_vit.find_units(model)})


def some(units: Sequence[Units], seed: int = 1) -> Mask:
    """A random mask that keeps about 60 % and at least one unit of each group."""
    generator, mask = torch.Generator().manual_seed(seed), {}
    for unit in units:
        grid = torch.rand(unit.shape, generator=generator) < 0.6
        grid.view(-1)[0] = True
        grid.view(-1)[-1] = False
        mask[unit.name] = grid if unit.count > 1 else torch.ones(unit.shape, dtype=torch.bool)
    return mask


def keep(units: Sequence[Units], name: str, kept: bool) -> Mask:
    (unit,) = (u for u in units if u.name == name)
    return {name: torch.full(unit.shape, kept)}


def check_same(model: nn.Module, x: Tensor, units: Sequence[Units], mask: Mask) -> Shape:
    """Zeroed and realised outputs agree to rounding, and differ from the dense ones."""
    with torch.no_grad():
        dense = model(x)
        with masked(model, units, mask):
            zeroed = model(x)
        small = copy.deepcopy(model)
        shape = realise_(small, units, mask)
        realised = small(x)
    assert float((zeroed - dense).abs().max()) > 1e-3
    # Dense outputs are of size 1; RoPE tables and GELUs keep a few float32 digits in float64 models.
    assert float((realised - zeroed).abs().max()) < 1e-6
    return shape


@each_model
def test_realised_and_zeroed_models_agree_when_all_kinds_are_cut_at_once(which: str) -> None:
    model, x = build(which)
    units = timm_vit.find_units(model)
    check_same(model, x, units, some(units))


@each_model
def test_realised_and_zeroed_models_agree_for_each_kind_alone(which: str) -> None:
    model, x = build(which)
    for kind in kinds_of(model):
        units = [u for u in timm_vit.find_units(model) if u.kind == kind]
        if all(u.count > 1 for u in units):
            check_same(model, x, units, some(units))


@each_model
@pytest.mark.parametrize("block", [(8, 8), (7, 10)])
def test_realised_and_zeroed_models_agree_for_tiles(which: str, block: tuple[int, int]) -> None:
    model, x = build(which)
    units = timm_vit.find_units(model, ["block"], block=block)
    check_same(model, x, units, some(units))


@pytest.mark.parametrize("kinds", PAIRS)
def test_realised_and_zeroed_models_agree_for_each_pair_of_kinds(kinds: tuple[str, str]) -> None:
    model, x = build()
    units = timm_vit.find_units(model, list(kinds))
    check_same(model, x, units, some(units))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_realised_and_zeroed_models_agree_in_lower_precision(dtype: torch.dtype) -> None:
    model, x = build(dtype=dtype)
    units = timm_vit.find_units(model)
    mask = some(units)
    with torch.no_grad(), masked(model, units, mask):
        zeroed = model(x)
    realise_(model, units, mask)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        realised = model(x)
    assert realised.dtype == dtype
    error = float((realised - zeroed).float().norm() / zeroed.float().norm())
    assert error < 100 * torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 10)


def test_layers_the_mask_leaves_out_stay_the_same_objects() -> None:
    model, _ = build()
    units = timm_vit.find_units(model)
    before = dict(model.named_modules())
    realise_(model, units, keep(units, "blocks.1.mlp:neuron", False))
    for name in ("blocks.0.attn", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        assert model.get_submodule(name) is before[name]


def test_neurons_leave_stock_linears_behind() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["neuron"])
    shape = realise_(model, units, {u.name: torch.arange(96) % 3 > 0 for u in units})
    for name in ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        assert type(model.get_submodule(name)) is nn.Linear
    assert shape == {f"blocks.{i}.mlp": {"type": "mlp", "neurons": 64} for i in range(2)}


def test_heads_leave_an_attention_of_the_kept_heads_behind() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["head"])
    mask = {u.name: torch.tensor([True, False, True]) for u in units}
    shape = realise_(model, units, mask)
    assert shape["blocks.0.attn"] == {"type": "attention", "heads": 2, "qk": 8, "v": 8}
    assert isinstance(model.get_submodule("blocks.0.attn"), SlimAttention)


def test_tiles_leave_block_sparse_linears_behind() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["block"], block=(16, 10))
    mask = some(units)
    shape = realise_(model, units, mask)
    name = "blocks.0.attn.qkv"
    kept = int(mask[f"{name}:block"].sum())
    assert shape[name] == {"type": "block", "block": [16, 10], "kept": kept}
    layer = model.get_submodule(name)
    assert isinstance(layer, BlockSparseLinear) and len(layer.values) == kept


@pytest.mark.parametrize(
    "name", ["blocks.0.mlp:neuron", "blocks.0.attn:head", "blocks.0.attn:vo", "blocks.1.mlp:neuron"]
)
@pytest.mark.parametrize("which", ["plain", "no biases", "layer scale"])
def test_a_branch_with_nothing_left_contributes_exactly_its_bias(which: str, name: str) -> None:
    model, x = build(which)
    units = timm_vit.find_units(model)
    layer = next(u.layer for u in units if u.name == name)
    bias = model.get_submodule(layer.out).bias
    expected = torch.zeros(24).double() if bias is None else bias.detach().clone()
    shape = check_same(model, x, units, keep(units, name, False))
    assert shape == {layer.name: {"type": "constant", "features": 24}}
    realise_(model, units, keep(units, name, False))
    branch = model.get_submodule(layer.name)
    assert isinstance(branch, ConstantBranch)
    out = branch(torch.randn(2, 17, 24, dtype=torch.float64))
    assert torch.equal(out, expected.expand(2, 17, 24))


def test_a_model_with_every_branch_empty_still_runs() -> None:
    model, x = build()
    units = timm_vit.find_units(model, ["head", "neuron"])
    mask = {u.name: torch.zeros(u.shape, dtype=torch.bool) for u in units}
    check_same(model, x, units, mask)


def test_a_bias_of_an_emptied_branch_can_be_written_to_without_touching_the_output_of_before() -> (
    None
):
    branch = ConstantBranch(3, torch.tensor([1.0, 2.0, 3.0]))
    with torch.no_grad():
        out = branch(torch.zeros(2, 3))
        out.add_(1)
    assert branch.bias.tolist() == [1.0, 2.0, 3.0]


def test_zeroing_restores_every_weight_bit_for_bit() -> None:
    model, _ = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    units = timm_vit.find_units(model)
    with pytest.raises(KeyError), masked(model, units, some(units)):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        raise KeyError
    assert len(changed) == 2 * 6  # weights and biases of qkv and fc1, weights of proj and fc2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_zeroing_turns_nan_in_what_is_dropped_into_zeros() -> None:
    model, x = build()
    units = timm_vit.find_units(model, ["neuron"])
    mask = {u.name: torch.arange(96) != 5 for u in units}
    model.get_parameter("blocks.0.mlp.fc2.weight").data[:, 5] = float("nan")
    with torch.no_grad(), masked(model, units, mask):
        assert bool(torch.isfinite(model(x)).all())


def test_parameters_that_were_frozen_stay_frozen_in_smaller_linears() -> None:
    model, _ = build()
    model.get_submodule("blocks.0.mlp").requires_grad_(False)
    units = timm_vit.find_units(model, ["neuron"])
    realise_(model, units, some(units))
    assert not any(p.requires_grad for p in model.get_submodule("blocks.0.mlp").parameters())
    assert all(p.requires_grad for p in model.get_submodule("blocks.1.mlp").parameters())


@pytest.mark.parametrize("training", [True, False])
def test_rebuilt_layers_keep_the_mode_of_those_they_replace(training: bool) -> None:
    model, _ = build()
    model.train(training)
    units = timm_vit.find_units(model)
    realise_(model, units, some(units))
    assert {module.training for module in model.modules()} == {training}


def test_dropout_rates_survive_in_the_smaller_attention() -> None:
    model, x = build("dropout")
    units = timm_vit.find_units(model, ["head"])
    realise_(model, units, some(units))
    slim = model.get_submodule("blocks.0.attn")
    assert isinstance(slim, SlimAttention)
    assert (slim.attn_drop_p, slim.proj_drop_p) == (0.25, 0.5)
    assert torch.equal(model(x), model(x))  # eval: no dropout
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_mask_that_keeps_everything_is_refused() -> None:
    model, _ = build()
    units = timm_vit.find_units(model)
    with pytest.raises(ValueError, match="the mask keeps everything"):
        realise_(model, units, {})


def test_a_layer_cut_by_tiles_and_whole_units_at_once_is_refused_by_name() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["neuron", "block"])
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: cut by blocks and by whole units"):
        realise_(model, units, some(units))


def test_heads_without_any_q_and_k_channel_are_refused_by_name() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["qk"])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: no q/k channel left"):
        realise_(model, units, keep(units, "blocks.0.attn:qk", False))


def test_a_mask_of_another_model_is_refused() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["head"])
    with pytest.raises(ValueError, match=r"expected a mask of shape \(3,\), got \(4,\)"):
        realise_(model, units, {"blocks.0.attn:head": torch.zeros(4, dtype=torch.bool)})


def reshaped(which: str, shape: Shape) -> nn.Module:
    fresh, _ = build(which)
    reshape_(fresh, timm_vit.find_layers(fresh)[0], shape)
    return fresh


@each_model
def test_a_fresh_model_given_the_shape_takes_the_weights_and_computes_the_same(which: str) -> None:
    model, x = build(which)
    units = timm_vit.find_units(model)
    shape = realise_(model, units, some(units))
    fresh = reshaped(which, shape)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_a_shape_with_emptied_branches_and_tiles_is_given_to_a_fresh_model_too() -> None:
    model, x = build()
    units = timm_vit.find_units(model, ["head", "neuron", "block"], block=(7, 10))
    mask = keep(units, "blocks.0.attn:head", False) | keep(units, "blocks.1.mlp:neuron", False)
    mask |= some([u for u in units if u.name.startswith("blocks.1.attn.qkv:")])
    shape = realise_(model, units, mask)
    fresh = reshaped("plain", shape)
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_a_shape_is_plain_data_that_survives_json() -> None:
    model, _ = build()
    units = timm_vit.find_units(model, ["head", "neuron"])
    shape = realise_(model, units, some(units))
    assert json.loads(json.dumps(shape)) == shape


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"blocks.9.attn": {"type": "constant"}}, r"blocks\.9\.attn: .* fits no layer"),
        ({"blocks.0.mlp": {"type": "conv"}}, r"blocks\.0\.mlp: .* fits no layer"),
        ({"blocks.0.mlp": {"type": "block", "kept": 1}}, r"blocks\.0\.mlp: .* fits no layer"),
        ({"blocks.0.mlp": {"type": "mlp"}}, "expected neurons between 1 and 96, got None"),
        ({"blocks.0.mlp": {"type": "mlp", "neurons": 97}}, "between 1 and 96, got 97"),
        ({"blocks.0.mlp": {"type": "mlp", "neurons": True}}, "between 1 and 96, got True"),
        (
            {"blocks.0.attn": {"type": "attention", "heads": 4, "qk": 8, "v": 8}},
            r"blocks\.0\.attn: expected heads between 1 and 3, got 4",
        ),
        (
            {"blocks.0.attn": {"type": "attention", "heads": 1, "qk": 0, "v": 8}},
            "expected qk between 1 and 8, got 0",
        ),
        (
            {"blocks.0.mlp.fc1": {"type": "block", "kept": 3}},
            r"blocks\.0\.mlp\.fc1: expected block \[rows, cols\], got None",
        ),
        (
            {"blocks.0.mlp.fc1": {"type": "block", "block": [32, 0], "kept": 3}},
            "expected cols between 1 and",
        ),
        (
            {"blocks.0.mlp.fc1": {"type": "block", "block": [32, 24], "kept": 4}},
            r"expected kept tiles within \(3, 1\), got 4",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_the_name_of_the_layer(
    shape: Shape, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        reshaped("plain", shape)
