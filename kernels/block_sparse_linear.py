"""y = x Wᵀ + b with W stored as tiles: the specification in plain PyTorch.

Source: our own. Shapes: x [..., K], values [S, R, C] (S stored tiles of R rows and C columns of W),
row_index and col_index [S] int32 (which tile row and tile column each is), out N. Stored tiles are
sorted by row, then column; border tiles are zero-padded, so N and K need not divide by R and C.
The product gathers the input tiles and sums the partial products per tile row: work is proportional to
the stored tiles, and nothing of a dropped tile is read (a NaN there cannot leak).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# (tokens, K, N, (R, C), density): ragged edges, one token, nothing and everything kept.
CASES: tuple[tuple[int, int, int, tuple[int, int], float], ...] = (
    (1, 64, 64, (32, 32), 0.5),
    (197, 192, 576, (32, 32), 0.7),
    (15, 100, 130, (32, 64), 0.5),
    (16, 77, 33, (16, 16), 0.3),
    (3, 64, 96, (64, 32), 0.0),
    (7, 50, 70, (32, 32), 1.0),
)


def pack(weight: Tensor, keep: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the kept tiles out of a dense weight.

    Args:
        weight: [N, K].
        keep: bool [ceil(N / R), ceil(K / C)].
        block: (R, C).

    Returns:
        values [S, R, C], row_index [S] int32, col_index [S] int32.
    """
    rows, cols = block
    grid_rows, grid_cols = keep.shape
    pad = (0, grid_cols * cols - weight.shape[1], 0, grid_rows * rows - weight.shape[0])
    tiles = F.pad(weight, pad).view(grid_rows, rows, grid_cols, cols).transpose(1, 2)
    row_index, col_index = keep.to(weight.device).nonzero(as_tuple=True)
    return tiles[row_index, col_index].contiguous(), row_index.int(), col_index.int()


def unpack(values: Tensor, row_index: Tensor, col_index: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense weight [N, K] of stored tiles, zeros elsewhere; bit-exact."""
    _, rows, cols = values.shape
    grid_rows, grid_cols = -(-shape[0] // rows), -(-shape[1] // cols)
    tiles = values.new_zeros(grid_rows, grid_cols, rows, cols)
    tiles[row_index.long(), col_index.long()] = values
    dense = tiles.transpose(1, 2).reshape(grid_rows * rows, grid_cols * cols)
    return dense[: shape[0], : shape[1]].contiguous()


def reference(
    x: Tensor,
    values: Tensor,
    row_index: Tensor,
    col_index: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """The dense product with the unpacked weight: the oracle of every other path."""
    return F.linear(x, unpack(values, row_index, col_index, (out_features, x.shape[-1])), bias)


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    row_index: Tensor,
    col_index: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """Block-sparse product by gather, batched matmul and a sum per tile row.

    Args:
        x: [..., K]; that K is the packed weight's is for the caller to see to (`BlockSparseLinear` does).
        values: [S, R, C] stored tiles.
        row_index: [S] tile row of each.
        col_index: [S] tile column of each.
        bias: [N] or None.
        out_features: N.

    Returns:
        [..., N], dtype of x.
    """
    _, rows, cols = values.shape
    lead, width = x.shape[:-1], x.shape[-1]
    grid_rows, grid_cols = -(-out_features // rows), -(-width // cols)
    tokens = x.numel() // width if width else 0
    x_TK = F.pad(x.reshape(tokens, width), (0, -width % cols))
    x_gTC = x_TK.view(tokens, grid_cols, cols).transpose(0, 1)  # [tile cols, T, C]
    part_STR = torch.bmm(x_gTC[col_index.long()], values.transpose(1, 2))
    out_gTR = x.new_zeros(grid_rows, tokens, rows).index_add(0, row_index.long(), part_STR)
    out = out_gTR.transpose(0, 1).reshape(tokens, grid_rows * rows)[:, :out_features]
    if bias is not None:
        out = out + bias
    return out.reshape(*lead, out_features)
