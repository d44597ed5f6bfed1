"""The operations a network's time is made of, as data: what is computed, and how much of it.

An `Op` is the key of a device profile's entry: everything that its time depends on and nothing else.
Shapes: M tokens, N outputs, K inputs; attention of B images, H heads, T tokens, q/k width d, v width e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_linear import block_sparse_linear
from hwprune.layers import SlimAttention

Kind = Literal["linear", "attention", "gelu", "layer_norm"]
Impl = Literal["dense", "block_sparse"]

DIMS: dict[str, tuple[str, ...]] = {
    "linear": ("m", "n", "k"),
    "attention": ("b", "h", "t", "d", "e"),
    "gelu": ("m", "n"),
    "layer_norm": ("m", "n"),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, order=True)
class Op:
    """One operation.

    Attributes:
        kind: linear (with bias), attention (all between the projections), gelu or layer_norm.
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
            ValueError: an unknown kind or type, another number of sizes, a density outside (0, 1].
        """
        if self.kind not in DIMS or self.dtype not in DTYPES:
            raise ValueError(
                f"expected a kind of {sorted(DIMS)} and a type of {sorted(DTYPES)}, got {self.kind!r} "
                f"and {self.dtype!r}"
            )
        if len(self.shape) != len(DIMS[self.kind]) or min(self.shape) < 1:
            raise ValueError(
                f"{self.kind}: expected sizes {DIMS[self.kind]} >= 1, got {self.shape}"
            )
        if not 0 < self.density <= 1 or (self.impl == "dense") != (self.block == (0, 0)):
            raise ValueError(f"expected dense, or tiles at a density in (0, 1], got {self}")

    @property
    def family(self) -> tuple[Any, ...]:
        """What interpolation never crosses: (kind, impl, block, dtype)."""
        return (self.kind, self.impl, self.block, self.dtype)

    @property
    def macs(self) -> float:
        """Multiply-accumulates; for the pointwise kinds their elements."""
        if self.kind == "linear":
            m, n, k = self.shape
            return m * n * k * self.density
        if self.kind == "attention":
            b, h, t, d, e = self.shape
            return float(b * h * t * t * (d + e))
        return float(self.shape[0] * self.shape[1])

    @property
    def weight_bytes(self) -> float:
        """Bytes of the parameters, indices included."""
        size = DTYPES[self.dtype].itemsize
        if self.kind != "linear":
            return 2.0 * self.shape[1] * size if self.kind == "layer_norm" else 0.0
        _, n, k = self.shape
        tiles = n * k * self.density / (self.block[0] * self.block[1]) if self.block[0] else 0.0
        return (n * k * self.density + n) * size + 4 * tiles

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
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected an operation, got {found!r}: {error!r}") from None
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

    if op.kind == "gelu":
        x = draw(*op.shape)
        return lambda: F.gelu(x)
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
    keep = (ranks < max(1, round(op.density * rows * cols))).view(rows, cols)
    tiles = BlockSparseWeight.from_dense(weight, keep, op.block)
    return lambda: block_sparse_linear(x, tiles, bias)
