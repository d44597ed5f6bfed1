"""Folders of denoisers that are broken, mixed up or hostile: one clear error, and nothing is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hwprune
from hwprune.families import dit
from hwprune.families.denoiser import find_units
from hwprune.integrations.diffusers_models import register
from hwprune.realise import realise_

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def model(seed: int = 1) -> nn.Module:
    made, _, _ = dit.tiny()
    units = find_units(made, ["head", "neuron", "depth"])
    draw = torch.Generator().manual_seed(seed)
    mask = {u.name: torch.rand(u.shape, generator=draw) < 0.7 for u in units if u.kind != "depth"}
    mask[units[-1].name] = torch.tensor([False])
    realise_(made, units, mask)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    folder = tmp_path_factory.mktemp("whole") / "model"
    hwprune.save(model(), folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A fresh copy of a good folder."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors as another program would: without our header."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def entry(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda c: c["quantization_config"].update(changes))


def shape(name: str, value: Any) -> Callable[[Path], None]:
    return lambda f: edit(f, lambda c: c["quantization_config"]["shape"].update({name: value}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda c: c.update(changes))


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))


def of_another(folder: Path) -> None:
    hwprune.save(model(seed=2), folder / "other")
    shutil.copy(folder / "other" / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(folder / "other")


FF = "transformer_blocks.1.ff"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "weights cut short": (cut_short, "no readable safetensors file"),
    "weights are text": (lambda f: (f / WEIGHTS).write_text("hello"), "no readable safetensors"),
    "a pickle": (as_pickle, "is a pickle, which is never opened"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config has NaN": (lambda f: (f / "config.json").write_text('{"a": NaN}'), "NaN is no JSON"),
    "a tensor less": (
        lambda f: rewrite(f, lambda t: t.pop("proj_out_2.bias")),
        r"proj_out_2\.bias is missing from the file \(1 such\)",
    ),
    "a tensor more": (
        lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(1))),
        "extra is in the file, but the model has no place for it",
    ),
    "a tensor of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"proj_out_2.bias": torch.ones(3)})),
        r"proj_out_2\.bias: expected \(4,\), got \(3,\)",
    ),
    "whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({"proj_out_2.bias": torch.ones(4, dtype=torch.int8)})),
        r"proj_out_2\.bias: expected fractions, got torch\.int8",
    ),
    "NaN": (
        lambda f: rewrite(f, lambda t: t["proj_out_2.bias"].fill_(float("nan"))),
        r"proj_out_2\.bias holds NaN or Inf",
    ),
    "weights of another": (of_another, "describe different models; they were swapped"),
    "version": (entry(version=99), "version 99 of the hwprune entry is unknown, expected 1"),
    "no version": (entry(version=None), "version None of the hwprune entry is unknown"),
    "shape is a list": (entry(shape=[]), "expected shape as an object, got list"),
    "shape is empty": (entry(shape={}), "has an empty shape"),
    "another shape": (shape(FF, {"type": "units", "kept": 5}), "describe different models"),
    "class of ours no more": (config(_class_name="AutoencoderKL"), "_class_name is 'AutoencoderKL'"),
    "class is code": (config(_class_name="os.system"), "_class_name is 'os.system', expected one of"),
    "class is a list": (config(_class_name=["x"]), r"_class_name is \"\['x'\]\", expected one of"),
    "a billion layers": (config(num_layers=10**9), "num_layers=1000000000 is out of range"),
    "many layers": (config(num_layers=5000), "num_layers=5000 for a file of"),
    "wide": (config(attention_head_dim=10**7), "attention_head_dim=10000000 is out of range"),
    "wider than the file": (config(attention_head_dim=64), r"\.weight: expected|\.bias: expected"),
    "far wider": (
        config(attention_head_dim=200_000, num_attention_heads=1),
        "a dense model of .* GB for so small a file",
    ),
    "a list that never ends": (config(num_layers=[[[[[1]]]]]), "expected a short flat list"),
    "text for a number": (config(num_layers="three"), "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_our_loader_says_what_is_wrong(folder: Path, what: str) -> None:
    change, words = BAD[what]
    change(folder)
    with pytest.raises(hwprune.CheckpointError, match=words):
        hwprune.load(folder)


# Without our header, as in a folder of save_pretrained, the shape itself has to be refused.
SHAPES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "too many kept": (shape(FF, {"type": "units", "kept": 96}), "expected kept of 0 to 95"),
    "negative": (shape(FF, {"type": "units", "kept": -1}), "expected kept of 0 to"),
    "a boolean": (shape(FF, {"type": "units", "kept": True}), "expected kept of 0 to 95"),
    "text": (shape(FF, {"type": "units", "kept": "5"}), "expected kept of 0 to"),
    "no size": (shape(FF, {"type": "units"}), "expected kept of 0 to 95 neurons, got None"),
    "no such layer": (shape("x.y", {"type": "units", "kept": 1}), "x.y: the file's shape"),
    "no such block": (shape("transformer_blocks.9", {"type": "removed"}), "fits no layer"),
    "no such type": (shape(FF, {"type": "mlp", "kept": 1}), "fits no layer of this model"),
    "the first block": (shape("transformer_blocks.0", {"type": "removed"}), "fits no layer"),
    "not a table": (shape(FF, 7), "expected type and sizes, got 7"),
    "fewer kept": (shape(FF, {"type": "units", "kept": 5}), f"{FF}.net.0.proj"),
    "a tensor less": (lambda f: rewrite(f, lambda t: t.pop("proj_out_2.bias")), "missing from"),
    "NaN": (
        lambda f: rewrite(f, lambda t: t["proj_out_2.bias"].fill_(float("nan"))),
        r"proj_out_2\.bias .*holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("loader", ["ours", "stock"])
def test_shapes_that_do_not_fit_are_refused_by_both_loaders(
    folder: Path, what: str, loader: str
) -> None:
    rewrite(folder, lambda tensors: None)
    change, words = SHAPES[what]
    change(folder)
    if loader == "ours":
        with pytest.raises(hwprune.CheckpointError, match=words):
            hwprune.load(folder)
        return
    # A shape that could be another model's is refused by diffusers itself: a size mismatch.
    expected = RuntimeError if what == "fewer kept" else hwprune.CheckpointError
    with pytest.raises(expected, match=words):
        diffusers.DiTTransformer2DModel.from_pretrained(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hwprune.CheckpointError, match="no such folder"):
        hwprune.load(tmp_path / "nothing")


def test_saving_refuses_what_could_not_be_opened(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.proj_out_2.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"proj_out_2\.bias holds NaN or Inf; a broken model"):
        hwprune.save(broken, tmp_path / "model")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="AutoencoderKL is no denoiser hwprune opens again"):
        hwprune.save(vae, tmp_path / "model")
    with pytest.raises(ValueError, match="format='dense' is for vision transformers"):
        hwprune.save(model(), tmp_path / "model", format="dense")
    changed = model()
    changed.proj_out_1 = nn.Sequential(changed.proj_out_1)
    with pytest.raises(hwprune.CheckpointError, match="does not open again"):
        hwprune.save(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_files_of_others_is_never_replaced(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt', which hwprune did not write"):
        hwprune.save(model(), folder, force=True)
    (folder / "notes.txt").unlink()
    hwprune.save(model(), folder, force=True)


def test_a_pipeline_with_a_pickle_or_a_broken_denoiser_is_refused(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.DiTPipeline(model(), vae, diffusers.DDIMScheduler())
    hwprune.save(pipeline, tmp_path / "pipe")
    edit(tmp_path / "pipe" / "transformer", lambda c: c["quantization_config"].update(version=7))
    with pytest.raises(hwprune.CheckpointError, match="version 7 of the hwprune entry"):
        hwprune.load(tmp_path / "pipe")
    hwprune.save(pipeline, tmp_path / "pipe", force=True)
    (tmp_path / "pipe" / "vae" / WEIGHTS).rename(tmp_path / "pipe" / "vae" / "pytorch_model.bin")
    with pytest.raises(
        hwprune.CheckpointError, match=r"pytorch_model\.bin: a pickle, which is never"
    ):
        hwprune.load(tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    with pytest.raises(hwprune.CheckpointError, match="diffusers cannot open the pipeline"):
        hwprune.load(tmp_path / "pipe")
