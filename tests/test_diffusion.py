"""Pruning a denoiser from end to end: budgets exact, masks realised, failures leave the model as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune import diffusion
from hwprune.conditions import label_conditions
from hwprune.selection import METHODS, REPAIRED
from hwprune.teacher import Sampler, draw

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, stable_diffusion, tiny_dit  # noqa: E402

Budget = hwprune.Budget
QUICK: dict[str, Any] = {"steps": 2, "updates": 8, "images": 8, "batch": 4}


def pruned(budget: hwprune.Budget, **asked: Any) -> tuple[nn.Module, Any]:
    model = tiny_dit()
    given = {**QUICK, "scheduler": flow(), **asked}
    return model, hwprune.prune_diffusion(model, [1, 2, 3], budget, **given)


def finals(model: nn.Module) -> Tensor:
    found = label_conditions(model, flow(), [1, 2, 3], steps=2)
    sampler = Sampler(model, found)
    (batch,) = draw(sampler, "held", 6, batch=6)
    with torch.no_grad():
        return sampler.final(batch)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_smaller_model_that_opens_again(method: str, tmp_path: Path) -> None:
    model, report = pruned(Budget(params=0.8), method=method)
    params = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in tiny_dit().parameters())
    assert (report.params, report.dense_params, report.method) == (params, dense, method)
    assert 0.7 < params / dense <= 0.8  # a head is 2 % of this model
    assert not {"contract", "prove"} & set(report.seconds)  # nothing is timed for it
    assert (report.distance["check"] != report.distance["unrepaired"]) == (method in REPAIRED)
    hwprune.save(model, tmp_path / "x")
    again = hwprune.load(tmp_path / "x")
    assert torch.equal(finals(again), finals(model))
    written = json.loads((tmp_path / "x" / "report.json").read_text())
    assert written["params"] == params and written["method"] == method
    assert all(p.requires_grad for p in model.parameters())


def test_the_distance_reported_is_that_of_the_model_one_gets() -> None:
    model, report = pruned(Budget(macs=0.7))
    sampler = Sampler(tiny_dit(), label_conditions(model, flow(), [1, 2, 3], steps=2))
    batches = draw(sampler, "held", 2, batch=4)
    with torch.no_grad():
        off = sampler.final(batches[0]) - Sampler(model, sampler.conditions).final(batches[0])
    assert report.distance["held"] == pytest.approx(float(off.square().mean()), rel=1e-4)
    assert report.distance["held"] > 0


def test_budgets_of_both_kinds_hold_at_once() -> None:
    for params, macs in ((0.8, 0.65), (0.7, 0.95)):
        _, report = pruned(Budget(params=params, macs=macs))
        assert report.params_ratio <= params and report.macs_ratio <= macs
        assert report.params_ratio > params - 0.05 or report.macs_ratio > macs - 0.05


def test_absolute_budgets_and_depth() -> None:
    dense = sum(p.numel() for p in tiny_dit().parameters())
    kinds = ("head", "neuron", "depth")
    model, report = pruned(Budget(params=0.5 * dense), kinds=kinds, updates=20)
    assert report.params <= 0.5 * dense
    assert len(model.transformer_blocks) < 3
    removed = [row for row in report.layers if row["kind"] == "depth" and not row["kept"]]
    assert len(removed) == 3 - len(model.transformer_blocks)


def test_a_budget_of_one_changes_nothing() -> None:
    model, report = pruned(Budget(params=1.0))
    dense = tiny_dit().state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert report.distance["held"] == 0 and "nothing was removed" in report.warnings[0]


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    one, other = pruned(Budget(params=0.8)), pruned(Budget(params=0.8))
    assert all(
        torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True)
    )
    assert one[1].learning == other[1].learning
    assert pruned(Budget(params=0.8), seed=1)[1].learning != one[1].learning


def test_a_killed_run_goes_on_in_its_folder_to_the_same_model(tmp_path: Path) -> None:
    expected, _ = pruned(Budget(params=0.8))

    def killed(progress: Any) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(Budget(params=0.8), folder=tmp_path, watch=killed)
    seen: list[int] = []
    got, report = pruned(Budget(params=0.8), folder=tmp_path, watch=lambda p: seen.append(p.step))
    again = pruned(Budget(params=0.8), folder=tmp_path)[1]
    assert again.seconds["learn"] >= 0.9 * report.seconds["learn"]  # what was taken before counts
    assert seen == [6, 7, 8]
    assert all(
        torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True)
    )
    pruned(Budget(params=0.9), folder=tmp_path)  # another budget is another run
    assert len(list(tmp_path.glob("learning-*.pt"))) == 2
    assert len(list(tmp_path.glob("teacher-*.safetensors"))) == 3


def unchanged_after(error: type[BaseException], match: str, model: nn.Module, **asked: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    given = {**QUICK, "scheduler": flow(), "budget": Budget(params=0.8), "conditions": [1], **asked}
    with pytest.raises(error, match=match):
        hwprune.prune_diffusion(model, **given)
    after = model.state_dict()
    assert list(after) == list(before)
    same = [torch.equal(after[k].nan_to_num(7), before[k].nan_to_num(7)) for k in before]
    assert all(same) and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"method": "best"}, "expected one of ours, top-k, ecodiff"),
        ({"kinds": ["qk"]}, "expected some of head, neuron, depth"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"images": 0}, "images: expected at least 1"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"updates": 0}, "updates: expected at least 1"),
        ({"minutes": 0}, "minutes: expected more than 0"),
        ({"profile": "some"}, "budgets macs and params need no device profile; leave profile out"),
        ({"conditions": ["a cat"]}, "alone cannot read prompts"),
        ({"scheduler": None}, "give its scheduler"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(asked: dict[str, Any], match: str) -> None:
    unchanged_after(ValueError, match, tiny_dit(), **asked)


def test_a_budget_out_of_reach_says_what_is_left() -> None:
    asked = {"budget": Budget(params=0.1)}
    match = r"params=0.100 is out of reach: with every head and neuron removed 0\.\d+ of the dense"
    unchanged_after(hwprune.UnreachableBudget, match, tiny_dit(), **asked)


def test_nan_names_step_and_layer() -> None:
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[0, 0] = float("nan")
    match = r"step 0 of 2 .*transformer_blocks\.1\.ff\.net\.2"
    unchanged_after(FloatingPointError, match, model)


@pytest.mark.parametrize("where", ["_first_prediction", "repair_trajectory_", "realise_"])
def test_a_failure_after_weights_have_changed_puts_them_back(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real = getattr(diffusion, where)

    def broken(*args: Any, **given: Any) -> Any:
        if where != "realise_":
            real(*args, **given)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(diffusion, where, broken)
    unchanged_after(RuntimeError, "broken on purpose", tiny_dit())


def test_a_pruned_model_is_not_pruned_again() -> None:
    model, _ = pruned(Budget(params=0.8))
    with pytest.raises(ValueError, match="is pruned already"):
        hwprune.prune_diffusion(model, [1], Budget(params=0.7), scheduler=flow(), **QUICK)


def test_a_pipeline_is_pruned_by_prompts_in_place(tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path / "words")
    unet = pipeline.unet
    dense = sum(p.numel() for p in unet.parameters())
    report = hwprune.prune_diffusion(
        pipeline, ["a cat", "dogs"], Budget(params=0.97), **{**QUICK, "images": 4, "batch": 2}
    )
    assert pipeline.unet is unet and sum(p.numel() for p in unet.parameters()) <= 0.97 * dense
    assert report.sampling["guidance"] == 7.5 and report.sampling["evaluations"] == 4
    hwprune.save(pipeline, tmp_path / "out")
    again = hwprune.load(tmp_path / "out")
    for some in (pipeline, again):
        some.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "output_type": "np"}
    one, other = (
        some(["a"], generator=torch.Generator().manual_seed(0), **asked).images
        for some in (pipeline, again)
    )
    assert (one == other).all()


def test_ours_comes_closer_than_chance_on_a_real_model(shared_data: Path) -> None:
    folder = shared_data / "dit_fashion"
    if not folder.is_dir():
        pytest.skip("no dit_fashion in ../shared/data, so no real diffusion weights")
    far = {}
    for method in ("ours", "random"):
        model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        report = hwprune.prune_diffusion(
            model,
            list(range(10)),
            Budget(params=0.8),
            scheduler=scheduler,
            method=method,
            steps=3,
            updates=8,
            images=16,
            batch=8,
        )
        assert report.params_ratio <= 0.8
        far[method] = report.distance["held"]
    assert far["ours"] < 0.25 * far["random"], far


def test_a_saved_pipeline_has_its_report_and_can_be_replaced(tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path / "tokens")
    report = hwprune.prune_diffusion(
        pipeline, ["a", "b"], Budget(params=0.95), method="magnitude", **{**QUICK, "images": 4}
    )
    hwprune.save(pipeline, tmp_path / "x")
    written = json.loads((tmp_path / "x" / "report.json").read_text())
    assert written["params"] == report.params
    hwprune.save(pipeline, tmp_path / "x", force=True)
    again = hwprune.load(tmp_path / "x")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor), name


def test_one_held_image_has_a_distance_that_can_be_compared() -> None:
    _, report = pruned(Budget(params=0.9), images=2)
    assert report.images["held"] == 1
    assert 0 < report.distance["relative"] < 10
