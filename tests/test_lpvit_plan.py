"""LPViT as an objective of prune: its own masks, on the one road, at DeiT's and Swin's widths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hwprune.allocate import Budget
from hwprune.analysis import analyse
from hwprune.cost import count_macs
from hwprune.families import of
from hwprune.layers import BlockSparseLinear
from hwprune.lpvit import lpvit_masks
from hwprune.lpvit_calibration import block_linears, calibrate
from hwprune.lpvit_plan import lpvit_plan, score
from hwprune.pruning import prune
from hwprune.units import expand

timm = pytest.importorskip("timm")


def vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def swin(width: int, stages: int) -> nn.Module:
    """Stages of one block each, 1, 2, 4 ... times as wide, windows of 4 x 4 in the first ones."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=width,
        depths=(1,) * stages,
        num_heads=(1, 2, 4, 8)[:stages],
        num_classes=5,
    )
    return model.eval()


def images(size: int = 16, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, 3, size, size, generator=generator).split(3))


def tiles_of(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def test_without_repair_it_is_lpvit_as_published() -> None:
    dense, model, batches = vit(), vit(), images()
    masks = lpvit_masks(dense, batches, keep_ratio=0.6, block=(8, 8), true_macs=True)
    report = prune(model, batches, Budget(macs=0.6), objective="lpvit", repair=False, block=(8, 8))
    assert masks.keys() == set(block_linears(dense))
    expected = copy.deepcopy(dense)
    for name, keep in masks.items():
        weight = expected.get_submodule(name).weight
        unit = next(
            u for u in of(dense).find_units(dense, ("block",), block=(8, 8)) if name in u.name
        )
        weight.data *= expand(keep, unit.slices[0], weight.shape)
        if not bool(keep.all()):
            assert len(model.get_submodule(name).values) == int(keep.sum())
    x = torch.cat(batches)
    with torch.no_grad():
        assert torch.allclose(model(x), expected(x), atol=1e-5)
    assert report.objective == "lpvit" and report.kinds == ("block",) and report.plans == ()
    assert report.macs_ratio <= 0.6 and report.macs_ratio > 0.58
    assert report.macs == count_macs(model, x[:1])


def test_repair_re_fits_what_lpvit_keeps() -> None:
    bare, fitted, batches = vit(), vit(), images(count=12)
    args = {"objective": "lpvit", "block": (8, 8), "refine": 3}
    found = [
        prune(m, batches, Budget(macs=0.7), repair=r, **args)
        for m, r in ((bare, False), (fitted, True))
    ]
    assert found[0].tiles == found[1].tiles
    assert found[1].distortion["measured"] < found[0].distortion["measured"]
    assert 0 < found[1].distortion["predicted"] < found[0].distortion["predicted"]


def test_the_predicted_distortion_is_the_quadratic_form_by_hand() -> None:
    model, batches = vit(), images()
    found = analyse(model, batches, block=(8, 8), objective="lpvit")
    assert found.lpvit is not None and found.curves == {}
    args = (model, found.units, found.lpvit, found.statistics, found.cost, Budget(macs=0.6))
    plan, mask = lpvit_plan(*args, repair=False)
    total = 0.0
    for unit in found.units:
        name = unit.slices[0].param.removesuffix(".weight")
        weight = model.get_submodule(name).weight.detach().double()
        gone = weight * ~expand(mask[unit.name], unit.slices[0], weight.shape)
        moments = found.statistics.linear[name]
        total += 0.5 * torch.trace(moments.metric @ gone @ moments.second @ gone.T).item()
    assert plan.distortion == pytest.approx(total, rel=1e-9)
    assert plan.macs <= 0.6 * plan.dense_macs
    assert plan.keep == {name: int(grid.sum()) for name, grid in mask.items()}


@pytest.mark.parametrize(
    ("width", "heads", "tile"), [(384, 6, (32, 32)), (768, 12, (64, 64)), (192, 3, (128, 64))]
)
def test_deit_widths(width: int, heads: int, tile: tuple[int, int]) -> None:
    model = vit(embed_dim=width, depth=1, num_heads=heads, patch_size=8)
    report = prune(model, images(), Budget(macs=0.6), objective="lpvit", repair=False, block=tile)
    assert 0.55 < report.macs_ratio <= 0.6
    hidden = {name: (m.out_features, m.in_features) for name, m in tiles_of(model).items()}
    assert hidden.get("blocks.0.mlp.fc1", (4 * width, width)) == (4 * width, width)


@pytest.mark.parametrize(
    ("width", "stages", "tile"), [(96, 3, (64, 64)), (96, 2, (32, 32)), (128, 2, (64, 32))]
)
def test_swin_widths_ragged_tiles_included(width: int, stages: int, tile: tuple[int, int]) -> None:
    model, batches = swin(width, stages), images(32, 2)
    report = prune(model, batches, Budget(macs=0.7), objective="lpvit", repair=False, block=tile)
    assert 0.6 < report.macs_ratio <= 0.7, "by torch's own count, border tiles stored whole"
    assert {m.in_features for m in tiles_of(model).values()} & {width, 2 * width, 4 * width}
    if tile == (64, 64):
        assert any(m.in_features % 64 for m in tiles_of(model).values()), "a ragged one"


def test_gradients_of_windows_are_those_of_one_image_at_a_time() -> None:
    model, batches = swin(16, 2), images(32, 4)[:1]
    name = "layers.0.blocks.0.attn.qkv"
    found = calibrate(model, batches, [name], (8, 8))[name]
    weight = model.get_submodule(name).weight
    for n, image in enumerate(batches[0].split(1)):
        (gradient,) = torch.autograd.grad(model(image).square().mean(), weight)
        sums = (weight * gradient).detach().view(6, 8, 2, 8).sum((1, 3)).flatten()
        assert torch.allclose(found.block_sums[n], sums.double(), rtol=1e-3, atol=1e-7)


class Mixed(nn.Module):
    """A linear whose rows are tokens first, images second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1)[:, :48].view(len(x), 6, 8).transpose(0, 1).flatten(0, 1)
        out = self.blocks[0](tokens).view(6, len(x), 8)
        return self.head(out.tanh().mean(0))


def test_rows_that_mix_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0: expected an input with 3 images first"):
        calibrate(Mixed(), images()[:1], ["blocks.0"], (4, 4))


@pytest.mark.parametrize(
    ("budget", "args", "message"),
    [
        (Budget(latency=0.6), {}, "objective lpvit: expected a budget of macs alone, got latency"),
        (Budget(params=0.6), {}, "objective lpvit: expected a budget of macs alone, got params"),
        (Budget(macs=0.6, params=0.6), {}, "got macs, params"),
        (Budget(macs=0.6), {"kinds": ("head",)}, "the kind block alone, got head"),
        (Budget(macs=0.01), {}, "out of reach of LPViT: keep_ratio: expected at least 0"),
        (Budget(macs=0.6), {"objective": "spdy"}, "expected second-order or lpvit, got 'spdy'"),
    ],
)
def test_what_lpvit_has_no_answer_to_is_refused(
    budget: Budget, args: dict[str, object], message: str
) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, images(), budget, block=(8, 8), **{"objective": "lpvit", **args})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_feature_model_and_another_analysis_are_refused() -> None:
    with pytest.raises(ValueError, match="objective lpvit: expected a classifier"):
        prune(vit(num_classes=0), images(), Budget(macs=0.6), objective="lpvit", block=(8, 8))
    found = analyse(vit(), images(), kinds=("block",), block=(8, 8))
    with pytest.raises(ValueError, match="expected one made with objective='lpvit'"):
        prune(vit(), images(), Budget(macs=0.6), objective="lpvit", analysis=found)
    units = of(vit()).find_units(vit(), ("block",), block=(8, 8))
    assert score(vit(), units, images(), (8, 8)).sums.keys() == set(block_linears(vit()))
