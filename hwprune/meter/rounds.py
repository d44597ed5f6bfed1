"""Rounds: every arm once in each, in random order, and what their figures say when compared in pairs.

A randomised complete block design: what drifts (clocks, temperature, neighbours) meets all arms of a round
alike, and a ratio is taken inside a round before anything is averaged. Simulated with the drift of a GPU,
16 interleaved rounds tell a ratio to 0.4 %, 16 + 16 in a row only to 1.3 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, wilcoxon

from hwprune.meter.estimate import Estimate, Unavailable

Floats = npt.NDArray[np.float64]
Verdict = Literal["lower", "higher", "same", "ambiguous"]

LEVEL = 0.95
RESAMPLES = 2000
MAX_DISCARDED = 0.2  # share of rounds; above it what is left is a selection, not a sample
_EXACT_BELOW = 16  # rounds; see median_interval


@dataclass(frozen=True)
class Limits:
    """When a comparison has enough rounds.

    Attributes:
        least, most: rounds.
        half_width_rel: of the 95 % interval of every ratio; 0.01 for latency, 0.02 for energy.
        seconds_per_arm: after which no further round starts, tight or not.
    """

    least: int = 8
    most: int = 32
    half_width_rel: float = 0.01
    seconds_per_arm: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot give an interval.

        Raises:
            ValueError: fewer than two rounds, a most below the least, no time.
        """
        if self.least < 2 or self.most < self.least:
            raise ValueError(
                f"expected at least 2 rounds (one round gives no interval), got {self.least} to "
                f"{self.most}"
            )
        if not self.half_width_rel > 0 or not self.seconds_per_arm > 0:
            raise ValueError(
                f"expected a positive half-width and time, got {self.half_width_rel} and "
                f"{self.seconds_per_arm} s"
            )

    def looks(self) -> list[int]:
        """Round counts at which the intervals are looked at: 8, 12, 16, 24, 32.

        Looking after every round and stopping at the first narrow interval picks the intervals that are
        narrow by luck: they cover 0.90 where five looks cover 0.93 (simulated, AR(1) drift).
        """
        found, count, step = [], self.least, 0
        while count < self.most:
            found.append(count)
            count = max(count + 1, count * 3 // 2 if step % 2 == 0 else count * 4 // 3)
            step += 1
        return [*found, self.most]


def orders(arms: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """The order of the arms in each round, without end: independent random permutations."""
    generator = random.Random(seed)
    while True:
        yield tuple(generator.sample(list(arms), len(arms)))


@dataclass
class Ledger:
    """What came of the rounds: one or more figures an arm and round, and the rounds that do not count.

    A round is kept or discarded whole: dropping single samples would take the slow ones of one arm.

    Attributes:
        figures: arm -> one figure a turn of each kept round.
        discarded: (round, reason).
    """

    figures: dict[str, list[list[float]]] = field(default_factory=dict)
    discarded: list[tuple[int, str]] = field(default_factory=list)
    rounds: int = 0

    def keep(self, figures: Mapping[str, list[float]]) -> None:
        """Count a round. All arms that are still measured must be in it."""
        for arm, figure in figures.items():
            self.figures.setdefault(arm, []).append(figure)
        self.rounds += 1

    def discard(self, reason: str) -> None:
        """Count a round as run and void."""
        self.discarded.append((self.rounds, reason))
        self.rounds += 1

    def drop(self, arm: str) -> None:
        """Forget an arm that broke."""
        self.figures.pop(arm, None)

    @property
    def kept(self) -> int:
        """Rounds that count."""
        return self.rounds - len(self.discarded)

    @property
    def invalid(self) -> str:
        """Why the whole result does not count; "" where it does."""
        if self.rounds and len(self.discarded) > MAX_DISCARDED * self.rounds:
            reason = self.discarded[-1][1]
            return (
                f"{len(self.discarded)} of {self.rounds} rounds were discarded, the last: {reason}"
            )
        return ""

    def values(self, arm: str) -> Floats:
        """The figures of an arm, [rounds, turns]."""
        found = np.asarray(self.figures.get(arm, ()), dtype=np.float64)
        return found.reshape(len(found), -1) if len(found) else np.empty((0, 1))


def median_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median over rounds.

    From 16 rounds on the percentile bootstrap over rounds. Below, the interval between order statistics,
    interpolated (Hettmansperger and Sheather 1986): for a median the bootstrap covers 0.91 at 8 rounds,
    plain or BCa, this 0.945 (simulated, with and without outliers). Below 6 rounds no such interval exists:
    the range is returned, which covers 1 - 2^(1-n).

    Args:
        values: [rounds].
        seed: of the resampling.
    """
    ranked = np.sort(values)
    count = len(ranked)
    if count >= _EXACT_BELOW:
        middles = np.median(resample(ranked, seed), axis=1)
        lo, hi = np.quantile(middles, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    else:
        # P(k-th smallest < median < k-th largest) for each k; the last that still covers, and the next.
        ks = np.arange(1, count // 2 + 1)
        covered = 1 - 2 * binom.cdf(ks - 1, count, 0.5)
        k = int((covered >= LEVEL).sum())
        if k == 0:
            return float(ranked[0]), float(ranked[-1])
        lo, hi = ranked[k - 1], ranked[count - k]
        if k < count // 2:
            share = (covered[k - 1] - LEVEL) / (covered[k - 1] - covered[k])
            share = (count - k) * share / (k + (count - 2 * k) * share)
            lo += share * (ranked[k] - lo)
            hi += share * (ranked[count - k - 1] - hi)
    middle = float(np.median(ranked))
    return min(float(lo), middle), max(float(hi), middle)


def resample(values: npt.NDArray[np.float64], seed: int, times: int = RESAMPLES) -> Floats:
    """Rounds drawn with replacement: [times, rounds, ...]."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(times, len(values)))
    return np.asarray(values[chosen])


def of_arm(values: npt.ArrayLike, seed: int = 0) -> Estimate | Unavailable:
    """The median over rounds of a positive figure, with its interval.

    Args:
        values: of each kept round: [rounds], or [rounds, turns].
        seed: of the bootstrap.
    """
    found = np.asarray(values, dtype=np.float64)
    broken = _broken(found)
    if broken:
        return Unavailable(broken)
    found = by_round(found)
    return Estimate(float(np.median(found)), *median_interval(found, seed), len(found), _few(found))


def of_ratio(
    above: npt.ArrayLike, below: npt.ArrayLike, limit_rel: float, seed: int = 0
) -> Estimate | Unavailable:
    """The ratio of two arms, paired by round: exp of the median log-ratio, with its interval.

    Args:
        above: of each kept round: [rounds], or [rounds, turns], then paired turn by turn.
        below: the same of the other arm, of the same rounds.
        limit_rel: the half-width asked for; a wider interval is flagged "imprecise".
        seed: of the bootstrap.
    """
    over, under = (np.asarray(arm, dtype=np.float64) for arm in (above, below))
    if over.shape != under.shape:
        return Unavailable(f"the arms ran in {over.shape} and {under.shape} rounds: no pairs")
    broken = _broken(over) or _broken(under)
    if broken:
        return Unavailable(broken)
    logs = by_round(np.log(over) - np.log(under))
    value, (lo, hi) = float(np.median(logs)), median_interval(logs, seed)
    flags = _few(logs)
    if (math.exp(hi) - math.exp(lo)) / 2 > limit_rel * math.exp(value):
        flags = (*flags, "imprecise")
    return Estimate(math.exp(value), math.exp(lo), math.exp(hi), len(logs), flags)


def by_round(values: Floats) -> Floats:
    """[rounds] from [rounds, turns]: the median turn."""
    return values if values.ndim == 1 else np.asarray(np.median(values, axis=1))


def _broken(values: Floats) -> str:
    """Why these are no figures of rounds; "" where they are."""
    if len(values) < 2:
        return f"{len(values)} round(s) were measured, and at least 2 are needed for an interval"
    if not bool(np.isfinite(values).all()) or not bool((values > 0).all()):
        odd = values[~(np.isfinite(values) & (values > 0))][0]
        return f"a round gave {odd}: expected a positive finite figure, so the clock or sensor is broken"
    return ""


def _few(values: Floats) -> tuple[str, ...]:
    """Below 6 rounds the range covers less than 95 %."""
    return ("few_rounds",) if len(values) < 6 else ()


def mad(values: Floats) -> float:
    """Median absolute deviation of the rounds from their median, in the unit of the values."""
    values = by_round(values)
    return float(np.median(np.abs(values - np.median(values))))


def p_value(above: Floats, below: Floats) -> float:
    """Two-sided Wilcoxon signed-rank test that the paired log-ratios lie about 0."""
    logs = by_round(np.log(above) - np.log(below))
    if len(logs) < 2 or not bool(logs.any()):
        return 1.0
    return float(wilcoxon(logs, zero_method="zsplit").pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for there being many (Holm 1979): each keeps its name."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return adjusted


def verdict(
    ratio: Estimate, p: float, limit_rel: float, same_with_itself: Estimate | None = None
) -> Verdict:
    """What a ratio allows to say.

    Args:
        ratio: of two arms.
        p: its p-value, adjusted where there are many.
        limit_rel: the half-width asked for.
        same_with_itself: the A/A ratio. Where that excludes 1, the bench sees differences that are not
            there, and none up to the size of that one is claimed.

    Returns:
        "lower" or "higher" where the interval excludes 1 and so does the test; "same" where the interval
        covers 1 and is tight; else "ambiguous".
    """
    if same_with_itself is not None and not same_with_itself.contains(1.0):
        false_log = max(abs(math.log(same_with_itself.lo)), abs(math.log(same_with_itself.hi)))
        if abs(math.log(ratio.value)) <= false_log:
            return "ambiguous"
    if not ratio.contains(1.0):
        if p > 1 - LEVEL:
            return "ambiguous"
        return "lower" if ratio.value < 1 else "higher"
    return "same" if ratio.half_width_rel <= limit_rel else "ambiguous"
