"""Benchmark rows: one JSON object a line with everything needed to run it again; tables come from them."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]


def provenance() -> Row:
    """Date, commit, versions and processor of this run."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "hwprune", "kernels", "scripts"
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit + ("+changes" if changed else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "hwprune": _version("hwprune"),
        "device": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Model of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> Row:
    """The first CUDA device, its driver, and what compiles for it; take the place of the processor."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def append(file: Path, row: Row) -> None:
    """Add one row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def read(file: Path) -> list[Row]:
    """All rows, oldest first.

    Raises:
        SystemExit: no such file.
    """
    if not file.is_file():
        raise SystemExit(f"expected rows in {file}, got no such file; run the benchmark first")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def newest(rows: Iterable[Row], keys: tuple[str, ...]) -> list[Row]:
    """The last row of each combination of keys, in order of first appearance."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def write_between(file: Path, name: str, text: str) -> None:
    """Replace what stands between the two markers of that name.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = file.read_text(encoding="utf-8")
    before, found_begin, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or old.count(begin) + old.count(end) != 2:
        raise SystemExit(f"expected {begin} and then {end}, once each, in {file}; put them in")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
