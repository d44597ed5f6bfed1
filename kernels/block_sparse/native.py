"""The CPU kernel: native.cpp, compiled on first use, kept in a cache, tried before it is trusted.

Environment: HWPRUNE_NATIVE=0 never compiles; HWPRUNE_CACHE is the folder for compiled kernels (default
~/.cache/hwprune, or $XDG_CACHE_HOME/hwprune).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
DTYPES = (torch.float32, torch.bfloat16)

_lock = threading.Lock()
_trusted: frozenset[torch.dtype] | None = None
_reason = "not compiled yet: it is on the first block-sparse product on this CPU"


def supports(dtype: torch.dtype) -> bool:
    """Whether the native kernel computes in `dtype` here; compiles it when first asked."""
    global _trusted
    if dtype not in DTYPES:
        return False
    if _trusted is None:
        with _lock:
            if _trusted is None:
                _trusted = _prepare()
    return dtype in _trusted


def why_not() -> str:
    """Why the native kernel does not run; empty where it does."""
    return _reason


def linear(
    x: Tensor,
    values: Tensor,
    idx: Tensor,
    crow: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    act: str,
) -> Tensor:
    """act(x Wᵀ + bias) + residual. x [M, K], residual [M, N]; call only where `supports` says so."""
    out: Tensor = torch.ops.hwprune_native.block_sparse_linear(
        x, values, crow, idx, bias, residual, out_features, act
    )
    return out


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if given := os.environ.get("HWPRUNE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwprune"


@cache
def _flags() -> tuple[str, ...]:
    """Compiler flags; at::vec is told what torch itself was told of this processor."""
    level = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", "-march=native", f"-DCPU_CAPABILITY={level}"]
    if level in ("AVX2", "AVX512"):
        flags.append(f"-DCPU_CAPABILITY_{level}")
    return tuple(flags)


def _key() -> str:
    """What a compiled kernel depends on: source, flags, torch, Python's ABI and the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = ""
    parts = (
        SOURCE.read_text(),
        *_flags(),
        torch.__version__,
        sys.implementation.cache_tag or "",
        platform.machine(),
        processor,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _prepare() -> frozenset[torch.dtype]:
    """Load or compile, then try; every failure is a sentence, and plain PyTorch runs instead."""
    global _reason
    if os.environ.get("HWPRUNE_NATIVE") == "0":
        _reason = "HWPRUNE_NATIVE=0"
        return frozenset()
    try:
        _load()
    except Exception as error:  # a compiler can fail in any way, and none may stop the model
        _reason = f"it could not be compiled ({str(error).strip().splitlines()[0]})"
        _say(f"the CPU kernel is off, plain PyTorch runs instead: {_reason}")
        return frozenset()
    found = frozenset(dtype for dtype in DTYPES if _right(dtype))
    _reason = "" if found else "torch's brgemm does not run on this processor"
    return found


def _load() -> None:
    """Load the compiled kernel, compiling it first where the cache has none that is whole.

    A library's name carries the hash of its content: one that a full disk cut short would kill the
    process (SIGBUS) when loaded.
    """
    key = _key()
    for kept in sorted(cache_folder().glob(f"native-{key}-*.so")):
        if kept.name == _named(key, kept):
            torch.ops.load_library(str(kept))
            return
        _say(f"{kept} is damaged")
        with suppress(OSError):
            kept.unlink()
    with tempfile.TemporaryDirectory(prefix="hwprune-") as folder:
        built = _compile(Path(folder))
        target = cache_folder() / _named(key, built)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(built, temporary)
            temporary.replace(target)
        except OSError as error:
            _say(f"it is not kept, so the next process compiles it again ({error})")


def _named(key: str, library: Path) -> str:
    return f"native-{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _compile(folder: Path) -> Path:
    """Compile and load, in a folder of its own: a build that is killed leaves no lock behind."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # importing it says that there is no CUDA, which is not needed
    from torch.utils import cpp_extension

    _say(f"compiling the CPU kernel, once, into {cache_folder()} (about 10 s)")
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # ninja's wheel
    try:
        cpp_extension.load(
            name="hwprune_native",
            sources=[str(SOURCE)],
            extra_cflags=list(_flags()),
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
            with_cuda=False,
        )
    finally:
        os.environ["PATH"] = path
        log.setLevel(level)
    return folder / "hwprune_native.so"


def _right(dtype: torch.dtype) -> bool:
    """Whether a small product, ragged and half empty, comes out right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 72, generator=generator).to(dtype)
    weight[32:64] = 0
    weight[:32, 32:64] = 0
    x = torch.randn(150, 72, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T
    idx = torch.tensor([0, 2, 0, 1, 2, 0], dtype=torch.int32)
    crow = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    padded = torch.zeros(96, 96, dtype=dtype)
    padded[:80, :72] = weight
    tiles = padded.view(3, 32, 3, 32).transpose(1, 2)
    values = tiles[torch.tensor([0, 0, 2, 2, 2]), idx[:-1].long()].contiguous()
    try:
        for tokens in (3, 150):
            out = linear(x[:tokens], values, idx, crow, None, None, 80, "none")
            error = (out.double() - exact[:tokens]).norm() / exact[:tokens].norm()
            if not float(error) < 4 * torch.finfo(dtype).eps:
                return False
    except RuntimeError:
        return False
    return True


def _say(text: str) -> None:
    """One line on stderr."""
    print(f"hwprune: {text}", file=sys.stderr, flush=True)
