"""Pictures while a mask is learned: there to be looked at, and nothing hangs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hwprune
from hwprune.conditions import conditions_of
from hwprune.gating import Gating

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from fakes import tiny_diffusion  # noqa: E402
from fakes.tiny_diffusion import flow, tiny_dit  # noqa: E402

from hwprune.diffusion_folder import open_diffusion  # noqa: E402
from hwprune.pictures import Sampled  # noqa: E402

QUICK: dict[str, Any] = {"steps": 2, "updates": 6, "images": 4, "batch": 4}


def opened_parts(folder: Path) -> Any:
    tiny_dit().save_pretrained(folder / "transformer")
    flow().save_pretrained(folder / "scheduler")
    return open_diffusion(str(folder))


def learned(opened: Any, asked: Any, preview: Any, **more: Any) -> Any:
    return hwprune.prune_diffusion(
        opened.model,
        asked,
        hwprune.Budget(params=0.9),
        preview=preview,
        **{**QUICK, **more},
    )


def size_of(file: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width = imread(file).shape[:2]
    return height, width


def test_a_better_mask_is_shown_while_learning_and_changes_nothing(tmp_path: Path) -> None:
    results = []
    for shown in (False, True):
        opened = opened_parts(tmp_path / f"m{shown}")
        conditions = conditions_of(opened.model, [1, 2], steps=2, scheduler=opened.scheduler)
        pictures = Sampled(opened, conditions, seed=0, batch=4)
        calls: list[int] = []

        def preview(gating: Gating, keep: Tensor, own: Sampled = pictures) -> None:
            calls.append(int(keep.sum()))  # noqa: B023 - called at once
            own.preview(gating, keep, tmp_path / "live" / "samples.png")

        report = learned(opened, conditions, preview if shown else None)
        results.append((report.params, report.distance["held"]))
        if shown:
            assert calls and size_of(tmp_path / "live" / "samples.png") > (100, 100)
            assert [path.name for path in (tmp_path / "live").iterdir()] == ["samples.png"]
    assert results[0] == results[1]


def test_a_pipeline_of_latents_keeps_its_decoder_for_them(tmp_path: Path) -> None:
    pipeline = tiny_diffusion.stable_diffusion(tmp_path / "tokens")
    pipeline.save_pretrained(tmp_path / "p")
    opened = open_diffusion(str(tmp_path / "p"))
    conditions = conditions_of(opened.whole, ["a", "b"], steps=2)
    pictures = Sampled(opened, conditions, seed=0, batch=4)
    opened.pipeline = None  # as the command frees it
    file = tmp_path / "samples.png"
    learned(opened, conditions, lambda gating, keep: pictures.preview(gating, keep, file))
    assert size_of(file) > (100, 100)


def test_a_picture_that_fails_stops_no_learning(tmp_path: Path) -> None:
    opened = opened_parts(tmp_path / "m")
    conditions = conditions_of(opened.model, [1], steps=2, scheduler=opened.scheduler)
    pictures = Sampled(opened, conditions, seed=0, batch=4)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    pictures.sampler.final = broken  # type: ignore[method-assign]
    file = tmp_path / "samples.png"
    report = learned(opened, conditions, lambda g, k: pictures.preview(g, k, file))
    assert pictures.failed and not file.exists() and report.params_ratio <= 0.9
    assert torch.isfinite(torch.tensor(report.distance["held"]))
