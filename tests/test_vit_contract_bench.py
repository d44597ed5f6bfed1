"""The contract's benchmark: rivals are given as much as takes the same time, and its table says so."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
same_latency = importlib.import_module("parts.same_latency")
quality = importlib.import_module("parts.quality")
bench = importlib.import_module("vit_contract")


@pytest.mark.parametrize("latency", [0.8, 0.65, 0.5])
@pytest.mark.parametrize(
    "curve",
    [
        lambda share: 0.15 + 0.85 * share,  # the usual: something is always paid
        lambda share: share**1.5,
        lambda share: 0.3 + 0.7 * round(share * 12) / 12,  # widths in steps
    ],
)
def test_a_rival_gets_the_most_that_takes_the_time(latency, curve):
    found = same_latency.share_at(latency, curve, least=0.1, most=1.0, tries=8)
    assert found.latency == curve(found.share) <= latency * (1 + same_latency.SLOWER)
    # A step of the third curve is 0.058 wide: no share comes nearer than that.
    assert found.latency >= latency * (1 - same_latency.CLOSE) or latency - found.latency < 0.06
    assert all(
        other <= found.share
        for other, took in found.tries
        if took <= latency * (1 + same_latency.SLOWER)
    )


def test_a_rival_that_is_fast_with_everything_kept_keeps_everything():
    found = same_latency.share_at(0.8, lambda share: 0.6 * share, least=0.1, most=0.99)
    assert found.at_most
    assert found.share == 0.99
    assert len(found.tries) == 1


def test_a_rival_that_is_never_fast_enough_is_refused_with_what_it_reached():
    with pytest.raises(ValueError, match=r"none is as fast as 0.50 .* takes 0.9"):
        same_latency.share_at(0.5, lambda share: 0.9 + 0.1 * share, least=0.1, most=1.0)


def test_the_lead_is_paired_by_image():
    def said(*classes):
        return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()

    labels = torch.tensor([0, 1, 2, 0])
    dense, ours, theirs = said(0, 1, 2, 1), said(0, 1, 0, 1), said(0, 0, 0, 1)
    lead = quality.difference(dense, ours, theirs, labels)
    assert lead["value"] == pytest.approx(-1 / 3)  # 1 and 2 right, of 3
    assert quality.difference(dense, ours, ours, labels) == {"value": 0.0, "se": 0.0}
    # By hand: x = (-1, 1, 0, 0) picks image 1; minus value times dense right.
    x = torch.tensor([1 / 3, -1 + 1 / 3, 1 / 3, 0.0])
    assert lead["se"] == pytest.approx((x.std() / 2 / 0.75).item())


def _row(method, budget, run, top1, **more):
    return {
        "run": run, "method": method, "budget": budget, "commit": run, "torch": "2", "batch": 8,
        "threads": 1, "device": "a CPU", "date": "2026-01-02T03:04:05Z", "test_images": 9,
        "top1_ratio": top1, "top1_ratio_se": 0.01, "ahead": {"value": top1 - 0.9, "se": 0.02},
        "latency_ratio": {"value": 0.5, "lo": 0.49, "hi": 0.51}, **more,
    }  # fmt: skip


def test_the_table_shows_one_run_a_budget_and_the_best_recipe_in_it():
    found = [
        {"method": "tiles", "budget": 0.5, "commit": "before there were runs"},
        _row("tiles", 0.5, "old", 0.7),
        _row("macs", 0.5, "old", 0.6),  # an older run: not to be set beside the new one
        _row("tiles", 0.5, "new", 0.9),
        _row("torch-pruning", 0.5, "new", 0.1, recipe="a"),
        _row("torch-pruning", 0.5, "new", 0.3, recipe="b", at_most=True),
        {**_row("lpvit", 0.5, "new", 0.0), "refused": "6 models were timed"},
    ]
    text = bench.table(found)
    assert "0.900 ± 0.010 @ 0.500 [0.490, 0.510]" in text
    assert "0.300 ± 0.010 (-0.600 ± 0.020) @ 0.500 [0.490, 0.510] (all)" in text
    assert "no model as fast" in text
    assert "0.600" not in text.replace("-0.600", "")
    assert "0.100" not in text
    assert "commit new," in text


def test_running_as_tiles_leaves_the_outputs():
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(
            bench.as_tiles_where_faster(model, x)(x), model(x), rtol=1e-4, atol=1e-5
        )


def test_torch_prunings_reach_is_what_it_can_keep():
    recipes = importlib.import_module("parts.torch_pruning_recipe")
    timm = importlib.import_module("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3
    ).eval()
    low, high = recipes.reach(model, 8)
    assert recipes._mlp_width(model, low * recipes.ALLOWANCE, 8) == 8
    assert recipes._mlp_width(model, high * recipes.ALLOWANCE, 8) == 192
    with pytest.raises(ValueError, match="head width 8"):
        recipes._mlp_width(model, low * recipes.ALLOWANCE * 0.99, 8)


@pytest.mark.slow
def test_the_contracts_of_a_gpu_walk_their_road_on_a_cpu():
    script = ROOT / "scripts" / "benchmarks" / "vit_contract_gpu.py"
    before = {p: p.read_bytes() for p in (ROOT / "profiles" / "rows").glob("*.jsonl")}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "--dry-run"],
        env=env, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Kept, or on a machine that does not hold still refused; energy needs a sensor.
    assert "tiny latency 0.6 whole units:" in done.stdout
    assert "tiny energy 0.6 whole units:" in done.stdout
    assert {p: p.read_bytes() for p in (ROOT / "profiles" / "rows").glob("*.jsonl")} == before
