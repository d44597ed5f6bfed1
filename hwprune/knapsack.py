"""A multiple-choice knapsack: one option of every group, least summed loss, every limit kept; by HiGHS.

A limit adds up what the chosen options spend; the limit of memory also counts the highest of their peaks: one
continuous variable that is no lower than the peak of any chosen option.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SECONDS = 60.0  # of one run of HiGHS; a DeiT-B takes about one


@dataclass(frozen=True, eq=False)
class Limit:
    """What the chosen options spend, plus the highest of their peaks, may not be above the room.

    Attributes:
        spend: one array [options] a group.
        room: in the unit of `spend`.
        unit: a typical total, of the dense model: the solver counts in millionths of it.
        peak: one array [options] a group; None = nothing but the sum counts.
        floor: the peak of what no option changes.
    """

    spend: Sequence[Floats]
    room: float
    unit: float
    peak: Sequence[Floats] | None = None
    floor: float = 0.0

    def used(self, chosen: Sequence[int]) -> float:
        """What a choice takes of the room."""
        total = float(sum(group[i] for group, i in zip(self.spend, chosen, strict=True)))
        if self.peak is None:
            return total
        return total + max(
            [self.floor, *(float(g[i]) for g, i in zip(self.peak, chosen, strict=True))]
        )

    def least(self) -> float:
        """The least that any choice takes."""
        if self.peak is None:
            return float(sum(group.min() for group in self.spend))
        highest = max([self.floor, *(float(group.min()) for group in self.peak)])
        levels = np.unique(np.concatenate([[highest], *self.peak]))
        totals = [
            level + sum(s[p <= level].min() for s, p in zip(self.spend, self.peak, strict=True))
            for level in levels[levels >= highest]
        ]
        return float(min(totals))


@dataclass(frozen=True, eq=False)
class Knapsack:
    """One option of every group is chosen.

    Attributes:
        loss: one array [options] a group, finite; the sum of the chosen is to be least.
        limits: name -> limit; all are kept.
    """

    loss: Sequence[Floats]
    limits: Mapping[str, Limit]

    def value(self, chosen: Sequence[int]) -> float:
        """The summed loss of a choice."""
        return float(sum(group[i] for group, i in zip(self.loss, chosen, strict=True)))

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether a choice keeps every limit."""
        # Sums of floats differ in their last digit by the order they are taken in.
        return all(
            limit.used(chosen) <= limit.room + 1e-12 * limit.unit for limit in self.limits.values()
        )


def solve(problem: Knapsack) -> list[int] | None:
    """The index of the option taken in each group; None where no choice keeps every limit.

    Raises:
        RuntimeError: HiGHS neither found a choice nor proved that there is none within a minute.
    """
    # Counted from the best option of each group: what is common to all options costs no digits.
    above = [group - group.min() for group in problem.loss]
    cap = max(float(group.max()) for group in above)
    refused: list[list[int]] = []
    while True:
        chosen = _run(problem, above, cap, refused)
        if chosen is None:
            return None
        loss = float(sum(group[i] for group, i in zip(above, chosen, strict=True)))
        if not problem.fits(chosen):
            refused.append(chosen)  # HiGHS takes 0.999999 for 1, so a sum may be 1e-6 over
        elif loss >= cap / 10:
            return chosen
        else:
            cap = loss


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep what HiGHS's C++ prints (a debug line of 1.14's) out of standard output, where JSON may go."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _run(
    problem: Knapsack, above: Sequence[Floats], cap: float, refused: Sequence[Sequence[int]]
) -> list[int] | None:
    """One run of HiGHS without options above `cap` and without choices refused; None if infeasible.

    HiGHS stops within 1e-6 of the objective's unit and of a row's: the units are small.
    """
    from scipy.optimize import Bounds, milp

    loss = np.concatenate(above)
    starts = np.concatenate([[0], np.cumsum([len(group) for group in above])])
    peaked = [limit for limit in problem.limits.values() if limit.peak is not None]
    with _quiet_stdout():
        result = milp(
            np.concatenate(
                [np.minimum(loss, cap) * (1e3 / cap if cap else 1.0), np.zeros(len(peaked))]
            ),
            integrality=np.concatenate([np.ones(len(loss)), np.zeros(len(peaked))]),
            bounds=Bounds(
                np.concatenate([np.zeros(len(loss)), [_scaled(p, p.floor) for p in peaked]]),
                np.concatenate([loss <= cap, np.full(len(peaked), np.inf)]),
            ),
            constraints=_rows(problem, starts, peaked, refused),
            options={"mip_rel_gap": 1e-6, "time_limit": _SECONDS},
        )
    if result.x is None:
        if result.status != 2:  # 2 = proven infeasible
            raise RuntimeError(
                f"HiGHS found no choice among {len(loss)} options within {_SECONDS:.0f} s: {result.message}; "
                "raise round_to, so that there are fewer"
            )
        return None
    taken = result.x[: len(loss)] > 0.5
    return [int(np.flatnonzero(taken[a:b])[0]) for a, b in pairwise(starts)]


def _scaled(limit: Limit, amount: float) -> float:
    return amount / (limit.unit * 1e-6)


def _rows(
    problem: Knapsack,
    starts: npt.NDArray[np.int64],
    peaked: Sequence[Limit],
    refused: Sequence[Sequence[int]],
) -> list[Any]:
    """One option a group; the limits; peaks under their variable; no choice that was refused."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    options, groups = int(starts[-1]), len(starts) - 1
    width = options + len(peaked)
    owner = np.repeat(np.arange(groups), np.diff(starts))
    here = np.arange(options)
    one_each = csr_array((np.ones(options), (owner, here)), shape=(groups, width))
    rows = [LinearConstraint(one_each, 1, 1)]
    for limit in problem.limits.values():
        row = np.zeros((1, width))
        row[0, :options] = np.concatenate(limit.spend) / (limit.unit * 1e-6)
        if limit.peak is not None:
            column = options + peaked.index(limit)
            row[0, column] = 1.0
            peaks = np.concatenate(limit.peak) / (limit.unit * 1e-6)
            values = np.concatenate([peaks, -np.ones(groups)])
            at = (
                np.concatenate([owner, np.arange(groups)]),
                np.concatenate([here, np.full(groups, column)]),
            )
            under = csr_array((values, at), shape=(groups, width))
            rows.append(LinearConstraint(under, -np.inf, 0))
        rows.append(LinearConstraint(row, -np.inf, _scaled(limit, limit.room)))
    for chosen in refused:
        row = np.zeros((1, width))
        row[0, starts[:-1] + np.asarray(chosen)] = 1.0
        rows.append(LinearConstraint(row, -np.inf, groups - 1))
    return rows
