"""The Triton kernels of the gradients: of the input, and of the stored tiles; imported only where they run.

The input's gradient walks block-columns and carries two indices from step to step (which block-row, which
tile); the weight's is one program a stored tile, summed over tokens. Neither uses atomics, so both are
the same to the bit in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hwprune.kernels.block_sparse import gpu_forward
from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse.tiles import Config

# Tokens that one program of the weight's gradient sums in one go when tiles alone do not fill the device.
_SPLIT = 2048


@triton.jit
def input_gradient_kernel(
    g_ref,
    w_ref,
    ridx,
    perm,
    ccol,
    dx,
    tokens,
    width,
    outputs,
    stride_g,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of tokens by one block-column: dx = grad W."""
    tiles_m = tl.cdiv(tokens, BM)
    pid = tl.program_id(0)
    column = pid // tiles_m
    pm = pid % tiles_m
    start = tl.load(ccol + column)
    end = tl.load(ccol + column + 1)
    rm = pm * BM + tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rows_g = tl.minimum(rm, tokens - 1).to(tl.int64) * stride_g
    g_ptrs = g_ref + rows_g[:, None] + rn[None, :]
    w_ptrs = w_ref + rn[:, None] * BK + rk[None, :]
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    row = tl.load(ridx + start)
    place = tl.load(perm + start).to(tl.int64)
    for j in tl.range(start, end, num_stages=STAGES):
        if EVEN_N:
            g = tl.load(g_ptrs + row * BN)
        else:
            g = tl.load(g_ptrs + row * BN, mask=(row * BN + rn)[None, :] < outputs, other=0.0)
        w = tl.load(w_ptrs + place * (BN * BK))
        row = tl.load(ridx + j + 1)
        place = tl.load(perm + j + 1).to(tl.int64)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    cols = column * BK + rk
    mask = (rm < tokens)[:, None] & (cols < width)[None, :]
    at = rm.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient_kernel(
    g_ref,
    x_ref,
    row_of,
    idx,
    dw,
    tokens,
    width,
    outputs,
    stored,
    stride_g,
    stride_x,
    share,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One stored tile, over one share of the tokens: dW = gradᵀ x, in float32."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rn = tl.load(row_of + tile) * BN + tl.arange(0, BN)
    rk = tl.load(idx + tile) * BK + tl.arange(0, BK)
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    first = part * share
    last = tl.minimum(first + share, tokens)
    for m in tl.range(first, last, BM, num_stages=STAGES):
        rm = m + tl.arange(0, BM)
        inside = (rm < last)[:, None]
        at = rm.to(tl.int64)[:, None]
        mask_g = inside if EVEN_N else inside & (rn < outputs)[None, :]
        mask_x = inside if EVEN_K else inside & (rk < width)[None, :]
        g = tl.load(g_ref + at * stride_g + rn[None, :], mask=mask_g, other=0.0)
        x = tl.load(x_ref + at * stride_x + rk[None, :], mask=mask_x, other=0.0)
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION)
    inner = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
    at = (part * stored + tile).to(tl.int64) * (BN * BK)
    tl.store(dw + at + inner, acc.to(dw.dtype.element_ty))


def input_gradient(grad: Tensor, weight: BlockSparseWeight, config: Config) -> Tensor:
    """grad W: [M, N] -> [M, K]; grad's last dimension contiguous."""
    (bn, bk), (outputs, width) = weight.block, weight.shape
    by_column = weight.transposed()
    dx = torch.empty((len(grad), width), dtype=grad.dtype, device=grad.device)
    grid = (-(-len(grad) // config.tokens) * weight.grid[1],)
    input_gradient_kernel[grid](
        grad,
        weight.values,
        by_column.ridx,
        by_column.perm,
        by_column.ccol,
        dx,
        len(grad),
        width,
        outputs,
        grad.stride(0),
        BM=config.tokens,
        BN=bn,
        BK=bk,
        STAGES=config.stages,
        EVEN_N=outputs % bn == 0,
        PRECISION=gpu_forward.precision(grad.dtype),
        num_warps=config.warps,
    )
    return dx


def weight_gradient(grad: Tensor, x: Tensor, weight: BlockSparseWeight, processors: int) -> Tensor:
    """gradᵀ x on the stored tiles: [S, bn, bk]; both [M, .] with a contiguous last dimension.

    Where the tiles alone do not fill the device twice, the tokens are shared out and the parts, in float32,
    are summed in order.
    """
    (bn, bk), (outputs, width) = weight.block, weight.shape
    stored, tokens = len(weight.values), len(grad)
    parts = 1
    if stored < 2 * processors:
        parts = max(1, min(-(-2 * processors // max(stored, 1)), -(-tokens // _SPLIT)))
    step = 32 if grad.element_size() == 4 else 64
    share = -(-tokens // (parts * step)) * step
    dtype = weight.values.dtype if parts == 1 else torch.float32
    dw = torch.empty((parts, stored, bn, bk), dtype=dtype, device=grad.device)
    weight_gradient_kernel[(stored, parts)](
        grad,
        x,
        weight.row_of().int(),
        weight.idx,
        dw,
        tokens,
        width,
        outputs,
        stored,
        grad.stride(0),
        x.stride(0),
        share,
        BM=step,
        BN=bn,
        BK=bk,
        STAGES=4,
        EVEN_N=outputs % bn == 0,
        EVEN_K=width % bk == 0,
        PRECISION=gpu_forward.precision(grad.dtype),
        num_warps=8 if bn * bk >= 128 * 128 else 4,
    )
    return dw[0] if parts == 1 else dw.sum(0).to(weight.values.dtype)
