"""Block-sparse products in plain PyTorch: any device and dtype, and every gradient.

Work is proportional to the stored tiles, and nothing of a dropped tile is read (a NaN there cannot
leak). Never `torch.sparse`: on a CPU its BSR product is 10 to 30 times slower than dense.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight


def product(x_MK: Tensor, weight: BlockSparseWeight) -> Tensor:
    """x Wᵀ: one gather and one matrix product a block-row. [M, K] -> [M, N]."""
    (rows, cols), (grid_rows, grid_cols) = weight.block, weight.grid
    x_MCk = F.pad(x_MK, (0, -x_MK.shape[1] % cols)).view(len(x_MK), grid_cols, cols)
    y_MRn = x_MK.new_zeros(len(x_MK), grid_rows, rows)
    at = weight.crow.tolist()
    idx = weight.idx.long()
    for r in range(grid_rows):
        s, e = at[r], at[r + 1]
        if s < e:
            gathered = x_MCk[:, idx[s:e]].flatten(1)
            y_MRn[:, r] = gathered @ weight.values[s:e].transpose(0, 1).flatten(1).T
    return y_MRn.flatten(1)[:, : weight.shape[0]]


def input_gradient(grad_MN: Tensor, weight: BlockSparseWeight) -> Tensor:
    """grad W: [M, N] -> [M, K]."""
    (rows, cols), (grid_rows, grid_cols) = weight.block, weight.grid
    g_RMn = _tiles(grad_MN, grid_rows, rows)
    part_SMk = torch.bmm(g_RMn[weight.row_of()], weight.values)
    out_CMk = grad_MN.new_zeros(grid_cols, len(grad_MN), cols)
    out_CMk.index_add_(0, weight.idx[:-1].long(), part_SMk)
    return out_CMk.transpose(0, 1).flatten(1)[:, : weight.shape[1]].contiguous()


def weight_gradient(grad_MN: Tensor, x_MK: Tensor, weight: BlockSparseWeight) -> Tensor:
    """gradᵀ x on the stored tiles only: [S, bn, bk]."""
    (rows, cols), (grid_rows, grid_cols) = weight.block, weight.grid
    g_RMn, x_CMk = _tiles(grad_MN, grid_rows, rows), _tiles(x_MK, grid_cols, cols)
    return torch.bmm(g_RMn[weight.row_of()].transpose(1, 2), x_CMk[weight.idx[:-1].long()])


def _tiles(t_MD: Tensor, count: int, side: int) -> Tensor:
    """[M, D] -> [count, M, side], zero-padded."""
    padded = F.pad(t_MD, (0, count * side - t_MD.shape[1]))
    return padded.view(len(t_MD), count, side).transpose(0, 1)
