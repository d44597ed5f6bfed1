"""Latency, energy and memory of every way to leave a layer: what the knapsack spends.

A `Pricer` is made for one model, batch, type and device. Its dense total is measured where this machine is
the device, else predicted; the residual of the dense model goes with the bytes an operation moves. A
`MemoryPricer` needs no device: weights are counted, activations estimated.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hwprune.cost import Structure
from hwprune.memory_cost import layer_peak_bytes, layer_weight_bytes, peaks, weight_bytes
from hwprune.network import NetworkModel
from hwprune.operations import layer_operations
from hwprune.ops import NAMES, Op
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
    """

    network: NetworkModel
    images: int
    dtype: str
    dense: Prediction
    _known: dict[Op, Prediction] = field(default_factory=dict)
    _priced: dict[tuple[object, ...], tuple[float, float | None]] = field(default_factory=dict)

    def price(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, float | None]:
        """Seconds and joules of one layer for a batch; joules None where the device has no sensor.

        Raises:
            UnknownOp: the profile says nothing about an operation of the layer.
        """
        key = (layer.name, tokens, keep.heads, keep.qk, keep.v, keep.neurons, *_items(keep))
        if key not in self._priced:  # a search prices the same options hundreds of times
            self._priced[key] = self._summed(model, layer, keep, tokens)
        return self._priced[key]

    def _summed(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, float | None]:
        ops = layer_operations(
            model,
            layer,
            keep,
            images=self.images,
            tokens=tokens,
            dtype=self.dtype,
        )
        seconds, joules = 0.0, 0.0
        for op in ops:
            if op not in self._known:
                self._known[op] = self.network.predict([op])  # with its share of the residual
            found = self._known[op]
            seconds += found.latency_s
            joules = joules + found.energy_j if found.energy_j is not None else float("nan")
        return seconds, None if joules != joules else joules

    @property
    def without_energy(self) -> str:
        """Why energy cannot be limited or weighed, and what to do; empty where it can."""
        if self.dense.energy_j is not None:
            return ""
        return (
            f"{self.network.costs.profile.name} has no energy figures; name a device that has with device=NAME "
            "(--device), or measure this one with `hwprune profile` where a power sensor is readable"
        )

    def spread_rel(self) -> float:
        """Half-width of the intervals of what was priced, the median operation's; from held-out errors."""
        found = [(p.hi_s - p.lo_s) / 2 / p.latency_s for p in self._known.values()]
        return statistics.median(found) if found else 0.0


def _items(keep: Structure) -> tuple[object, ...]:
    """Stored weights and tiles, as part of a key."""
    weights = None if keep.weights is None else tuple(keep.weights.items())
    return weights, None if keep.tiles is None else tuple(keep.tiles.items())


@dataclass(frozen=True, eq=False)
class MemoryPricer:
    """Bytes of weights, and of activations at the worst moment of a layer.

    Attributes:
        images: of the batch.
        dtype: fp32, fp16 or bf16.
        weights: bytes of the dense model's weights.
        dense_peaks: part of a forward -> activations at its worst moment in the dense model, scaled.
        scale: of estimated activations: measured by estimated ones of the dense model, 1 where they could not
            be measured.
    """

    images: int
    dtype: str
    weights: int
    dense_peaks: Mapping[str, float]
    scale: float = 1.0

    @classmethod
    def fitted(
        cls, model: nn.Module, layers: Sequence[Layer], x: Tensor, activations: float | None = None
    ) -> MemoryPricer:
        """For one model and batch.

        Args:
            model: dense.
            layers: its prunable layers, whether or not they are to be pruned.
            x: the batch, in the type it will run in.
            activations: measured peak of a forward in bytes, or None.
        """
        found = peaks(model, layers, {}, x)
        scale = 1.0 if activations is None else activations / max(found.values())
        scaled = {name: scale * value for name, value in found.items()}
        return cls(len(x), NAMES[x.dtype], weight_bytes(model), scaled, scale)

    @property
    def dense_bytes(self) -> float:
        """Weights and activations of the dense model."""
        return self.weights + max(self.dense_peaks.values())

    def floor(self, layers: Collection[str]) -> float:
        """The peak outside of these layers, which no choice in them changes."""
        outside = [value for name, value in self.dense_peaks.items() if name not in layers]
        return max(outside, default=0.0)

    def price(
        self, model: nn.Module, layer: Layer, keep: Structure, tokens: int
    ) -> tuple[float, float]:
        """Bytes of a layer's weights, and of what is alive at its worst moment."""
        alive = layer_peak_bytes(
            model, layer, keep, images=self.images, tokens=tokens, dtype=self.dtype
        )
        return float(layer_weight_bytes(model, layer, keep)), self.scale * alive
