"""Builds tests/fakes/nvml.c into a libnvidia-ml.so.1 for the loader's path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WATTS = 345.0
SOURCE = Path(__file__).parent / "nvml.c"


def build_nvml(folder: Path) -> Path:
    """The folder, with the library in it; skips the test where there is no compiler."""
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler here (or not Linux), so no library to put on the loader's path")
    library = folder / "libnvidia-ml.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return folder
