"""y = (x Vᵀ + b) * act(x Gᵀ + c) + residual, V and G stored as tiles of one pattern: GEGLU and SwiGLU.

The input tile is read once for both matrices. Source: Shazeer, GLU Variants Improve Transformer (2020);
diffusers' GEGLU and SwiGLU keep value and gate in one projection, value first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse import op
from hwprune.kernels.block_sparse.format import BlockSparseWeight

# (tokens, K, N of each matrix, (bn, bk), density)
CASES: tuple[tuple[int, int, int, tuple[int, int], float], ...] = (
    (1, 64, 64, (32, 32), 0.5),
    (197, 96, 130, (64, 32), 0.7),
    (15, 100, 70, (32, 64), 0.5),
    (5, 64, 96, (64, 32), 0.0),
    (130, 64, 128, (128, 64), 1.0),
)


def stack(value: BlockSparseWeight, gate: BlockSparseWeight) -> BlockSparseWeight:
    """Both matrices' tiles in one weight of shape (N, K): values [2 S, bn, bk], the gate's after the value's.

    Raises:
        ValueError: their patterns or sizes differ.
    """
    same = value.shape == gate.shape and value.block == gate.block
    if not (same and torch.equal(value.idx, gate.idx) and torch.equal(value.crow, gate.crow)):
        raise ValueError(
            f"block_sparse_glu: value {value.shape} and gate {gate.shape} need one pattern of tiles; keep "
            "the union of both masks"
        )
    return replace(value, values=torch.cat([value.values, gate.values]))


def reference(
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """The dense computation with both unpacked weights."""
    parts = []
    for i, values in enumerate(weight.values.chunk(2)):
        shift = None if bias is None else bias.chunk(2)[i]
        parts.append(F.linear(x, replace(weight, values=values).to_dense(), shift))
    out = parts[0] * op.apply_act(parts[1], act)
    return out if residual is None else out + residual


def block_sparse_glu(
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "gelu",
    *,
    count: int = 0,
) -> Tensor:
    """The gated product.

    Args:
        x: [..., K].
        weight: from `stack`.
        bias: [2 N], the value's first, or None.
        residual: [..., N] or None, added last.
        act: of the gate: gelu (GEGLU), silu (SwiGLU), gelu_tanh or none.
        count: tiles in every block-row where they all hold as many, else 0.

    Returns:
        [..., N]. Differentiable in x, weight.values, bias and residual.

    Raises:
        ValueError: what does not fit, see `op.check_input`; an odd number of tiles.
    """
    if len(weight.values) % 2:
        raise ValueError(
            f"block_sparse_glu: expected tiles of two matrices (see stack), got {len(weight.values)}"
        )
    return op.run("block_sparse_glu", x, weight, bias, residual, act, gated=True, count=count)
