"""Predicted MACs and parameters against the realised model, a formula on paper and fvcore."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hwprune.allocate import Budget, Plan, allocate, select
from hwprune.cost import ModelCost, count_macs, model_cost
from hwprune.distortion import Curve
from hwprune.layers import BlockSparseLinear
from hwprune.options import option_groups
from hwprune.realise import realise_
from hwprune.units import full_mask, get_linear, layers_of

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


def check_costs(model: nn.Module, curves: Mapping[str, Curve], plan: Plan) -> None:
    """The plan's figures are those of the realised model, to the last MAC and parameter."""
    small = copy.deepcopy(model)
    units = [c.units for c in curves.values()]
    realise_(small, units, {**full_mask(units), **select(curves, plan)})
    assert plan.macs == count_macs(small, IMAGE)
    assert plan.params == sum(p.numel() for p in small.parameters())


MODELS = {
    "plain": {},
    "without biases": {"qkv_bias": False, "proj_bias": False},
    "qk-norm": {"qk_norm": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "average pool": {"global_pool": "avg", "class_token": False},
    "features": {"num_classes": 0},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "gated, packed": {"name": "vit_giant_patch14_dinov2"},
    "gated, apart": {"name": "vit_small_plus_patch16_dinov3"},
    "rotary": {"name": "vit_small_patch16_rope_224"},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_predicted_macs_and_parameters_are_those_of_the_realised_model(
    changes: dict[str, object],
) -> None:
    model, curves, cost = problem(None, 2, **changes)
    for macs in (0.5, 0.7, 0.9):  # the gated one of EVA keeps its attention, 0.44
        plan = allocate(model, curves, cost, Budget(macs=macs))
        assert plan.macs <= macs * cost.macs
        check_costs(model, curves, plan)


def test_an_emptied_attention_with_norms_of_its_own_is_counted_without_them() -> None:
    model, curves, cost = problem(None, 2, qk_norm=True)
    plan = allocate(model, curves, cost, Budget(macs=0.2))
    assert 0 in [structure.heads for structure in plan.structure.values()]
    check_costs(model, curves, plan)


@pytest.mark.parametrize("block", [(12, 12), (16, 10), (7, 24), (20, 20)])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "proj_bias": False}])
def test_predicted_costs_of_tiles_are_exact_also_where_border_tiles_are_padded(
    block: tuple[int, int], changes: dict[str, object]
) -> None:
    model, curves, cost = problem(["block"], 2, block, **changes)
    for macs in (0.35, 0.6, 0.95):
        plan = allocate(model, curves, cost, Budget(macs=macs))
        assert plan.macs <= macs * cost.macs
        check_costs(model, curves, plan)


@pytest.mark.parametrize("block", [(20, 20), (16, 10), (64, 64)])
def test_every_option_of_tiles_costs_what_is_stored_and_none_more_than_dense(
    block: tuple[int, int],
) -> None:
    model, curves, cost = problem(["block"], 2, block)
    for _, options in option_groups(model, curves, cost):
        for option in options:
            ((name, kept),) = option.keep.items()
            linear = get_linear(model, name.removesuffix(":block"))
            sparse = BlockSparseLinear.from_dense(linear, curves[name].kept(kept), block)
            stored = sparse.values.numel()
            if kept == curves[name].units.count:
                stored = linear.weight.numel()
            assert option.params == stored <= linear.weight.numel()
            assert option.macs == 17 * stored


def test_predicted_costs_are_exact_where_tiles_and_whole_units_compete() -> None:
    model, curves, cost = problem(["head", "neuron", "block"], 4, (16, 10))
    for macs in (0.35, 0.6, 0.85):
        check_costs(model, curves, allocate(model, curves, cost, Budget(macs=macs)))


def by_hand(model: nn.Module) -> float:
    """MACs of the dense ViT on 16x16 images, from the textbook formula."""
    tokens, width, hidden = 17, 24, 96
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    return 2 * block + 16 * width * 3 * 16 + width * 5


def test_dense_macs_follow_the_textbook_formula() -> None:
    assert count_macs(vit(), IMAGE) == by_hand(vit())


def test_macs_are_those_of_one_image_whatever_the_batch() -> None:
    assert count_macs(vit(), IMAGE.expand(3, -1, -1, -1)) == by_hand(vit())


def test_counting_leaves_training_mode_as_it_was() -> None:
    model = vit().train()
    count_macs(model, IMAGE)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kinds", [None, ["block"]])
def test_true_macs_agree_with_fvcore_to_a_thousandth(kinds: list[str] | None) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model, curves, cost = problem(kinds, 2)
    plan = allocate(model, curves, cost, Budget(macs=0.6))
    units = [c.units for c in curves.values()]
    realise_(model, units, {**full_mask(units), **select(curves, plan)})

    def attention(inputs: Sequence[object], outputs: Sequence[object]) -> float:
        (b, h, t, d), v = inputs[0].type().sizes(), inputs[2].type().sizes()  # type: ignore[attr-defined]
        return b * h * t * t * (d + v[-1])

    counter = fvcore.FlopCountAnalysis(model, IMAGE).unsupported_ops_warnings(False)
    counter.set_op_handle("aten::scaled_dot_product_attention", attention)

    def tiles(inputs: Sequence[object], outputs: Sequence[object]) -> float:
        x, values = (i.type().sizes() for i in inputs[:2])  # type: ignore[attr-defined]
        return float(torch.Size(x[:-1]).numel() * torch.Size(values).numel())

    counter.set_op_handle("hwprune::block_sparse_linear", tiles)
    counter.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel of a CPU pads q, k and v to one width
        assert counter.total() == pytest.approx(plan.macs, rel=1e-3)


def test_tokens_are_counted_on_one_image_also_where_the_batch_has_more() -> None:
    model = vit()
    units = timm_vit.find_units(model, ["neuron"])
    batch: Tensor = IMAGE.expand(4, -1, -1, -1)
    cost = model_cost(model, layers_of(units), batch)
    assert set(cost.tokens.values()) == {17}
    assert cost.macs == by_hand(model)


def test_the_fixed_cost_is_all_that_is_no_prunable_layer() -> None:
    model = vit()
    cost = model_cost(model, layers_of(timm_vit.find_units(model)), IMAGE)
    assert cost.fixed_macs == 16 * 24 * 3 * 16 + 24 * 5  # patch embedding and classifier
    inside = sum(
        p.numel() for name, p in model.named_parameters() if ".attn." in name or ".mlp." in name
    )
    assert cost.fixed_params == cost.params - inside
