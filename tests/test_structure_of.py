"""What `hwprune inspect` says of denoisers and pipelines, against the models, without their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hwprune
from hwprune.families.denoiser import find_units
from hwprune.realise import realise_
from hwprune.spec import CheckpointError
from hwprune.structure_of import describe_folder
from hwprune.terminal import show_folder

pytest.importorskip("diffusers")

from fakes.tiny_diffusion import tiny_dit


def saved(folder: Path, *kinds: str) -> Path:
    """A tiny DiT cut by hand: the first two units of each layer of these kinds are kept."""
    model = tiny_dit()
    units = find_units(model, list(kinds))
    mask = {u.name: torch.arange(u.count) < 2 for u in units}
    if "depth" in kinds:
        whole = [u for u in units if u.kind == "depth"]
        mask = {u.name: torch.ones(u.count, dtype=torch.bool) for u in units}
        mask[whole[0].name] = torch.zeros(1, dtype=torch.bool)
    realise_(model, units, mask)
    hwprune.save(model, folder)
    return folder


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("hwprune.shards.read_tensors", read)


def test_a_denoiser_s_structure_is_that_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "dit", "head", "neuron")
    model = hwprune.load(folder)
    no_weights(monkeypatch)
    found = describe_folder(folder)
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["dense_params"] == sum(p.numel() for p in tiny_dit().parameters())
    kinds = {
        kind: row[kind] for row in found["layers"] for kind in ("heads", "neurons") if kind in row
    }
    assert kinds["heads"] == [2, 3] and kinds["neurons"][0] == 2
    for row in found["layers"]:
        module = model.get_submodule(row["layer"])
        assert row["params"] == sum(p.numel() for p in module.parameters()) < row["dense_params"]
    assert found["macs"] is None and found["base"]["architecture"] == "DiTTransformer2DModel"
    show_folder(found)
    out = capsys.readouterr().out
    assert "2 of 3" in out and max(map(len, out.splitlines())) <= 100


def test_removed_blocks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "dit", "depth")
    found = describe_folder(folder)
    assert [row["blocks"] for row in found["layers"] if "blocks" in row] == [[0, 1]]
    assert found["params"] == sum(p.numel() for p in hwprune.load(folder).parameters())
    show_folder(found)
    assert "0 of 1" in capsys.readouterr().out


def test_a_folder_around_a_denoiser_and_a_dense_one(tmp_path: Path) -> None:
    saved(tmp_path / "parts" / "transformer", "head")
    found = describe_folder(tmp_path / "parts")
    assert found["folder"].endswith("transformer") and found["format"] == "pruned"
    hwprune.save(tiny_dit(), tmp_path / "dense")
    found = describe_folder(tmp_path / "dense")
    assert found["format"] == "dense model" and found["params"] == found["dense_params"]
    assert all(row.get("heads", [3])[0] == row.get("heads", [3])[-1] for row in found["layers"])


def test_what_is_no_model_gets_a_line(tmp_path: Path) -> None:
    for make, said in (
        (lambda f: None, "no config.json"),
        (lambda f: (f / "config.json").write_text("{}"), "timm.create_model"),
        (lambda f: (f / "config.json").write_text('{"_class_name": "UNet1DModel"}'), "expected"),
    ):
        folder = tmp_path / said.replace(".", "").replace(" ", "")
        folder.mkdir()
        make(folder)
        with pytest.raises(CheckpointError, match=said.replace(".", r"\.")):
            describe_folder(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        describe_folder(tmp_path / "none")
