"""A sweep: the points of a front from one calibration, what the file and the picture say, baselines beside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hwprune.allocate import Budget, UnreachableBudget
from hwprune.analysis import analyse
from hwprune.front import Front, cost_of, steps
from hwprune.pruning import prune
from hwprune.sweeping import sweep

timm = pytest.importorskip("timm")

BUDGETS = [Budget(macs=ratio) for ratio in (0.8, 0.5)]


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(16, 3, 16, 16, generator=generator).split(8))


@pytest.fixture(scope="module")
def front() -> Front:
    """Of `vit()`, with both baselines, accuracy made up."""
    return sweep(
        vit(),
        images(),
        BUDGETS,
        block=(8, 8),
        baselines=("magnitude", "lpvit"),
        each=lambda model, report: f"{report.budget['macs']:.2f}",
        evaluate=lambda model: (sum(p.numel() for p in model.parameters()) / 1e5, 50),
    )


def test_each_point_is_what_pruning_to_its_budget_alone_gives(front: Front) -> None:
    found = analyse(vit(), images())
    for point, report, budget in zip(front.points, front.reports, BUDGETS, strict=True):
        alone = prune(vit(), images(), budget, analysis=found)
        assert report.distortion == alone.distortion == point["distortion"]
        assert point["macs_ratio"] == alone.macs_ratio <= budget.macs
        assert point["budget"] == budget.given
        assert point["folder"] == f"{budget.macs:.2f}"
        assert point["top1"] == pytest.approx(alone.params / 1e5)
        assert point["top1_se"] == pytest.approx((point["top1"] * (1 - point["top1"]) / 50) ** 0.5)


def test_baselines_keep_the_same_budgets_and_lose_more(front: Front) -> None:
    by = {(p["method"], p["budget"]["macs"]): p for p in front.baselines}
    assert by.keys() == {(name, b.macs) for name in ("magnitude", "lpvit") for b in BUDGETS}
    for (_, budget), point in by.items():
        (ours,) = (p for p in front.points if p["budget"]["macs"] == budget)
        assert point["macs_ratio"] <= budget * 1.001
        assert point["distortion"]["measured"] > ours["distortion"]["measured"]
        assert point["folder"] is None
    assert front.dense["macs_ratio"] == 1 and front.dense["distortion"]["measured"] == 0


def test_the_model_is_left_dense() -> None:
    model = vit()
    sweep(model, images(), BUDGETS[:1], baselines=())
    assert all(torch.equal(t, vit().state_dict()[n]) for n, t in model.state_dict().items())


def test_a_budget_out_of_reach_is_a_point_that_says_so_and_all_of_them_an_error() -> None:
    found = sweep(vit(), images(), [Budget(macs=0.7), Budget(macs=1e-4)])
    kept, lost = found.points
    assert kept["refused"] is None and "out of reach" in lost["refused"]
    assert lost["distortion"] is None and lost["macs_ratio"] is None and len(found.reports) == 1
    with pytest.raises(UnreachableBudget, match="out of reach"):
        sweep(vit(), images(), [Budget(macs=1e-4)])


def test_refinement_carries_what_won_to_the_next_point() -> None:
    found = sweep(vit(), images(), BUDGETS, refine=4, baselines=())
    first, second = found.reports
    (won,) = (row["factors"] for row in first.plans if row["won"])
    assert len(second.plans) >= 2
    assert set(won) <= {curve["units"] for curve in first.curves}


def test_the_file_says_what_was_found_and_the_pictures_show_it(
    front: Front, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert front.write(tmp_path / "new") == ["front.json", "front.svg", "front.png"]
    told = json.loads((tmp_path / "new" / "front.json").read_text())
    assert told == json.loads(json.dumps(front.to_dict()))
    assert (told["metric"], told["unit"], told["images"]) == ("macs", "nats", 16)
    svg = (tmp_path / "new" / "front.svg").read_text()
    for words in ("hwprune", "magnitude", "lpvit", "dense", "MACs, of dense", "top-1 on 50 images"):
        assert words in svg
    assert (tmp_path / "new" / "front.png").read_bytes().startswith(b"\x89PNG")
    # Every colour stands on a white and on a black page: contrast of at least 3 with both.
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert colours and all(contrast(c, 1.0) >= 3 and contrast(c, 0.0) >= 3 for c in colours), (
        colours
    )


def contrast(colour: str, page: float) -> float:
    """WCAG 2 contrast of a colour with a page of a luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    own = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return (max(own, page) + 0.05) / (min(own, page) + 0.05)


def test_a_refused_point_is_left_out_of_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sweep(vit(), images(), [Budget(macs=0.7), Budget(macs=1e-4)], baselines=())
    assert len(found.write(tmp_path)) == 3
    assert "distortion, nats" in (tmp_path / "front.svg").read_text()


def test_measured_costs_go_before_predicted_ones() -> None:
    figure = {"value": 0.5, "lo": 0.4, "hi": 0.6}
    other = {"value": 0.7, "lo": 0.7, "hi": 0.7}
    point = {"measured": {"latency_ratio": figure}, "predicted": {"latency_ratio": other}}
    assert cost_of(point, "latency") == figure
    assert cost_of({"predicted": {"latency_ratio": other}, "measured": None}, "latency") == other
    assert cost_of({"macs_ratio": 0.3}, "macs") == {"value": 0.3, "lo": 0.3, "hi": 0.3}
    assert cost_of(point, "energy") is None


def test_steps_are_even_and_bad_ones_refused() -> None:
    assert list(steps(0.9, 0.4, 6)) == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert list(steps(0.5, 0.6, 2)) == [0.5, 0.6]
    for bad in ((0.9, 0.9, 3), (1.2, 0.5, 3), (0.9, 0.0, 3), (0.9, 0.5, 1)):
        with pytest.raises(ValueError, match="expected FIRST:LAST:COUNT"):
            steps(*bad)
    with pytest.raises(ValueError, match="expected baselines of magnitude, lpvit, got 'random'"):
        sweep(vit(), images(), BUDGETS, baselines=("random",))
    with pytest.raises(ValueError, match="at least one budget"):
        sweep(vit(), images(), [])
