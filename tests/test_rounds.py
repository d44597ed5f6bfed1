"""Rounds by simulation: false alarms, power, coverage under drift, and what is no figure at all."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import bootstrap

from hwprune.meter import rounds
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.rounds import Ledger, Limits, holm, of_arm, of_ratio, verdict

Array = npt.NDArray[np.float64]
RUNS = 400
DRIFT_SD, MEMORY, NOISE_SD = 0.02, 0.95, 0.008  # of the logarithm: measure.md 2.8


def simulate(
    runs: int, count: int, effect: float = 0.0, *, sequential: bool = False, spikes: bool = False
) -> tuple[Array, Array]:
    """Two arms of `count` rounds under AR(1) drift: (a, b), each [runs, count]; b is slower by `effect`."""
    generator = np.random.default_rng(7 * count + runs + int(1000 * effect))
    steps = generator.normal(size=(runs, 2 * count)) * DRIFT_SD
    drift = np.empty_like(steps)
    drift[:, 0] = steps[:, 0]
    for t in range(1, 2 * count):
        drift[:, t] = MEMORY * drift[:, t - 1] + math.sqrt(1 - MEMORY**2) * steps[:, t]
    noise = generator.normal(size=(runs, 2 * count)) * NOISE_SD
    if spikes:
        hit = generator.random(noise.shape) < 0.1
        noise += hit * generator.exponential(0.03, size=noise.shape)
    seen = drift + noise
    if sequential:
        a, b = seen[:, :count], seen[:, count:]
    else:
        pairs = seen.reshape(runs, count, 2)
        order = np.argsort(generator.random(pairs.shape), -1)
        a, b = np.moveaxis(np.take_along_axis(pairs, order, -1), -1, 0)
    return np.exp(a), np.exp(b + math.log1p(effect))


def ratios(a: Array, b: Array) -> list[Estimate]:
    found = [of_ratio(y, x, 0.01, seed) for seed, (x, y) in enumerate(zip(a, b, strict=True))]
    return [ratio for ratio in found if isinstance(ratio, Estimate)]


def share_covering(estimates: list[Estimate], truth: float) -> float:
    return sum(ratio.contains(truth) for ratio in estimates) / len(estimates)


TWO_SD = 2 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("count", [8, 12, 16, 32])
@pytest.mark.parametrize("spikes", [False, True])
def test_same_arms_are_called_different_in_at_most_5_percent(count: int, spikes: bool) -> None:
    found = ratios(*simulate(RUNS, count, spikes=spikes))
    assert len(found) == RUNS
    assert 1 - share_covering(found, 1.0) <= 0.05 + TWO_SD


def test_one_percent_is_found_in_four_of_five_runs_of_32_rounds() -> None:
    a, b = simulate(RUNS, 32, effect=0.01)
    said = [
        verdict(ratio, rounds.p_value(y, x), 0.01)
        for ratio, x, y in zip(ratios(a, b), a, b, strict=True)
    ]
    assert said.count("higher") >= 0.8 * RUNS
    assert said.count("lower") == 0


@pytest.mark.parametrize("count", [8, 15, 16, 32])
def test_intervals_cover_what_they_promise(count: int) -> None:
    found = ratios(*simulate(1000, count, effect=0.03))
    assert 0.92 <= share_covering(found, 1.03) <= 0.98


def test_stopping_at_a_narrow_interval_keeps_the_coverage() -> None:
    limits = Limits()
    covered, counts = 0, []
    for seed, (x, y) in enumerate(zip(*simulate(RUNS, limits.most), strict=True)):
        for count in limits.looks():
            ratio = of_ratio(y[:count], x[:count], limits.half_width_rel, seed)
            assert isinstance(ratio, Estimate)
            if "imprecise" not in ratio.flags:
                break
        covered += ratio.contains(1.0)
        counts.append(count)
    assert covered / RUNS >= 0.95 - 2 * TWO_SD
    assert 8 <= np.mean(counts) < 24, "it stops early where it can"


def test_arms_measured_one_after_the_other_raise_false_alarms() -> None:
    """Guards the guard: without interleaving the drift is taken for a difference."""
    assert 1 - share_covering(ratios(*simulate(RUNS, 16, sequential=True)), 1.0) > 0.2


def test_the_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(3).normal(10, 1, size=24)
    ours = rounds.median_interval(values)
    theirs = bootstrap(
        (values,), np.median, n_resamples=5000, method="percentile", random_state=0
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.15)


def test_eight_rounds_use_the_order_statistics() -> None:
    """Of 8, the 1st to 8th cover 0.9922 and the 2nd to 7th 0.9297: 0.95 lies between."""
    lo, hi = rounds.median_interval(np.arange(1.0, 9.0))
    assert 1 < lo < 2 and 7 < hi < 8
    assert lo + hi == pytest.approx(9)


def test_orders_are_permutations_that_a_seed_repeats() -> None:
    arms = ("dense", "pruned", "again")
    found = list(islice(rounds.orders(arms, seed=5), 300))
    assert found == list(islice(rounds.orders(arms, seed=5), 300))
    assert found != list(islice(rounds.orders(arms, seed=6), 300))
    assert {tuple(sorted(order)) for order in found} == {tuple(sorted(arms))}
    assert len(set(found)) == 6
    first = [order[0] for order in found]
    assert all(70 < first.count(arm) < 130 for arm in arms)


def test_looks_are_few() -> None:
    assert Limits().looks() == [8, 12, 16, 24, 32]
    assert Limits(least=2, most=3).looks() == [2, 3]
    assert Limits(least=4, most=4).looks() == [4]


@pytest.mark.parametrize(
    "bad", [{"least": 1}, {"most": 7}, {"half_width_rel": 0.0}, {"seconds_per_arm": -1.0}]
)
def test_limits_that_give_no_interval_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Limits(**bad)  # type: ignore[arg-type]


def test_one_round_gives_a_reason_and_no_figure() -> None:
    one = np.array([0.01])
    for found in (of_arm(one), of_ratio(one, one, 0.01), of_arm(np.array([]))):
        assert isinstance(found, Unavailable)
        assert "at least 2" in found.reason


@pytest.mark.parametrize("odd", [math.inf, math.nan, 0.0, -1.0])
def test_a_time_that_is_none_gives_a_reason_and_no_figure(odd: float) -> None:
    good, bad = np.full(9, 0.01), np.full(9, 0.01)
    bad[4] = odd
    for found in (of_arm(bad), of_ratio(bad, good, 0.01), of_ratio(good, bad, 0.01)):
        assert isinstance(found, Unavailable)
        assert "positive finite" in found.reason


def test_turns_are_paired_before_the_median_is_taken() -> None:
    """Both arms slow down in the same turn of a round; only the pairs show that they are equal."""
    below = np.tile([1.0, 1.0, 2.0], (8, 1))
    above = np.tile([1.0, 2.0, 4.0], (8, 1))
    found = of_ratio(above, below, 0.01)
    assert isinstance(found, Estimate)
    assert (found.value, found.n) == (2.0, 8)
    assert of_arm(above).value == 2.0  # type: ignore[union-attr]


def test_unequal_rounds_are_no_pairs() -> None:
    assert isinstance(of_ratio(np.ones(8), np.ones(9), 0.01), Unavailable)


def test_few_rounds_are_flagged_and_give_their_range() -> None:
    found = of_arm(np.array([3.0, 1.0, 2.0]))
    assert isinstance(found, Estimate)
    assert (found.lo, found.value, found.hi) == (1.0, 2.0, 3.0)
    assert found.flags == ("few_rounds",)
    assert of_arm(np.arange(1.0, 9.0)).flags == ()  # type: ignore[union-attr]


def test_equal_times_give_a_ratio_of_one_without_width() -> None:
    found = of_ratio(np.full(8, 2.0), np.full(8, 2.0), 0.01)
    assert isinstance(found, Estimate)
    assert (found.value, found.lo, found.hi) == (1.0, 1.0, 1.0)
    assert rounds.p_value(np.full(8, 2.0), np.full(8, 2.0)) == 1.0
    assert verdict(found, 1.0, 0.01) == "same"


def test_verdicts() -> None:
    clear, tight, wide = (
        Estimate(0.8, 0.79, 0.81, 8),
        Estimate(1.0, 0.995, 1.005, 8),
        Estimate(1.0, 0.9, 1.1, 8),
    )
    assert verdict(clear, 0.01, 0.01) == "lower"
    assert verdict(Estimate(1.2, 1.1, 1.3, 8), 0.01, 0.01) == "higher"
    assert verdict(tight, 0.9, 0.01) == "same"
    assert verdict(wide, 0.9, 0.01) == "ambiguous"
    assert verdict(clear, 0.2, 0.01) == "ambiguous", "one of many: Holm does not bear it out"


def test_no_difference_up_to_the_false_one_of_the_bench_is_claimed() -> None:
    off = Estimate(1.03, 1.01, 1.05, 8)
    assert verdict(Estimate(0.97, 0.96, 0.98, 8), 0.01, 0.01, off) == "ambiguous"
    assert verdict(Estimate(0.8, 0.79, 0.81, 8), 0.01, 0.01, off) == "lower"


def test_holm_is_the_step_down_procedure() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_fifth_of_the_rounds_may_be_void_and_no_more() -> None:
    ledger = Ledger()
    for _ in range(4):
        ledger.keep({"a": [1.0, 1.5], "b": [2.0, 3.0]})
    ledger.discard("the clock was set")
    assert (ledger.kept, ledger.invalid) == (4, "")
    ledger.discard("a kernel was compiled")
    assert ledger.invalid == ("2 of 6 rounds were discarded, the last: a kernel was compiled")
    assert ledger.discarded == [(4, "the clock was set"), (5, "a kernel was compiled")]
    assert ledger.values("b").tolist() == [[2.0, 3.0]] * 4
    ledger.drop("b")
    assert len(ledger.values("b")) == 0


def test_mad_is_that_of_the_textbook() -> None:
    assert rounds.mad(np.array([1.0, 1.0, 2.0, 2.0, 4.0, 6.0, 9.0])) == 1.0
