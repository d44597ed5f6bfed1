"""The parts of scripts/bench cost-model: plans at their share, an order, rows that are JSON. It is not run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from test_predict import linears, smooth, tiles

from hwprune.cost import count_macs
from hwprune.predict import CostModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"))
cost_model = importlib.import_module("cost_model")
timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")


@pytest.mark.parametrize("plan", cost_model.PLANS)
def test_plans_have_about_the_macs_they_are_named_by(plan: str) -> None:
    torch.manual_seed(0)
    dense = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=256, depth=4, num_heads=8, num_classes=10
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    macs, kinds = cost_model.PLANS[plan]
    found = cost_model.pruned(dense, kinds, macs, x)
    assert count_macs(found, x) / count_macs(dense, x) == pytest.approx(macs, abs=0.05)
    assert found(x).isfinite().all()


def test_the_order_is_compared() -> None:
    def plan(predicted: float, measured: float) -> dict[str, dict[str, float]]:
        return {"predicted": {"value": predicted}, "measured": {"value": measured}}

    same = {"a": plan(0.5, 0.6), "b": plan(0.7, 0.8), "c": plan(0.9, 0.95)}
    assert cost_model.tau(same) == 1
    assert cost_model.tau({**same, "c": plan(0.4, 0.95)}) == pytest.approx(-1 / 3)


def test_held_out_errors_are_told_by_family_and_as_json() -> None:
    found = cost_model.held_out(CostModel(smooth([*linears(), *tiles()], noise=0.02)))
    assert list(found) == ["linear fp32", "linear block_sparse 32x32 fp32", "all"]
    assert found["all"]["n"] == len(linears()) + len(tiles())
    assert 0 < found["linear fp32"]["median_inside"] < 0.05
    json.dumps(found, allow_nan=False)


def test_without_a_profile_of_this_machine_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "list_devices", dict)
    with pytest.raises(SystemExit, match="hwprune profile"):
        cost_model.profile_of_this_machine(None)
