"""`hwprune export`: the file computes what the model does, or it is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune import export as exporting
from hwprune.cli import main
from hwprune.digits import digits_model
from hwprune.export import ExportError, export

pytest.importorskip("timm")


def pruned(*kinds: str) -> nn.Module:
    torch.manual_seed(0)
    model = digits_model(pretrained=False)
    x = torch.randn(16, 1, 16, 16)
    hwprune.prune(model, [x], hwprune.Budget(macs=0.6), kinds=list(kinds), block=(16, 16))
    return model


def needs_onnx() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install hwprune[export]")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "pruned"
    hwprune.save(pruned("head", "neuron", "qk", "vo"), out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("qk", "vo", "neuron"), ("block",)])
def test_onnx_runtime_runs_what_was_written_at_any_batch(
    kinds: tuple[str, ...], tmp_path: Path
) -> None:
    runtime = needs_onnx()
    model, file = pruned(*kinds), tmp_path / "m.onnx"
    found = export(model, file, to="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert found.max_error < 1e-4 and found.batches == (2, 1, 5)
    assert ("no tiles" in "".join(found.notes)) == (kinds == ("block",))
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "images"
    x = torch.randn(7, 1, 16, 16)  # a batch the export never saw
    (got,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [("head", "neuron"), ("block",)])
def test_an_exported_program_is_loaded_by_torch(kinds: tuple[str, ...], tmp_path: Path) -> None:
    model, file = pruned(*kinds), tmp_path / "m.pt2"
    found = export(model, file, to="torch-export")
    assert bool(found.notes) == (kinds == ("block",))
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(file).module()(x), model(x))


def test_the_command_writes_beside_the_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, told = folder.with_name("pruned.pt2"), folder.with_name("told.json")
    words = ["export", str(folder), "--to", "torch-export", "--batch", "3"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json", str(told)])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "") and "largest difference" in out
    assert max(map(len, out.splitlines())) <= 100 or str(target) in out
    found = json.loads(told.read_text())
    assert found["file"] == str(target) and found["batches"] == [3] and target.is_file()
    assert found["max_error"] <= 1e-4 * found["max_output"]


class Wrong(nn.Module):
    """What a broken exporter could write."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def __call__(self, x: Tensor) -> Tensor:
        y = self.model(x)
        if self.how == "nan":
            return y * float("nan")
        if self.how == "shape":
            return y[:, :3]
        if self.how == "one batch" and len(x) != 2:
            raise RuntimeError("expected batch 2")
        return y * 1.01 if self.how == "scaled" else y


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", "something else"),
        ("scaled", "something else"),
        ("shape", "gives"),
        ("one batch", "does not run at batch 1"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = digits_model(pretrained=False)
    nn.init.normal_(model.get_parameter("head.weight"))

    def written(net: nn.Module, x: Tensor, fresh: Path, *_: object) -> Wrong:
        fresh.write_text("x")
        fresh.with_name(f"{fresh.name}.data").write_text("x")
        return Wrong(net, how)

    monkeypatch.setattr(exporting, "_written", written)
    (tmp_path / "m.pt2").write_text("what was there")
    with pytest.raises(ExportError, match=said):
        export(model, tmp_path / "m.pt2", to="torch-export")
    assert (tmp_path / "m.pt2").read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    how = "right"
    export(model, tmp_path / "m.pt2", to="torch-export")
    assert (tmp_path / "m.pt2").read_text() == "x"


class Unexportable(nn.Module):
    """Data decides its path."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 4, 4)}

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = tmp_path / "dit"
    denoiser.mkdir()
    (denoiser / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    for words, said in (
        ([denoiser, "--to", "onnx"], "torch.export.export"),
        ([tmp_path / "none", "--to", "onnx"], "none"),
        (["digits", "--to", "onnx", "--batch", "0"], "--batch"),
        (["digits", "--to", "onnx", "--batch", "some"], "--batch"),
        (["digits", "--to", "pickle"], "pickle"),
        (["digits", "--to", "torch-export", "--out", tmp_path], "is a folder"),
        (["digits", "--to", "torch-export", "--out", tmp_path / "a" / "b"], "no such folder"),
    ):
        monkeypatch.setattr(
            "hwprune.opening.digits_model", lambda progress: digits_model(pretrained=False)
        )
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, words)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1) and said in err, err
    with pytest.raises(ExportError, match="cannot be exported"):
        export(Unexportable(), tmp_path / "m.pt2", to="torch-export")
    with pytest.raises(ValueError, match="float32"):
        export(digits_model(pretrained=False).half(), tmp_path / "m.pt2", to="torch-export")
    assert [p.name for p in tmp_path.iterdir()] == ["dit"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"hwprune\[export\]"):
        export(digits_model(pretrained=False), tmp_path / "m.onnx", to="onnx")
