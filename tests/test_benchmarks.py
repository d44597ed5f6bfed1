"""The parts benchmarks are made of: counts, paired quality, rows, baselines. The benchmarks are not run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hwprune.layers import BlockSparseLinear

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
count = importlib.import_module("parts.count")
quality = importlib.import_module("parts.quality")
rows = importlib.import_module("parts.rows")

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")
whole_units = importlib.import_module("parts.whole_units")
recipes = importlib.import_module("parts.torch_pruning_recipe")
vit_quality = importlib.import_module("vit_quality")
kernels = importlib.import_module("kernels")

TOKENS, DIM, DEPTH = 5, 48, 2
DENSE = 4 * 3 * 8 * 8 * DIM + DEPTH * (TOKENS * 12 * DIM * DIM + 2 * TOKENS**2 * DIM) + DIM * 10


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=3,
        num_classes=10,
    ).eval()


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_count_is_the_sum_of_every_product(vit):
    assert count.true_macs(vit, images(1)) == DENSE
    assert count.parameters(vit) == sum(p.numel() for p in vit.parameters())


def test_count_of_ragged_blocks_is_what_they_cover(vit):
    """fc1 is 192 x 48; 3 of its 5 x 20-blocks, the last one cropped to 2 x 8."""
    keep = torch.zeros(39, 3, dtype=torch.bool)
    keep[0, 0] = keep[7, 1] = keep[38, 2] = True
    linear = vit.blocks[0].mlp.fc1
    vit.blocks[0].mlp.fc1 = BlockSparseLinear.from_dense(linear, keep, (5, 20))
    covered = 5 * 20 + 5 * 20 + 2 * 8
    dense_parameters = sum(p.numel() for p in vit.parameters()) - 3 * 100 + linear.weight.numel()
    assert count.true_macs(vit, images(1)) == DENSE - TOKENS * (192 * 48 - covered)
    assert count.parameters(vit) == dense_parameters - 192 * 48 + covered


def test_quality_pairs_images():
    labels = torch.tensor([0, 1, 2, 3])
    dense = torch.eye(4) * 9
    pruned = dense.clone()
    pruned[3] = pruned[0]
    found = quality.compare(dense, pruned, labels)
    assert (found["top1"], found["top1_dense"], found["top1_ratio"]) == (0.75, 1.0, 0.75)
    assert found["top1_difference_se"] == pytest.approx(torch.tensor([0, 0, 0, -1.0]).std() / 2)
    assert found["kl_to_dense"] > 0
    same = quality.compare(dense, dense, labels)
    assert (same["top1_ratio"], same["top1_ratio_se"], same["kl_to_dense"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("budget", [0.8, 0.5])
@pytest.mark.parametrize("even", [False, True])
def test_whole_unit_baselines_meet_the_budget_within_a_neuron(vit, criterion, budget, even):
    pruned = whole_units.prune(vit, [images()], budget, criterion=criterion, seed=0, even=even)
    macs = count.true_macs(pruned, images(1))
    assert budget * DENSE - TOKENS * 2 * DIM <= macs <= budget * DENSE
    assert count.true_macs(vit, images(1)) == DENSE
    assert pruned(images()).isfinite().all()


@pytest.mark.parametrize("importance", ["logits", "labels", "magnitude"])
@pytest.mark.parametrize("shared", [False, True])
def test_torch_pruning_recipe_meets_the_budget_and_keeps_the_softmax_scale(vit, importance, shared):
    pytest.importorskip(
        "torch_pruning", reason="torch-pruning is not installed: pip install hwprune[bench]"
    )
    labels = [torch.tensor([1, 2, 3, 4])]
    recipe = recipes.Recipe(importance, 8, shared)
    pruned = recipes.prune(vit, [images()], labels, 0.6, recipe)
    attention = pruned.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (3, 8, 24)
    macs = count.true_macs(pruned, images(1)) / DENSE
    assert 0.6 - 2 * 8 * DEPTH * TOKENS * 2 * DIM / DENSE < macs <= 0.606
    # Every kept query row is a row of the old one times sqrt(8 / 16), so that q.k / sqrt(8) is as before.
    kept = attention.qkv.weight[:24] / 0.5**0.5
    old = vit.blocks[0].attn.qkv.weight[:48]
    assert (kept[:, None] - old[None]).abs().amax(-1).min(1).values.max() < 1e-6
    unfused = pruned(images())
    for block in pruned.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(pruned(images()), unfused)


def test_torch_pruning_recipe_refuses_what_a_budget_cannot_hold(vit):
    with pytest.raises(ValueError, match="head width 16 would need MLPs"):
        recipes.prune(vit, [images()], [torch.zeros(4).long()], 0.2, recipes.Recipe("logits", 16))


def test_newest_row_of_each_kind_wins():
    found = rows.newest([{"a": 1, "v": 1}, {"a": 2, "v": 2}, {"a": 1, "v": 3}], ("a",))
    assert found == [{"a": 1, "v": 3}, {"a": 2, "v": 2}]


def test_rows_are_appended_and_read_back(tmp_path):
    file = tmp_path / "rows" / "x.jsonl"
    facts = rows.provenance()
    rows.append(file, facts)
    rows.append(file, {"a": 1})
    assert rows.read(file) == [json.loads(json.dumps(facts)), {"a": 1}]
    assert {"date", "commit", "torch", "timm", "python", "hwprune", "device"} <= set(facts)


def test_table_goes_between_its_markers_and_nowhere_else(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("top\n<!-- x:begin -->\nold\n<!-- x:end -->\nbottom\n")
    rows.write_between(file, "x", "| new |")
    assert file.read_text() == "top\n<!-- x:begin -->\n| new |\n<!-- x:end -->\nbottom\n"
    with pytest.raises(SystemExit, match="expected <!-- y:begin -->"):
        rows.write_between(file, "y", "")


def test_vit_quality_without_its_data_says_so_and_adds_no_row(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--data", str(tmp_path), "--rows", str(file)])
    assert vit_quality.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped: ") and "imagenet_calib1000.tar" in said
    assert not file.exists()


def test_vit_quality_table_shows_the_best_recipe_of_the_newest_rows():
    row = {
        "method": "torch-pruning",
        "budget": 0.8,
        "top1_dense": 0.8,
        "top1_ratio_se": 0.01,
        "macs_ratio": 0.8,
        "seconds": 9.0,
        "seed": 0,
        "calibration_images": 256,
        "test_images": 650,
        "threads": 1,
        "device": "CPU",
        "commit": "abc",
        "torch": "2",
        "timm": "1",
        "date": "2026-11-20T00:00:00Z",
    }
    text = vit_quality.table(
        [
            {**row, "variant": "first", "top1_ratio": 0.9},
            {**row, "variant": "second", "top1_ratio": 0.4},
            {**row, "variant": "first", "top1_ratio": 0.3},
            {**row, "method": "random", "variant": "", "top1_ratio": 0.1},
        ]
    )
    assert "| Torch-Pruning, best recipe | 0.400 ± 0.010 @ 0.800 | not run | not run | 9 |" in text
    assert "0.80: second" in text and "0.900" not in text
    assert "| random, heads and neurons | 0.100" in text and "magnitude" not in text


@pytest.mark.slow
def test_the_gpu_benchmark_walks_its_whole_road_without_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    script = ROOT / "scripts" / "benchmarks" / "kernels_gpu.py"
    before = [p.read_bytes() for p in sorted((ROOT / "profiles" / "rows").glob("*.jsonl"))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--rounds", "3"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "interpreter" in done.stderr and done.returncode:
        pytest.skip("Triton's interpreter before 3.7 does not run on this NumPy")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("x dense, efficiency") == 3
    after = [p.read_bytes() for p in sorted((ROOT / "profiles" / "rows").glob("*.jsonl"))]
    assert before == after  # what was not measured leaves no row


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({1.0: 1.1, 0.5: 2.0}, 1.0),
        ({1.0: 0.8, 0.8: 1.2, 0.5: 2.0}, 0.9),
        ({1.0: 0.5, 0.5: 0.9}, 0.0),
        ({0.9: 1.5, 0.5: 2.0}, None),
    ],
)
def test_the_break_even_density_is_where_the_speed_up_crosses_one(
    points: dict[float, float], expected: float | None
) -> None:
    speedups = {f"ours {d:g}": {"value": s} for d, s in points.items()}
    speedups["oneDNN prepacked"] = {"value": 3.0}
    assert kernels.break_even(speedups) == (None if expected is None else pytest.approx(expected))
