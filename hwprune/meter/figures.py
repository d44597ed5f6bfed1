"""From rounds to figures: what the blocks and windows of one arm say of it."""

from __future__ import annotations

import numpy as np

from hwprune.meter.arms import Arm
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.inputs import Inputs
from hwprune.meter.measurement import ArmFigures
from hwprune.meter.memory import Memory
from hwprune.meter.rounds import LEVEL, Floats, mad, of_arm
from hwprune.meter.schedule import Rounds
from hwprune.meter.timing import GAP_REL, LAUNCH_BOUND, RAN_SHARE, Block

_P95_RESAMPLES = 400  # of whole rounds; each sorts all calls anew
_P95_CALLS = 60  # three above the 95th percentile


def arm_figures(
    arm: Arm,
    latency: Rounds,
    joules: Rounds,
    memory: Memory | Unavailable | None,
    inputs: Inputs,
    seed: int,
) -> ArmFigures:
    """The figures of an arm; all `Unavailable` with its error where it has one.

    Args:
        arm: measured or failed.
        latency: its rounds of latency.
        joules: its rounds of energy.
        memory: of one forward; None where it was not looked at.
        inputs: of every call.
        seed: of the bootstrap.
    """
    reason = arm.error or latency.ledger.invalid
    if reason or arm.runnable is None:
        none = Unavailable(reason or "it was not made ready")
        return ArmFigures(
            arm.name,
            *(none,) * 4,
            memory=memory or none,
            average_power_w=none,
            energy_j=none,
            flags=tuple(arm.flags),
            error=arm.error,
        )
    per_call, blocks = arm.runnable.per_call, latency.blocks.get(arm.name, [])
    rounds_s = latency.ledger.values(arm.name)
    middle = of_arm(rounds_s, seed)
    calls = sum(len(b.times_s) for b in blocks)
    return ArmFigures(
        arm.name,
        middle,
        percentile_95([b.times_s / per_call for b in blocks], seed),
        _inverse(middle, inputs.batch),
        of_arm(cpu_seconds(arm, latency), seed),
        memory or Unavailable("it was not looked at"),
        *_energy(arm, joules, seed),
        mad_s=mad(rounds_s) if len(rounds_s) else None,
        calls=calls * per_call,
        flags=tuple(dict.fromkeys([*arm.flags, *_flags(blocks, calls, joules, arm)])),
    )


def cpu_seconds(arm: Arm, latency: Rounds) -> Floats:
    """CPU seconds a forward in each round: [rounds]."""
    per_call = 1 if arm.runnable is None else arm.runnable.per_call
    blocks = latency.blocks.get(arm.name, [])
    return np.asarray([b.cpu_s / len(b.times_s) / per_call for b in blocks])


def percentile_95(times_s: list[Floats], seed: int) -> Estimate | Unavailable:
    """95th percentile of all calls, with the bootstrap interval over rounds.

    Args:
        times_s: [calls] of each round.
        seed: of the resampling.
    """
    if len(times_s) < 2:
        return Unavailable(f"{len(times_s)} round(s) were measured, and at least 2 are needed")
    generator = np.random.default_rng(seed)
    value = float(np.percentile(np.concatenate(times_s), 95))
    chosen = generator.integers(len(times_s), size=(_P95_RESAMPLES, len(times_s)))
    seen = [np.percentile(np.concatenate([times_s[i] for i in row]), 95) for row in chosen]
    lo, hi = np.quantile(seen, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if not np.isfinite([value, lo, hi]).all():
        return Unavailable("a call took no finite time: the clock is broken")
    return Estimate(value, min(float(lo), value), max(float(hi), value), len(times_s))


def _inverse(latency_s: Estimate | Unavailable, images: int) -> Estimate | Unavailable:
    if isinstance(latency_s, Unavailable):
        return latency_s
    value, lo, hi = (images / x for x in (latency_s.value, latency_s.hi, latency_s.lo))
    return Estimate(value, lo, hi, latency_s.n, latency_s.flags)


def _energy(
    arm: Arm, joules: Rounds, seed: int
) -> tuple[Estimate | Unavailable, Estimate | Unavailable]:
    """(average power, joules an image)."""
    windows = joules.windows.get(arm.name, [])
    reason = joules.unavailable or joules.ledger.invalid
    if reason:
        return Unavailable(reason), Unavailable(reason)
    power_w = np.asarray([w.average_power_w for w in windows])
    return of_arm(power_w, seed), of_arm(joules.ledger.values(arm.name), seed)


def _flags(blocks: list[Block], calls: int, joules: Rounds, arm: Arm) -> list[str]:
    found = []
    if calls < _P95_CALLS:
        found.append("few_calls")
    if blocks and float(np.median([b.gap_rel for b in blocks])) > GAP_REL:
        found.append("gaps")
    if blocks and float(np.median([b.ran_share for b in blocks])) < RAN_SHARE:
        found.append("preempted")
    if blocks and float(np.median([b.launch_share for b in blocks])) > LAUNCH_BOUND:
        found.append("launch_bound")
    for window in joules.windows.get(arm.name, []):
        found += window.flags
    return found
