"""The command line on a folder of transformers: prune it, evaluate what came out, and say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hwprune
from hwprune.cli import main
from hwprune.families import hf_vit

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

from PIL import Image  # noqa: E402 - comes with timm


def run(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a ViT with its processor; `images`, 10 class folders of 3 pictures."""
    place = tmp_path_factory.mktemp("cli")
    model, _ = hf_vit.examples()["vit"]()
    model.save_pretrained(place / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        place / "model"
    )
    draw = np.random.default_rng(0)
    for label in range(10):
        (place / "images" / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "images" / str(label) / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def pruned(place: Path) -> Path:
    words = ("--data", place / "images", "--budget", "macs=0.7", "--out", place / "small")
    assert run("prune", place / "model", *words, "--json", place / "prune.json") == 0
    return place / "small"


def test_a_folder_of_transformers_is_pruned_and_opens_with_transformers(
    place: Path, pruned: Path
) -> None:
    assert json.loads((place / "prune.json").read_text())["macs_ratio"] <= 0.7
    model = transformers.ViTForImageClassification.from_pretrained(pruned)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, hwprune.load(pruned)(x).logits)
    processor = json.loads((pruned / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}


def test_the_pruned_folder_is_evaluated_as_the_dense_one(place: Path, pruned: Path) -> None:
    found = []
    for folder in (place / "model", pruned):
        words = ("--data", place / "images", "--json", place / "eval.json")
        assert run("eval", folder, *words) == 0
        found.append(json.loads((place / "eval.json").read_text()))
    dense, small = found
    assert dense["images"] == small["images"] == 30
    assert small["macs"] <= 0.7 * dense["macs"] and small["params"] < dense["params"]


def test_inspect_tells_layer_by_layer_what_is_left(place: Path, pruned: Path) -> None:
    found = []
    for folder in (place / "model", pruned):
        assert run("inspect", folder, "--json", place / "inspect.json") == 0
        found.append(json.loads((place / "inspect.json").read_text()))
    dense, small = found
    assert dense["macs"] == small["dense_macs"] and dense["macs_ratio"] == 1
    told = json.loads((place / "prune.json").read_text())
    assert (small["macs_ratio"], small["params_ratio"]) == (
        told["macs_ratio"],
        told["params_ratio"],
    )
    model = hwprune.load(pruned)
    for row in small["layers"]:
        held = sum(p.numel() for p in model.get_submodule(row["layer"]).parameters())
        assert row["params"] == held
    assert small["base"]["architecture"] == "ViTForImageClassification"


def test_pruning_what_is_pruned_is_refused(
    place: Path, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", place / "images", "--budget", "macs=0.5", "--out", place / "again")
    assert run("prune", pruned, *words) == 2
    assert "was written by hwprune, from ViTForImageClassification" in capsys.readouterr().err


def test_weights_beside_a_folder_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = place / "model" / "model.safetensors"
    words = ("--data", place / "images", "--weights", weights)
    assert run("eval", place / "model", *words) == 2
    assert "holds its own weights; leave --weights out" in capsys.readouterr().err
