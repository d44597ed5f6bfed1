"""`hwprune doctor`: true of this machine, one finding a part, and never an end on a strange one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from fakes.profiles import profile_of

from hwprune import doctor
from hwprune.cli import main
from hwprune.doctor import EXTRAS, Finding, examine
from hwprune.ops import Op
from hwprune.profiling import this_device

ROOT = Path(__file__).resolve().parent.parent


def by_part(found: list[Finding]) -> dict[str, Finding]:
    return {finding.part: finding for finding in found}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    return ended.value.code, *capsys.readouterr()


def test_it_tells_the_truth_of_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "x.json"
    code, out, err = run(capsys, "--json", str(target))
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    found = {f["part"]: f for f in json.loads(target.read_text())["findings"]}
    assert str(torch.__version__) in found["torch"]["found"]
    assert (found["CUDA GPU"]["state"] == "works") == torch.cuda.is_available()
    assert (found["Triton"]["state"] == "missing") == (importlib.util.find_spec("triton") is None)
    assert (found["hwprune[timm]"]["state"] == "works") == (
        importlib.util.find_spec("timm") is not None
        and importlib.util.find_spec("torchvision") is not None
    )
    for finding in found.values():
        assert finding["found"] and finding["follows"], finding
        assert finding["part"] in out


def test_the_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = declared["optional-dependencies"]
    assert set(EXTRAS) == set(optional) - {"dev", "bench"}
    for extra, (packages, _) in EXTRAS.items():
        names = {line.split(">")[0].split("=")[0].strip() for line in optional[extra]}
        assert set(packages) == names


def test_a_bare_machine_gets_reasons_and_next_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hwprune.device.list_devices", dict)
    monkeypatch.delenv("HWPRUNE_NATIVE", raising=False)
    found = by_part(examine())
    for extra in EXTRAS:
        finding = found[f"hwprune[{extra}]"]
        assert finding.state == "missing" and f"hwprune[{extra}]" in finding.next
    assert found["Triton"].next.startswith("pip install")
    assert "compiler" in found["CPU kernel"].found and "ninja" in found["CPU kernel"].found
    assert "hwprune profile" in found["device profile"].next
    monkeypatch.setenv("HWPRUNE_NATIVE", "0")
    assert "HWPRUNE_NATIVE" in by_part(examine())["CPU kernel"].next


def test_a_profile_of_this_machine_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = profile_of({Op("gelu", (8, 8), "fp32"): 1e-3})
    monkeypatch.setattr("hwprune.device.list_devices", lambda: {"mine": tmp_path / "mine.json"})
    monkeypatch.setattr("hwprune.device.read_profile", lambda path: made)
    monkeypatch.setattr("hwprune.profiling.this_device", lambda place: made.key)
    assert by_part(examine())["device profile"].state == "works"
    monkeypatch.setattr("hwprune.profiling.this_device", this_device)
    assert by_part(examine())["device profile"].state == "missing"
    assert "mine" in by_part(examine())["device profile"].found


@pytest.mark.parametrize(
    "error", [RuntimeError(""), OSError(5, "I/O"), ImportError("libcuda"), KeyError("x")]
)
def test_what_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    for name in ("_torch", "_gpu", "_triton", "_nvml", "_rapl", "_profile", "_cache", "_extra"):
        monkeypatch.setattr(doctor, name, broken)
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and type(error).__name__ in out and "Traceback" not in out


def test_a_strange_library_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and yet no properties
    found = by_part(examine())
    assert found["energy of the GPU"].state == "missing"
    if not torch.version.cuda or not Path("/dev/nvidia0").exists():
        assert found["CUDA GPU"].state == "missing" and "failed" in found["CUDA GPU"].found
