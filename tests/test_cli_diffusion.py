"""`hwprune prune-diffusion` as a user types it: folders in, the same form out, errors in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import hwprune
from hwprune import diffusion
from hwprune.cli import app, main

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, stable_diffusion, tiny_dit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--steps", "2", "--updates", "6", "--images", "4", "--batch", "4", "--device", "cpu")
SHORT = ("--budget", "params=0.8", "--labels", "0-3", *QUICK)


class Ran:
    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["prune-diffusion", *map(str, words)])
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with transformer/ and scheduler/ alone."""
    folder = tmp_path / "parts"
    hwprune.save(tiny_dit(), folder / "transformer")
    flow().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion(folder / "words").save_pretrained(folder / "sd")
    return folder / "sd"


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def is_png(file: Path) -> bool:
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_parts_in_parts_out(
    capsys: pytest.CaptureFixture[str], parts: Path, tmp_path: Path
) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed, so there are no pictures"
    )
    out, file = tmp_path / "out", tmp_path / "x.json"
    ran = Ran(capsys, parts, *SHORT, "--guidance", "1.5", "--out", out, "--json", file)
    assert (ran.code, ran.err) == (0, "")
    assert {p.name for p in out.iterdir()} == {
        "transformer",
        "scheduler",
        "README.md",
        "report.json",
        "report.html",
        "samples.png",
    }
    found = json.loads(file.read_text())
    model = hwprune.load(out / "transformer")
    assert found["params"] == count(model) <= 0.8 * count(tiny_dit())
    assert found["sampling"]["guidance"] == 1.5 and found["images"]["conditions"] == 4
    keys = {"macs_ratio", "params_ratio", "predicted", "measured", "seconds", "distance", "samples"}
    assert keys <= found.keys()
    assert is_png(out / "samples.png")
    same = (out / "scheduler" / "scheduler_config.json").read_bytes()
    assert same == (parts / "scheduler" / "scheduler_config.json").read_bytes()
    table = [line for line in ran.out.splitlines() if "samples.png" not in line]
    table = [line for line in table if not line.startswith("next: ")]
    assert f'hwprune.load("{out / "transformer"}")' in ran.out
    assert max(map(len, table)) <= 100 and "\x1b[" not in ran.out
    assert not list(tmp_path.glob(".*")), "the work folder was left"
    assert Ran(capsys, parts, *SHORT, "--out", out).code == 2
    assert Ran(capsys, parts, *SHORT, "--out", out, "--force", "--json", "-").code == 0


def test_a_pipeline_in_a_pipeline_out(
    capsys: pytest.CaptureFixture[str], stored: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\n\n  two dogs \n")
    words = ("--budget", "params=0.97", "--prompts", prompts, *QUICK, "--out", out, "--json", "-")
    ran = Ran(capsys, stored, *words)
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["images"]["conditions"] == 2 and found["sampling"]["guidance"] == 7.5
    again = diffusers.DiffusionPipeline.from_pretrained(out)
    assert count(again.unet) == found["params"]
    if found["samples"] is not None:
        assert is_png(out / "samples.png")
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        for file in (stored / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()


def test_pictures_that_fail_do_not_cost_the_model(
    capsys: pytest.CaptureFixture[str],
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed, so there are no pictures"
    )
    from hwprune import pictures

    real, calls = pictures.drawn, 0

    def failing(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:  # the dense model's are two batches of four
            raise RuntimeError("the decoder is out of memory")
        return real(*args, **given)

    monkeypatch.setattr(pictures, "drawn", failing)
    ran = Ran(capsys, parts, *SHORT, "--out", tmp_path / "out")
    assert ran.code == 0 and "no pictures: RuntimeError: the decoder is out of" in ran.out
    assert count(hwprune.load(tmp_path / "out" / "transformer")) < count(tiny_dit())
    assert not (tmp_path / "out" / "samples.png").exists()


def test_a_component_in_a_component_out(
    capsys: pytest.CaptureFixture[str], parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = Ran(capsys, parts / "transformer", *SHORT, "--out", out, "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert count(hwprune.load(out)) == found["params"]
    assert found["samples"] is None or is_png(Path(found["samples"]))


def test_unconditional_depth_and_a_baseline(
    capsys: pytest.CaptureFixture[str], parts: Path, tmp_path: Path
) -> None:
    words = ("--budget", "macs=0.5", "--kinds", "depth,neuron", "--method", "random", *QUICK)
    ran = Ran(capsys, parts, *words, "--out", tmp_path / "out", "--json", "-", "--no-repair")
    found = json.loads(ran.out)
    assert ran.code == 0 and found["macs_ratio"] <= 0.5 and found["method"] == "random"
    assert found["images"]["conditions"] == 1 and set(found["kinds"]) == {"depth", "neuron"}


def test_a_killed_run_goes_on_with_the_same_words(
    capsys: pytest.CaptureFixture[str],
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = (parts, *SHORT, "--out", tmp_path / "out", "--json", "-")
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "repair_trajectory_", interrupt)
        ran = Ran(capsys, *words)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.startswith("hwprune: interrupted; what was learned is kept in ")
    assert str(tmp_path / ".out.work") in ran.err and "same command" in ran.err
    assert not (tmp_path / "out").exists()
    kept = {p.name for p in (tmp_path / ".out.work").iterdir()}
    assert sum(name.startswith("learning-") for name in kept) == 1

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("an update was done again")

    with monkeypatch.context() as patch:
        patch.setattr("hwprune.settling.SettlingGates.learn", forbidden)
        assert Ran(capsys, *words).code == 0
    assert not (tmp_path / ".out.work").exists()


def test_gates_that_do_not_settle_are_exit_3_and_the_best_is_kept(
    capsys: pytest.CaptureFixture[str], parts: Path, tmp_path: Path
) -> None:
    words = ("--minutes", "0.0000001", "--out", tmp_path / "out", "--work", tmp_path / "work")
    ran = Ran(capsys, parts, *SHORT, *words)
    assert ran.code == 3 and "did not settle" in ran.err and ran.err.count("\n") == 1
    assert count(hwprune.load(tmp_path / "out" / "transformer")) <= 0.8 * count(tiny_dit())
    assert (tmp_path / "work").is_dir()


@pytest.mark.parametrize(
    ("words", "code", "pieces"),
    [
        (("--budget", "params=0.1"), 3, ("params=0.100 is out of reach",)),
        (("--budget", "memory=0.5"), 2, ("budget memory", "params, macs, latency and energy")),
        (("--budget", "size=1"), 2, ("size=1",)),
        (("--labels", "3-1"), 2, ("--labels", "0-9 or 1,3,5-7", "'3-1'")),
        (("--labels", "a"), 2, ("--labels", "'a'")),
        (("--labels", "0-99"), 2, ("expected 0 to 9, got 11",)),
        (("--steps", "0"), 2, ("steps: expected at least 1",)),
        (("--kinds", "block"), 2, ("head, neuron, depth",)),
        (("--method", "best"), 2, ("--method", "ecodiff")),
        (("--images", "0"), 2, ("images: expected at least 1",)),
        (("--device", "cuda:77"), 2, ("--device cuda:77: it cannot be used here",)),
        (("--device", "tpu9"), 2, ("--device tpu9",)),
        (("--json", "no/such.json"), 2, ("no such folder no",)),
        (("--prompts", "no.txt"), 2, ("--prompts and --labels: give one",)),
    ],
)
def test_bad_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    parts: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    code: int,
    pieces: tuple[str, ...],
) -> None:
    base = dict(zip(SHORT[::2], SHORT[1::2], strict=True)) | dict(
        zip(words[::2], words[1::2], strict=True)
    )
    flat = [word for pair in base.items() for word in pair]
    ran = Ran(capsys, parts, *flat, "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("hwprune: ") and ran.err.count("\n") == 1
    assert all(piece in ran.err for piece in pieces), ran.err
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], parts: Path, stored: Path, tmp_path: Path
) -> None:
    def refused(model: Path, piece: str, *words: object) -> None:
        ran = Ran(capsys, model, *(words or SHORT), "--out", tmp_path / "out")
        assert (ran.code, ran.out) == (2, "")
        assert piece in ran.err and ran.err.count("\n") == 1, ran.err

    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("a cat\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    asked = ("--budget", "params=0.9", *QUICK, "--prompts")
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path / "empty", "holds no diffusion model")
    refused(stored, "takes no class labels")
    refused(stored, "none.txt is empty", *asked, tmp_path / "none.txt")
    refused(stored, "expected text in UTF-8", *asked, tmp_path / "bytes.txt")
    refused(stored, "no such file", *asked, tmp_path / "missing.txt")
    refused(parts, "alone cannot read prompts", *asked, tmp_path / "some.txt")
    shutil.rmtree(parts / "scheduler")
    refused(parts, "the scheduler the model was made for")
    refused(parts / "transformer", "the scheduler the model was made for")
    (parts / "scheduler").mkdir()
    (parts / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Oops"}')
    refused(parts, "expected a scheduler of diffusers")
    shutil.copytree(parts / "transformer", parts / "unet")
    refused(parts, "both a transformer and a unet")
    (parts / "transformer" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(parts / "transformer", "holds a AutoencoderKL")


def test_a_name_that_is_no_folder_is_asked_of_the_hub(
    capsys: pytest.CaptureFixture[str],
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "some/pipeline":
            return str(stored)
        raise OSError("no connection")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    words = ("--budget", "params=0.97", *QUICK, "--out", tmp_path / "out", "--json", "-")
    ran = Ran(capsys, "some/pipeline", *words)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["images"]["conditions"] == 1  # the empty prompt alone
    ran = Ran(capsys, "some/other", *words, "--force")
    assert ran.code == 2 and "could not be had from the hub: no connection" in ran.err
    assert asked == ["some/pipeline", "some/other"]


def test_targets_are_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hwprune.diffusion_folder.open_diffusion", None)  # would fail at once
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "cat.jpg").touch()
    for out, force, piece in (
        (parts, "--force", "lie in each other"),
        (parts / "new", "--force", "lie in each other"),
        (mine, "--offload", "exists already"),
        (mine, "--force", "cat.jpg"),
        (mine / "cat.jpg", "--force", "is a file"),
    ):
        ran = Ran(capsys, parts, *SHORT, "--out", out, force)
        assert ran.code == 2 and piece in ran.err and ran.err.count("\n") == 1, ran.err
    assert (mine / "cat.jpg").exists()


def test_nan_and_a_full_gpu_are_one_line(
    capsys: pytest.CaptureFixture[str],
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    words = (parts, *SHORT, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "repair_trajectory_", full)
        ran = Ran(capsys, *words)
    assert ran.code == 2 and "--checkpointing" in ran.err and ran.err.count("\n") == 1
    assert list((tmp_path / ".out.work").glob("learning-*.pt"))

    def broken(*_: object, **__: object) -> None:
        raise FloatingPointError("NaN at step 1 of 2, first in layer x")

    monkeypatch.setattr(diffusion, "repair_trajectory_", broken)
    ran = Ran(capsys, *words)
    assert (ran.code, ran.err) == (2, "hwprune: NaN at step 1 of 2, first in layer x\n")


def test_flags_are_the_agreed_ones() -> None:
    agreed = (
        "--budget --out --prompts --labels --steps --method --kinds --guidance --updates --minutes --images "
        "--batch --device --profile --dtype --checkpointing --offload --work --no-repair --seed --force --json"
    )
    command: Any = typer.main.get_command(app)
    found = command.commands["prune-diffusion"].params
    assert {flag for p in found for flag in p.opts if flag.startswith("--")} == set(agreed.split())


def test_the_methods_named_are_those_there_are() -> None:
    from hwprune.cli_diffusion import Method
    from hwprune.selection import METHODS

    assert [method.value for method in Method] == list(METHODS)


def test_the_script_prunes_a_pipeline(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    words = ["--model", stored, "--prompts", tmp_path / "prompts.txt", "--budget", "0.97"]
    words += ["--out", tmp_path / "out", "--steps", "2", "--images", "2", "--minutes", "0.02"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prune_sdxl.py", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"params .* \(0\.9[0-7]", done.stdout)
    assert type(hwprune.load(tmp_path / "out")).__name__ == "UNet2DConditionModel"
