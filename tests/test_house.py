"""The house keeps its shape: what lies where, one idea a file, nothing of one machine in a text."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "hwprune", "kernels", "profiles", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE",
    "CHANGELOG.md", "constraints.txt", ".ci", ".gitattributes", ".gitignore",
}  # fmt: skip

# Each is spelled so that this file does not match itself.
LEFT_OPEN = re.compile(
    r"\bTO[D]O\b|\bFIX[M]E\b|NotImplemented[E]rror|mark\.x[f]ail|no [c]over|type: [i]gnore(?!\[)"
)
REGISTRY = re.compile(
    r"pypi\.[o]rg|python[h]osted|download\.py[t]orch|anaconda\.[o]rg|"
    r"--(?:extra-)?index-[u]rl|--find-[l]inks"
)
MACHINE_PATH = re.compile(
    r"(?<![\w.\-/$}>])/(?:[w]ork|[r]oot|[o]pt|[h]ome|[U]sers)/\w|file:/{2}",
)


def texts() -> list[Path]:
    """Every file a person wrote, without what links lead to."""
    found: list[Path] = []
    for name in TOP_LEVEL:
        top = ROOT / name
        found += top.rglob("*") if top.is_dir() else [top]
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.resolve() == path
        and "__pycache__" not in path.parts
        and b"\0" not in path.read_bytes()[:4096]
    )


def programs() -> list[Path]:
    """The texts that are Python or shell."""
    return [p for p in texts() if p.suffix == ".py" or p.read_text().startswith("#!")]


def occurrences(pattern: re.Pattern[str]) -> list[str]:
    """Each line of a text that a pattern is found in, with its place."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_the_top_level_is_as_planned() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what is committed is not known")
    committed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert {name.split("/")[0] for name in committed if name} <= TOP_LEVEL


def test_no_program_has_more_than_400_lines() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in programs()}
    assert not {name: n for name, n in lines.items() if n > 400}, "one idea a file"


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "core"}
    assert not [str(p.relative_to(ROOT)) for p in programs() if p.stem in empty]


def test_every_module_opens_with_a_sentence() -> None:
    for path in programs():
        if path.suffix == ".py":
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = docstring.split("\n\n")[0].strip()
            assert first.endswith((".", ":")), f"{path.relative_to(ROOT)} opens with {first!r}"


def test_nothing_is_left_open() -> None:
    assert not occurrences(LEFT_OPEN)


def test_no_text_names_a_registry_or_a_path_of_one_machine() -> None:
    # A version is pinned by its name and number; where it comes from is the user's own setting.
    assert not occurrences(REGISTRY)
    assert not occurrences(MACHINE_PATH)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (LEFT_OPEN, "# TO" + "DO: later"),
        (LEFT_OPEN, "x = 1  # type" + ": ignore"),
        (REGISTRY, "torch @ https://download.py" + "torch.org/whl/cpu"),
        (MACHINE_PATH, "data = '/ho" + "me/someone/images'"),
    ],
)
def test_a_line_that_breaks_a_rule_is_seen(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


def test_shell_scripts_are_executable_and_stop_at_the_first_error() -> None:
    shell = [p for p in programs() if "bash" in p.read_text().splitlines()[0] and p.suffix == ""]
    assert {"setup", "test", "check", "demo"} <= {p.name for p in shell}
    for path in shell:
        assert "\nset -eu" in path.read_text(), f"{path.relative_to(ROOT)} lacks set -eu"
        assert path.stat().st_mode & 0o111, f"{path.relative_to(ROOT)} is not executable"


def test_constraints_pin_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    assert not [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    ]
