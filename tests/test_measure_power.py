"""scripts/measure_power.py: a model or a command in one line, with a sensor and without."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes.compiled import WATTS, build_nvml

from hwprune.meter.energy_window import Chunk
from hwprune.meter.estimate import Unavailable

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "measure_power.py"
pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install hwprune[power]")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


def run(*words: object, library: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = {"LD_LIBRARY_PATH": str(library), "FAKE_WATTS": str(WATTS)} if library else {}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=os.environ | path | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_command_is_measured_with_a_curve_and_a_picture(library: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install hwprune[plot]"
    )
    files = [tmp_path / name for name in ("x.json", "x.csv", "x.png")]
    done = run(
        "--json",
        files[0],
        "--csv",
        files[1],
        "--png",
        files[2],
        "--",
        "sleep",
        "1",
        library=library,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(files[0].read_text())
    assert found["command"] == ["sleep", "1"] and found["exit_code"] == 0
    assert found["average_power_w"] == pytest.approx(WATTS, rel=0.05)
    assert found["device"] == "FAKE-BOARD" and found["reason"] == ""
    assert len(files[1].read_text().splitlines()) > 5 and files[2].stat().st_size > 5000
    for piece in ("sleep 1", "average power", "W", "about 5 %, alike"):
        assert piece in done.stdout


def test_without_a_sensor_the_time_is_told_and_why_no_energy(tmp_path: Path) -> None:
    done = run(
        "--sensor",
        "nvml:7",
        "--csv",
        tmp_path / "x.csv",
        "--",
        sys.executable,
        "-c",
        "print(41 + 1)",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("42\n"), "the command's own output goes through"
    assert "no energy: nvml:7: " in done.stdout and "no curve" in done.stdout
    assert not (tmp_path / "x.csv").exists()


def test_the_exit_code_is_the_command_s(tmp_path: Path) -> None:
    assert run("--", sys.executable, "-c", "raise SystemExit(3)").returncode == 3


@pytest.mark.slow
def test_a_model_is_measured_in_steady_state(library: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")
    words = ("test_vit", "--random-weights", "--batch", 1, "--seconds", 1)
    done = run(*words, "--sensor", "nvml:0", "--device", "cpu", "--json", "-", library=library)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["average_power_w"] == pytest.approx(WATTS, rel=0.01)
    assert found["energy_per_image_j"] == pytest.approx(WATTS * found["latency_s"], rel=0.02)
    assert found["method"] == "counter" and found["model"] == words[0]


def test_a_model_without_a_sensor_still_has_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("measure_power", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run_chunk() -> Chunk:
        time.sleep(0.01)
        return Chunk(2)

    work = SimpleNamespace(
        name="model",
        images=4,
        notes=("random weights",),
        repeated=lambda: (run_chunk, lambda: None),
    )
    none = Unavailable("no board")
    found = script.measure_model(work, none, 0.2, none, True) | {"model": "model"}
    assert found["reason"] == "no board" and found["energy_j"] is None
    assert found["energy_per_image_j"] is None
    assert 0.005 <= found["latency_s"] < 0.05
    script.report(found, none, None, None)
    said = capsys.readouterr().out
    assert "no energy: no board" in said and "latency of a call" in said and " J" not in said


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        ((), "either a MODEL or -- COMMAND"),
        (("digits", "--", "ls"), "either a MODEL or -- COMMAND"),
        (("digits", "--seconds", "0"), "--seconds"),
        (("--sensor", "gpu", "--", "ls"), "expected a device as"),
        (("--", "./no-such-program"), "no-such-program: No such file"),
        (("--frobnicate",), "No such option"),
        (("--csv", "no/such/x.csv", "--", "ls"), "cannot be written"),
        (("--json", "no/such/x.json", "--", "ls"), "no such folder"),
    ],
)
def test_bad_words_are_exit_2_and_one_line(words: tuple[str, ...], piece: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and piece in done.stderr, done.stderr
