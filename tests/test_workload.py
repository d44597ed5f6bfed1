"""A model by its name with random inputs: every family of denoisers, timm names, folders, bad words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hwprune.denoiser_inputs import random_call
from hwprune.meter.window import time_per_call
from hwprune.workload import open_workload, torch_device

CPU = torch.device("cpu")
DENOISERS = [
    "unet.tiny",
    "dit.tiny",
    "dit.tiny_pixart",
    "mmdit.tiny",
    "mmdit.tiny_sd3",
    "qwen_image.tiny",
    "sana.tiny",
]


def tiny(name: str) -> nn.Module:
    """A tiny denoiser of one of the families."""
    pytest.importorskip(
        "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
    )
    from importlib import import_module

    module, function = name.split(".")
    make: Callable[[], tuple[nn.Module, object, object]] = getattr(
        import_module(f"hwprune.families.{module}"), function
    )
    return make()[0]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_of_denoisers_runs_on_its_random_inputs(name: str) -> None:
    model = tiny(name)
    latent, inputs = random_call(
        model, 3, side=4 if name in ("mmdit.tiny", "qwen_image.tiny") else None
    )
    with torch.no_grad():
        out = model(latent, **inputs)[0]
    assert len(out) == 3 and out.isfinite().all()
    floats = [t for t in (latent, inputs.get("encoder_hidden_states")) if t is not None]
    assert all(t.std() > 0.5 for t in floats), "zeros run faster and cooler than data"
    again, _ = random_call(model, 3, side=4 if name in ("mmdit.tiny", "qwen_image.tiny") else None)
    assert torch.equal(latent, again)


def test_a_class_without_known_inputs_is_named() -> None:
    with pytest.raises(ValueError, match="random inputs of a Linear are not known; known are DiT"):
        random_call(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("as_pipeline", [True, False])
def test_a_diffusers_folder_opens_its_denoiser(tmp_path: Path, as_pipeline: bool) -> None:
    model = tiny("unet.tiny")
    folder = tmp_path / "unet" if as_pipeline else tmp_path
    model.save_pretrained(folder)  # type: ignore[operator]
    if as_pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    work = open_workload(str(tmp_path), batch=2, device=CPU)
    assert "UNet2DConditionModel" in work.notes[0]
    latent, inputs = random_call(model, 2)
    with torch.no_grad():
        expected = model(latent, **inputs)[0]
    torch.testing.assert_close(work.call()[0], expected)  # type: ignore[index]


def test_a_timm_name_runs_on_images_of_its_own_size() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")
    work = open_workload("test_vit", batch=2, device=CPU, dtype="bf16", random_weights=True)
    out = work.call()
    assert isinstance(out, torch.Tensor) and out.shape == (2, 1000) and out.dtype == torch.bfloat16
    assert not out.requires_grad and set(work.notes) == {
        "random weights",
        "normally distributed inputs",
    }
    run_chunk, drain = work.repeated()
    seconds = time_per_call(run_chunk, drain, 0.3)
    assert 1e-4 < seconds < 5


def test_time_per_call_counts_only_what_has_finished() -> None:
    from fakes.virtual import VirtualClock

    from hwprune.meter.energy_window import Chunk

    clock, called = VirtualClock(), 0

    def one_behind() -> Chunk:  # as on a GPU with one chunk queued
        nonlocal called
        clock.sleep(0.25)
        called += 1
        return Chunk(0 if called == 1 else 5)

    assert time_per_call(one_behind, lambda: clock.sleep(0.25), 1.0, clock=clock) == pytest.approx(
        0.05
    )
    with pytest.raises(ValueError, match="expected run_chunk to finish work"):
        time_per_call(lambda: (clock.sleep(0.1), Chunk(0))[1], lambda: None, 1.0, clock=clock)


def test_bad_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for words, piece in (
        ({"name": str(tmp_path)}, "a pipeline without transformer or unet"),
        ({"name": "no_such_model"}, "no model 'no_such_model'"),
        ({"name": "digits", "batch": 0}, "--batch"),
        ({"name": "digits", "dtype": "int4"}, "--dtype"),
    ):
        options = {"batch": 1, "device": CPU} | words
        with pytest.raises(ValueError, match=piece):
            open_workload(**options)  # type: ignore[arg-type]
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match="--device"):
            torch_device(name)
    assert torch_device("cpu:0") == CPU
