"""The compiled CPU kernel: right, quiet once cached, and never in the way where it cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse import native
from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_linear import block_sparse_linear, reference

ROOT = Path(__file__).resolve().parent.parent

TRY = """
import torch
from torch import nn
from hwprune import BlockSparseLinear
from hwprune.kernels.block_sparse import native
torch.manual_seed(0)
linear = nn.Linear(96, 128)
keep = torch.rand(4, 3) < 0.6
sparse = BlockSparseLinear.from_dense(linear, keep, (32, 32))
x = torch.randn(200, 96)
expected = nn.functional.linear(x, sparse.to_dense(), linear.bias)
torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-5)
half = sparse.bfloat16()(x.bfloat16())
torch.testing.assert_close(half.float(), expected, rtol=5e-2, atol=5e-2)
print(native.supports(torch.float32), "|", native.why_not())
"""


def tried(**env: str) -> tuple[str, str]:
    """stdout and stderr of a process of its own."""
    full = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    full.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", TRY], env=full, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip(), done.stderr.strip()


def compiler() -> None:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler on this machine")
    if not native.supports(torch.float32):
        pytest.skip(f"the native kernel does not run here: {native.why_not()}")


@pytest.mark.slow
def test_it_is_compiled_once_with_one_line_and_then_quietly_loaded(tmp_path: Path) -> None:
    compiler()
    out, err = tried(HWPRUNE_CACHE=str(tmp_path))
    assert out == "True |"
    assert err.count("\n") == 0 and err.startswith("hwprune: compiling the CPU kernel, once, into")
    (kept,) = tmp_path.iterdir()  # and no folder of the build is left
    assert tried(HWPRUNE_CACHE=str(tmp_path)) == ("True |", "")
    kept.write_bytes(kept.read_bytes()[:1000])  # a disk that was full
    out, err = tried(HWPRUNE_CACHE=str(tmp_path))
    assert out == "True |" and "is damaged" in err and "compiling" in err
    assert sorted(kept.parent.iterdir()) == [kept] and kept.stat().st_size > 10_000


def test_without_a_compiler_plain_pytorch_runs_and_says_so_once(tmp_path: Path) -> None:
    out, err = tried(HWPRUNE_CACHE=str(tmp_path), PATH="/nonexistent", CXX="/nonexistent/c++")
    assert out.startswith("False | it could not be compiled")
    lines = err.splitlines()
    assert len(lines) == 2 and lines[1].startswith(
        "hwprune: the CPU kernel is off, plain PyTorch runs"
    )


def test_it_can_be_switched_off() -> None:
    assert tried(HWPRUNE_NATIVE="0") == ("False | HWPRUNE_NATIVE=0", "")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    compiler()
    blocked = tmp_path / "file"
    blocked.write_text("")
    out, err = tried(HWPRUNE_CACHE=str(blocked / "cache"))
    assert out == "True |" and "compiling" in err and "it is not kept" in err


def problem(
    tokens: int, width: int, outputs: int, block: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, BlockSparseWeight, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width)
    keep = torch.rand(-(-outputs // block[0]), -(-width // block[1]), generator=generator) < 0.5
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    rest = (torch.randn(*s, generator=generator).to(dtype) for s in ((outputs,), (tokens, outputs)))
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    return x, BlockSparseWeight.from_dense(weight.to(dtype), keep, block), *rest  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("block", [(32, 32), (64, 16), (128, 64), (24, 10), (7, 2)], ids=str)
def test_it_errs_no_more_than_the_dense_product(
    dtype: torch.dtype, act: str, block: tuple[int, int]
) -> None:
    if not native.supports(dtype):
        pytest.skip(f"the native kernel does not run here: {native.why_not()}")
    for tokens in (1, 3, 16, 127, 128, 129, 197, 400):
        for width, outputs in ((96, 128), (101, 77), (33, 300)):
            x, weight, bias, residual = problem(tokens, width, outputs, block, dtype)
            out = native.linear(
                x, weight.values, weight.idx, weight.crow, bias, residual, outputs, act
            )
            wide = BlockSparseWeight(
                weight.values.double(), weight.idx, weight.crow, weight.order, weight.shape
            )
            exact = reference(x.double(), wide, bias.double(), residual.double(), act)
            dense = reference(x, weight, bias, residual, act)
            own, others = ((t.double() - exact).norm() / exact.norm() for t in (out, dense))
            assert float(own) <= 1.5 * float(others) + torch.finfo(dtype).eps


def test_its_gelu_follows_erf_over_the_whole_range() -> None:
    if not native.supports(torch.float32):
        pytest.skip(f"the native kernel does not run here: {native.why_not()}")
    z = torch.linspace(-12, 12, 20_001)[:, None]
    weight = BlockSparseWeight.from_dense(torch.ones(1, 1), torch.ones(1, 1) > 0, (2, 2))
    for act, exact in (
        ("gelu", F.gelu(z.double())),
        ("gelu_tanh", F.gelu(z.double(), approximate="tanh")),
        ("silu", F.silu(z.double())),
    ):
        out = block_sparse_linear(z, weight, act=act).double()
        assert float((out - exact).abs().max()) < 2e-6, act


def test_any_number_of_threads_gives_the_same_bits() -> None:
    if not native.supports(torch.float32):
        pytest.skip(f"the native kernel does not run here: {native.why_not()}")
    before = torch.get_num_threads()
    try:
        for tokens in (30, 500):
            x, weight, bias, _ = problem(tokens, 96, 128, (32, 32), torch.float32)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(block_sparse_linear(x, weight, bias))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
