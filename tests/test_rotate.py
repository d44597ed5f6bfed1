"""Rotations inside heads: the model stays what it was, and what is truncated costs what is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hwprune.realise import masked, realise_
from hwprune.rotate import rotate_, rotation_qk, rotation_vo
from hwprune.statistics import Statistics, calibrate
from hwprune.units import AttentionLayer, layers_of

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

HEADS, WIDTH = 3, 8


def vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": HEADS}
    model = timm.create_model("vit_tiny_patch16_224", **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def pixels(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def attentions(model: nn.Module) -> list[AttentionLayer]:
    layers = layers_of(timm_vit.find_units(model, ["vo"]))
    return [layer for layer in layers if isinstance(layer, AttentionLayer)]


def turn_(model: nn.Module, kind: str, statistics: Statistics) -> None:
    for layer in attentions(model):
        if kind == "qk":
            rotation = rotation_qk(statistics.queries[layer.name])
        else:
            rotation = rotation_vo(model, layer, statistics.linear[layer.out])
        rotate_(model, layer, kind, rotation)


def calibrated(model: nn.Module, x: Tensor) -> Statistics:
    return calibrate(model, timm_vit.find_units(model, ["qk", "vo"]), [x])


def channel(layer: AttentionLayer, part: str, head: int, c: int) -> tuple[str, int]:
    """The weight and the row (column, for the output) of one channel of one head."""
    rows = getattr(layer, part)
    return f"{rows.linear}.weight", rows.start + head * layer.head_dim + c


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["qk", "vo"])
def test_a_rotated_model_computes_what_it_did(kind: str, bias: bool) -> None:
    model, x = vit(qkv_bias=bias), pixels()
    with torch.no_grad():
        before = model(x)
        turn_(model, kind, calibrated(model, x))
        after = model(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["qk", "vo"])
def test_a_rotation_changes_the_weights_it_is_about(kind: str) -> None:
    model, x = vit(), pixels()
    before = model.get_parameter("blocks.0.attn.qkv.weight").detach().clone()
    turn_(model, kind, calibrated(model, x))
    moved = (model.get_parameter("blocks.0.attn.qkv.weight") - before).abs().sum(1) > 1e-6
    width = HEADS * WIDTH
    expected = [kind == "qk"] * 2 * width + [kind == "vo"] * width  # rows [q | k | v]
    assert moved.tolist() == expected


def test_both_rotations_in_a_row_keep_the_function() -> None:
    model, x = vit(), pixels()
    with torch.no_grad():
        before = model(x)
        statistics = calibrated(model, x)
        turn_(model, "qk", statistics)
        turn_(model, "vo", statistics)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


def test_rotated_channels_of_a_float32_model_keep_the_function_to_float32() -> None:
    model, x = vit().float(), pixels().float()
    with torch.no_grad():
        before = model(x)
        statistics = calibrated(model, x)
        turn_(model, "qk", statistics)
        turn_(model, "vo", statistics)
        after = model(x)
    assert float((after - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize("kind", ["qk", "vo"])
def test_rotated_sides_have_weights_of_equal_size(kind: str) -> None:
    model, x = vit(), pixels()
    turn_(model, kind, calibrated(model, x))
    for layer in attentions(model):
        for head in range(HEADS):
            for c in range(WIDTH):
                name, row = channel(layer, "q" if kind == "qk" else "v", head, c)
                first = model.get_parameter(name)[row].norm()
                if kind == "qk":
                    name, row = channel(layer, "k", head, c)
                    second = model.get_parameter(name)[row].norm()
                else:
                    second = model.get_parameter(f"{layer.out}.weight")[:, head * WIDTH + c].norm()
                torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-12)


def low_rank_(model: nn.Module, layer: AttentionLayer, part: str, rank: int) -> None:
    """Let the rows of each head, bias included, span only `rank` directions."""
    linear = model.get_submodule(getattr(layer, part).linear)
    assert isinstance(linear, nn.Linear)
    start = getattr(layer, part).start
    with torch.no_grad():
        for head in range(HEADS):
            rows = slice(start + head * WIDTH, start + (head + 1) * WIDTH)
            basis = torch.linalg.qr(torch.randn(WIDTH, rank, dtype=torch.float64))[0]
            linear.weight[rows] = basis @ (basis.T @ linear.weight[rows])
            linear.bias[rows] = basis @ (basis.T @ linear.bias[rows])


@pytest.mark.parametrize("low", ["q", "k"])
def test_cutting_q_and_k_to_the_exact_rank_of_each_head_loses_nothing(low: str) -> None:
    model, x = vit(), pixels(16)
    for layer in attentions(model):
        low_rank_(model, layer, low, rank=3)
    with torch.no_grad():
        before = model(x)
        turn_(model, "qk", calibrated(model, x))
        units = timm_vit.find_units(model, ["qk"])
        realise_(model, units, {u.name: torch.arange(WIDTH) < 3 for u in units})
        after = model(x)
    # Eigenvalues under 1e-6 of the largest are floored, roots under 1e-3: errors enter squared.
    assert float((after - before).norm() / before.norm()) < 1e-4


def test_cutting_q_and_k_below_the_rank_does_lose_something() -> None:
    model, x = vit(), pixels(16)
    for layer in attentions(model):
        low_rank_(model, layer, "q", rank=3)
    with torch.no_grad():
        before = model(x)
        turn_(model, "qk", calibrated(model, x))
        units = timm_vit.find_units(model, ["qk"])
        realise_(model, units, {u.name: torch.arange(WIDTH) < 2 for u in units})
        after = model(x)
    assert float((after - before).norm() / before.norm()) > 1e-3


def test_cutting_v_to_the_exact_rank_of_each_head_loses_nothing() -> None:
    model, x = vit(), pixels(16)
    for layer in attentions(model):
        low_rank_(model, layer, "v", rank=3)
    with torch.no_grad():
        before = model(x)
        turn_(model, "vo", calibrated(model, x))
        units = timm_vit.find_units(model, ["vo"])
        realise_(model, units, {u.name: torch.arange(WIDTH) < 3 for u in units})
        after = model(x)
    assert float((after - before).norm() / before.norm()) < 1e-4


def test_a_tail_never_rises_and_is_zero_where_everything_is_kept() -> None:
    model, x = vit(), pixels()
    statistics = calibrated(model, x)
    for layer in attentions(model):
        for rotation in (
            rotation_qk(statistics.queries[layer.name]),
            rotation_vo(model, layer, statistics.linear[layer.out]),
        ):
            assert rotation.tail.shape == (HEADS, WIDTH + 1)
            assert bool((rotation.tail.diff(dim=1) <= 0).all())
            assert float(rotation.tail[:, -1].abs().max()) == 0
            assert float(rotation.tail[:, 0].min()) > 0


def test_the_tail_of_v_is_the_metric_error_of_the_truncated_product() -> None:
    model, x = vit(), pixels()
    layer = attentions(model)[0]
    moments = calibrated(model, x).linear[layer.out]
    rotation = rotation_vo(model, layer, moments)
    weight = model.get_parameter(f"{layer.out}.weight").detach()
    for head in range(HEADS):
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        for kept in range(WIDTH + 1):
            product = rotation.second[head][:, :kept] @ rotation.first[head][:kept]
            lost = weight[:, own] @ (torch.eye(WIDTH, dtype=torch.float64) - product)
            error = 0.5 * torch.trace(moments.metric @ lost @ moments.centred[own, own] @ lost.T)
            torch.testing.assert_close(rotation.tail[head, kept], error, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["qk", "vo"])
def test_after_rotation_the_first_channels_are_worth_more_than_the_last(kind: str) -> None:
    model, x = vit(), pixels(16)
    turn_(model, kind, calibrated(model, x))
    units = timm_vit.find_units(model, [kind])
    with torch.no_grad():
        dense = model(x)
        with masked(model, units, {u.name: torch.arange(WIDTH) < 6 for u in units}):
            without_last = (model(x) - dense).norm()
        with masked(model, units, {u.name: torch.arange(WIDTH) >= 2 for u in units}):
            without_first = (model(x) - dense).norm()
    assert without_last < 0.5 * without_first


def test_heads_wider_than_the_output_still_rotate_without_changing_the_function() -> None:
    model, x = vit(embed_dim=6, num_heads=1, depth=1), pixels()
    attention = model.get_submodule("blocks.0.attn")
    wide = type(attention)(6, num_heads=1, attn_head_dim=16, qkv_bias=True).double()
    model.get_submodule("blocks.0").attn = wide
    before_weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(x)
        turn_(model, "vo", calibrated(model, x))
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[name], before_weights[name])
