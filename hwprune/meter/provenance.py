"""Where a figure comes from: date, versions, device, clocks, load and commit, as plain JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import EnergySource

_PACKAGES = ("hwprune", "torch", "timm", "triton", "numpy", "nvidia-ml-py")
_CPU_INFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def provenance(device: torch.device, source: EnergySource | Unavailable) -> dict[str, Any]:
    """What somebody needs to know to measure again; what cannot be had is None.

    Args:
        device: what was measured on.
        source: the sensor of its energy.
    """
    found: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": _commit(),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "cpu_mhz": _cpu_mhz(),
        "cpu_governor": _read(_GOVERNOR),
        "load_average": load_average(),
    }
    if isinstance(source, Unavailable):
        return found | {"sensor": None, "sensor_reason": source.reason}
    reading, caps = source.read(state=True), source.caps
    sensor = {
        "backend": caps.backend,
        "device": caps.device,
        "scope": caps.scope,
        "mapping": caps.mapping,
        "power_cap_w": caps.cap_w,
        "clock_sm_mhz": reading.clock_sm_mhz,
        "clock_mem_mhz": reading.clock_mem_mhz,
        "temperature_c": reading.temperature_c,
        "notes": list(caps.notes),
    }
    return found | {"sensor": sensor}


def processor() -> str:
    """Model of the CPU."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def load_average() -> float | None:
    """Processes that wanted a core over the last minute, this one among them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": processor(), "cores": os.cpu_count()}
    found = torch.cuda.get_device_properties(device)
    return {
        "type": str(device),
        "name": found.name,
        "sm": [found.major, found.minor],
        "sm_count": found.multi_processor_count,
        "memory_bytes": found.total_memory,
    }


def _cpu_line(key: str) -> str:
    for line in (_read(_CPU_INFO) or "").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _cpu_mhz() -> float | None:
    """Of the first core, now."""
    told = _cpu_line("cpu MHz")
    return float(told) if told.replace(".", "", 1).isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of hwprune's own checkout, "+changes" where files differ; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "hwprune", "kernels"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")
