"""The cost model on devices whose truth is known: hits, intervals, what is refused, and what never happens."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from fakes.profiles import entry_of, profile_of

from hwprune.device import DeviceProfile
from hwprune.ops import Op
from hwprune.predict import CostModel, Prediction, UnknownOp, _Family, total
from hwprune.predict_power import PowerModel

TOKENS, WIDTHS = (197, 1576), (64, 96, 192, 288, 384, 576, 768, 1152)


def seconds(op: Op) -> float:
    """A smooth device: 1e11 products and 1e10 bytes a second, 5 us a launch, small products less efficient."""
    efficiency = 1 / (1 + 40 / min(op.shape[1:]) + 20 / op.shape[0])
    bytes_ = op.weight_bytes + op.activation_bytes
    return 5e-6 + max(op.macs / 1e11, bytes_ / 1e10) / efficiency


def linears(widths: tuple[int, ...] = WIDTHS) -> list[Op]:
    return [Op("linear", (m, n, k), "fp32") for m, n, k in product(TOKENS, widths, widths)]


def tiles() -> list[Op]:
    sizes = product(TOKENS, (192, 384, 768), (192, 384, 768), (0.25, 0.5, 0.75))
    return [Op.tiles((m, n, k), "fp32", (32, 32), round(d * n * k / 1024)) for m, n, k, d in sizes]


def smooth(
    ops: list[Op], noise: float = 0.0, seed: int = 0, power_w: float | None = None
) -> DeviceProfile:
    generator = random.Random(seed)
    return profile_of(
        {op: seconds(op) * math.exp(noise * generator.gauss(0, 1)) for op in ops}, power_w=power_w
    )


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel(smooth([*linears(), *tiles()], noise=0.02))


def some(count: int, low: int = 64, high: int = 1152) -> list[Op]:
    """Linears within the range of what was measured, none of them measured."""
    generator = random.Random(5)
    sizes = [
        (generator.choice(TOKENS), *generator.sample(range(low, high), 2)) for _ in range(count)
    ]
    return [Op("linear", size, "fp32") for size in sizes]


# --- hits and interpolation ----------------------------------------------------------------------


def test_what_was_measured_is_handed_back_verbatim_however_jagged() -> None:
    generator = random.Random(1)
    times = {op: generator.uniform(1e-5, 1e-2) for op in linears()}
    model = CostModel(profile_of(times))
    for entry in model.entries.values():
        found = model.predict(entry.op)
        assert (found.latency_s, found.lo_s, found.hi_s) == (
            entry.latency_s,
            entry.lo_s,
            entry.hi_s,
        )
        assert (found.tier, found.latency_s) == ("hit", times[entry.op])


def test_a_smooth_device_is_predicted_within_percents(model: CostModel) -> None:
    errors = [abs(model.predict(op).latency_s / seconds(op) - 1) for op in some(200)]
    assert np.median(errors) < 0.03 and max(errors) < 0.2
    assert {model.predict(op).tier for op in some(200)} <= {"interpolated", "hit"}


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    """Of measurements that are as noisy as the profile's."""
    held, asked = 0, 0
    for seed in range(6):
        model = CostModel(smooth(linears(), noise=0.05, seed=seed))
        generator = random.Random(100 + seed)
        for op in some(150):
            found, measured = model.predict(op), seconds(op) * math.exp(generator.gauss(0, 0.05))
            held += found.lo_s <= measured <= found.hi_s
            asked += 1
    assert 0.91 <= held / asked <= 0.99


def test_intervals_are_as_wide_as_the_noise() -> None:
    widths = []
    for noise in (0.01, 0.1):
        found = CostModel(smooth(linears(), noise=noise)).predict(some(1)[0])
        widths.append(math.log(found.hi_s / found.lo_s))
    assert widths[1] > 3 * widths[0]


def test_density_is_interpolated_between_those_measured(model: CostModel) -> None:
    for kept in range(36 + 2, 108, 7):  # 0.26 to 0.74 of 144 tiles
        op = Op.tiles((197, 384, 384), "fp32", (32, 32), kept)
        found = model.predict(op)
        assert found.tier in ("interpolated", "hit")
        assert found.latency_s == pytest.approx(seconds(op), rel=0.1)


def test_whole_sites_are_held_out() -> None:
    """Each site is off by a factor of its own: with one density left in, the others would be predicted well."""
    generator = random.Random(3)
    factor = {op.shape: math.exp(generator.gauss(0, 0.3)) for op in tiles()}
    model = CostModel(profile_of({op: seconds(op) * factor[op.shape] for op in tiles()}))
    (errors,) = model.held_out_errors().values()
    assert len(errors) == len(tiles()) and np.median(errors) > 0.12


def test_held_out_errors_are_those_of_a_model_that_never_saw_the_site() -> None:
    """An oracle of its own: leave a site out by hand, ask a fresh model."""
    ops = linears((64, 192, 384, 768))
    found = CostModel(smooth(ops, noise=0.05)).held_out_errors()[ops[0].family]
    times = {e.op: e.latency_s for e in smooth(ops, noise=0.05).entries}
    by_hand = []
    for op in ops:
        fresh = CostModel(profile_of({o: t for o, t in times.items() if o != op})).predict(op)
        by_hand.append(abs(fresh.latency_s / times[op] - 1))
    assert np.median(found) == pytest.approx(np.median(by_hand), rel=0.5)
    assert found.shape == (len(ops),)


# --- what never happens --------------------------------------------------------------------------


def test_no_prediction_is_negative_or_below_what_the_device_can_do() -> None:
    generator = random.Random(2)
    for seed in range(3):  # noise of e: no spline stays tame
        model = CostModel(smooth(linears(), noise=1.0, seed=seed))
        family: _Family = next(iter(model._families.values()))
        for _ in range(150):
            op = Op(
                "linear", tuple(generator.choice((1, 3, 50, 500, 9000)) for _ in range(3)), "fp32"
            )
            found = model.predict(op)
            assert 0 < found.lo_s <= found.latency_s <= found.hi_s < math.inf
            assert found.latency_s >= max(family.light_s(op), model.floor_s) * (1 - 1e-9)


def test_nothing_is_quicker_than_the_quickest_launch(model: CostModel) -> None:
    tiny = model.predict(Op("linear", (1, 1, 1), "fp32"))
    assert tiny.latency_s == model.floor_s and tiny.tier == "extrapolated"


@pytest.mark.parametrize(
    "op",
    [
        Op("gelu", (197, 64), "fp32"),
        Op("attention", (1, 3, 197, 64, 64), "fp32"),
        Op("linear", (197, 64, 64), "bf16"),
        Op.tiles((197, 384, 384), "fp32", (64, 64), 9),
        Op.tiles((197, 384, 384), "bf16", (32, 32), 9),
    ],
    ids=str,
)
def test_what_no_family_measured_raises(model: CostModel, op: Op) -> None:
    with pytest.raises(UnknownOp, match=r"says nothing about .*hwprune profile"):
        model.predict(op)


def test_a_family_of_few_is_not_interpolated_but_its_hits_stand() -> None:
    few = linears()[:5]
    model = CostModel(smooth(few))
    assert model.predict(few[0]).tier == "hit"
    with pytest.raises(UnknownOp):
        model.predict(some(1)[0])


def test_a_small_family_claims_no_certainty() -> None:
    """Six entries: holding one out leaves few, and an interval of no width would be a lie."""
    model = CostModel(smooth([Op("linear", (197, w, w), "fp32") for w in WIDTHS[:6]], noise=0.05))
    found = model.predict(Op("linear", (197, 100, 100), "fp32"))
    assert found.hi_s / found.lo_s > 1.1


def test_out_of_range_is_flagged_and_wider_the_farther(model: CostModel) -> None:
    inside = model.predict(Op("linear", (1576, 1000, 1000), "fp32"))
    near, far = (model.predict(Op("linear", (1576, n, n), "fp32")) for n in (2000, 9000))
    assert (inside.tier, near.tier, far.tier) == ("interpolated", "extrapolated", "extrapolated")
    widths = [math.log(p.hi_s / p.lo_s) for p in (inside, near, far)]
    assert widths[0] < widths[1] < widths[2]
    assert far.latency_s == pytest.approx(
        seconds(Op("linear", (1576, 9000, 9000), "fp32")), rel=0.3
    )


def test_a_direction_that_was_never_varied_is_extrapolated() -> None:
    model = CostModel(smooth([op for op in linears() if op.shape[0] == 197]))
    assert model.predict(Op("linear", (197, 100, 100), "fp32")).tier == "interpolated"
    assert model.predict(Op("linear", (400, 100, 100), "fp32")).tier == "extrapolated"


@pytest.mark.parametrize(
    "sizes", [[(64, 64)] * 1, [(w, w) for w in WIDTHS], [(64, w) for w in WIDTHS]]
)
def test_sizes_that_move_together_are_fitted(sizes: list[tuple[int, int]]) -> None:
    ops = [Op("linear", (m, *size), "fp32") for size in sizes for m in range(100, 800, 100)]
    found = CostModel(smooth(ops)).predict(Op("linear", (250, *sizes[-1]), "fp32"))
    assert found.latency_s == pytest.approx(
        seconds(Op("linear", (250, *sizes[-1]), "fp32")), rel=0.1
    )


# --- what is never mixed -------------------------------------------------------------------------


def test_modes_caches_and_values_are_never_mixed() -> None:
    op = Op("gelu", (6, 10), "fp32")
    axes = list(product(("eager", "graph"), ("hot", "cold"), ("normal", "zeros")))
    entries = tuple(
        entry_of(op, (i + 1) * 1e-5, mode=m, l2=c, values=v) for i, (m, c, v) in enumerate(axes)
    )
    profile = DeviceProfile("fake", {}, {}, {}, entries, {}, synthetic=True)
    for i, (mode, l2, values) in enumerate(axes):
        found = CostModel(profile, mode, l2, values).predict(op)
        assert found.latency_s == (i + 1) * 1e-5
    assert CostModel(profile).predict(op).latency_s == 1e-5
    with pytest.raises(ValueError, match=r"expected entries of \('compile', 'hot', 'normal'\)"):
        CostModel(profile, "compile")
    with pytest.raises(ValueError, match="expected a mode"):
        CostModel(profile, "fast")
    with pytest.raises(ValueError, match="l2"):
        CostModel(profile, "eager", "warm")


def test_another_devices_figures_are_marked_and_widened(model: CostModel) -> None:
    other = CostModel(replace(model.profile, transferred="another device"))
    for op in (linears()[3], some(1)[0], Op("linear", (5, 9000, 9000), "fp32")):
        here, there = model.predict(op), other.predict(op)
        assert there.tier == "transferred" and there.latency_s == here.latency_s
        assert there.lo_s < here.lo_s <= here.hi_s < there.hi_s


# --- power and energy ----------------------------------------------------------------------------


def watts(op: Op) -> float:
    """80 W idle, up to 700 W with the rate of work."""
    return 80 + 620 * op.macs / seconds(op) / 1e11


@pytest.fixture(scope="module")
def powered() -> CostModel:
    """Every seventh operation has a power."""
    entries = []
    for i, op in enumerate(linears()):
        w = watts(op) if i % 7 == 0 else None
        given = {} if w is None else {"power_w": w, "energy_j": w * seconds(op)}
        entries.append(entry_of(op, seconds(op), **given))
    sensor = {"source": "fake", "idle_w": 80.0}
    return CostModel(DeviceProfile("fake", {}, {}, sensor, tuple(entries), {}, synthetic=True))


def test_energy_is_power_times_latency_between_idle_and_the_largest_seen(
    powered: CostModel,
) -> None:
    most = max(e.power_w or 0 for e in powered.entries.values())
    errors = []
    for op in [*linears(), *some(60), Op("linear", (1, 1, 1), "fp32")]:
        found = powered.predict(op)
        assert found.energy_j and found.energy_lo_j and found.energy_hi_j
        assert found.energy_lo_j <= found.energy_j <= found.energy_hi_j
        power = found.energy_j / found.latency_s
        assert 80 - 1e-9 <= power <= most + 1e-9
        errors.append(abs(power / watts(op) - 1))
    assert np.median(errors) < 0.1


def test_measured_energy_is_handed_back_verbatim(powered: CostModel) -> None:
    told = [e for e in powered.entries.values() if e.energy_j is not None]
    assert len(told) == 19
    assert all(powered.predict(e.op).energy_j == e.energy_j for e in told)


def test_without_power_there_is_no_energy(model: CostModel) -> None:
    for op in (linears()[0], some(1)[0]):
        found = model.predict(op)
        assert (found.energy_j, found.energy_lo_j, found.energy_hi_j) == (None, None, None)


def test_few_anchors_tell_no_power() -> None:
    entries = [entry_of(op, seconds(op), power_w=300.0) for op in linears()[:3]]
    assert PowerModel(entries).predict(linears()[9], 1e-4) is None


def test_power_never_falls_below_idle() -> None:
    entries = [
        entry_of(op, seconds(op), power_w=w)
        for op, w in zip(linears(), (50, 60, 90, 100, 95), strict=False)
    ]
    found = PowerModel(entries, idle_w=80.0).predict(linears()[0], seconds(linears()[0]))
    assert found is not None and 80 <= found[1] <= found[0] <= found[2] <= 100


# --- sums ----------------------------------------------------------------------------------------


def test_a_sum_keeps_its_value_within_its_interval() -> None:
    generator = random.Random(4)
    for count in (0, 1, 2, 50):
        parts = []
        for _ in range(count):
            v = generator.uniform(1e-6, 1e-2)
            ends = (v * generator.uniform(0.1, 1), v * generator.uniform(1, 3))
            parts.append(Prediction(v, *ends, 2 * v, "interpolated", 2 * ends[0], 2 * ends[1]))
        found = total(parts)
        assert 0 <= found.lo_s <= found.latency_s <= found.hi_s
        assert found.latency_s == pytest.approx(sum(p.latency_s for p in parts))
        # No narrower than independent errors, no wider than errors that all agree.
        linear = sum(p.hi_s - p.latency_s for p in parts)
        square = math.sqrt(sum((p.hi_s - p.latency_s) ** 2 for p in parts))
        assert square - 1e-12 <= found.hi_s - found.latency_s <= linear + 1e-12
        if count:
            assert found.energy_j == pytest.approx(2 * found.latency_s)
            assert found.energy_lo_j == pytest.approx(2 * found.lo_s)


def test_a_sum_is_as_certain_as_its_least_certain_part() -> None:
    def part(tier: str, energy: float | None = 1.0) -> Prediction:
        return Prediction(1.0, 0.9, 1.1, energy, tier, energy, energy)

    order = ["hit", "interpolated", "extrapolated", "transferred"]
    for i, tier in enumerate(order):
        assert total([part(t) for t in order[: i + 1]]).tier == tier
    assert total([part("hit"), part("hit", None)]).energy_j is None
