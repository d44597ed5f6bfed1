"""A load for sensors: square matrix products whose power depends on the values multiplied."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from hwprune.meter.energy_window import Chunk

Values = Literal["random", "zeros", "masked"]
_QUEUED_S = 0.02  # of work a chunk; two are queued at most, so that an end is met within 40 ms


class Load(Protocol):
    """Work of known kinds on a device."""

    def busy(self, seconds: float) -> None:
        """Compute for a time and return when done."""

    def chunks(self, values: Values) -> tuple[Callable[[], Chunk], Callable[[], None]]:
        """Products of matrices of such values, as (run_chunk, drain)."""


class GemmLoad:
    """Products of n x n matrices.

    Args:
        device: cuda or cpu.
        n: their size.
        dtype: of both.
        seed: of the draw.
    """

    def __init__(
        self,
        device: torch.device,
        n: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._a = torch.randn(n, n, generator=generator).to(device, dtype)
        self._b = torch.randn(n, n, generator=generator).to(device, dtype)
        keep = torch.rand(n // 64 or 1, n // 64 or 1, generator=generator) < 0.5
        tiles = keep.repeat_interleave(64, 0).repeat_interleave(64, 1)[:n, :n]
        self._mask = torch.nn.functional.pad(
            tiles, (0, n - tiles.shape[1], 0, n - tiles.shape[0])
        ).to(device)
        self._out = torch.empty_like(self._a)
        self._call_s = self._time()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _time(self) -> float:
        """Seconds a product, warmed up."""
        for repeats in (3, 10):
            self._synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(self._a, self._b, out=self._out)
            self._synchronise()
        return (time.perf_counter() - start) / repeats

    def busy(self, seconds: float) -> None:
        """Compute for a time and return when done."""
        end = time.perf_counter() + seconds
        some = max(1, int(min(0.005, seconds / 4) / self._call_s))
        while time.perf_counter() < end:
            for _ in range(some):
                torch.mm(self._a, self._b, out=self._out)
            self._synchronise()

    def chunks(self, values: Values) -> tuple[Callable[[], Chunk], Callable[[], None]]:
        """Products of random matrices, of zeros, or of one whose tiles of 64 x 64 are half zero."""
        left = {
            "random": self._a,
            "zeros": torch.zeros_like(self._a),
            "masked": self._a * self._mask,
        }[values]
        right = torch.zeros_like(self._b) if values == "zeros" else self._b
        count = max(1, round(_QUEUED_S / self._call_s))
        queued: list[torch.cuda.Event] = []

        def run_chunk() -> Chunk:
            for _ in range(count):
                torch.mm(left, right, out=self._out)
            if self._device.type != "cuda":
                return Chunk(count)
            event = torch.cuda.Event()
            event.record()
            queued.append(event)
            if len(queued) < 2:
                return Chunk(0)
            queued.pop(0).synchronize()
            return Chunk(count)

        return run_chunk, self._synchronise
