"""A network's cost from its operations: their sum, and a residual fitted to whole networks that were measured.

The residual is what moving activations takes beyond a profile's figures: an operation is profiled on inputs
it has just seen; in a network it finds them, and leaves its output, in a colder cache. The additions of the
residual stream are passes over it and no operations of a profile. So it goes by the bytes of activations, not
by work: on one core the block-sparse linears of a ViT-Tiny lose as many milliseconds as its dense ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from hwprune.ops import Op
from hwprune.predict import CostModel, Prediction, total


@dataclass(frozen=True)
class NetworkModel:
    """Prices whole networks on a device: scale * (sum of operations) + s_per_byte * (bytes of activations).

    Attributes:
        costs: of operations.
        s_per_byte: the residual of a forward, by the bytes of `moved_bytes`; never negative.
        scale: of the sum of operations; other than 1 where networks were quicker than their operations
            alone, or where three or more were measured.
        spread_rel: largest relative error of the fit over the networks it was fitted to, from three on.
    """

    costs: CostModel
    s_per_byte: float = 0.0
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
        moved = np.asarray([sum(map(moved_bytes, ops)) for ops, _ in seen])
        scale, s_per_byte = 1.0, float(np.median((times - sums) / moved))
        if len(seen) >= 3:
            weighted = np.c_[sums, moved] / times[:, None]
            scale, s_per_byte = (float(v) for v in nnls(weighted, np.ones(len(times)))[0])
        if s_per_byte < 0 or scale == 0:
            # Quicker than the parts: a ratio then, as a negative residual would make small networks free.
            scale, s_per_byte = float(np.median(times / sums)), 0.0
        spread = float(np.abs((scale * sums + s_per_byte * moved) / times - 1).max())
        return cls(costs, s_per_byte, scale, spread if len(seen) > 2 else 0.0)

    def predict(self, ops: Sequence[Op]) -> Prediction:
        """Latency and energy of one forward with these operations, or of a part of one.

        Raises:
            UnknownOp: the profile says nothing about one of them.
        """
        found = costs_of(self.costs, ops)
        moving_s = self.s_per_byte * sum(map(moved_bytes, ops))
        value, lo, hi = (
            self.scale * end + moving_s for end in (found.latency_s, found.lo_s, found.hi_s)
        )
        extra = self.spread_rel * value
        # The residual is known to be there, not how it divides: half of it is left open either way.
        lo, hi = max(0.0, lo - extra - moving_s / 2), hi + extra + moving_s / 2
        priced = replace(found, latency_s=value, lo_s=lo, hi_s=hi)
        if found.energy_j is None or found.energy_lo_j is None or found.energy_hi_j is None:
            return priced
        if not found.latency_s:
            return replace(priced, energy_j=0.0, energy_lo_j=0.0, energy_hi_j=0.0)
        # The residual draws what the operations draw on average.
        energy = found.energy_j / found.latency_s * value
        low = found.energy_lo_j / found.lo_s * lo if found.lo_s else 0.0
        high = found.energy_hi_j / found.hi_s * hi
        return replace(
            priced, energy_j=energy, energy_lo_j=min(energy, low), energy_hi_j=max(energy, high)
        )


def moved_bytes(op: Op) -> float:
    """Bytes of activations that an operation takes from and leaves to others.

    A layer norm stands for the addition before it as well: two tensors in, one out, where it has one and one.
    """
    return op.activation_bytes * (2.5 if op.kind == "layer_norm" else 1.0)


def costs_of(costs: CostModel, ops: Sequence[Op]) -> Prediction:
    """The sum of operations; each different one is looked up once.

    Raises:
        UnknownOp: the profile says nothing about one of them.
    """
    known: Mapping[Op, Prediction] = {op: costs.predict(op) for op in set(ops)}
    return total(known[op] for op in ops)
