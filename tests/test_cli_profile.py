"""`hwprune profile` and `hwprune devices`: what they print and write, and the one line each bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.profiles import profile_of

from hwprune import device, profile_ops, profiling
from hwprune.cli import main
from hwprune.device import DeviceProfile, content_hash, read_profile
from hwprune.ops import Op

OPS = [Op("gelu", (8, 8), "fp32"), Op("linear", (8, 8, 8), "fp32")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Two operations, a folder of one's own, and what `measure_device` was asked for."""
    asked: list[dict[str, Any]] = []
    real = profiling.measure_device

    def measured(ops: list[Op], place: torch.device, **given: Any) -> DeviceProfile:
        asked.append({"ops": ops, "place": place, "threads": torch.get_num_threads(), **given})
        return real(OPS, place, **{**given, "minutes": 1.0})

    monkeypatch.setattr(profiling, "measure_device", measured)
    monkeypatch.setattr(device, "FOLDER", tmp_path / "shipped")
    monkeypatch.delenv("HWPRUNE_PROFILES", raising=False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield asked  # type: ignore[misc]
    torch.set_num_threads(threads)


class Ran:
    """What a command did: its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


def refused(ran: Ran, *pieces: str) -> None:
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("hwprune: ") and ran.err.count("\n") == 1, ran.err
    assert not [piece for piece in pieces if piece not in ran.err], ran.err


def test_a_profile_is_measured_written_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: list[dict[str, Any]]
) -> None:
    ran = Ran(
        capsys,
        "profile",
        "--device",
        "cpu",
        "--threads",
        1,
        "--minutes",
        3,
        "--out",
        "my.json",
        "--json",
        "-",
    )
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (told["entries"], told["with_energy"]) == (2, 0) and told["energy_reason"]
    found = read_profile(tmp_path / "my.json")
    assert found.device["threads"] == 1 and found.provenance["clock"] == "thread CPU time"
    assert found.provenance["command"].startswith("hwprune")
    assert (quick[0]["minutes"], quick[0]["threads"]) == (3.0, 1)
    assert {op.dtype for op in quick[0]["ops"]} == {"fp32", "bf16"}
    assert {op.shape[0] for op in quick[0]["ops"]} >= {8 * 197, 197}
    assert [p.name for p in tmp_path.iterdir()] == ["my.json"]


def test_a_profile_does_not_tell_where_its_owners_folders_are(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    quick: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["profile", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "my.json")]
    monkeypatch.setattr(sys, "argv", ["hwprune", *words])
    ran = Ran(capsys, *words)
    assert ran.code == 0, ran.err
    command = read_profile(tmp_path / "my.json").provenance["command"]
    assert command == "hwprune profile --device cpu --threads 1 --out my.json"
    assert str(tmp_path) not in (tmp_path / "my.json").read_text(encoding="utf-8")


def test_without_a_name_it_is_the_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: list[dict[str, Any]]
) -> None:
    ran = Ran(
        capsys, "profile", "--device", "cpu", "--threads", 1, "--batches", "2", "--dtypes", "fp32"
    )
    assert ran.code == 0, ran.err
    (file,) = tmp_path.glob("*.json")
    assert file.stem.endswith("-1-thread") and file.stem in ran.out
    assert {op.dtype for op in quick[0]["ops"]} == {"fp32"}


def test_a_stopped_run_is_gone_on_with_or_begun_anew(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    partial = tmp_path / ".my.partial.json"
    words = ("profile", "--device", "cpu", "--threads", 1, "--out", "my.json")
    partial.write_text("{")
    ran = Ran(capsys, *words)
    assert ran.code == 0 and "hwprune: .my.partial.json is left aside" in ran.err
    partial.write_text("{")
    ran = Ran(capsys, *words, "--fresh")
    assert (ran.code, ran.err) == (0, "")
    assert not partial.exists()


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (("--minutes", "0"), ("--minutes", "positive", "got 0")),
        (("--minutes", "nan"), ("--minutes",)),
        (("--minutes", "inf"), ("--minutes",)),
        (("--threads", "0"), ("--threads", "at least 1")),
        (("--batches", "8,x"), ("--batches", "'8,x'")),
        (("--batches", "0"), ("--batches",)),
        (("--batches", ""), ("--batches",)),
        (("--dtypes", "fp32,fp8"), ("--dtypes", "fp32, fp16, bf16", "'fp8'")),
        (("--dtypes", ""), ("--dtypes",)),
        (("--out", "my.txt"), ("--out", ".json", "my.txt")),
        (("--out", "none/my.json"), ("--out", "does not exist")),
        (("--out", "folder.json"), ("--out", "folder.json is a folder")),
        (("--device", "tpu"), ("tpu",)),
        (("--json", "none/told.json"), ("none",)),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    quick: list[dict[str, Any]],
    words: tuple[str, ...],
    pieces: tuple[str, ...],
) -> None:
    (tmp_path / "folder.json").mkdir()
    device_of = () if "--device" in words else ("--device", "cpu")
    refused(Ran(capsys, "profile", *device_of, *words), *pieces)
    assert not quick


def test_another_run_into_the_same_file_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("fcntl", reason="no fcntl on this system, so runs are not told apart")
    from hwprune.profile_state import claimed

    with claimed(tmp_path / ".my.partial.json"):
        refused(
            Ran(capsys, "profile", "--device", "cpu", "--out", "my.json"),
            "another run is measuring",
        )


# --- devices -------------------------------------------------------------------------------------


def test_devices_lists_what_is_there_and_what_is_broken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no profiles" in Ran(capsys, "devices").out
    assert json.loads(Ran(capsys, "devices", "--json", "-").out) == {"devices": {}}
    folder = tmp_path / "own"
    folder.mkdir()
    Ran(capsys, "profile", "--device", "cpu", "--threads", 1, "--out", folder / "mine.json")
    (folder / "broken.json").write_text("{")
    fake = profile_of({OPS[0]: 1e-5}).to_dict()
    assert fake["provenance"]["content_sha256"] == content_hash(fake)
    (folder / "fake.json").write_text(json.dumps(fake))
    monkeypatch.setenv("HWPRUNE_PROFILES", str(folder))
    ran = Ran(capsys, "devices")
    assert ran.code == 0 and "mine" in ran.out and "1 thread(s)" in ran.out
    said = " ".join(ran.out.split())
    assert "expected JSON" in said and "synthetic" in said
    told = json.loads(Ran(capsys, "devices", "--json", "-").out)["devices"]
    assert told["mine"]["entries"] == 2 and "error" in told["broken"] and "error" in told["fake"]


@pytest.mark.parametrize("command", ["profile", "devices"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    ran = Ran(capsys, command, "--help")
    assert ran.code == 0 and "--json" in ran.out


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC, 1 thread(s)", "amd-epyc-1-thread"),
        ("Intel(R) Xeon(R) @ 2.20GHz, 8 thread(s)", "intel-r-xeon-r-2-20ghz-8-thread"),
    ],
)
def test_names_of_files(key: str, name: str) -> None:
    assert device.file_name(key) == name


def test_the_script_is_the_command(root: Path, tmp_path: Path) -> None:
    script = root / "scripts" / "profile_device.py"
    words = [sys.executable, str(script), "--minutes", "0"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 2 and "--minutes: expected a positive number" in ran.stderr


def test_the_road_of_a_gpu_is_walked_on_a_cpu(root: Path) -> None:
    script = root / "scripts" / "benchmarks" / "profile_gpu.py"
    before = sorted((root / "profiles").iterdir())
    words = [sys.executable, str(script), "--dry-run"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "16 operations, 0 not reached" in ran.stdout and "failed: none" in ran.stdout
    assert sorted((root / "profiles").iterdir()) == before


def test_the_default_shapes_are_those_of_profile_ops() -> None:
    assert len(profile_ops.profile_ops((8, 1), ("fp32", "bf16"))) > 500


def test_a_profile_for_one_model_measures_its_operations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: list[dict[str, Any]]
) -> None:
    pytest.importorskip("timm")
    words = ("profile", "--for", "digits", "--batches", "64,2", "--dtypes", "fp32")
    assert Ran(capsys, *words, "--out", tmp_path / "d.json").code == 0
    asked = quick[0]["ops"]
    tokens = {op.shape[0] for op in asked if op.kind == "linear"}
    assert {64 * 17, 2 * 17} <= tokens and {op.dtype for op in asked} == {"fp32"}
    assert len(asked) == len(set(asked)) < 200
    refused(Ran(capsys, "profile", "--for", "resnet18", "--out", tmp_path / "r.json"), "ResNet")


def test_a_profile_for_a_denoiser_measures_its_operations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: list[dict[str, Any]]
) -> None:
    pytest.importorskip("diffusers")
    import hwprune
    from hwprune.families import dit

    hwprune.save(dit.tiny()[0], tmp_path / "pipe" / "transformer")
    words = ("profile", "--for", tmp_path / "pipe", "--batches", "3", "--dtypes", "bf16")
    assert Ran(capsys, *words, "--out", tmp_path / "d.json").code == 0
    asked = quick[0]["ops"]
    assert {op.dtype for op in asked} == {"bf16"} and len(asked) == len(set(asked))
    heads = {op.shape for op in asked if op.kind == "attention"}
    assert heads == {(3, kept, 16, 8, 8) for kept in (1, 2, 3)}
    neurons = {op.shape[1] for op in asked if op.kind == "gelu"}
    assert len(neurons) > 5 and all(count % 8 == 0 for count in neurons)
