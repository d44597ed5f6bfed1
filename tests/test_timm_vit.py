"""What timm's plain vision transformers can be cut by, unit by unit; and what they refuse, by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hwprune.layers import BlockSparseLinear
from hwprune.realise import masked, realise_
from hwprune.units import AttentionLayer, Mask, Units, full_mask

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm


def random_mask(units: list[Units]) -> Mask:
    generator, mask = torch.Generator().manual_seed(3), {}
    for unit in units:
        grid = torch.rand(unit.shape, generator=generator) < 0.6
        grid.view(-1)[0], grid.view(-1)[-1] = True, False
        mask[unit.name] = grid
    return mask


def vit(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model(name, **{**args, "num_classes": 5, **changes}).eval()


def test_every_unit_of_a_vit_is_found_and_named_after_its_layer() -> None:
    names = [u.name for u in timm_vit.find_units(vit(depth=1))]
    assert names == [
        "blocks.0.attn:head",
        "blocks.0.attn:qk",
        "blocks.0.attn:vo",
        "blocks.0.mlp:neuron",
    ]


def test_tiles_cover_the_four_linears_of_a_block_and_no_other() -> None:
    units = timm_vit.find_units(vit(depth=1), ["block"], block=(16, 16))
    assert {u.name: u.shape for u in units} == {
        "blocks.0.attn.qkv:block": (5, 2),
        "blocks.0.attn.proj:block": (2, 2),
        "blocks.0.mlp.fc1:block": (6, 2),
        "blocks.0.mlp.fc2:block": (2, 6),
    }


def test_a_head_owns_its_rows_of_q_k_and_v_their_biases_and_its_output_columns() -> None:
    unit = timm_vit.find_units(vit(depth=1), ["head"])[0]
    own = {part.param: part.index[1].tolist() for part in unit.slices if part.index is not None}
    rows = [*range(8, 16), *range(32, 40), *range(56, 64)]
    assert own == {
        "blocks.0.attn.qkv.weight": rows,
        "blocks.0.attn.qkv.bias": rows,
        "blocks.0.attn.proj.weight": list(range(8, 16)),
    }


def test_a_neuron_of_a_packed_gated_mlp_owns_one_row_in_each_half() -> None:
    units = timm_vit.find_units(vit("vit_giant_patch14_dinov2"), ["neuron"])
    hidden = units[0].count
    own = {p.param: p.index[2].tolist() for p in units[0].slices if p.index is not None}
    assert own["blocks.0.mlp.fc1.weight"] == own["blocks.0.mlp.fc1.bias"] == [2, 2 + hidden]
    assert own["blocks.0.mlp.fc2.weight"] == [2]


def test_a_channel_of_q_and_k_is_cut_in_all_heads_of_both() -> None:
    unit = timm_vit.find_units(vit(depth=1), ["qk"])[0]
    assert unit.slices[0].index is not None
    assert unit.slices[0].index[3].tolist() == [3, 11, 19, 27, 35, 43]


REFUSED = [
    ({"qk_norm": True}, "qk", "qk-norm normalises q and k over the channels"),
    ({"scale_attn_norm": True}, "head", "a norm over the attention output mixes"),
    ({"scale_attn_norm": True}, "vo", "a norm over the attention output mixes"),
    ({"scale_attn_norm": True}, "qk", "a norm over the attention output mixes"),
    ({"scale_mlp_norm": True}, "neuron", "a norm over the hidden neurons mixes"),
    ({"name": "vit_small_patch16_rope_224"}, "qk", r"rotary embeddings \(RoPE\) tie q and k"),
    ({"name": "vit_small_patch16_rope_mixed_224"}, "head", "mixed rotary embeddings are learned"),
]


@pytest.mark.parametrize(("changes", "kind", "reason"), REFUSED)
def test_a_kind_that_cannot_be_cut_exactly_is_refused_with_layer_and_reason(
    changes: dict[str, object], kind: str, reason: str
) -> None:
    model = vit(**changes)
    with pytest.raises(ValueError, match=rf"blocks\.0\.\w+: kind '{kind}' cannot be .*: {reason}"):
        timm_vit.find_units(model, [kind])


@pytest.mark.parametrize(("changes", "kind", "reason"), REFUSED)
def test_a_refused_kind_is_left_out_where_nobody_asked_for_it(
    changes: dict[str, object], kind: str, reason: str
) -> None:
    found = {u.kind for u in timm_vit.find_units(vit(**changes))}
    assert found and kind not in found


ALL = {"head", "qk", "vo", "neuron"}


@pytest.mark.parametrize(
    ("name", "blocks", "kinds"),
    [
        ("deit_small_distilled_patch16_224", 12, ALL),
        ("deit3_base_patch16_224", 12, ALL),
        ("vit_giant_patch14_reg4_dinov2", 40, ALL),
        ("vit_large_patch16_dinov3", 24, ALL - {"qk"}),
        ("vit_7b_patch16_dinov3", 40, ALL - {"qk"}),
        ("vit_base_patch16_clip_224", 12, ALL),
        ("vit_large_patch14_clip_quickgelu_336", 24, ALL),
        ("vit_so400m_patch14_siglip_384", 27, ALL),
        ("vit_base_patch16_siglip_gap_256", 12, ALL),
    ],
)
def test_every_block_of_a_full_size_can_be_cut(name: str, blocks: int, kinds: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers, left = timm_vit.find_layers(model)
    assert len(layers) == 2 * blocks and not left
    assert {u.kind for u in timm_vit.find_units(model)} == kinds


def gate_(model: nn.Module) -> None:
    """What timm's gated attention has: a linear whose sigmoid multiplies the attention's output."""
    for block in model.get_submodule("blocks"):
        block.attn.gate = nn.Linear(24, 24)


@pytest.mark.parametrize("kind", ["head", "qk", "vo"])
def test_gated_attention_is_refused_by_name(kind: str) -> None:
    model = vit()
    gate_(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: .* the output gate acts on single"):
        timm_vit.find_units(model, [kind])


def test_gated_attention_can_still_be_cut_by_tiles() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    gate_(model)
    units = timm_vit.find_units(model, ["block"], block=(8, 8))
    mask = random_mask(units)
    with torch.no_grad(), masked(model, units, mask):
        zeroed = model(x)
    realise_(model, units, mask)
    with torch.no_grad():
        torch.testing.assert_close(model(x), zeroed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("beit_base_patch16_224", "timm.models.beit.Attention"),
        ("samvit_base_patch16", "timm.models.vision_transformer_sam.Attention"),
        ("eva02_tiny_patch14_224", "timm.models.eva.EvaAttention"),
        ("vit_relpos_small_patch16_224", "RelPosAttention"),
    ],
)
def test_attention_of_another_making_is_left_dense_and_named(name: str, kind: str) -> None:
    model = vit(name)
    layers, left = timm_vit.find_layers(model)
    assert not [layer for layer in layers if isinstance(layer, AttentionLayer)]
    assert left[0].startswith("blocks.0.attn: attention of type") and kind in left[0]
    assert {u.kind for u in timm_vit.find_units(model)} == {"neuron"}


def test_a_model_where_every_kind_is_refused_says_why_layer_by_layer() -> None:
    model = vit("eva02_tiny_patch14_224", scale_mlp=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: .*EvaAttention.*") as caught:
        timm_vit.find_units(model)
    model = vit(scale_attn_norm=True, scale_mlp_norm=True)
    with pytest.raises(ValueError, match="a norm over the hidden neurons mixes them all"):
        timm_vit.find_units(model)
    assert "Eva" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "vit_small_patch16_18x2_224",
            {"depth": 1},
            "ParallelThingsBlock.*parallel blocks are not",
        ),
        ("mixer_s16_224", {}, "blocks.0 is a MixerBlock, expected a block with"),
        ("resnet18", {}, "ResNet has no `blocks`"),
    ],
)
def test_a_model_of_another_build_is_refused_by_name(
    name: str, changes: dict[str, object], words: str
) -> None:
    model = timm.create_model(name, **changes)
    with pytest.raises(ValueError, match=words):
        timm_vit.find_units(model)


@pytest.mark.parametrize("kinds", [["row"], ["head", "heads"], []])
def test_kinds_that_do_not_exist_are_refused_with_those_that_do(kinds: list[str]) -> None:
    with pytest.raises(ValueError, match="expected some of block, head, neuron, qk, vo, got"):
        timm_vit.find_units(vit(), kinds)


def test_a_model_already_cut_by_tiles_is_refused_by_the_name_of_the_layer() -> None:
    model = vit()
    units = timm_vit.find_units(model, ["block"], block=(8, 8))
    realise_(model, units, random_mask(units))
    assert isinstance(model.get_submodule("blocks.0.attn.qkv"), BlockSparseLinear)
    with pytest.raises(ValueError, match=r"blocks\.0\.(attn|mlp).* prune the dense model"):
        timm_vit.find_units(model)


def test_the_full_mask_of_a_vit_changes_nothing() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    units = timm_vit.find_units(model)
    with torch.no_grad():
        dense = copy.deepcopy(model)(x)
        with masked(model, units, full_mask(units)):
            assert torch.equal(model(x), dense)
