"""The knapsack of one additive limit without a solver: a price of the limit, and what is left over filled in.

At a price p of the limit every group takes its option of least loss + p * spend, which lies on the lower convex
hull of the group (Everett 1963). The price at which the limit is just kept gives a bound that no choice is
below; the options that a better choice than the one at hand can hold are few (Pisinger 1995), and a dynamic
program over them finds the best. A plan in milliseconds: for sweeps and searches that need hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hwprune.knapsack import Floats

_STATES = 20_000  # of the dynamic program; above that the fill-in is no longer exact, only bounded


@dataclass(frozen=True)
class Choice:
    """A choice, and how far it can be from the best.

    Attributes:
        chosen: index of the option of each group.
        value: summed loss.
        bound: no choice within the limit has a smaller one.
        exact: the fill-in saw every choice that could have been better, so that this one is best.
    """

    chosen: list[int]
    value: float
    bound: float
    exact: bool

    @property
    def gap_rel(self) -> float:
        """Proven: the value is at most this share above the least possible one."""
        return max(0.0, self.value - self.bound) / self.value if self.value > 0 else 0.0


class Lagrangian:
    """One option of every group, least summed loss, one limit on a sum: prepared once, solved for any limit.

    Args:
        loss: one array [options] a group.
        spend: the same of what is limited.
    """

    def __init__(self, loss: Sequence[Floats], spend: Sequence[Floats]) -> None:
        """Find the lower convex hull of every group, and order their edges by what they buy."""
        self.loss, self.spend = list(loss), list(spend)
        self.hulls = [lower_hull(a, b) for a, b in zip(loss, spend, strict=True)]
        edges = []
        for group, hull in enumerate(self.hulls):
            slope = np.inf
            for a, b in pairwise(hull):
                dearer = float(spend[group][b] - spend[group][a])
                better = float(loss[group][a] - loss[group][b])
                slope = min(slope, better / dearer)  # round-off must not turn two edges round
                edges.append((slope, dearer, group))
        # Hulls are convex, so an order by slope takes each group's edges from the cheap end.
        edges.sort(key=lambda edge: -edge[0])
        self.slopes = np.array([edge[0] for edge in edges])
        self.steps = np.cumsum([edge[1] for edge in edges])
        self.owners = [edge[2] for edge in edges]
        self.least = float(sum(spend[g][hull[0]] for g, hull in enumerate(self.hulls)))

    def solve(self, room: float) -> Choice | None:
        """The best choice that spends no more than `room`; None where there is none."""
        if self.least > room:
            return None
        taken = int(np.searchsorted(self.steps, room - self.least, side="right"))
        first = self.at(taken)
        value = self._value(first)
        if taken == len(self.owners):
            return Choice(first, value, value, exact=True)
        price = float(self.slopes[taken])
        best, priced = 0.0, []
        for loss, spend in zip(self.loss, self.spend, strict=True):
            total = loss + price * spend
            best += float(total.min())
            priced.append(total - total.min())
        bound = best - price * room
        found, exact = _filled(priced, self.spend, price, room, max(0.0, value - bound))
        if found is not None and (better := self._value(found)) < value:
            first, value = found, better
        return Choice(first, value, min(bound, value), exact)

    def at(self, edges: int) -> list[int]:
        """The choice that a price of the limit picks once so many edges are worth it; 0 = the cheapest."""
        steps = [0] * len(self.hulls)
        for group in self.owners[:edges]:
            steps[group] += 1
        return [hull[i] for hull, i in zip(self.hulls, steps, strict=True)]

    def _value(self, chosen: Sequence[int]) -> float:
        return float(sum(group[i] for group, i in zip(self.loss, chosen, strict=True)))


def lower_hull(loss: Floats, spend: Floats) -> list[int]:
    """Indices on the lower convex hull, from the cheapest option to the one of least loss."""
    order = np.lexsort((loss, spend))
    hull: list[int] = []
    for i in map(int, order):
        if hull and loss[i] >= loss[hull[-1]]:
            continue  # no cheaper, no better
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (loss[b] - loss[a]) * (spend[i] - spend[a])
            if turn < (loss[i] - loss[a]) * (spend[b] - spend[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _filled(
    priced: Sequence[Floats], spend: Sequence[Floats], price: float, room: float, gap: float
) -> tuple[list[int] | None, bool]:
    """The best choice less than `gap` above the bound, or None; and whether all such were seen.

    A choice is above the bound by what its options are above the best of their group at this price, plus the
    price of the room it leaves unused. The window grows until it holds a choice: the first one that does holds
    the best of all.
    """
    window = gap / 64
    while True:
        window = min(window, gap)
        found, exact = _program(priced, spend, price, room, window)
        if found is not None or window >= gap:
            return found, exact
        window *= 4


def _program(
    priced: Sequence[Floats], spend: Sequence[Floats], price: float, room: float, window: float
) -> tuple[list[int] | None, bool]:
    """Dynamic program over the choices at most `window` above the bound."""
    kept = [np.flatnonzero(excess <= window) for excess in priced]
    # Wide groups last: what is fixed early prunes nothing, and what comes late is pruned from both sides.
    order = sorted(range(len(kept)), key=lambda g: len(kept[g]))
    after_least = np.cumsum([0.0] + [float(spend[g][kept[g]].min()) for g in reversed(order)])[::-1]
    after_most = np.cumsum([0.0] + [float(spend[g][kept[g]].max()) for g in reversed(order)])[::-1]
    excess, spent, exact = np.zeros(1), np.zeros(1), True
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for place, group in enumerate(order):
        options = kept[group]
        excess_SK = excess[:, None] + priced[group][options]
        spent_SK = spent[:, None] + spend[group][options]
        unused = room - spent_SK - after_most[place + 1]  # at least this much stays unused
        fits = spent_SK + after_least[place + 1] <= room
        fits &= excess_SK + price * np.maximum(unused, 0.0) <= window
        state, option = np.nonzero(fits)
        if not len(state):
            return None, exact
        excess, spent = excess_SK[state, option], spent_SK[state, option]
        front = _front(spent, excess - price * spent)
        if len(front) > _STATES:
            exact = False
            front = front[np.linspace(0, len(front) - 1, _STATES).astype(np.int64)]
        steps.append((state[front], options[option[front]]))
        excess, spent = excess[front], spent[front]
    at = int(np.argmin(excess - price * spent))
    chosen = [0] * len(order)
    for group, (state, option) in zip(reversed(order), reversed(steps), strict=True):
        chosen[group], at = int(option[at]), int(state[at])
    return chosen, exact


def _front(spent: Floats, loss: Floats) -> npt.NDArray[np.int64]:
    """Indices of the states that no other beats on both, by spend."""
    order = np.lexsort((loss, spent))
    ranked = loss[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(ranked)[:-1]])
    return order[ranked < best_before]
