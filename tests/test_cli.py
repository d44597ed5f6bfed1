"""The command line: what it prints and writes, its exit codes, and the line each bad input gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hwprune import checkpoint, opening, shards
from hwprune.cli import main
from hwprune.digits import digits_model

pytest.importorskip("timm")
pytest.importorskip("sklearn")

ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])(?:;\d+)*m")
PRUNE = ("prune", "digits", "--data", "digits", "--calibration", "32")


@pytest.fixture(autouse=True)
def untrained_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model without its half minute of training."""
    monkeypatch.setattr(opening, "digits_model", fresh_digits)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def fresh_digits(progress: object = None) -> nn.Module:
    return digits_model(pretrained=False)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by `hwprune prune`, with prune.json beside it."""
    out = tmp_path_factory.mktemp("cli") / "pruned"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(opening, "digits_model", fresh_digits)
        words = ("--budget", "macs=0.6", "--out", str(out), "--json", f"{out}.json")
        main([*PRUNE, *words])
    assert ended.value.code == 0
    return out


class Ran:
    """What a command did: its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


def refused(ran: Ran, *pieces: str) -> None:
    """Exit 2, and one line that says all of `pieces`."""
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("hwprune: ") and ran.err.count("\n") == 1, ran.err
    assert not [piece for piece in pieces if piece not in ran.err], ran.err


# --- what the commands do ----------------------------------------------------------------------


def test_prune_writes_a_folder_and_the_json_keys_scripts_rely_on(pruned: Path) -> None:
    found = json.loads(Path(f"{pruned}.json").read_text())
    keys = {"macs_ratio", "params_ratio", "predicted", "measured", "seconds", "model", "out"}
    assert keys <= found.keys()
    assert 0.5 < found["macs_ratio"] <= 0.6
    for figures in (found["predicted"], found["measured"]):
        assert figures["latency_ratio"] is None and figures["energy_ratio"] is None
        assert figures["reason"]
    model = checkpoint.load(pruned)
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert not list(pruned.parent.glob(".*")), "something half-written was left"


def test_eval_counts_what_the_model_gets_right(
    capsys: pytest.CaptureFixture[str], pruned: Path
) -> None:
    ran = Ran(capsys, "eval", pruned, "--data", "digits", "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)  # nothing but JSON on stdout
    keys = {"top1", "top5", "images", "macs", "params", "model", "data", "seconds"}
    assert found.keys() == keys
    written = json.loads(Path(f"{pruned}.json").read_text())
    assert (found["images"], found["macs"]) == (599, written["macs"])
    assert found["params"] == written["params"]

    from hwprune.data import digits_dataset

    test, model = digits_dataset("test"), checkpoint.load(pruned)
    with torch.no_grad():
        right = model(test.images_NCHW).argmax(1) == test.labels_N
    assert found["top1"] == pytest.approx(right.double().mean().item(), abs=2 / 599)


def test_inspect_tells_the_structure_without_reading_weights(
    capsys: pytest.CaptureFixture[str], pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_tensors(found: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(shards, "read_tensors", read_tensors)
    ran = Ran(capsys, "inspect", pruned, "--json", "-")
    monkeypatch.undo()
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    model = checkpoint.load(pruned)
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["base"]["architecture"] == "deit_tiny_patch16_224"
    assert found["provenance"]["budget"] == {"macs": 0.6}
    assert len(found["layers"]) == 8
    for row in found["layers"]:
        module = model.get_submodule(row["layer"])
        assert row["params"] == sum(p.numel() for p in module.parameters())
        assert {"heads", "qk", "v"} <= row.keys() or "neurons" in row


def test_inspect_counts_tiles(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "blocks"
    words = ("--budget", "macs=0.7", "--kinds", "block", "--block", "24x16", "--out", out)
    assert Ran(capsys, *PRUNE, *words).code == 0
    ran = Ran(capsys, "inspect", out, "--json", "-")
    model = checkpoint.load(out)
    for row in json.loads(ran.out)["layers"]:
        module = model.get_submodule(row["layer"])
        assert row["params"] == sum(p.numel() for p in module.parameters())
        sparse = [m for m in module.modules() if hasattr(m, "crow")]
        if len(sparse) == 2:  # both linears of the layer are cut
            assert row["tiles"][0] == sum(len(m.values) for m in sparse)
        assert sparse or "tiles" not in row
    assert "neurons" not in Ran(capsys, "inspect", out).out


def test_tables_are_plain_and_within_100_columns_when_piped(
    capsys: pytest.CaptureFixture[str], pruned: Path, tmp_path: Path
) -> None:
    done = Ran(capsys, *PRUNE, "--budget", "params=0.9", "--out", tmp_path / "x")
    outs = [done, Ran(capsys, "inspect", pruned), Ran(capsys, "eval", pruned, "--data", "digits")]
    for ran in outs:
        assert (ran.code, ran.err) == (0, "")
        assert ESCAPE not in ran.out
        table = [line for line in ran.out.splitlines() if not line.startswith("next: ")]
        assert max(map(len, table)) <= 100
    assert "next: hwprune eval " in done.out and "--data digits" in done.out


def test_a_budget_of_one_gives_the_model_bit_for_bit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = Ran(
        capsys, *PRUNE, "--budget", "macs=1", "--budget", "params=1.0", "--out", tmp_path / "x"
    )
    assert ran.code == 0 and "nothing was removed" in ran.out
    kept, dense = checkpoint.load(tmp_path / "x").state_dict(), fresh_digits().state_dict()
    assert kept.keys() == dense.keys()
    assert all(torch.equal(kept[name], dense[name]) for name in dense)


def test_the_dense_form_and_the_dtype_are_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--budget", "macs=0.5", "--format", "dense", "--dtype", "fp16", "--no-repair")
    ran = Ran(capsys, *PRUNE, *words, "--out", tmp_path / "x")
    assert ran.code == 0 and "dense form" in ran.out
    kept, dense = checkpoint.load(tmp_path / "x").state_dict(), fresh_digits().state_dict()
    assert {name: t.shape for name, t in kept.items()} == {n: t.shape for n, t in dense.items()}
    assert {t.dtype for t in kept.values()} == {torch.float16}
    ran = Ran(capsys, "inspect", tmp_path / "x", "--json", "-")
    found = json.loads(ran.out)
    assert (found["format"], found["macs_ratio"], found["params_ratio"]) == ("dense", 1, 1)
    assert min(row["params"] / row["dense_params"] for row in found["layers"]) < 0.6


def test_a_second_run_replaces_the_folder_when_forced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for ratio in ("0.9", "0.7"):
        assert (
            Ran(
                capsys, *PRUNE, "--budget", f"macs={ratio}", "--out", tmp_path / "x", "--force"
            ).code
            == 0
        )
    ran = Ran(capsys, "inspect", tmp_path / "x", "--json", "-")
    assert json.loads(ran.out)["provenance"]["budget"] == {"macs": 0.7}


# --- exit codes --------------------------------------------------------------------------------


def test_a_budget_out_of_reach_is_exit_3_with_what_each_layer_reaches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = Ran(capsys, *PRUNE, "--budget", "macs=0.0001", "--out", tmp_path / "x")
    assert (ran.code, ran.out) == (3, "")
    assert "out of reach" in ran.err and "\n  blocks.3.mlp: " in ran.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", ["hwprune.analysis.calibrate", "hwprune.shards.write"])
def test_ctrl_c_is_exit_130_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    words = ("--budget", "macs=0.9", "--out", tmp_path / "x", "--json", tmp_path / "x.json")
    ran = Ran(capsys, *PRUNE, *words)
    assert (ran.code, ran.out, ran.err) == (
        130,
        "",
        "hwprune: interrupted; nothing was written; the same command begins again\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_bug_is_not_made_to_look_like_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("hwprune.analysis.calibrate", broken)
    with pytest.raises(KeyError, match="ours"):
        main([*PRUNE, "--budget", "macs=0.9", "--out", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ((), ("Missing option '--budget'", "prune --help")),
        (("--budget", "latency=0.6", "--device", "x"), ("expected a device of", "hwprune profile")),
        (("--budget", "energy=9W"), ("energy: expected a number, or one with J, mJ, kJ", "9W")),
        (("--budget", "macs=0.6", "--device", "h200"), ("device='h200'", "leave device out")),
        (("--budget", "flops=0.6"), ("flops=0.6", "macs=0.6, params=50M")),
        (("--budget", "macs=0"), ("macs must be above 0",)),
        (("--budget", "macs=0.6", "--budget", "macs=0.5"), ("macs given twice",)),
        (("--budget", "macs=0.6", "--kinds", "head,tail"), ("tail", "block, head, neuron, qk, vo")),
        (("--budget", "macs=0.6", "--block", "32"), ("--block", "32x32", "'32'")),
        (("--budget", "macs=0.6", "--block", "0x8"), ("--block", "32x32", "'0x8'")),
        (("--budget", "macs=0.6", "--round-to", "0"), ("--round-to", "at least 1", "0")),
        (("--budget", "macs=0.6", "--batch", "0"), ("--batch", "at least 1", "0")),
        (("--budget", "macs=0.6", "--calibration", "0"), ("at least one calibration image",)),
        (("--budget", "macs=0.6", "--calibration", "9999"), ("at most 1198",)),
        (("--budget", "macs=0.6", "--dtype", "int4"), ("--dtype", "fp32", "int4")),
        (("--budget", "macs=0.6", "--format", "onnx"), ("--format", "pruned", "onnx")),
        (("--budget", "macs=0.6", "--data", "no/such"), ("no such folder or file: no/such",)),
        (("--budget", "macs=0.6", "--class-map", "names.txt"), ("leave it out",)),
        (("--budget", "macs=0.6", "--weights", "no.pth"), ("no such weights file: no.pth",)),
        (("--budget", "macs=0.6", "--json", "no/such.json"), ("--json", "no such folder no")),
        (("--budget", "macs=0.6", "--sparsity", "0.5"), ("--sparsity", "prune --help")),
    ],
)
def test_bad_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    pieces: tuple[str, ...],
) -> None:
    refused(Ran(capsys, *PRUNE, "--out", tmp_path / "x", *words), *pieces)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("deit_tny_patch16_224", ("no model 'deit_tny_patch16_224'", "deit_tiny_patch16_224")),
        ("digit", ("did you mean", "digits")),
        ("zzzzzzzz", ("a folder or the word digits",)),
        ("vit_tiny_patch16_224.mine", ("no weights 'mine'", "augreg_in21k_ft_in1k")),
        ("./nowhere", ("./nowhere is no folder",)),
    ],
)
def test_an_unknown_model_is_refused_with_what_comes_close(
    capsys: pytest.CaptureFixture[str], name: str, pieces: tuple[str, ...]
) -> None:
    refused(Ran(capsys, "eval", name, "--data", "digits"), *pieces)


def test_a_folder_that_holds_no_images_or_no_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(Ran(capsys, "eval", "digits", "--data", tmp_path), "holds no images")
    refused(Ran(capsys, "eval", tmp_path, "--data", "digits"), "has no config.json")
    refused(Ran(capsys, "inspect", tmp_path), "no config.json")
    refused(Ran(capsys, "inspect", tmp_path / "none"), "no such folder")
    (tmp_path / "config.json").write_text("{")
    refused(Ran(capsys, "eval", tmp_path, "--data", "digits"), "config.json", "expected JSON")


def test_a_pruned_folder_is_not_pruned_again(
    capsys: pytest.CaptureFixture[str], pruned: Path, tmp_path: Path
) -> None:
    words = ("--data", "digits", "--budget", "macs=0.5", "--out", tmp_path / "x")
    refused(Ran(capsys, "prune", pruned, *words), "prune that dense model", "deit_tiny_patch16_224")
    refused(Ran(capsys, "eval", pruned, "--data", "digits", "--weights", __file__), "own weights")


def test_where_nothing_can_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(opening, "open_model")  # the work would fail at once
    words = (*PRUNE, "--budget", "macs=0.6", "--out")
    refused(Ran(capsys, *words, pruned), "exists already", "--force")
    refused(Ran(capsys, *words, pruned / "config.json"), "is a file")
    refused(Ran(capsys, *words, pruned / "config.json" / "x"), "no folder that can be written")
    refused(Ran(capsys, *words, pruned, "--force", "--json", pruned / "x.json"), "lies in --out")
    refused(Ran(capsys, *words, tmp_path / "x", "--json", tmp_path), "is a folder")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    refused(Ran(capsys, *words, tmp_path / "photos", "--force"), "cat.jpg", "did not write")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(
        Ran(capsys, *words, tmp_path / "x" / "y"), f"{tmp_path} is no folder that can be written"
    )


# --- the program -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_sees_progress_with_time_left_and_no_color_is_honoured(pruned: Path) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    ours, theirs = pty.openpty()
    code = "from hwprune.cli import main; main()"
    words = [sys.executable, "-c", code, "eval", str(pruned), "--data", "digits"]
    environment = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env=environment | {"NO_COLOR": "1", "TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    text = seen.decode()
    assert "evaluate" in text and re.search(r"100 %.*\d:\d\d", text)
    assert ESCAPE in text and not COLOUR.search(text)
