"""The public block-sparse kernels that run on a GPU: torch's own BSR, torchao's (deleted, 0.18) and STK's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight

Call = Callable[[], Any]


def peers(x: Tensor, weight: BlockSparseWeight, bias: Tensor, dry: bool) -> dict[str, Call | str]:
    """What each computes for x [M, K] and the weight's tiles; a string says why one does not run."""
    found: dict[str, Call | str] = {}
    for name, make in (("torch BSR", _torch), ("torchao 0.18", _torchao), ("STK", _stk)):
        try:
            found[name] = "needs a GPU" if dry and name != "torch BSR" else make(x, weight, bias)
        except Exception as error:  # another release, another device: the reason goes into the row
            found[name] = f"{type(error).__name__}: {str(error)[:150]}"
    return found


def _torch(x: Tensor, weight: BlockSparseWeight, bias: Tensor) -> Call:
    """F.linear of a BSR weight, tokens padded to its tiles (it leaves its Triton path otherwise)."""
    block = weight.block
    if block[0] != block[1]:
        raise ValueError(f"square tiles only, got {block}")
    padded = F.pad(x, (0, 0, 0, -len(x) % block[0]))
    if any(side % step for side, step in zip(weight.shape, block, strict=True)):
        raise ValueError(f"sizes must be multiples of {block}, got {weight.shape}")
    bsr = weight.to_dense().to_sparse_bsr(block)
    exact = F.linear(x.float(), weight.to_dense().float(), bias.float())
    out = F.linear(padded, bsr)[: len(x)].float() + bias.float()
    if float((out - exact).norm() / exact.norm()) > 0.02:
        raise RuntimeError("wrong result")
    return lambda: F.linear(padded, bsr) + bias


def _torchao(x: Tensor, weight: BlockSparseWeight, bias: Tensor) -> Call:
    """torchao.sparsity's BlockSparseTensor, last in 0.18."""
    from torchao.sparsity.blocksparse import BlockSparseTensor  # type: ignore[import-not-found]

    if weight.block[0] != weight.block[1]:
        raise ValueError(f"square tiles only, got {weight.block}")
    stored = BlockSparseTensor.from_dense(weight.to_dense(), weight.block[0])
    padded = F.pad(x, (0, 0, 0, -len(x) % weight.block[0]))
    F.linear(padded, stored, bias)
    return lambda: F.linear(padded, stored, bias)


def _stk(x: Tensor, weight: BlockSparseWeight, bias: Tensor) -> Call:
    """Stanford's STK: 128 x 128 tiles, every size a multiple of 128."""
    import stk  # type: ignore[import-not-found]

    if weight.block != (128, 128):
        raise ValueError(f"tiles of 128 x 128 only, got {weight.block}")
    matrix = stk.ops.to_sparse(weight.to_dense().t().contiguous(), 128)
    padded = F.pad(x, (0, 0, 0, -len(x) % 128))
    stk.ops.dds(padded, matrix)
    return lambda: stk.ops.dds(padded, matrix) + torch.as_tensor(bias)
