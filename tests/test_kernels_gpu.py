"""The kernels on a real GPU: bf16 at real shapes, training, CUDA graphs, torch.compile, beside cuBLAS.

Each check is a function of the device, which the CPU runs too, so that none is first tried on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight, balanced
from hwprune.kernels.block_sparse_glu import block_sparse_glu, stack
from hwprune.kernels.block_sparse_glu import reference as gated_reference
from hwprune.kernels.block_sparse_linear import block_sparse_linear, reference
from hwprune.layers import BlockSparseLinear

BLOCKS = [(32, 32), (64, 16), (64, 32), (64, 64), (128, 64), (128, 128)]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


def close(found: Tensor, exact: Tensor, times: float = 4) -> None:
    """Within `times` roundings of the type, in the 2-norm."""
    error = (found.detach().double() - exact.detach()).norm() / exact.detach().norm()
    assert float(error) <= times * torch.finfo(found.dtype).eps, float(error)


def products(device: str, block: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    for outputs, width in ((768, 384), (200, 136)):
        grid = (-(-outputs // block[0]), -(-width // block[1]))
        keep = torch.rand(grid) < 0.5
        dense = (torch.randn(outputs, width, device=device) / width**0.5).to(dtype)
        weight = BlockSparseWeight.from_dense(dense, keep, block)
        x = torch.randn(tokens, width, device=device).to(dtype)
        bias = torch.randn(outputs, device=device).to(dtype)
        residual = torch.randn(tokens, outputs, device=device).to(dtype)
        wide = replace(weight, values=weight.values.double())
        for act in ("none", "gelu") if outputs == 768 else ("gelu_tanh",):
            out = block_sparse_linear(x, weight, bias, residual, act)
            close(out, reference(x.double(), wide, bias.double(), residual.double(), act))
        assert torch.equal(out, block_sparse_linear(x, weight, bias, residual, act))
        pair, both = stack(weight, weight), torch.cat([bias, bias])
        gated = block_sparse_glu(x, pair, both)
        exact = gated_reference(
            x.double(), replace(pair, values=pair.values.double()), both.double()
        )
        close(gated, exact, 8)


def gradients(device: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keep = torch.rand(-(-300 // block[0]), -(-200 // block[1])) < 0.5
    weight = BlockSparseWeight.from_dense(
        torch.randn(300, 200, device=device).to(dtype) / 14, keep, block
    )
    x, probe = (torch.randn(1000, n, device=device).to(dtype) for n in (200, 300))
    grads = []
    for kind in (dtype, torch.float64):
        leaves = [x.detach().to(kind).requires_grad_(), weight.values.to(kind).requires_grad_()]
        call = block_sparse_linear if kind == dtype else reference
        out = call(leaves[0], replace(weight, values=leaves[1]))
        grads.append(torch.autograd.grad(out, leaves, probe.to(kind)))
    for found, exact in zip(*grads, strict=True):
        close(found, exact)


def layer(device: str, dtype: torch.dtype) -> tuple[BlockSparseLinear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(384, 768).to(device, dtype)
    sparse = BlockSparseLinear.from_dense(linear, balanced(torch.rand(12, 6), 0.5), (64, 64))
    return sparse, torch.randn(2, 197, 384, device=device).to(dtype)


@each_block
def test_the_checks_themselves_pass_on_the_cpu(block: tuple[int, int]) -> None:
    products("cpu", block, torch.float32, 33)
    gradients("cpu", block, torch.float32)


# Each takes several kernels to compile, a second or two each, and scripts/gpu has ten minutes for everything.
@pytest.mark.gpu
@each_block
def test_products(block: tuple[int, int]) -> None:
    products("cuda", block, torch.bfloat16, 197)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 1576])
def test_products_of_other_types_and_sizes(dtype: torch.dtype, tokens: int) -> None:
    torch.set_float32_matmul_precision("highest")
    products("cuda", (64, 64), dtype, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(64, 64), (128, 64)], ids=str)
def test_gradients(block: tuple[int, int]) -> None:
    gradients("cuda", block, torch.bfloat16)


@pytest.mark.gpu
def test_tf32_follows_torch_s_flag() -> None:
    weight = BlockSparseWeight.from_dense(
        torch.randn(256, 256, device="cuda"), torch.ones(4, 4) > 0, (64, 64)
    )
    x = torch.randn(300, 256, device="cuda")
    exact = x.double() @ weight.to_dense().double().T
    errors = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        out = block_sparse_linear(x, weight)
        errors.append(float((out - exact).norm() / exact.norm()))
    torch.set_float32_matmul_precision("highest")
    assert errors[0] < 1e-6 < errors[1] < 1e-3


def replays(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call inside a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.gpu
def test_it_runs_in_cuda_graphs_under_compile_and_autocast() -> None:
    sparse, x = layer("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = sparse(x)
        replay = replays(lambda: sparse(x))
        x.mul_(2)
        torch.testing.assert_close(replay(), sparse(x), rtol=0, atol=0)
        x.div_(2)
        compiled = torch.compile(sparse, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    wide = sparse.float()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        out = wide(x.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_an_input_whose_rows_are_not_aligned_takes_the_pointers() -> None:
    sparse, _ = layer("cuda", torch.bfloat16)
    wide = torch.randn(300, 391, device="cuda", dtype=torch.bfloat16)
    x = wide[:, 3:387]
    out = sparse(x)
    close(out, F.linear(x.double(), sparse.to_dense().double(), sparse.bias.double()))  # type: ignore[union-attr]
