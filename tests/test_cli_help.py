"""The command line's help and its flags: what every script and reader rests on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from hwprune.cli import app, main


def test_importing_the_command_line_brings_neither_torch_nor_timm() -> None:
    heavy = ("torch", "timm", "numpy", "scipy")
    code = f"import sys, hwprune.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", "hwprune --help must answer at once"


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hwprune", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_flags_are_the_agreed_ones() -> None:
    agreed = {  # a new flag is a promise to every script
        "prune": "--data --budget --out --weights --kinds --block --calibration --batch --dtype "
        "--round-to --timed-batch --class-map --format --device --seed --no-repair --force --json "
        "--mode --energy-weight --objective --refine --sweep --baseline --eval-data",
        "eval": "--data --weights --class-map --batch --json",
        "measure": "--against --batch --dtype --mode --l2 --rounds --seconds --device --energy --data "
        "--split --weights --against-weights --random-weights --seed --json",
        "profile": "--out --minutes --device --batches --dtypes --threads --for --fresh --json",
        "inspect": "--json",
        "devices": "--json",
        "report": "--with --open --json",
        "export": "--to --out --batch --weights --json",
        "doctor": "--compile --json",
    }
    group = typer.main.get_command(app)
    found = {
        name: {flag for p in command.params for flag in p.opts if flag.startswith("--")}
        for name, command in group.commands.items()
        if name != "prune-diffusion"  # tests/test_cli_diffusion.py
    }
    assert found == {name: set(flags.split()) for name, flags in agreed.items()}


@pytest.mark.parametrize("words", [("--help",), (), ("prune", "--help"), ("inspect", "-h")])
def test_help_is_on_stdout(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "Usage: hwprune" in out and "\x1b" not in out


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    from hwprune import __version__

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"hwprune {__version__}\n"
    with pytest.raises(SystemExit) as ended:
        main(["shrink"])
    assert ended.value.code == 2 and "No such command 'shrink'" in capsys.readouterr().err


def test_colours_go_where_they_are_not_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--no-color", "devices"], ["devices", "--no-color"]):
        monkeypatch.delenv("NO_COLOR", raising=False)
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0 and os.environ.pop("NO_COLOR") == "1"
    assert "amd" in capsys.readouterr().out.lower()
