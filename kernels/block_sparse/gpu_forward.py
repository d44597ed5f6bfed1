"""The Triton kernel of the forward product, gated or not; imported only where it runs.

The block-column index is carried from one step to the next. Loaded in the step that uses it, as in every
public kernel we know, it costs half of the software pipeline on sm_90 and all of it on sm_80 (Triton
gives (stages - 2) / (indirections + 1) stages to each level): 2 and 1 tiles in flight instead of 4 and 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse.tiles import Config

# What a Triton that lacks a feature, or a device that lacks the memory, raises at a launch.
REFUSED = (triton.CompilationError, triton.OutOfResources, AttributeError, ImportError)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation in float32."""
    if ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    if ACT == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1; libdevice's tanh does not run in the interpreter
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        z = z * tl.sigmoid(2.0 * u)
    if ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def forward(
    x_ref,
    w_ref,
    idx,
    crow,
    order,
    bias,
    residual,
    y,
    tokens,
    width,
    outputs,
    stored,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    COUNT: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of tokens by one block-row; the longest block-rows first, tokens inner.

    x_ref is a pointer to [tokens, width] or a descriptor of it, w_ref one to [stored * BN, BK] (twice
    that for a gated layer, whose gate tiles follow). COUNT > 0 says that every block-row holds that many.
    """
    tiles_m = tl.cdiv(tokens, BM)
    pid = tl.program_id(0)
    row = tl.load(order + pid // tiles_m)
    pm = pid % tiles_m
    if COUNT > 0:
        start = row * COUNT
        end = start + COUNT
    else:
        start = tl.load(crow + row)
        end = tl.load(crow + row + 1)

    rm = pm * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    rn = tl.arange(0, BN)
    if not TMA:
        # Rows past the end read the last row instead of a mask: 16-byte copies stay whole.
        rows_x = tl.minimum(rm, tokens - 1).to(tl.int64) * stride_x
        x_ptrs = x_ref + rows_x[:, None] + rk[None, :]
        w_ptrs = w_ref + start.to(tl.int64) * (BN * BK) + rn[:, None] * BK + rk[None, :]
        to_gate = stored.to(tl.int64) * (BN * BK)

    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    acc_gate = acc
    col = tl.load(idx + start)
    for j in tl.range(start, end, num_stages=STAGES):
        if TMA:
            a = x_ref.load([pm * BM, col * BK])
            w = w_ref.load([j * BN, 0])
        else:
            if EVEN_K:
                a = tl.load(x_ptrs + col * BK)
            else:
                a = tl.load(x_ptrs + col * BK, mask=(col * BK + rk)[None, :] < width, other=0.0)
            w = tl.load(w_ptrs)
        if SWAP:
            acc = tl.dot(w, a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, w.T, acc, input_precision=PRECISION)
        if GATED:
            if TMA:
                g = w_ref.load([(stored + j) * BN, 0])
            else:
                g = tl.load(w_ptrs + to_gate)
            if SWAP:
                acc_gate = tl.dot(g, a.T, acc_gate, input_precision=PRECISION)
            else:
                acc_gate = tl.dot(a, g.T, acc_gate, input_precision=PRECISION)
        if not TMA:
            w_ptrs += BN * BK
        col = tl.load(
            idx + j + 1
        )  # carried: what the next step reads (one entry of padding at the end)

    if SWAP:
        acc = acc.T
        acc_gate = acc_gate.T
    cols = row * BN + rn
    inside = cols < outputs
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            acc_gate += tl.load(bias + outputs + cols, mask=inside, other=0.0).to(tl.float32)[
                None, :
            ]
        acc = acc * activate(acc_gate, ACT)
    else:
        acc = activate(acc, ACT)
    at = rm.to(tl.int64)[:, None] * outputs + cols[None, :]
    mask = (rm < tokens)[:, None] & inside[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


def describable(x: Tensor, block: tuple[int, int]) -> bool:
    """Whether a tensor descriptor may speak of x [M, K]: 16-byte rows, start and box."""
    return (
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and block[1] * x.element_size() >= 16
        and x.shape[0] > 0
    )


def precision(dtype: torch.dtype) -> str:
    """Of float32 products, by torch's own switch; others have but one."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def launch(
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    config: Config,
    *,
    gated: bool = False,
    count: int = 0,
) -> Tensor:
    """Run the kernel.

    Args:
        x: [M, K], last dimension contiguous.
        weight: of one matrix, or of value and gate with one pattern (values [2 S, bn, bk]).
        bias: [N], or [2 N] of a gated layer.
        residual: [M, N] contiguous, or None.
        act: none, gelu, gelu_tanh or silu; of the gate where there is one.
        config: from `tiles.choose`.
        gated: values hold the gate's tiles after the value's.
        count: tiles in every block-row, where they all hold as many (0 = not so, or not known).

    Returns:
        [M, N], dtype of x.
    """
    (bn, bk), (outputs, width) = weight.block, weight.shape
    if width % 16:  # a mask that ends inside 16 bytes would undo the asynchronous copies
        x, width = F.pad(x, (0, -width % 16)), width + -width % 16
    y = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device)
    stored = len(weight.values) // (2 if gated else 1)
    tma = config.tma and describable(x, weight.block) and stored > 0
    x_ref: object = x
    w_ref: object = weight.values
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_ref = TensorDescriptor.from_tensor(x, [config.tokens, bk])
        w_ref = TensorDescriptor.from_tensor(weight.values.view(-1, bk), [bn, bk])
    grid = (-(-len(x) // config.tokens) * weight.grid[0],)
    forward[grid](
        x_ref,
        w_ref,
        weight.idx,
        weight.crow,
        weight.order,
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        len(x),
        width,
        outputs,
        stored,
        x.stride(0),
        BM=config.tokens,
        BN=bn,
        BK=bk,
        STAGES=config.stages,
        COUNT=count,
        ACT=act,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=width % bk == 0,
        SWAP=config.swap,
        TMA=tma,
        PRECISION=precision(x.dtype),
        num_warps=config.warps,
    )
    return y
