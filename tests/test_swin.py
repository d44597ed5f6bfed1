"""Swin: windows, position biases and stages of different width, against timm's own layers and loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune.allocate import Budget
from hwprune.cost import count_macs, model_cost
from hwprune.families import swin
from hwprune.layers import AttentionSizes
from hwprune.lpvit import lpvit_masks
from hwprune.pruning import prune
from hwprune.realise import masked, realise_
from hwprune.repair import repair_
from hwprune.statistics import calibrate
from hwprune.units import AttentionLayer, Mask, Units
from hwprune.window_attention import SlimWindowAttention

timm = pytest.importorskip("timm")

# How timm resamples position biases: torch tells of the copies it makes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")


def tiny() -> tuple[nn.Module, Tensor]:
    return swin.examples()["v1"]()


def first_ones(units: list[Units]) -> Mask:
    return {u.name: torch.arange(u.count) < max(1, u.count // 2) for u in units}


def test_a_head_owns_its_column_of_the_position_bias_table() -> None:
    model, _ = tiny()
    unit = swin.find_units(model, ["head"])[0]
    own = {
        part.param: (part.dim, part.index[1].tolist())
        for part in unit.slices
        if part.index is not None
    }
    rows = [i * 24 + j for i in range(3) for j in range(12, 24)]
    assert own == {
        "layers.0.blocks.0.attn.qkv.weight": (0, rows),
        "layers.0.blocks.0.attn.qkv.bias": (0, rows),
        "layers.0.blocks.0.attn.relative_position_bias_table": (1, [1]),
        "layers.0.blocks.0.attn.proj.weight": (1, list(range(12, 24))),
    }


@pytest.mark.parametrize("window", [(4, 4), (3, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_slim_window_attention_is_timms_with_the_same_weights(
    window: tuple[int, int], shifted: bool
) -> None:
    torch.manual_seed(0)
    area = window[0] * window[1]
    dense = timm.models.swin_transformer.WindowAttention(24, 3, window_size=window).double().eval()
    nn.init.normal_(dense.relative_position_bias_table)
    sizes = AttentionSizes(24, 3, 8, 8, dense.scale, 24, qkv_bias=True, proj_bias=True)
    slim = SlimWindowAttention.like(dense, sizes).double().eval()
    slim.load_state_dict(dense.state_dict())
    assert torch.equal(slim.relative_position_index, dense.relative_position_index)
    x = torch.randn(2 * 6, area, 24, dtype=torch.float64)
    mask = torch.randn(6, area, area, dtype=torch.float64) if shifted else None
    torch.testing.assert_close(slim(x, mask), dense(x, mask), rtol=0, atol=1e-12)


def test_attention_of_v2_is_left_dense_by_name_and_its_mlps_are_cut() -> None:
    model, _ = swin.examples()["v2"]()
    layers, left = swin.find_layers(model)
    assert not [layer for layer in layers if isinstance(layer, AttentionLayer)] and len(layers) == 4
    assert left[0].startswith("layers.0.blocks.0.attn: attention of Swin v2 takes q and k to unit")
    assert {u.kind for u in swin.find_units(model)} == {"neuron"}


def test_stages_hold_the_patch_mergings_in_the_order_they_run() -> None:
    model, _ = tiny()
    kinds = [type(stage).__name__ for stage in swin.stages(model)]
    block = "SwinTransformerBlock"
    assert kinds == [block, block, "PatchMerging", block, block]
    assert {layer.stage for layer in swin.find_layers(model)[0]} == {0, 1, 3, 4}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"])
def test_full_sizes_have_the_published_macs_and_layers_in_every_stage(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers, left = swin.find_layers(model)
    depth = {"swin_tiny_patch4_window7_224": 12, "swin_base_patch4_window7_224": 24}[name]
    assert len(layers) == 2 * depth and not left
    cost = model_cost(model, layers, torch.zeros(1, 3, 224, 224, device="meta"))
    # Swin paper, table 1: 4.5 and 15.4 GMACs (attention products included).
    published = {12: 4.5e9, 24: 15.4e9}[depth]
    assert cost.macs == pytest.approx(published, rel=0.02)
    assert cost.tokens["layers.0.blocks.0.attn"] == 3136
    assert cost.tokens["layers.3.blocks.1.mlp"] == 49


def test_a_re_fit_across_stages_helps_and_leaves_the_model_as_realised() -> None:
    model, x = tiny()
    other = torch.randn(16, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    batches = list(other.split(4))
    units = swin.find_units(model, ["head", "neuron"])
    mask = first_ones(units)
    statistics = calibrate(model, units, batches)
    with torch.no_grad():
        dense = model(x)
        with masked(model, units, mask):
            before = float((model(x) - dense).square().mean())
        repair_(model, units, mask, statistics, batches, swin.stages(model))
        fitted = model(x)
        realise_(model, units, mask)
        torch.testing.assert_close(model(x), fitted, rtol=1e-4, atol=1e-4)
    assert float((fitted - dense).square().mean()) < 0.7 * before


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Tensor]:
    model, x = tiny()
    prune(model, [x], Budget(macs=0.6), round_to=4)
    folder = tmp_path_factory.mktemp("swin") / "pruned"
    hwprune.save(model, folder)
    return folder, model.eval(), x


@torch.no_grad()
def test_stock_timm_opens_a_pruned_swin_bit_for_bit(pruned: tuple[Path, nn.Module, Tensor]) -> None:
    folder, model, x = pruned
    assert any(isinstance(m, SlimWindowAttention) for m in model.modules())
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_stock_timm_opens_it_at_another_image_size(
    pruned: tuple[Path, nn.Module, Tensor],
) -> None:
    folder, _, _ = pruned
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=40).eval()
    resized = hwprune.load(folder)
    resized.set_input_size((40, 40))
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(again(x), resized(x))


@torch.no_grad()
def test_a_pruned_swin_exports_for_any_number_of_images(
    pruned: tuple[Path, nn.Module, Tensor],
) -> None:
    _, model, x = pruned
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(5, 3, 28, 28)
    torch.testing.assert_close(program(more), model(more), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_dense_form_is_timms_swin_and_computes_the_same(
    pruned: tuple[Path, nn.Module, Tensor], tmp_path: Path
) -> None:
    _, model, x = pruned
    hwprune.save(model, tmp_path / "dense", format="dense")
    again = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    assert type(again.layers[0].blocks[0].attn).__module__ == "timm.models.swin_transformer"
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pruned_swin_takes_another_image_size_as_its_dense_form_does(
    pruned: tuple[Path, nn.Module, Tensor], tmp_path: Path
) -> None:
    folder, model, _ = pruned
    hwprune.save(model, tmp_path / "dense", format="dense")
    x = torch.randn(2, 3, 40, 40)
    small, dense = (hwprune.load(path) for path in (folder, tmp_path / "dense"))
    for one in (small, dense):
        one.set_input_size((40, 40))
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_without_heads_stays_in_its_place_at_another_image_size() -> None:
    model, _ = tiny()
    units = swin.find_units(model, ["head"])
    mask = {u.name: torch.zeros(u.shape, dtype=torch.bool) for u in units}
    x = torch.randn(1, 3, 40, 40)
    with masked(model, units, mask):
        model.set_input_size((40, 40))
        zeroed = model(x)
        model.set_input_size((28, 28))
    realise_(model, units, mask)
    model.set_input_size((40, 40))
    torch.testing.assert_close(model(x), zeroed, rtol=1e-5, atol=1e-5)


def test_sums_of_an_image_are_over_all_of_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwprune.statistics._probe", lambda out, *_: torch.ones_like(out))
    model, x = tiny()
    model, x = model.double(), x.double()
    unit = swin.find_units(model, ["head"])[1]
    sums_NU = calibrate(model, [unit], [x], sums=True).sums[unit.name]
    weight = model.get_parameter("layers.0.blocks.1.attn.proj.weight")
    for image, found_U in zip(x, sums_NU, strict=True):
        product = weight.detach() * torch.autograd.grad(model(image[None]).sum(), weight)[0]
        torch.testing.assert_close(found_U, product.view(24, 2, 12).sum((0, 2)))


@pytest.mark.parametrize("fidelity", ["paper", "repo"])
@pytest.mark.parametrize("block", [(8, 12), (20, 16)], ids=["dividing", "ragged"])
def test_lpvit_chooses_blocks_of_a_swin(
    fidelity: Literal["paper", "repo"], block: tuple[int, int]
) -> None:
    model, x = tiny()
    dense_macs = count_macs(model, x)
    masks = lpvit_masks(model, [x], keep_ratio=0.7, block=block, fidelity=fidelity, true_macs=True)
    units = swin.find_units(model, ["block"], block=block)
    assert {f"{name}:block": tuple(keep.shape) for name, keep in masks.items()} == {
        u.name: u.shape for u in units
    }
    mask = {f"{name}:block": keep for name, keep in masks.items()}
    with torch.no_grad():
        with masked(model, units, mask):
            zeroed = model(x)
        realise_(model, units, mask)
        torch.testing.assert_close(model(x), zeroed, rtol=1e-4, atol=1e-4)
    if block == (8, 12):  # ragged tiles are stored, and multiplied, whole
        assert 0.68 < count_macs(model, x) / dense_macs <= 0.7
