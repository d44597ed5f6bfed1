"""Runs the rounds: a block of every arm in each, latency first and then energy, until the ratios are tight.

An arm that raises leaves with its reason and the others go on; a round in which something happened to the
machine is discarded whole.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hwprune.meter.arms import Arm
from hwprune.meter.clock import Clock
from hwprune.meter.energy_window import FLAGS, Chunk, EnergyWindow
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.rounds import Ledger, Limits, of_ratio, orders
from hwprune.meter.source import EnergySource
from hwprune.meter.timing import SLICES, Block, Timer
from hwprune.meter.validity import RoundWatch

Progress = Callable[[str, int, int], None]  # (step, done, total)
EnergyOf = Callable[
    [EnergySource | Unavailable, Callable[[], Chunk], Callable[[], None]],
    EnergyWindow | Unavailable,
]
CHUNK_S = 0.05  # of work queued at most, so that a window ends when it is told to
_FAILURES = 2  # windows without an answer in a row, after which the sensor is given up


@dataclass
class Rounds:
    """What the rounds of one kind gave.

    Attributes:
        ledger: seconds a forward, or joules an image, of every arm and kept round.
        blocks: arm -> blocks of the kept rounds (latency).
        windows: arm -> windows of the kept rounds (energy).
        unavailable: why there are no figures; "" where there are.
        tight: every ratio reached the half-width asked for.
    """

    ledger: Ledger = field(default_factory=Ledger)
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    windows: dict[str, list[EnergyWindow]] = field(default_factory=dict)
    unavailable: str = ""
    tight: bool = False


def latency_rounds(
    arms: Sequence[Arm],
    timer: Timer,
    limits: Limits,
    *,
    reference: str,
    seed: int,
    watch: RoundWatch,
    clock: Clock,
    progress: Progress | None = None,
) -> Rounds:
    """Time the arms in interleaved rounds.

    Args:
        arms: made ready; one that fails is left out from then on, with its error noted.
        timer: of the device.
        limits: when to stop.
        reference: the arm whose ratios to all others must be tight.
        seed: of the order and the bootstrap.
        watch: says which rounds do not count.
        clock: for the time limit.
        progress: called with ("latency", thousandths done, 1000): of the rounds or the time, whichever ends.
    """
    found = Rounds()

    turns = 1
    if timer.device.type != "cuda":
        turns = max(1, min([SLICES, *(arm.calls for arm in arms)]))

    def round_of(order: Iterator[Sequence[Arm]]) -> None:
        slices: dict[str, list[Block]] = {}
        watch.begin()
        for _ in range(turns):
            for arm in next(order):
                if arm.error:
                    continue
                try:
                    block = timer.block(arm.call, max(1, arm.calls // turns))
                except (
                    Exception
                ) as error:  # of a kernel, an allocation: the others are worth having
                    _drop(arm, error, found)
                    slices.pop(arm.name, None)
                else:
                    slices.setdefault(arm.name, []).append(block)
                watch.block()
        reason = watch.verdict()
        if reason or not slices:
            found.ledger.discard(reason or "no arm was left")
            return
        per_call = {arm.name: arm.runnable.per_call for arm in arms if arm.runnable is not None}
        found.ledger.keep(
            {name: [b.median_s / per_call[name] for b in parts] for name, parts in slices.items()}
        )
        for name, parts in slices.items():
            found.blocks.setdefault(name, []).append(Block.joined(parts))

    _run(found, arms, limits, reference, seed, clock, "latency", progress, round_of)
    return found


def energy_rounds(
    arms: Sequence[Arm],
    source: EnergySource | Unavailable,
    energy_of: EnergyOf,
    limits: Limits,
    *,
    images: int,
    device: torch.device,
    reference: str,
    seed: int,
    clock: Clock,
    progress: Progress | None = None,
) -> Rounds:
    """Measure the energy of the arms in interleaved rounds, one steady window a block.

    Args:
        arms: timed before.
        source: the sensor; `Unavailable` is passed on, and nothing runs.
        energy_of: measures a window: (source, run_chunk, drain).
        limits: when to stop.
        images: of a forward; the ledger has joules an image.
        device: of the arms.
        reference: the arm whose ratios to all others must be tight.
        seed: of the order and the bootstrap.
        clock: for the time limit.
        progress: called with ("energy", thousandths done, 1000).
    """
    found = Rounds()
    if isinstance(source, Unavailable):
        found.unavailable = source.reason
        return found
    failures = 0

    def round_of(order: Iterator[Sequence[Arm]]) -> None:
        nonlocal failures
        windows: dict[str, EnergyWindow] = {}
        for arm in next(order):
            run_chunk, drain = chunks(arm, device)
            try:
                window = energy_of(source, run_chunk, drain)
            except Exception as error:  # as for latency
                _drop(arm, error, found)
                continue
            if isinstance(window, Unavailable):
                failures += 1
                if failures >= _FAILURES:
                    found.unavailable = window.reason
                found.ledger.discard(window.reason)
                return
            failures = 0
            if window.status == "discard":
                reason = next((FLAGS[f] for f in window.flags if f in FLAGS), "the window is void")
                found.ledger.discard(reason)
                return
            windows[arm.name] = window
        per_call = {arm.name: arm.runnable.per_call for arm in arms if arm.runnable is not None}
        found.ledger.keep(
            {
                name: [window.energy_per_iteration_j / per_call[name] / images]
                for name, window in windows.items()
            }
        )
        for name, window in windows.items():
            found.windows.setdefault(name, []).append(window)

    _run(found, arms, limits, reference, seed, clock, "energy", progress, round_of)
    return found


def _drop(arm: Arm, error: Exception, found: Rounds) -> None:
    arm.fail(error)
    found.ledger.drop(arm.name)
    found.blocks.pop(arm.name, None)
    found.windows.pop(arm.name, None)


def _run(
    found: Rounds,
    arms: Sequence[Arm],
    limits: Limits,
    reference: str,
    seed: int,
    clock: Clock,
    step: str,
    progress: Progress | None,
    round_of: Callable[[Iterator[Sequence[Arm]]], None],
) -> None:
    """Rounds in random order until the ratios are tight, the rounds or the time are used up."""
    looks = set(limits.looks())
    start_ns = clock.now_ns()
    by_name = {arm.name: arm for arm in arms}
    most_s = limits.seconds_per_arm * len(by_name)

    def permuted() -> Iterator[Sequence[Arm]]:
        for names in orders(list(by_name), seed):
            yield [by_name[name] for name in names if not by_name[name].error]

    order = permuted()
    for count in itertools.count(1):
        if found.unavailable or all(arm.error for arm in arms):
            break
        round_of(order)
        kept, spent_s = found.ledger.kept, (clock.now_ns() - start_ns) / 1e9
        if progress is not None:
            progress(step, min(999, int(1000 * max(kept / limits.most, spent_s / most_s))), 1000)
        if kept in looks and _tight(found.ledger, reference, limits, seed):
            found.tight = True
            break
        # Discarded rounds are run again, but a machine that spoils every round is not waited for.
        if kept >= limits.most or count >= 2 * limits.most:
            break
        if spent_s + spent_s / count > most_s and (kept >= 2 or count >= 4):
            break
    if progress is not None:
        progress(step, 1000, 1000)


def _tight(ledger: Ledger, reference: str, limits: Limits, seed: int) -> bool:
    """Whether all ratios to the reference have the half-width asked for."""
    for name in ledger.figures:
        if name == reference:
            continue
        ratio = of_ratio(ledger.values(reference), ledger.values(name), limits.half_width_rel, seed)
        if not isinstance(ratio, Estimate) or "imprecise" in ratio.flags:
            return False
    return reference in ledger.figures


def chunks(arm: Arm, device: torch.device) -> tuple[Callable[[], Chunk], Callable[[], None]]:
    """An arm as work for the energy meter: about 50 ms a chunk, and at most two chunks queued.

    Args:
        arm: timed before; its calls are counted as iterations.
        device: where it runs.

    Returns:
        (run_chunk, drain).
    """
    count = max(1, round(CHUNK_S / arm.call_s))
    call = arm.call
    if device.type != "cuda":

        def run_chunk() -> Chunk:
            for _ in itertools.repeat(None, count):
                call()
            return Chunk(count)

        return run_chunk, lambda: None

    queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def run_chunk_on_gpu() -> Chunk:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in itertools.repeat(None, count):
                call()
            end.record()
            queued.append((start, end))
            if len(queued) < 2:
                return Chunk(0, 0.0)
            first, last = queued.popleft()
            last.synchronize()
            return Chunk(count, first.elapsed_time(last) / 1e3)

    return run_chunk_on_gpu, lambda: torch.cuda.synchronize(device)
