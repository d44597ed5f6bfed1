"""A network's cost from its operations: their sum, and a residual fitted to whole networks that were measured.

What is no operation of a profile (the patch embedding, residual additions, the interpreter) is the residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwprune.operations import layer_operations as layer_operations
from hwprune.operations import operations as operations
from hwprune.ops import Op
from hwprune.predict import CostModel, Prediction, total


@dataclass(frozen=True)
class NetworkModel:
    """Prices whole networks on a device: scale * (sum of operations) + offset.

    Attributes:
        costs: of operations.
        offset_s: the residual of a forward: what is no operation; never negative.
        scale: of the sum of operations; other than 1 where networks were quicker than their operations
            alone, or where three or more were measured.
        spread_rel: largest relative error of the fit over the networks it was fitted to, from three on.
    """

    costs: CostModel
    offset_s: float = 0.0
    scale: float = 1.0
    spread_rel: float = 0.0

    @classmethod
    def fitted(cls, costs: CostModel, seen: Sequence[tuple[Sequence[Op], float]]) -> NetworkModel:
        """Fit the residual to measured networks.

        Args:
            costs: of operations.
            seen: (operations, measured seconds of a forward) of at least one network; from three on the
                scale is fitted too.

        Raises:
            ValueError: none given, no operations, or a time that is not positive.
            UnknownOp: the profile says nothing about one of the operations.
        """
        if not seen or not all(ops and 0 < seconds < math.inf for ops, seconds in seen):
            raise ValueError(
                "expected at least one measured network, each with operations and a positive time, got "
                f"{[(len(ops), seconds) for ops, seconds in seen]}"
            )
        sums = np.asarray([costs_of(costs, ops).latency_s for ops, _ in seen])
        times = np.asarray([seconds for _, seconds in seen])
        scale, offset = 1.0, float(np.median(times - sums))
        if len(seen) >= 3 and np.ptp(sums) > 0.1 * sums.max():
            scale, offset = (float(v) for v in np.polyfit(sums, times, 1, w=1 / times))
        if offset < 0 or scale <= 0:
            # Quicker than the parts: a ratio then, as a negative offset would make small networks free.
            scale, offset = float(np.median(times / sums)), 0.0
        spread = float(np.abs((scale * sums + offset) / times - 1).max())
        return cls(costs, offset, scale, spread if len(seen) > 2 else 0.0)

    def predict(self, ops: Sequence[Op]) -> Prediction:
        """Latency and energy of one forward with these operations.

        Raises:
            UnknownOp: the profile says nothing about one of them.
        """
        found = costs_of(self.costs, ops)
        value, lo, hi = (
            self.scale * end + self.offset_s for end in (found.latency_s, found.lo_s, found.hi_s)
        )
        extra = self.spread_rel * value
        lo, hi = max(0.0, lo - extra), hi + extra
        if found.energy_j is None or found.energy_lo_j is None or found.energy_hi_j is None:
            return Prediction(value, lo, hi, None, found.tier)
        # The residual draws what the operations draw on average.
        power_w = found.energy_j / found.latency_s
        power_lo_w = found.energy_lo_j / found.lo_s if found.lo_s else 0.0
        power_hi_w = found.energy_hi_j / found.hi_s
        energy = power_w * value
        return Prediction(
            value,
            lo,
            hi,
            energy,
            found.tier,
            min(energy, power_lo_w * lo),
            max(energy, power_hi_w * hi),
        )


def costs_of(costs: CostModel, ops: Sequence[Op]) -> Prediction:
    """The sum of operations; each different one is looked up once.

    Raises:
        UnknownOp: the profile says nothing about one of them.
    """
    known: Mapping[Op, Prediction] = {op: costs.predict(op) for op in set(ops)}
    return total(known[op] for op in ops)
