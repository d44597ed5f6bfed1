"""Seconds and joules of a denoiser's layers by how many of their units are kept, on a profiled device.

Only counts that are worth keeping have a price of their own: neurons in multiples of 8, as the kernels of
every device like them, and no count that a larger one is no dearer than. Any other count has the price of the
next one that is worth it, to which a mask is filled up at no cost: so prices never fall as units are added.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hwprune.denoiser_operations import Part, block_operations, layer_parts
from hwprune.network import NetworkModel
from hwprune.operations import Counted
from hwprune.ops import Op
from hwprune.predict import Prediction
from hwprune.units import AnyLayer, CoupledLayer, ResidualBlock

NEURONS = (
    8  # neurons are kept in multiples of this; 16 bytes of fp16, the narrowest load of tensor cores
)


@dataclass(frozen=True, eq=False)
class LayerTables:
    """What a model's layers cost, by units name.

    Attributes:
        seconds: [count + 1] of each layer of heads or neurons, for 0 to all units kept.
        joules: the same; None where the device has no energy figures.
        steps: int64 [count + 1]: the count that a count is filled up to.
        blocks: depth units name -> (seconds, joules) of the whole dense block.
        spread_rel: half-width of the intervals, the median operation's.
    """

    seconds: Mapping[str, Tensor]
    joules: Mapping[str, Tensor] | None
    steps: Mapping[str, Tensor]
    blocks: Mapping[str, tuple[float, float]]
    spread_rel: float

    def of(self, metric: str) -> tuple[Mapping[str, Tensor], dict[str, float]]:
        """The tables of latency or energy, and what whole blocks cost."""
        if metric == "latency":
            return self.seconds, {name: cost[0] for name, cost in self.blocks.items()}
        assert self.joules is not None
        return self.joules, {name: cost[1] for name, cost in self.blocks.items()}


@dataclass(eq=False)
class Prices:
    """Predictions of operations, each looked up once.

    Attributes:
        network: of the device.
    """

    network: NetworkModel
    _known: dict[Op, Prediction] = field(default_factory=dict)

    def of(self, op: Op) -> tuple[float, float]:
        """(seconds, joules) of an operation; joules NaN where the device has no energy figures.

        Raises:
            UnknownOp: the profile says nothing about it.
        """
        if op not in self._known:
            self._known[op] = self.network.predict([op])
        found = self._known[op]
        return found.latency_s, float("nan") if found.energy_j is None else found.energy_j

    def sum(self, ops: Sequence[Op]) -> tuple[float, float]:
        """(seconds, joules) of several, one after the other."""
        each = [self.of(op) for op in ops]
        return sum(s for s, _ in each), sum(j for _, j in each)

    def spread_rel(self) -> float:
        """Half-width of the intervals of what was looked up, the median operation's."""
        found = [(p.hi_s - p.lo_s) / 2 / p.latency_s for p in self._known.values()]
        return statistics.median(found) if found else 0.0

    def beyond(self, ops: Sequence[Op]) -> float:
        """Share of the time of some operations that lies beyond the sizes of the profile."""
        whole = self.sum(ops)[0]
        far = [op for op in ops if self._known[op].tier == "extrapolated"]
        return self.sum(far)[0] / whole if whole else 0.0


def layer_tables(prices: Prices, layers: Sequence[AnyLayer], counted: Counted) -> LayerTables:
    """Price every layer of heads or neurons at every count, and every block.

    Args:
        prices: of the device.
        layers: of a family's `find_layers`.
        counted: operations of the dense model, for the batch that is meant.

    Raises:
        UnknownOp: the profile says nothing about an operation.
    """
    coupled = [x for x in layers if isinstance(x, CoupledLayer) and x.kind in ("head", "neuron")]
    seconds: dict[str, Tensor] = {}
    joules: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    known: dict[tuple[Part, ...], tuple[Tensor, Tensor, Tensor]] = {}
    for layer in coupled:
        parts = tuple(layer_parts(layer, counted, coupled))
        if not parts:
            continue  # it does not run
        if parts not in known:  # 70 blocks of SDXL are of two sizes
            known[parts] = _table(prices, parts, layer.count, NEURONS if layer.width == 1 else 1)
        name = f"{layer.name}:{layer.kind}"
        seconds[name], joules[name], steps[name] = known[parts]
    blocks = {
        f"{x.name}:depth": prices.sum(block_operations(x.name, counted))
        for x in layers
        if isinstance(x, ResidualBlock)
    }
    energy = not any(bool(table.isnan().any()) for table in joules.values())
    return LayerTables(seconds, joules if energy else None, steps, blocks, prices.spread_rel())


def _table(
    prices: Prices, parts: Sequence[Part], count: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(seconds, joules, steps) of a layer, each [count + 1]."""
    counts = sorted({*range(0, count + 1, step), count})
    rows = [_cost(prices, parts, count, kept) for kept in counts]
    costs = torch.tensor(rows, dtype=torch.float64)
    worth = worthwhile(costs if not bool(costs.isnan().any()) else costs[:, :1])
    places = torch.tensor(counts)[worth]
    index = torch.searchsorted(places, torch.arange(count + 1))
    table = costs[worth][index]
    return table[:, 0], table[:, 1], places[index]


def worthwhile(costs: Tensor) -> Tensor:
    """Which rows cost less than every later one, in each column: [rows, columns] -> bool [rows].

    The last is; what is left rises in every column.
    """
    found = torch.zeros(len(costs), dtype=torch.bool)
    least = torch.full(costs.shape[1:], float("inf"), dtype=costs.dtype)
    for row in range(len(costs) - 1, -1, -1):
        if bool((costs[row] < least).all()):
            found[row] = True
            least = costs[row]
    return found


def _cost(prices: Prices, parts: Sequence[Part], count: int, kept: int) -> tuple[float, float]:
    """(seconds, joules) of a layer with some units kept; nothing is left of it without any."""
    totals = [0.0, 0.0]
    for part in parts:
        if kept == 0 and part.share == 1.0:
            continue
        op = part.cut(count - kept)
        cut = prices.of(op) if op is not None else (0.0, 0.0)
        whole = prices.of(part.op) if part.share < 1 else (0.0, 0.0)
        for i in range(2):  # of what is shared, the rest of it belongs to others
            own = cut[i] - (1 - part.share) * whole[i]
            totals[i] += max(own, 0.0)  # NaN stays NaN
    return totals[0], totals[1]
