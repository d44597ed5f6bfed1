"""The average power of an operation, from those whose energy was measured.

Power follows how busy the device is: its neighbours are the operations that do as much work and move as many
bytes a second. Never below the idle device, never above the most that was seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hwprune.device import Entry
from hwprune.ops import Op

Floats = npt.NDArray[np.float64]

_NEAREST = 3
_FEWEST = 4  # anchors below which no power is told
_OTHER_FAMILY = 1.0  # as far as twice the rate


class PowerModel:
    """Power in W by achieved rates.

    Args:
        entries: of one mode; those with a power are the anchors.
        idle_w: of the device doing nothing, or None.

    Attributes:
        spread_of_hit: relative half-width of a measured power: two windows on one board.
    """

    spread_of_hit = 0.02

    def __init__(self, entries: Sequence[Entry], idle_w: float | None = None) -> None:
        """Collect the anchors."""
        told = [(e.op, e.latency_s, e.power_w) for e in entries if e.power_w is not None]
        self.idle_w = idle_w or 0.0
        self.ops = [op for op, _, _ in told]
        self.rates: Floats = np.asarray([_rates(op, seconds) for op, seconds, _ in told])
        self.watts: Floats = np.asarray([watts for _, _, watts in told])
        self._spread: float | None = None

    def predict(self, op: Op, latency_s: float) -> tuple[float, float, float] | None:
        """(W, lower, upper end), or None where too few operations have a power."""
        if len(self.ops) < _FEWEST:
            return None
        everyone = np.ones(len(self.ops), dtype=bool)
        watts = self._at(op, latency_s, everyone)
        spread = self.spread
        low, high = self._within(watts / (1 + spread)), self._within(watts * (1 + spread))
        return watts, min(low, watts), max(high, watts)

    @property
    def spread(self) -> float:
        """95 % of the errors of anchors predicted without themselves, relative."""
        if self._spread is None:
            errors = []
            for i, op in enumerate(self.ops):
                others = np.arange(len(self.ops)) != i
                seconds = math.exp2(_log_work(op) - float(self.rates[i, 0]))
                errors.append(abs(math.log(self._at(op, seconds, others) / self.watts[i])))
            ranked, rank = sorted(errors), math.ceil((len(errors) + 1) * 0.95)
            worst = ranked[rank - 1] if rank <= len(ranked) else 2 * ranked[-1]
            self._spread = math.expm1(worst)
        return self._spread

    def _at(self, op: Op, latency_s: float, among: npt.NDArray[np.bool_]) -> float:
        away = np.linalg.norm(self.rates[among] - np.asarray(_rates(op, latency_s)), axis=1)
        same = [o.family == op.family for o, wanted in zip(self.ops, among, strict=True) if wanted]
        away = away + np.where(same, 0.0, _OTHER_FAMILY)
        nearest = np.argsort(away)[:_NEAREST]
        weights = 1 / (away[nearest] + 1e-3)
        return self._within(float((weights * self.watts[among][nearest]).sum() / weights.sum()))

    def _within(self, watts: float) -> float:
        highest = float(self.watts.max())
        return min(max(watts, min(self.idle_w, highest)), highest)


def _log_work(op: Op) -> float:
    return math.log2(op.macs)


def _rates(op: Op, latency_s: float) -> tuple[float, float]:
    """Logarithms of work and bytes a second."""
    bytes_ = op.weight_bytes + op.activation_bytes
    return _log_work(op) - math.log2(latency_s), math.log2(bytes_ / latency_s)
