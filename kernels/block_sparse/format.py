"""A weight stored as tiles: which are kept, in the order the kernels read them.

Shapes: weight [N, K], tiles of (bn, bk), R = ceil(N / bn) block-rows, C = ceil(K / bk) block-columns, S
stored tiles. Border tiles are zero-padded, so N and K need not divide by bn and bk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# What the GPU kernels take: wgmma wants 64 rows or more (32 runs, on the older instructions), and a K step
# is 16 for bfloat16. Other sizes are stored, and multiplied by plain PyTorch.
ROWS = (32, 64, 128)
COLUMNS = (16, 32, 64, 128)
# Coordinates and tile numbers are int32 (int16 is what broke STK on Triton 3.2); offsets are 64-bit.
LARGEST = 2**31 - 1


class Transposed(NamedTuple):
    """The same tiles by block-column, for x's gradient: all int32.

    Attributes:
        ccol: [C + 1] where each block-column starts.
        ridx: [S + 1] block-row of each tile, column by column; one entry of padding.
        perm: [S + 1] where the tile lies in `values`; one entry of padding.
    """

    ccol: Tensor
    ridx: Tensor
    perm: Tensor


@dataclass(frozen=True)
class BlockSparseWeight:
    """The kept tiles of a weight, plain tensors only.

    Attributes:
        values: [S, bn, bk] stored tiles, sorted by block-row, then block-column.
        idx: [S + 1] int32, block-column of each; the last entry is padding (0), which the kernels'
            prefetch reads.
        crow: [R + 1] int32, where each block-row starts.
        order: [R] int32, block-rows by falling number of tiles: the longest are started first.
        shape: (N, K).
    """

    values: Tensor
    idx: Tensor
    crow: Tensor
    order: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor, block: tuple[int, int]) -> BlockSparseWeight:
        """Cut the kept tiles out of a dense weight.

        Args:
            weight: [N, K].
            keep: bool [R, C], True = keep.
            block: (bn, bk).

        Raises:
            ValueError: a mask of another shape or dtype, tiles without a side, more than int32 counts.
        """
        rows, cols = block
        if min(block) < 1:
            raise ValueError(f"block: sides must be at least 1, got {block}")
        grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // cols))
        if keep.dtype != torch.bool or tuple(keep.shape) != grid:
            raise ValueError(
                f"keep: expected bool {grid} for a weight {tuple(weight.shape)} in tiles of {tuple(block)}, "
                f"got {keep.dtype} {tuple(keep.shape)}"
            )
        pad = (0, grid[1] * cols - weight.shape[1], 0, grid[0] * rows - weight.shape[0])
        tiles = F.pad(weight, pad).view(grid[0], rows, grid[1], cols).transpose(1, 2)
        row_of, col_of = keep.to(weight.device).nonzero(as_tuple=True)
        crow = F.pad(keep.to(weight.device).sum(1).cumsum(0), (1, 0)).int()
        check_sizes(tokens=0, stored=len(row_of), block=block, shape=tuple(weight.shape))
        return cls(
            values=tiles[row_of, col_of].contiguous(),
            idx=F.pad(col_of.int(), (0, 1)),
            crow=crow,
            order=order_of(crow),
            shape=(weight.shape[0], weight.shape[1]),
        )

    @property
    def block(self) -> tuple[int, int]:
        """(bn, bk)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        rows, cols = self.block
        return -(-self.shape[0] // rows), -(-self.shape[1] // cols)

    @property
    def density(self) -> float:
        """Kept fraction of tiles."""
        return len(self.values) / max(self.grid[0] * self.grid[1], 1)

    def row_of(self) -> Tensor:
        """Block-row of each stored tile: int64 [S], without a transfer to the host."""
        tile = torch.arange(len(self.values), device=self.crow.device)
        return (self.crow[1:, None] <= tile).sum(
            0
        )  # rows that end before it; this exports to ONNX too

    def keep(self) -> Tensor:
        """The mask this was made from: bool [R, C]."""
        found = torch.zeros(self.grid, dtype=torch.bool, device=self.values.device)
        found[self.row_of(), self.idx[:-1].long()] = True
        return found

    def to_dense(self) -> Tensor:
        """The weight [N, K], zeros where tiles were dropped; bit-exact."""
        (rows, cols), grid = self.block, self.grid
        tiles = self.values.new_zeros(*grid, rows, cols)
        tiles[self.row_of(), self.idx[:-1].long()] = self.values
        dense = tiles.transpose(1, 2).reshape(grid[0] * rows, grid[1] * cols)
        return dense[: self.shape[0], : self.shape[1]].contiguous()

    def transposed(self) -> Transposed:
        """The tiles by block-column; no transfer to the host, so it may run inside a CUDA graph."""
        perm = torch.argsort(self.idx[:-1], stable=True)
        columns = torch.arange(self.grid[1] + 1, device=perm.device, dtype=torch.int32)
        ccol = torch.searchsorted(self.idx[:-1][perm].contiguous(), columns).int()
        return Transposed(ccol, F.pad(self.row_of()[perm].int(), (0, 1)), F.pad(perm.int(), (0, 1)))

    def compacted(self) -> tuple[BlockSparseWeight, Tensor, Tensor]:
        """Without block-rows and block-columns that hold nothing.

        Returns:
            The smaller weight, the kept rows [n] and the kept columns [k] of the old one, int64.
        """
        (bn, bk), keep = self.block, self.keep()
        tall, wide = keep.any(1), keep.any(0)
        rows = tall.repeat_interleave(bn)[: self.shape[0]].nonzero()[:, 0]
        cols = wide.repeat_interleave(bk)[: self.shape[1]].nonzero()[:, 0]
        place = F.pad(wide.cumsum(0) - 1, (0, 1))
        crow = F.pad(keep.sum(1)[tall].cumsum(0), (1, 0)).int()
        idx = F.pad(place[self.idx[:-1].long()].int(), (0, 1))
        small = replace(
            self, idx=idx, crow=crow, order=order_of(crow), shape=(len(rows), len(cols))
        )
        return small, rows, cols

    def check(self) -> None:
        """Refuse tensors that are no tiles of a weight: a wrong index would read foreign memory.

        Raises:
            ValueError: saying which tensor, what was expected and what it holds.
        """
        stored, (rows, cols) = len(self.values), self.grid
        for name, tensor, length in (
            ("idx", self.idx, stored + 1),
            ("crow", self.crow, rows + 1),
            ("order", self.order, rows),
        ):
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != (length,):
                raise ValueError(
                    f"{name}: expected int32 [{length}], got {tensor.dtype} {list(tensor.shape)}"
                )
        crow, idx = self.crow.long().cpu(), self.idx.long().cpu()
        if int(crow[0]) != 0 or int(crow[-1]) != stored or bool((crow.diff() < 0).any()):
            raise ValueError(
                f"crow: expected to rise from 0 to {stored}, got {crow.tolist()[:8]}..."
            )
        if stored and not 0 <= int(idx.min()) <= int(idx.max()) < cols:
            raise ValueError(
                f"idx: expected block-columns in [0, {cols}), got up to {int(idx.max())}"
            )
        place = torch.repeat_interleave(torch.arange(rows), crow.diff()) * cols + idx[:-1]
        if bool((place.diff() <= 0).any()):
            raise ValueError("idx: expected rising block-columns within each block-row")
        if not torch.equal(self.order.long().cpu().sort().values, torch.arange(rows)):
            raise ValueError(f"order: expected each of {rows} block-rows once")


def order_of(crow: Tensor) -> Tensor:
    """Block-rows by falling number of tiles, ties in order: int32 [R]."""
    return torch.argsort(crow.diff(), descending=True, stable=True).int()


def balanced(scores: Tensor, density: float) -> Tensor:
    """A mask with the same number of tiles in each block-row, the best of each.

    Block-rows of one length keep all of a GPU's processors busy to the end: at 1576 tokens the last one
    finishes 1.27 times the mean instead of 1.42 (simulated).

    Args:
        scores: [R, C], higher = keep.
        density: kept fraction, in [0, 1].

    Returns:
        bool [R, C].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected a fraction in [0, 1], got {density}")
    count = round(density * scores.shape[1])
    best = scores.topk(count, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def check_sizes(
    *, tokens: int, stored: int, block: tuple[int, int], shape: tuple[int, ...]
) -> None:
    """Refuse counts beyond int32; offsets are 64-bit, so sizes in elements may be larger.

    Raises:
        ValueError: naming the count.
    """
    for name, count in (
        ("tokens", tokens),
        ("rows of all stored tiles", stored * block[0]),
        ("out_features", shape[0]),
        ("in_features", shape[1]),
    ):
        if count > LARGEST:
            raise ValueError(
                f"{name}: expected at most {LARGEST} (int32), got {count}; split the batch or the layer"
            )
