"""Opening MODEL: weights from files and folders, strictly, and never by running a file's code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hwprune.opening import open_model, read_state

timm = pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parent.parent
NAME = "test_vit"  # timm's own for tests: 6 blocks of width 64, 160 pixels


def build(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(NAME, **arguments).eval()
    return model


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in build().state_dict().items()}


def test_weights_of_a_file_are_the_model_s(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    opened = open_model(NAME, tmp_path / "w.safetensors")
    assert not opened.model.training and opened.spec is None and not opened.note
    assert all(torch.equal(state[k], v) for k, v in opened.model.state_dict().items())


def test_half_precision_is_cast_to_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "w.safetensors")
    found = open_model(NAME, tmp_path / "w.safetensors").model.state_dict()
    assert all(torch.equal(state[k].half().float(), v) for k, v in found.items())
    assert {v.dtype for v in found.values()} == {torch.float32}


@pytest.mark.parametrize("key", ["", "model", "state_dict"])
def test_a_training_script_s_file_is_understood(
    state: dict[str, Tensor], tmp_path: Path, key: str
) -> None:
    found: dict[str, Any] = {f"module.{k}": v for k, v in state.items()}
    arguments = argparse.Namespace(lr=0.1)
    torch.save({key: found, "args": arguments, "epoch": 3} if key else found, tmp_path / "w.pth")
    assert all(torch.equal(state[k], v) for k, v in read_state(tmp_path / "w.pth").items())


def test_a_classifier_of_the_user_s_own_classes_is_taken_from_the_file(tmp_path: Path) -> None:
    save_file(build(num_classes=7).state_dict(), tmp_path / "w.safetensors")
    opened = open_model(NAME, tmp_path / "w.safetensors")
    assert opened.model.num_classes == 7 and "7 outputs" in opened.note


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    state["blocks.1.attn.qkv.weight"] = torch.zeros(192, 32)
    state["extra"] = state.pop("blocks.0.norm1.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        open_model(NAME, tmp_path / "w.safetensors")
    said = str(error.value)
    assert f"does not fit {NAME}" in said
    assert "blocks.1.attn.qkv.weight is [192, 32], expected [192, 64]" in said
    assert "1 missing from the file: blocks.0.norm1.bias" in said
    assert "1 in the file alone: extra" in said


def test_weights_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="Name the model the file was trained as"):
        open_model(NAME, tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    state: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight: expected finite"):
        open_model(NAME, tmp_path / "w.safetensors")


class Hostile:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_code_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": Hostile()}, "w.pth")
    with pytest.raises(ValueError, match="nothing else in it is run"):
        open_model(NAME, Path("w.pth"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"junk", "no readable safetensors file"),
        ("w.pth", b"junk", "cannot be read as tensors alone"),
        ("w.npz", b"junk", r"expected weights as \.safetensors or \.pth, got '\.npz'"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_model(NAME, tmp_path / name)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        read_state(tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="got int at 'epoch'"):
        read_state(tmp_path / "w.pth")


def test_weights_that_cannot_be_downloaded_name_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create_model(name: str, pretrained: bool) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"could not be downloaded.*no route.*--weights FILE"):
        open_model(NAME)


def test_a_host_without_an_address_is_asked_once_and_the_client_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    from huggingface_hub import constants

    def getaddrinfo(*_: object) -> None:
        raise socket.gaierror("no address")

    seen = []

    def create_model(name: str, pretrained: bool) -> None:
        seen.append(constants.HF_HUB_OFFLINE)
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("hwprune.opening.getproxies", dict)
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match="could not be downloaded"):
        open_model(NAME)
    assert seen == [True] and constants.HF_HUB_OFFLINE is False


def test_a_folder_of_timm_s_opens(state: dict[str, Tensor], tmp_path: Path) -> None:
    timm.models.save_for_hf(build(), tmp_path / "own", safe_serialization="both")
    found = open_model(str(tmp_path / "own")).model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in found.items())
    for file in (tmp_path / "own").glob("*.[bs]*"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be opened by timm"):
        open_model(str(tmp_path / "own"))


@pytest.mark.slow
def test_the_recipe_prunes_a_model_of_the_user_s(state: dict[str, Tensor], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    nn.init.normal_(state["head.weight"], std=0.5)  # random weights with something to lose
    save_file(state, tmp_path / "w.safetensors")
    names = [f"class{i}" for i in range(1000)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for i in range(6):
        folder = tmp_path / "images" / names[i]
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (170, 180, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / "a.png")
    words = [NAME, "--data", "images", "--weights", "w.safetensors", "--class-map", "names.txt"]
    words += ["--images", "6", "--budget", "0.8", "--out", "out"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prune_deit.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pruned: top-1" in done.stdout and "saved out" in done.stdout

    from hwprune.checkpoint import load

    report = vars(load(tmp_path / "out"))["hwprune_spec"]["report"]
    assert 0.7 < report["macs_ratio"] <= 0.8
