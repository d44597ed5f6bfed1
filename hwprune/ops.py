"""The operations a network's time is made of, as data: what is computed, and how much of it.

An `Op` is the key of a device profile's entry: everything that its time depends on and nothing else.
Shapes: M tokens, N outputs, K inputs; attention of B images, H heads, T tokens, q/k width d, v width e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_linear import block_sparse_linear
from hwprune.layers import SlimAttention

DIMS: dict[str, tuple[str, ...]] = {
    "linear": ("m", "n", "k"),
    "attention": ("b", "h", "t", "d", "e"),
    "gelu": ("m", "n"),
    "silu": ("m", "n"),
    "layer_norm": ("m", "n"),
}
IMPLS = ("dense", "block_sparse")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, order=True)
class Op:
    """One operation.

    Attributes:
        kind: linear (with bias), attention (all between the projections), gelu, silu or layer_norm.
        shape: sizes in the order of `DIMS[kind]`.
        dtype: fp32, fp16 or bf16.
        impl: dense, or block_sparse for a linear of stored tiles.
        density: kept fraction of the tiles, 1 for dense.
        block: (bn, bk) of the tiles, (0, 0) for dense.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    impl: str = "dense"
    density: float = 1.0
    block: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Refuse what is no operation.

        Raises:
            ValueError: an unknown kind, implementation or type, another number of sizes, a density outside
                (0, 1], tiles of what is no linear.
        """
        if self.kind not in DIMS or self.dtype not in DTYPES or self.impl not in IMPLS:
            raise ValueError(
                f"expected a kind of {sorted(DIMS)}, an implementation of {list(IMPLS)} and a type of "
                f"{sorted(DTYPES)}, got {self.kind!r}, {self.impl!r} and {self.dtype!r}"
            )
        if len(self.shape) != len(DIMS[self.kind]) or min(self.shape) < 1:
            raise ValueError(
                f"{self.kind}: expected sizes {DIMS[self.kind]} >= 1, got {self.shape}"
            )
        tiled = self.impl == "block_sparse"
        fits = min(self.block) >= 1 and self.kind == "linear" if tiled else self.block == (0, 0)
        if not fits or not 0 < self.density <= 1 or (not tiled and self.density != 1):
            raise ValueError(
                f"expected dense, or tiles of a linear at a density in (0, 1], got {self}"
            )

    @classmethod
    def tiles(
        cls, shape: tuple[int, int, int], dtype: str, block: tuple[int, int], kept: int
    ) -> Op:
        """A linear of stored tiles, with the density that their number gives.

        Args:
            shape: (M, N, K).
            dtype: fp32, fp16 or bf16.
            block: (bn, bk).
            kept: stored tiles, at least one.
        """
        grid = -(-shape[1] // block[0]) * -(-shape[2] // block[1])
        return cls("linear", shape, dtype, "block_sparse", kept / grid, block)

    @property
    def kept_tiles(self) -> int:
        """Stored tiles of a linear of tiles, 0 of anything else."""
        return round(self.density * self.grid_tiles)

    @property
    def grid_tiles(self) -> int:
        """Tiles of the dense weight, those at its edges included; 0 where there are none."""
        if not self.block[0]:
            return 0
        _, n, k = self.shape
        return -(-n // self.block[0]) * -(-k // self.block[1])

    @property
    def family(self) -> tuple[Any, ...]:
        """What interpolation never crosses: (kind, impl, block, dtype)."""
        return (self.kind, self.impl, self.block, self.dtype)

    @property
    def macs(self) -> float:
        """Multiply-accumulates, of stored tiles whole; for the pointwise kinds their elements."""
        if self.kind == "linear":
            m, n, k = self.shape
            if self.block[0]:
                return float(m * self.kept_tiles * self.block[0] * self.block[1])
            return float(m * n * k)
        if self.kind == "attention":
            b, h, t, d, e = self.shape
            return float(b * h * t * t * (d + e))
        return float(self.shape[0] * self.shape[1])

    @property
    def weight_bytes(self) -> float:
        """Bytes of the parameters that are read, of tiles with their indices."""
        size = DTYPES[self.dtype].itemsize
        if self.kind != "linear":
            return 2.0 * self.shape[1] * size if self.kind == "layer_norm" else 0.0
        _, n, k = self.shape
        if not self.block[0]:
            return float((n * k + n) * size)
        values = self.kept_tiles * self.block[0] * self.block[1]
        rows = -(-n // self.block[0])
        return float((values + n) * size + 4 * (self.kept_tiles + 1 + 2 * rows + 1))

    @property
    def activation_bytes(self) -> float:
        """Bytes read and written besides the parameters."""
        size = DTYPES[self.dtype].itemsize
        if self.kind == "linear":
            m, n, k = self.shape
            return float(m * (n + k) * size)
        if self.kind == "attention":
            b, h, t, d, e = self.shape
            return float(b * t * h * (2 * d + 2 * e) * size)
        return 2.0 * self.shape[0] * self.shape[1] * size

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, sizes by name."""
        return {
            "op": self.kind,
            "impl": self.impl,
            "shape": dict(zip(DIMS[self.kind], self.shape, strict=True)),
            "dtype": self.dtype,
            "density": self.density,
            "block": list(self.block) if self.block[0] else None,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Op:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or is no operation.
        """
        try:
            kind = found["op"]
            shape = tuple(int(found["shape"][name]) for name in DIMS[kind])
            rows, cols = found["block"] or (0, 0)
            dtype, impl, density = found["dtype"], found["impl"], float(found["density"])
            whole = all(type(found["shape"][name]) is int for name in DIMS[kind])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"expected an operation, got {found!r}: {error!r}") from None
        if not whole or len(found["shape"]) != len(shape):
            raise ValueError(f"{kind}: expected whole sizes {DIMS[kind]}, got {found['shape']!r}")
        return cls(kind, shape, dtype, impl, density, (int(rows), int(cols)))


class Pool:
    """Normally distributed numbers to take tensors from: hundreds of operations share one buffer.

    Args:
        device: where they lie.
        count: numbers of each type; larger tensors get numbers of their own.
    """

    def __init__(self, device: torch.device, count: int = 1 << 25) -> None:
        """Nothing drawn yet."""
        self.device, self.count = device, count
        self._drawn: dict[torch.dtype, Tensor] = {}
        self._next = 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor; others may lie over it, so do not write to it."""
        wanted = math.prod(shape)
        if dtype not in self._drawn:
            generator = torch.Generator().manual_seed(0)
            numbers = torch.randn(self.count, generator=generator)
            self._drawn[dtype] = numbers.to(device=self.device, dtype=dtype)
        if wanted > self.count:
            return torch.randn(*shape, device=self.device).to(dtype)
        if self._next + wanted > self.count:
            self._next = 0
        found = self._drawn[dtype][self._next : self._next + wanted].view(shape)
        self._next += -(-wanted // 64) * 64  # whole cache lines
        return found


def runnable(op: Op, pool: Pool, seed: int = 0) -> Callable[[], Tensor]:
    """The operation on normally distributed data, ready to be timed; nothing is kept between calls.

    Args:
        op: what to run.
        pool: where its data come from.
        seed: of the mask of a block-sparse weight (uniformly random tiles).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return pool.take(DTYPES[op.dtype], *shape)

    if op.kind in ("gelu", "silu"):
        x, act = draw(*op.shape), F.gelu if op.kind == "gelu" else F.silu
        return lambda: act(x)
    if op.kind == "layer_norm":
        x, scale, shift = draw(*op.shape), draw(op.shape[1]), draw(op.shape[1])
        return lambda: F.layer_norm(x, (op.shape[1],), scale, shift, 1e-6)
    if op.kind == "attention":
        b, h, t, d, e = op.shape
        layer = SlimAttention(8, h, d, e, scale=d**-0.5).eval()
        qkv = draw(b, t, h * (2 * d + e))
        return lambda: layer.attend(qkv)
    m, n, k = op.shape
    x, weight, bias = draw(m, k), draw(n, k), draw(n)
    if op.impl == "dense":
        return lambda: F.linear(x, weight, bias)
    rows, cols = -(-n // op.block[0]), -(-k // op.block[1])
    ranks = torch.rand(rows * cols, generator=generator).argsort().argsort()
    keep = (ranks < op.kept_tiles).view(rows, cols)
    tiles = BlockSparseWeight.from_dense(weight, keep, op.block)
    return lambda: block_sparse_linear(x, tiles, bias)
