"""What an install brings: one hwprune from a wheel, an sdist and a checkout, and nothing beside it.

kernels/ and profiles/ lie at the root and ship inside the package, by a map in pyproject.toml and
by two links. With an `__init__.py` a root folder named kernels would hide the package of that name
from transformers and diffusers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("kernels", "profiles")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run_python(code: str, cwd: Path) -> str:
    """Runs a text in a fresh interpreter and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an install reads, so that a build leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("hwprune", "kernels", "profiles", "tests", "scripts"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist: its links are lost by then."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    (wheel,) = (checkout / "dist").glob("*.whl")
    return sdist, wheel


def shipped() -> set[str]:
    """The files that an installed hwprune has, relative to site-packages."""
    own = [p for p in (ROOT / "hwprune").rglob("*.py") if p.resolve() == p]
    return (
        {p.relative_to(ROOT).as_posix() for p in own}
        | {f"hwprune/{name}" for name in mapped_files()}
        | {"hwprune/py.typed", "hwprune/page/page.html.jinja"}
    )


def mapped_files() -> set[str]:
    """The files of kernels/ and profiles/ that ship, relative to the root; profiles/rows does not."""
    kernels, profiles = (ROOT / "kernels").rglob("*.*"), (ROOT / "profiles").iterdir()
    sources = [p for p in kernels if p.suffix in (".py", ".cpp")]
    return {p.relative_to(ROOT).as_posix() for p in [*sources, *profiles] if p.is_file()}


def test_the_root_folders_are_no_packages_and_the_links_lead_to_them() -> None:
    for name in MAPPED:
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py must not exist"
        link = ROOT / "hwprune" / name
        assert link.is_symlink(), f"hwprune/{name} must be a link (git config core.symlinks true)"
        assert link.readlink() == Path("..", name)


def test_a_wheel_holds_the_package_and_nothing_beside_it(built: tuple[Path, Path]) -> None:
    _, wheel = built
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = {name for name in names if name.startswith(f"hwprune-{VERSION}.dist-info/")}
    assert names - info == shipped()
    texts = {name.split("/")[-1]: zipfile.ZipFile(wheel).read(name).decode() for name in info}
    assert "hwprune = hwprune.cli:main" in texts["entry_points.txt"]
    assert "Apache License" in texts["LICENSE"]
    assert texts["top_level.txt"].split() == ["hwprune"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]


def test_an_sdist_holds_real_files_and_no_links(built: tuple[Path, Path]) -> None:
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    names = {m.name.split("/", 1)[1] for m in members if m.isfile()}
    sources = {name for name in shipped() if name.removeprefix("hwprune/") not in mapped_files()}
    assert sources | mapped_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("scripts/")]


# Run without site-packages' own .pth files, so that the hwprune this test runs under is not seen.
LOOK_AROUND = """
import importlib.util, json, site, sys
folder, others, names = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path += [folder, *others]
site.addsitedir(folder)
import hwprune
found = {"version": hwprune.__version__}
for name in names:
    spec = importlib.util.find_spec(name)
    found[name] = spec and (spec.origin or list(spec.submodule_search_locations)[0])
print(json.dumps(found))
"""


def look_around(site_packages: Path, home: Path, cwd: Path) -> dict[str, str | None]:
    """Where an interpreter finds hwprune's modules.

    Args:
        site_packages: holds one unpacked wheel of hwprune.
        home: the folder hwprune is expected in; no other top-level name may lead there.
        cwd: where the interpreter runs.
    """
    beside = ["kernels", "profiles", "tests", "scripts"]
    kernels = [f"hwprune.kernels.{p.stem}" for p in (ROOT / "kernels").glob("*.py")]
    others = [p for p in sys.path if p and Path(p).is_dir() and Path(p).resolve() != ROOT]
    lists = [json.dumps(others), json.dumps(["hwprune", *kernels, *beside])]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOOK_AROUND, site_packages, *lists],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    assert found["version"] == VERSION
    assert found["hwprune"] == str(home / "hwprune" / "__init__.py")
    assert not [name for name in beside if str(found[name]).startswith(str(home))]
    return found


def test_an_installed_wheel_imports_from_site_packages(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(built[1]).extractall(site)
    found = look_around(site, home=site, cwd=tmp_path)
    for path in (ROOT / "kernels").glob("*.py"):
        expected = site / "hwprune" / "kernels" / path.name
        assert found[f"hwprune.kernels.{path.stem}"] == str(expected)


def test_an_editable_install_imports_from_the_checkout(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    build = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    found = look_around(tmp_path / "site", home=checkout, cwd=tmp_path)
    for path in (ROOT / "kernels").glob("*.py"):
        origin = Path(str(found[f"hwprune.kernels.{path.stem}"]))
        assert origin.resolve() == checkout / "kernels" / path.name


def test_importing_hwprune_brings_nothing_heavy() -> None:
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import hwprune\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    brought = set(json.loads(run_python(code, cwd=ROOT)))
    assert "hwprune" in brought
    assert not brought & {"triton", "timm", "diffusers", "pynvml", "transformers", "onnx"}


@pytest.mark.slow
def test_the_root_folder_named_kernels_does_not_break_other_libraries() -> None:
    for library in ("transformers", "diffusers"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    # -c puts '' first on sys.path: the repository root, where kernels/ can be seen.
    code = (
        "import sys\n"
        "assert sys.path[0] == ''\n"
        "from transformers import ViTModel\n"
        "from diffusers import DiTTransformer2DModel\n"
        "print(ViTModel.__name__, DiTTransformer2DModel.__name__)"
    )
    assert run_python(code, cwd=ROOT).split()[-2:] == ["ViTModel", "DiTTransformer2DModel"]
