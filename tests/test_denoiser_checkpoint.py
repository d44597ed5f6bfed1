"""A pruned denoiser opens with stock diffusers and with hwprune.load, bit for bit, alone or in a pipeline."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune.families.denoiser import find_units
from hwprune.integrations.diffusers_models import register
from hwprune.pruned_config import pruned_entry
from hwprune.realise import masked, realise_
from hwprune.units import Mask, Units

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).resolve().parent.parent / "hwprune" / "families"
TINY: dict[str, Callable[[], Any]] = {}
for path in sorted(FOLDER.glob("*.py")):
    if "\ndef tiny(" in path.read_text():
        module = importlib.import_module(f"hwprune.families.{path.stem}")
        for function, make in inspect.getmembers(module, inspect.isfunction):
            if function.startswith("tiny"):
                TINY[f"{path.stem}.{function}"] = make
each_model = pytest.mark.parametrize("which", TINY)
NARROW, ALL = ("head", "neuron"), ("head", "neuron", "depth")
TIME = torch.tensor([0.3, 0.7])


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()
    register()


def removal(units: list[Units]) -> Mask:
    draw = torch.Generator().manual_seed(1)
    mask = {u.name: torch.rand(u.shape, generator=draw) < 0.6 for u in units}
    mask[units[0].name][:] = False  # one layer with nothing left
    return mask


def pruned(
    which: str = "dit.tiny", kinds: tuple[str, ...] = ALL
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A tiny pruned model and how to call it or one like it."""
    model, latent, inputs = TINY[which]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    units = find_units(model, kinds)
    realise_(model, units, removal(units))

    def call(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            out: Tensor = model(
                latent.to(dtype), timestep=TIME, **moved(inputs, dtype), return_dict=False
            )[0]
        return out

    return model, call


def moved(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return {k: moved(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value


@each_model
def test_stock_diffusers_and_our_loader_open_every_form_bit_for_bit(
    tmp_path: Path, which: str
) -> None:
    model, call = pruned(which)
    expected = call(model)
    hwprune.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(call(model), expected)
    for folder in (tmp_path / "ours", tmp_path / "stock"):
        opened = [
            hwprune.load(folder),
            type(model).from_pretrained(folder),
            diffusers.AutoModel.from_pretrained(str(folder)),
        ]
        for again in opened:
            assert type(again) is type(model)
            assert torch.equal(call(again), expected)
    opened[1].save_pretrained(tmp_path / "again")
    assert torch.equal(call(type(model).from_pretrained(tmp_path / "again")), expected)
    kinds = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}


def test_several_files_and_lower_precision_open_as_they_are(tmp_path: Path) -> None:
    model, call = pruned("mmdit.tiny")
    model.to(torch.bfloat16)
    expected = call(model)
    hwprune.save(model, tmp_path / "model", max_shard_bytes=60_000)
    assert len(list((tmp_path / "model").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    again = hwprune.load(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    stock = type(model).from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert torch.equal(call(again), expected) and torch.equal(call(stock), expected)
    wide = hwprune.load(tmp_path / "model", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_dense_denoiser_is_saved_and_opened_as_stock_diffusers_would(tmp_path: Path) -> None:
    model, latent, inputs = TINY["unet.tiny"]()
    hwprune.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config and "_name_or_path" not in config
    with torch.no_grad():
        expected = model(latent, timestep=TIME, **inputs).sample
        for again in (
            hwprune.load(tmp_path / "model"),
            type(model).from_pretrained(tmp_path / "model"),
        ):
            assert torch.equal(again(latent, timestep=TIME, **inputs).sample, expected)


def test_a_whole_pipeline_is_saved_opened_and_samples_the_same(tmp_path: Path) -> None:
    model, _ = pruned("dit.tiny")
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=4
    )
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.DiTPipeline(model, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def samples(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        return pipeline(
            [1, 2], num_inference_steps=2, guidance_scale=1.0, generator=draw, output_type="np"
        ).images

    expected = samples(pipeline)
    pipeline.save_pretrained(tmp_path / "stock")
    hwprune.save(pipeline, tmp_path / "ours")
    for folder in (tmp_path / "stock", tmp_path / "ours"):
        for again in (diffusers.DiffusionPipeline.from_pretrained(folder), hwprune.load(folder)):
            assert (samples(again) == expected).all()
            assert pruned_entry(again.transformer.config) is not None
    with pytest.raises(FileExistsError, match="pass force=True"):
        hwprune.save(pipeline, tmp_path / "ours")
    hwprune.save(pipeline, tmp_path / "ours", force=True)


FRESH = """
import sys
folder, order = sys.argv[1:]
if order == "before":
    import hwprune
    assert "diffusers" not in sys.modules and "torch" not in sys.modules
from diffusers import DiTTransformer2DModel
try:
    model = DiTTransformer2DModel.from_pretrained(folder)
    print("opened", len(model.transformer_blocks))
except ValueError as error:
    print(str(error)[:50])
"""


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("before", "opened 2"),
        ("never", "Unknown quantization type, got hwprune - supported"),
    ],
)
def test_the_import_of_hwprune_is_what_teaches_diffusers_the_shape(
    tmp_path: Path, root: Path, order: str, words: str
) -> None:
    model, _, _ = TINY["dit.tiny"]()
    units = find_units(
        model, ["depth"]
    )  # nothing but a block less: the silent case without a guard
    realise_(model, units, {units[-1].name: torch.tensor([False])})
    hwprune.save(model, tmp_path / "model")
    env = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model"), order]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == words, done.stderr


def test_other_models_of_diffusers_are_not_touched(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path)
    again, info = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for a, b in zip(vae.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    made = diffusers.AutoencoderKL.from_config(vae.config)
    assert type(made) is type(vae)


def test_the_folder_says_nothing_of_where_the_dense_model_lay(tmp_path: Path) -> None:
    model, _, _ = TINY["dit.tiny"]()
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")
    units = find_units(model)
    realise_(model, units, removal(units))
    hwprune.save(model, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_report_travels_with_the_model(tmp_path: Path) -> None:
    model, _ = pruned()
    vars(model)["hwprune_spec"] = {"report": {"params_ratio": 0.8, "seconds": 3.5}}
    hwprune.save(model, tmp_path / "model")
    assert vars(hwprune.load(tmp_path / "model"))["hwprune_spec"]["report"]["params_ratio"] == 0.8
    assert "| params_ratio | 0.8 |" in (tmp_path / "model" / "README.md").read_text()


def test_pruning_twice_is_written_as_one_shape_unless_blocks_went(tmp_path: Path) -> None:
    model, call = pruned(kinds=NARROW)
    units = find_units(model, ["neuron"])
    mask = {u.name: torch.arange(u.count) % 2 > 0 for u in units}
    with masked(model, units, mask):
        expected = call(model)
    realise_(model, units, mask)
    torch.testing.assert_close(call(model), expected, rtol=0, atol=1e-5)
    hwprune.save(model, tmp_path / "model")
    assert torch.equal(call(type(model).from_pretrained(tmp_path / "model")), call(model))
    model, _ = pruned(kinds=ALL)
    units = find_units(model, ["neuron"])
    with pytest.raises(
        ValueError, match="was removed from this model before, so its blocks have new"
    ):
        realise_(model, units, {units[0].name: torch.arange(units[0].count) > 3})


def test_a_pruned_model_trains_and_opens_with_what_it_learned(tmp_path: Path) -> None:
    model, call = pruned()
    hwprune.save(model, tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "stock")
    hwprune.save(model, tmp_path / "model", force=True)
    for folder in ("stock", "model"):
        assert torch.equal(call(hwprune.load(tmp_path / folder)), call(model.eval()))
