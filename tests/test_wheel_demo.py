"""A wheel in an empty environment outside the checkout goes the whole road of scripts/demo, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment with hwprune from a wheel, and this environment's other packages."""
    for name in ("setuptools", "timm", "sklearn"):
        pytest.importorskip(name)
    if sys.platform == "win32":
        pytest.skip("the demo is a shell script")
    place = tmp_path_factory.mktemp("wheel")
    checkout = place / "checkout"
    for name in ("hwprune", "kernels", "profiles"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    ran([sys.executable, "-c", build, str(place)], cwd=checkout)
    ran([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], cwd=place)
    python = place / "venv" / "bin" / "python"
    site = Path(ran([python, "-c", "import site; print(site.getsitepackages()[0])"], place).strip())
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    # Only a path: what .pth files of that folder add, an editable hwprune above all, is not seen.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = python.with_name("hwprune")
    command.write_text(f"#!{python}\nfrom hwprune.cli import main\n\nmain()\n")
    command.chmod(0o755)
    shutil.rmtree(checkout)
    return python.parent


def ran(words: list[object], cwd: Path, **more: str) -> str:
    gone = ("PYTHONPATH", "VIRTUAL_ENV")
    clean = {key: value for key, value in os.environ.items() if key not in gone}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, env={**clean, **more}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 40 s of CPU, which a busy machine has taken 5 minutes over
def test_the_demo_passes_from_a_wheel(environment: Path, tmp_path: Path) -> None:
    where = ran([environment / "python", "-c", "import hwprune; print(hwprune.__file__)"], tmp_path)
    assert str(environment.parent) in where
    # As it is, but for the seconds that are spent measuring: with so few of them no profile comes to be, which
    # is the road of a machine that is too busy for a promise.
    text = (ROOT / "scripts" / "demo").read_text()
    quick, changed = re.subn(r"--minutes 1 |--seconds 15 ", lambda m: m[0][:-3] + "0.01 ", text)
    assert changed == 2
    demo = tmp_path / "scripts" / "demo"
    demo.parent.mkdir()
    demo.write_text(quick)
    out = tmp_path / "out"
    told = ran(["bash", demo, out], tmp_path, HWPRUNE_BIN=str(environment))
    assert "none is promised" in told and "asked     macs=0.6" in told
    assert "opened by timm" in told and str(out / "pruned" / "report.html") in told
    assert (out / "pruned" / "report.html").stat().st_size > 20_000
    found = json.loads((out / "pruned" / "report.json").read_text())
    assert {e["of"] for e in found["evaluations"]} == {"dense", "pruned"}
    assert found["macs_ratio"] <= 0.6


def test_importing_hwprune_costs_next_to_nothing_beside_torch() -> None:
    # Modules are counted and not seconds: those depend on the machine. Three took 3 ms of CPU.
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport hwprune\n"
        "print(len(set(sys.modules) - before))"
    )
    assert int(ran([sys.executable, "-c", code], ROOT)) <= 10


def test_help_imports_a_few_hundred_small_modules() -> None:
    # 241 of them took 0.1 s of CPU; torch alone would be 1500 more and two seconds.
    code = "import sys, hwprune.cli; print(len(sys.modules), 'torch' in sys.modules)"
    count, torch_too = ran([sys.executable, "-c", code], ROOT).split()
    assert int(count) < 450 and torch_too == "False"
