"""Latency and energy of every way to leave a layer, on a profiled device: what the knapsack spends.

A `Pricer` is made for one model, batch, type and device. Its dense total is measured where this machine is
the device, else predicted; the residual of the dense model goes with the bytes an operation moves.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from torch import nn

from hwprune.cost import Structure
from hwprune.network import NetworkModel
from hwprune.operations import layer_operations
from hwprune.ops import Op
from hwprune.predict import Prediction
from hwprune.units import Layer


@dataclass(frozen=True, eq=False)
class Pricer:
    """Prices structures of layers.

    Attributes:
        network: of the device, its residual fitted to the dense model.
        images: of the batch that is timed.
        dtype: fp32, fp16 or bf16.
        dense: latency and energy of the whole dense model for a batch.
        block: tile size of block options.
    """

    network: NetworkModel
    images: int
    dtype: str
    dense: Prediction
    block: tuple[int, int] = (0, 0)
    _known: dict[Op, Prediction] = field(default_factory=dict)

    def price(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, float | None]:
        """Seconds and joules of one layer for a batch; joules None where the device has no sensor.

        Raises:
            UnknownOp: the profile says nothing about an operation of the layer.
        """
        ops = layer_operations(
            model,
            layer,
            keep,
            images=self.images,
            tokens=tokens,
            dtype=self.dtype,
            block=self.block,
        )
        seconds, joules = 0.0, 0.0
        for op in ops:
            if op not in self._known:
                self._known[op] = self.network.predict([op])  # with its share of the residual
            found = self._known[op]
            seconds += found.latency_s
            joules = joules + found.energy_j if found.energy_j is not None else float("nan")
        return seconds, None if joules != joules else joules

    def spread_rel(self) -> float:
        """Half-width of the intervals of what was priced, the median operation's; from held-out errors."""
        found = [(p.hi_s - p.lo_s) / 2 / p.latency_s for p in self._known.values()]
        return statistics.median(found) if found else 0.0
