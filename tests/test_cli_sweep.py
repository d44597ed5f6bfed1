"""`hwprune prune --sweep`, --objective and --refine: the folders they write, the words they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hwprune import checkpoint, opening
from hwprune.cli import main
from hwprune.cli_sweep import FILES, Points
from hwprune.digits import digits_model
from hwprune.front import FILES as WRITTEN

pytest.importorskip("timm")
pytest.importorskip("sklearn")

PRUNE = ("prune", "digits", "--data", "digits", "--calibration", "16", "--batch", "16")


def fresh_digits(progress: object = None) -> nn.Module:
    return digits_model(pretrained=False)


@pytest.fixture(autouse=True)
def untrained_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model without its half minute of training, on a machine without a profile."""
    monkeypatch.setattr(opening, "digits_model", fresh_digits)
    monkeypatch.setattr("hwprune.judging.profile_here", lambda *_: None)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code, *capsys.readouterr()


def test_a_sweep_writes_a_folder_a_point_and_the_front(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "front"
    words = ("--sweep", "0.8:0.6:2", "--eval-data", "digits", "--dtype", "fp16", "--out", out)
    words += ("--baseline", "none")
    code, text, err = run(capsys, *PRUNE, *words)
    assert (code, err) == (0, "")
    pictures = {"front.svg", "front.png"} if (out / "front.svg").exists() else set()
    assert {p.name for p in out.iterdir()} == {"0.80", "0.60", "front.json"} | pictures
    told = json.loads((out / "front.json").read_text())
    for point, name in zip(told["points"], ("0.80", "0.60"), strict=True):
        model = checkpoint.load(out / name)
        assert point["folder"] == name and point["budget"] == {"macs": float(name)}
        params = sum(p.numel() for p in model.parameters())
        dense = sum(p.numel() for p in fresh_digits().parameters())
        assert point["params_ratio"] == pytest.approx(params / dense)
        assert 0 <= point["top1"] <= 1 and (out / name / "report.html").is_file()
    assert told["baselines"] == []
    assert "top-1" in text and "0.60" not in text.splitlines()[0] and str(out) in text
    assert max(len(line) for line in text.splitlines() if str(out) not in line) <= 100
    code, _, err = run(capsys, *PRUNE, *words)
    assert code == 2 and "exists already" in err and "--force" in err
    # Replaced: the points that were and are not any more are gone.
    again = ("--sweep", "params=0.9:0.8:2", "--json", "-", "--force")
    code, text, err = run(capsys, *PRUNE, *again, "--out", out)
    assert (code, err) == (0, "")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"0.90", "0.80"}
    told = json.loads(text)
    assert (told["metric"], told["points"][0]["top1"]) == ("params", None)
    assert {p["method"] for p in told["baselines"]} == {"magnitude"}
    (out / "0.90" / "photo.jpg").write_text("mine")
    code, _, err = run(capsys, *PRUNE, *again, "--out", out)
    assert code == 2 and "'0.90/photo.jpg', which hwprune did not write" in err


def test_lpvit_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, file = tmp_path / "x", tmp_path / "x.json"
    words = ("--objective", "lpvit", "--no-repair", "--block", "16x16", "--budget", "macs=0.7")
    code, _, err = run(capsys, *PRUNE, *words, "--out", out, "--json", file)
    assert (code, err) == (0, "")
    told = json.loads(file.read_text())
    assert (told["objective"], told["kinds"], told["plans"]) == ("lpvit", ["block"], [])
    assert 0.65 < told["macs_ratio"] <= 0.7
    with torch.no_grad():
        assert checkpoint.load(out)(torch.zeros(1, 1, 16, 16)).isfinite().all()


def test_refinement_tells_its_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--budget", "macs=0.7", "--refine", "2", "--json", "-", "--out", tmp_path / "x")
    code, text, err = run(capsys, *PRUNE, *words)
    assert (code, err) == (0, "")
    rows = json.loads(text)["plans"]
    assert 2 <= len(rows) <= 3 and sum(row["won"] for row in rows) == 1
    assert all(row["true"] >= 0 and row["predicted"] >= 0 for row in rows)
    code, text, err = run(capsys, *PRUNE, *words[:4], "--out", tmp_path / "y")
    (best,) = (row["true"] for row in rows if row["won"])
    said = " ".join(text.split())
    assert (code, err) == (0, "") and f"plans tried: {len(rows)}, " in said
    assert f" is kept: {best:.4g} +- " in said and f"plan: {rows[0]['true']:.4g})" in said


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (("--sweep", "0.9:0.4"), ("--sweep: expected [METRIC=]FIRST:LAST:COUNT", "'0.9:0.4'")),
        (("--sweep", "0.9:0.4:1"), ("--sweep: expected FIRST:LAST:COUNT", "at least 2 points")),
        (("--sweep", "1.9:0.4:3"), ("--sweep: expected", "ratios in (0, 1]")),
        (("--sweep", "0.9:0.4.1:3"), ("--sweep: ", "0.4.1")),
        (("--sweep", "flops=0.9:0.4:3"), ("flops=0.9",)),
        (("--sweep", "macs=0.9:0.4:3", "--budget", "latency"), ("macs and latency",)),
        (("--sweep", "macs=0.9:0.4:3", "--budget", "macs=0.5"), ("macs given twice",)),
        (("--budget", "macs"), ("macs=NUMBER",)),
        (
            ("--budget", "macs=0.7", "--eval-data", "digits"),
            ("--eval-data: expected with --sweep",),
        ),
        (("--budget", "macs=0.7", "--baseline", "lpvit"), ("--baseline: expected with --sweep",)),
        (("--budget", "macs=0.7", "--objective", "spdy"), ("--objective", "lpvit", "spdy")),
        (("--budget", "params=0.7", "--objective", "lpvit"), ("a budget of macs alone",)),
        (("--budget", "macs=0.7", "--refine", "-1"), ("refine: expected", "0 or more", "-1")),
    ],
)
def test_bad_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    pieces: tuple[str, ...],
) -> None:
    code, text, err = run(capsys, *PRUNE, *words, "--out", tmp_path / "x")
    assert (code, text) == (2, ""), err
    assert err.startswith("hwprune: ") and err.count("\n") == 1, err
    assert not [piece for piece in pieces if piece not in err], err
    assert not list(tmp_path.iterdir())


def test_what_is_swept_follows_from_the_words() -> None:
    def swept(text: str, *budgets: str, device: str | None = None) -> str:
        return Points.parse(text, budgets, device).metric

    assert swept("0.9:0.4:6") == "macs"
    assert swept("0.9:0.4:6", device="h200") == "latency"
    assert swept("energy=0.9:0.4:6", device="h200") == "energy"
    assert swept("0.9:0.4:6", "latency") == "latency"
    found = Points.parse("0.9:0.4:6", ("params=0.95",), None)
    assert [b.given for b in found.budgets][1] == {"macs": 0.8, "params": 0.95}
    assert found.folders == ("0.90", "0.80", "0.70", "0.60", "0.50", "0.40")
    fine = Points.parse("0.9:0.89:6", (), None)
    assert len(set(fine.folders)) == 6 and fine.folders[1] == "0.898"
    assert FILES == WRITTEN, "the command line has its own copy, so that --help needs no torch"
