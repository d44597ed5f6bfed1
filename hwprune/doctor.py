"""What of this machine works for hwprune, what follows from it, and what to do about the rest.

Each check looks and never changes anything; one that fails in a way nobody foresaw is a finding, not an end.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["works", "missing", "limited"]

# Extra of pyproject.toml -> its packages, and what they are for.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "timm": (("timm", "torchvision"), "vision transformers by name, and images"),
    "digits": (("scikit-learn",), "the built-in model and data"),
    "transformers": (("transformers",), "vision transformers of transformers"),
    "diffusers": (("diffusers", "transformers"), "diffusion models"),
    "power": (("nvidia-ml-py",), "energy of NVIDIA GPUs"),
    "plot": (("matplotlib",), "pictures in reports"),
    "export": (("onnx", "onnxscript", "onnxruntime"), "hwprune export --to onnx"),
}


@dataclass(frozen=True)
class Finding:
    """One part of the machine.

    Attributes:
        part: what was looked at.
        state: "works", "limited" (with less) or "missing".
        found: what is there, or why it is not.
        follows: what that means for hwprune.
        next: what to do about it; "" where nothing need be done.
    """

    part: str
    state: State
    found: str
    follows: str
    next: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def examine(*, compile_kernel: bool = False) -> list[Finding]:
    """Look at every part in turn.

    Args:
        compile_kernel: compile the CPU kernel now (up to two minutes) instead of telling whether it could be.
    """
    parts: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "CUDA GPU": _gpu,
        "Triton": _triton,
        "CPU kernel": lambda: _cpu_kernel(compile_kernel),
        "energy of the GPU": _nvml,
        "energy of the CPU": _rapl,
        "device profile": _profile,
        "cache folder": _cache,
    }
    for extra in EXTRAS:
        parts[f"hwprune[{extra}]"] = lambda extra=extra: _extra(extra)  # type: ignore[misc]
    return [_safely(name, look) for name, look in parts.items()]


def _safely(name: str, look: Callable[[], Finding]) -> Finding:
    """The finding of a check; a strange machine is told of and does not end the others."""
    try:
        return look()
    except Exception as error:  # drivers and half-installed packages raise whatever they like
        said = " ".join(str(error).split())[:200] or "no more is said"
        what = f"looking at it failed: {type(error).__name__}: {said}"
        return Finding(
            name, "missing", what, "hwprune goes on without it", "mend it if you need it"
        )


def _torch() -> Finding:
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    found = f"torch {torch.__version__}, Python {platform.python_version()}, {threads} of {cores} threads"
    version = tuple(
        int(p) for p in str(torch.__version__).split("+")[0].split(".")[:2] if p.isdigit()
    )
    if version < (2, 11):
        return Finding(
            "torch", "limited", found, "2.11 is the oldest that is tested", "upgrade torch"
        )
    return Finding("torch", "works", found, "pruning and measuring run")


def _gpu() -> Finding:
    import torch

    name = "CUDA GPU"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        told = "; ".join(
            f"{c.name}, sm_{c.major}{c.minor}, {c.total_memory / 1e9:.0f} GB" for c in cards
        )
        return Finding(name, "works", told, "models are pruned and measured there")
    why = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides all"
    return Finding(
        name,
        "missing",
        why,
        "everything runs on the CPU; large models take hours",
        "if there is one: check nvidia-smi, and that torch is a CUDA build",
    )


def _triton() -> Finding:
    import torch

    if importlib.util.find_spec("triton") is None:
        return Finding(
            "Triton",
            "missing",
            "not installed",
            "tiles (--kinds block) run as plain PyTorch on a GPU",
            "pip install triton (Linux; torch for CUDA brings it)",
        )
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return Finding(
            "Triton", "limited", f"triton {version}, no GPU", "tiles use the CPU kernel instead"
        )
    return Finding("Triton", "works", f"triton {version}", "tiles run on kernels of their own")


def _cpu_kernel(compile_kernel: bool) -> Finding:
    import torch

    from hwprune.kernels.block_sparse import native

    name, slow = (
        "CPU kernel",
        "tiles (--kinds block) run as plain PyTorch on the CPU, slower than dense",
    )
    if os.environ.get("HWPRUNE_NATIVE") == "0":
        return Finding(name, "missing", "HWPRUNE_NATIVE=0 forbids it", slow, "unset HWPRUNE_NATIVE")
    if compile_kernel:
        if native.supports(torch.float32):
            return Finding(name, "works", "compiled and tried", "tiles are fast on this CPU")
        return Finding(name, "missing", native.why_not(), slow, "install g++ and Python's headers")
    named = os.environ.get("CXX")
    compiler = next(
        (p for c in (named, "c++", "g++", "clang++") if c and (p := shutil.which(c))), None
    )
    has_ninja = shutil.which("ninja") or importlib.util.find_spec("ninja")
    lacking = [] if compiler else ["a C++ compiler (apt-get install g++)"]
    lacking += [] if has_ninja else ["ninja (pip install ninja)"]
    if lacking:
        return Finding(
            name, "missing", f"no {', no '.join(lacking)}", slow, "install what is missing"
        )
    return Finding(
        name,
        "works",
        f"{compiler} and ninja are there",
        "it is compiled on the first product of tiles, once",
        "hwprune doctor --compile does it now",
    )


def _nvml() -> Finding:
    from hwprune.meter.estimate import Unavailable
    from hwprune.meter.open import open_source

    name, without = (
        "energy of the GPU",
        "energy is null with this reason; energy budgets of a GPU need it",
    )
    found = open_source("nvml:0")
    if isinstance(found, Unavailable):
        return Finding(name, "missing", found.reason, without)
    try:
        caps = found.caps
        told = f"{caps.device}: {'a counter of joules' if caps.counter else 'watts only'}"
        state: State = "works" if caps.counter else "limited"
        return Finding(name, state, told, "hwprune measure and measure_energy give joules")
    finally:
        found.close()


def _rapl() -> Finding:
    from hwprune.meter.estimate import Unavailable
    from hwprune.meter.open import open_source

    name = "energy of the CPU"
    found = open_source("rapl")
    if isinstance(found, Unavailable):
        root = "permission" in found.reason.lower() or "readable" in found.reason.lower()
        mend = (
            "sudo chmod a+r /sys/class/powercap/*/energy_uj, until the next start" if root else ""
        )
        return Finding(
            name, "missing", found.reason, "energy of a CPU is null with this reason", mend
        )
    try:
        told = f"{found.caps.device}: packages, without memory"
        return Finding(name, "works", told, "measure_energy('rapl') gives joules")
    finally:
        found.close()


def _profile() -> Finding:
    import torch

    from hwprune.device import ProfileError, list_devices, read_profile
    from hwprune.profiling import this_device

    key = this_device(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    here: list[str] = []
    others: list[str] = []
    mend = "hwprune profile (20 minutes), or hwprune profile --for MODEL --minutes 1"
    for name, path in list_devices().items():
        try:
            profile = read_profile(path)
            (here if profile.key == key else others).append(name)
            threads = profile.device.get("threads")
            if threads and key.startswith(f"{profile.device.get('name')}, "):
                mend = f"OMP_NUM_THREADS={threads} runs as {name} was measured; or {mend}"
        except (ProfileError, OSError):
            others.append(f"{name} (damaged)")
    if here:
        told = f"{here[-1]} is of this machine ({key})"
        return Finding(
            "device profile", "works", told, "latency budgets are solved and proven here"
        )
    return Finding(
        "device profile",
        "missing",
        f"none of {key}; there are: {', '.join(others) or 'none'}",
        "latency and energy budgets are predicted for other devices only, and not proven",
        mend,
    )


def _cache() -> Finding:
    from hwprune.kernels.block_sparse.native import cache_folder

    folder = cache_folder()
    above: Path = next(p for p in (folder, *folder.parents) if p.exists())
    if os.access(above, os.W_OK):
        return Finding("cache folder", "works", str(folder), "compiled kernels are kept")
    return Finding(
        "cache folder",
        "missing",
        f"{above} cannot be written",
        "kernels and the digits model are made again each time",
        "set XDG_CACHE_HOME to a folder that can be written",
    )


def _extra(extra: str) -> Finding:
    packages, purpose = EXTRAS[extra]
    there, gone = [], []
    for package in packages:
        try:
            there.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            gone.append(package)
    name = f"hwprune[{extra}]"
    if not gone:
        return Finding(name, "works", ", ".join(there), purpose)
    told = f"no {', no '.join(gone)}" + (f"; {', '.join(there)}" if there else "")
    return Finding(name, "missing", told, f"without: {purpose}", f"pip install '{name}'")
