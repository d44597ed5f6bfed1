"""The Triton kernels in Triton's interpreter, on odd shapes, against float64: every path a GPU takes.

Needs TRITON_INTERPRET=1 before Triton is imported, so `test_in_a_process_of_its_own` runs this file again
in one that has it. bfloat16 products are wrong in the interpreter (it multiplies bit patterns), so
float16 stands for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hwprune.kernels.block_sparse import op, tiles
from hwprune.kernels.block_sparse.format import BlockSparseWeight, balanced
from hwprune.kernels.block_sparse_glu import reference as gated_reference
from hwprune.kernels.block_sparse_glu import stack
from hwprune.kernels.block_sparse_linear import block_sparse_linear, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")

# (tokens, K, N, (bn, bk), density): M of 1, 15, 16, 197; ragged N and K; empty rows; nothing, everything.
ODD = [
    (1, 64, 64, (64, 64), 0.5),
    (15, 100, 130, (32, 64), 0.5),
    (16, 77, 33, (64, 16), 0.4),
    (197, 48, 70, (32, 16), 0.6),
    (20, 96, 200, (128, 32), 0.5),
    (3, 64, 96, (64, 32), 0.0),
    (40, 130, 65, (32, 128), 1.0),
]
Case = tuple[int, int, int, tuple[int, int], float]
each_case = pytest.mark.parametrize("case", ODD, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
each_path = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    numpy = pytest.importorskip("numpy")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("Triton's interpreter before 3.7 does not run on NumPy 2.4 or newer")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=500)
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed, 1 skipped" in done.stdout, done.stdout[-300:]  # the one is this test


def problem(case: Case, dtype: torch.dtype) -> tuple[Tensor, BlockSparseWeight, Tensor, Tensor]:
    """x, weight, bias, residual; block-row 1 is empty where there are three."""
    tokens, width, outputs, (bn, bk), density = case
    generator = torch.Generator().manual_seed(tokens)
    keep = torch.rand(-(-outputs // bn), -(-width // bk), generator=generator) < density
    if len(keep) > 2:
        keep[1] = False

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = BlockSparseWeight.from_dense(draw(outputs, width) / 8, keep, (bn, bk))
    return draw(tokens, width), weight, draw(outputs), draw(tokens, outputs)


def config(case: Case, dtype: torch.dtype, tma: bool, weights: int = 1) -> tiles.Config:
    rows = -(-case[2] // case[3][0])
    size = torch.finfo(dtype).bits // 8
    return tiles.choose(case[0], rows, case[3], size, (9, 0), 132, weights=weights, tma=tma)


def close(found: Tensor, exact: Tensor) -> None:
    error = (found.double() - exact).norm() / exact.norm().clamp_min(1e-9)
    assert float(error) <= 2 * torch.finfo(found.dtype).eps, float(error)


def wide(weight: BlockSparseWeight) -> BlockSparseWeight:
    return replace(weight, values=weight.values.double())


@inside
@each_case
@each_dtype
@each_path
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_the_forward_product(case: Case, dtype: torch.dtype, tma: bool, act: str) -> None:
    from hwprune.kernels.block_sparse import gpu_forward

    x, weight, bias, residual = problem(case, dtype)
    launch = config(case, dtype, tma)
    out = gpu_forward.launch(x, weight, bias, residual, act, launch)
    close(out, reference(x.double(), wide(weight), bias.double(), residual.double(), act))
    bare = gpu_forward.launch(x, weight, None, None, act, launch)
    close(bare, reference(x.double(), wide(weight), None, None, act))


@inside
@each_path
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "none"])
def test_the_gated_product(tma: bool, act: str) -> None:
    from hwprune.kernels.block_sparse import gpu_forward

    for case in ODD[:4]:
        x, value, bias, residual = problem(case, torch.float16)
        weight = stack(value, replace(value, values=value.values.flip(0)))
        both = torch.cat([bias, bias.flip(0)])
        launch = config(case, torch.float16, tma, weights=2)
        out = gpu_forward.launch(x, weight, both, residual, act, launch, gated=True)
        close(out, gated_reference(x.double(), wide(weight), both.double(), residual.double(), act))


@inside
@each_path
@pytest.mark.parametrize("swap", [False, True])
def test_both_orders_of_operands_and_a_known_count_agree(tma: bool, swap: bool) -> None:
    from hwprune.kernels.block_sparse import gpu_forward

    keep = balanced(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), 0.5)
    weight = BlockSparseWeight.from_dense(torch.randn(150, 120).half() / 8, keep, (64, 32))
    x = torch.randn(33, 120).half()
    launch = replace(config((33, 120, 150, (64, 32), 0.5), torch.float16, tma), swap=swap)
    plain = gpu_forward.launch(x, weight, None, None, "none", launch)
    counted = gpu_forward.launch(x, weight, None, None, "none", launch, count=2)
    close(plain, reference(x.double(), wide(weight)))
    assert torch.equal(plain, counted)


@inside
@each_case
@each_dtype
def test_the_gradients(case: Case, dtype: torch.dtype) -> None:
    from hwprune.kernels.block_sparse import gpu_backward

    x, weight, _, grad = problem(case, dtype)
    bk = weight.block[1]
    launch = tiles.choose(len(x), weight.grid[1], (bk, weight.block[0]), 2, (8, 0), 108)
    dense = wide(weight).to_dense()
    close(gpu_backward.input_gradient(grad, weight, launch), grad.double() @ dense)
    exact = BlockSparseWeight.from_dense(
        grad.double().T @ x.double(), weight.keep(), weight.block
    ).values
    for processors in (1, 132):  # tiles that fill the device, and tokens shared out
        close(gpu_backward.weight_gradient(grad, x, weight, processors), exact)


@inside
def test_tokens_shared_out_are_summed_to_the_same_gradient() -> None:
    from hwprune.kernels.block_sparse import gpu_backward

    weight = BlockSparseWeight.from_dense(torch.randn(32, 16), torch.ones(1, 1) > 0, (32, 16))
    grad, x = torch.randn(5000, 32), torch.randn(5000, 16)
    parts = gpu_backward.weight_gradient(grad, x, weight, 132)
    exact = grad.double().T @ x.double()
    assert float((parts[0] - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(gpu_backward.weight_gradient(grad, x, weight, 132), parts)


@inside
@each_path
def test_nan_in_columns_that_no_tile_reads_does_not_leak(tma: bool) -> None:
    from hwprune.kernels.block_sparse import gpu_forward

    case = (20, 96, 130, (64, 32), 0.5)
    keep = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]]) > 0
    weight = BlockSparseWeight.from_dense(torch.randn(130, 96).half() / 8, keep, (64, 32))
    x = torch.randn(20, 96).half()
    launch = config(case, torch.float16, tma)
    clean = gpu_forward.launch(x, weight, None, None, "none", launch)
    x[:, 32:64] = float("nan")
    assert torch.equal(gpu_forward.launch(x, weight, None, None, "none", launch), clean)


@inside
def test_what_lies_behind_a_ragged_width_is_not_read() -> None:
    from hwprune.kernels.block_sparse import gpu_forward

    case = (20, 77, 64, (64, 32), 1.0)
    x, weight, _, _ = problem(case, torch.float16)
    buffer = torch.full((20, 120), float("nan"), dtype=torch.float16)
    buffer[:, :77] = x
    out = gpu_forward.launch(
        buffer[:, :77], weight, None, None, "none", config(case, torch.float16, False)
    )
    close(out, reference(x.double(), wide(weight)))


@inside
def test_offsets_past_int32_are_64_bit() -> None:
    from hwprune.kernels.block_sparse import gpu_backward, gpu_forward

    # Two rows 2^31 + 64 entries apart: 4 GiB of address space of which two pages are touched.
    far = 2**31 + 64
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((2, 64), (far, 1))
    x.copy_(torch.randn(2, 64))
    weight = BlockSparseWeight.from_dense(
        torch.randn(64, 64).half() / 8, torch.ones(2, 2) > 0, (32, 32)
    )
    launch = config((2, 64, 64, (32, 32), 1.0), torch.float16, False)
    close(
        gpu_forward.launch(x, weight, None, None, "none", launch),
        reference(x.double(), wide(weight)),
    )
    close(gpu_backward.input_gradient(x, weight, launch), x.double() @ wide(weight).to_dense())


@inside
@each_dtype
@pytest.mark.parametrize("act", ["gelu_tanh", "silu"])
def test_the_operator_trains_through_triton(dtype: torch.dtype, act: str) -> None:
    assert op._triton() is not None
    for case in ODD[1:3]:
        x, weight, bias, residual = problem(case, dtype)
        grads = []
        for kind in (dtype, torch.float64):
            leaves = [t.to(kind).requires_grad_() for t in (x, weight.values, bias, residual)]
            held = replace(weight, values=leaves[1])
            call = block_sparse_linear if kind == dtype else reference
            out = call(leaves[0], held, leaves[2], leaves[3], act)
            probe = torch.ones_like(out) / 3
            grads.append((out, *torch.autograd.grad(out, leaves, probe)))
        for found, exact in zip(*grads, strict=True):
            error = (
                found.detach().double() - exact.detach()
            ).norm() / exact.detach().norm().clamp_min(1e-9)
            assert float(error) < 8 * torch.finfo(dtype).eps


@inside
def test_opcheck_passes_through_triton() -> None:
    x, weight, bias, residual = problem(ODD[1], torch.float16)
    args = (x, weight.values, weight.idx, weight.crow, weight.order, bias, residual)
    torch.library.opcheck(op.block_sparse, (*args, 130, "gelu", False, 0))
