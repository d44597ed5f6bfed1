"""y = act(x Wᵀ + b) + residual with W stored as tiles: work, memory and gradients of the kept tiles only.

Source: our own; the carried index and the choice of tiles are explained in block_sparse/gpu_forward.py and
block_sparse/tiles.py. Shapes: x [..., K], W [N, K] in tiles of (bn, bk), see block_sparse/format.py.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse import op
from hwprune.kernels.block_sparse.format import BlockSparseWeight

# (tokens, K, N, (bn, bk), density): ragged edges, one token, nothing and everything kept.
CASES: tuple[tuple[int, int, int, tuple[int, int], float], ...] = (
    (1, 64, 64, (32, 32), 0.5),
    (197, 192, 576, (32, 32), 0.7),
    (15, 100, 130, (32, 64), 0.5),
    (16, 77, 33, (64, 16), 0.3),
    (3, 64, 96, (64, 32), 0.0),
    (7, 50, 70, (32, 32), 1.0),
    (200, 130, 140, (128, 64), 0.5),
    (130, 96, 64, (64, 64), 0.75),
)


def reference(
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """The dense computation with the unpacked weight: the oracle of every other path."""
    out = op.apply_act(F.linear(x, weight.to_dense(), bias), act)
    return out if residual is None else out + residual


def block_sparse_linear(
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    count: int = 0,
) -> Tensor:
    """Multiply by the kept tiles.

    Sums in float32 (float64 for float64), adds the bias, applies the activation, adds the residual, and
    rounds once. The same to the bit in every run.

    Args:
        x: [..., K], any strides, dtype and device of the weight.
        weight: the kept tiles.
        bias: [N] or None.
        residual: [..., N] or None, added last.
        act: none, gelu (erf), gelu_tanh or silu.
        count: tiles in every block-row where they all hold as many (`format.balanced`), else 0.

    Returns:
        [..., N], dtype of x. Differentiable in x, weight.values, bias and residual.

    Raises:
        ValueError: what does not fit, see `op.check_input`.
    """
    return op.run("block_sparse_linear", x, weight, bias, residual, act, gated=False, count=count)
