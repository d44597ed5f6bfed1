"""The first ten minutes on an unknown board: what its sensors answer, how often, and whether they see all.

Each part gives a JSON-able dict; what could not be had is null with its reason. The load is the caller's, so
that every part runs against a simulated board too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.energy_window import Chunk, EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.gemm_load import Load
from hwprune.meter.idle import idle_power
from hwprune.meter.rounds import of_ratio
from hwprune.meter.source import EnergySource, Reading
from hwprune.meter.window import energy_of

Found = dict[str, Any]
_POLL_S = 0.001
_CONTINUOUS_REL = (
    0.02  # a counter that depends less than that on the phase of a square wave integrates
)
_AA_REL = 0.01
_FEWEST_CHANGES = 10


@dataclass
class Board:
    """A source, a load for it, and a clock, with the seconds each part may take.

    Attributes:
        wave_s: of each square wave.
        window_s: of each energy window.
    """

    source: EnergySource
    load: Load
    clock: Clock = field(default_factory=RealClock)
    refresh_s: float = 20.0
    wave_s: float = 4.0
    window_s: float = 3.0
    idle_s: float = 10.0


def run_probe(board: Board, say: Callable[[str], None] = lambda _: None) -> Found:
    """All parts in order; a part that fails leaves its reason and the next one goes on."""
    found: Found = {"capabilities": capabilities(board.source)}
    parts: dict[str, Callable[[Board], Found]] = {
        "idle_before_w": idle_before,
        "refresh": refreshes,
        "square_wave": square_waves,
        "after_load": after_load,
        "aa": aa_power,
        "gemm_values": gemm_values,
    }
    for name, part in parts.items():
        say(name)
        try:
            found[name] = part(board)
        except (RuntimeError, ValueError, ArithmeticError) as error:  # the load failed, say
            found[name] = missing(f"{type(error).__name__}: {error}")
    return found


def missing(reason: str) -> Found:
    """What stands where there is no figure."""
    return {"value": None, "reason": reason}


def _figure(found: Any) -> Found:
    as_dict: Found = found.to_dict()
    return as_dict


def capabilities(source: EnergySource) -> Found:
    """What the source says it can answer, and why not the rest."""
    caps = source.caps
    return {
        "backend": caps.backend,
        "device": caps.device,
        "scope": caps.scope,
        "counter": caps.counter,
        "instant": caps.instant,
        "average": caps.average,
        "cap_w": caps.cap_w,
        "mapping": caps.mapping,
        "missing": dict(caps.missing),
        "notes": list(caps.notes),
    }


# --- how often the sensors refresh ---------------------------------------------------------------


def refreshes(board: Board) -> Found:
    """Time between changes of each field under load, and what a reading costs."""
    run_chunk, drain = board.load.chunks("random")
    readings, cpu_s = _polled(board, run_chunk, drain, board.refresh_s)
    found: Found = {
        name: _changes(readings, name) for name in ("energy_mj", "instant_mw", "average_mw")
    }
    found["reading_s"] = median(r.took_ns for r in readings) / 1e9
    found["reading_cpu_s"] = cpu_s / len(readings)
    found["readings"] = len(readings)
    found["failed_readings"] = sum(bool(r.error or r.status) for r in readings)
    return found


def _polled(
    board: Board, run_chunk: Callable[[], Chunk], drain: Callable[[], None], seconds: float
) -> tuple[list[Reading], float]:
    """Readings every millisecond beside work, and the CPU seconds they took."""
    readings: list[Reading] = []

    def steps() -> Iterator[float]:
        while True:
            readings.append(board.source.read())
            if readings[-1].lost:
                return
            yield _POLL_S

    end_ns = board.clock.now_ns() + seconds * 1e9
    beside = board.clock.beside(steps())
    try:
        while board.clock.now_ns() < end_ns:
            run_chunk()
    finally:
        cpu_s = beside.stop()
        drain()
    return readings, cpu_s


def _changes(readings: Sequence[Reading], name: str) -> Found:
    """Intervals between changes of a field, and its smallest step."""
    known = [(r.t_ns, value) for r in readings if (value := getattr(r, name)) is not None]
    if not known:
        said = next((r.status[name] for r in readings if name in r.status), "it is not answered")
        return missing(said)
    at, steps, last = [], [], known[0][1]
    for t_ns, value in known:
        if value != last:
            at.append(t_ns)
            steps.append(abs(value - last))
            last = value
    if len(at) < _FEWEST_CHANGES:
        return missing(f"it changed {len(at)} times in {len(known)} readings")
    gaps = sorted((b - a) / 1e9 for a, b in pairwise(at))
    return {
        "median_s": median(gaps),
        "p5_s": gaps[len(gaps) // 20],
        "p95_s": gaps[-1 - len(gaps) // 20],
        "changes": len(at),
        "smallest_step": min(steps),
        "mean": mean(value for _, value in known),
    }


# --- whether the counter sees everything ---------------------------------------------------------


def square_waves(
    board: Board, periods_s: Sequence[float] = (0.02, 0.05, 0.1, 0.101, 0.25), phases: int = 4
) -> Found:
    """Half duty at several periods; at 0.1 s in several phases, which a sampling counter tells apart.

    Returns:
        For each period the counter's and the power sensor's mean; `continuous`: True where the counter's
        energy at 0.1 s depends on the phase by less than 2 %.
    """
    found: Found = {"periods": [], "phases": [], "continuous": None}
    for period_s in periods_s:
        window = _wave(board, period_s, 0.0)
        found["periods"].append({"period_s": period_s, **_powers(window)})
    by_phase = [_wave(board, 0.1, 0.1 * k / phases) for k in range(phases)]
    found["phases"] = [_powers(window) for window in by_phase]
    counted = [w.counter_power_w for w in by_phase if isinstance(w, EnergyWindow)]
    if len(counted) == phases and all(w is not None for w in counted):
        watts = [w for w in counted if w is not None]
        found["phase_spread_rel"] = (max(watts) - min(watts)) / mean(watts)
        found["continuous"] = found["phase_spread_rel"] < _CONTINUOUS_REL
    else:
        found["reason"] = "the counter did not answer in every phase"
    return found


def _powers(window: EnergyWindow | Unavailable) -> Found:
    if isinstance(window, Unavailable):
        return missing(window.reason)
    return {
        "counter_w": window.counter_power_w,
        "instant_w": window.instant_power_w,
        "average_w": window.smoothed_power_w,
        "duration_s": window.duration_s,
    }


def _wave(board: Board, period_s: float, phase_s: float) -> EnergyWindow | Unavailable:
    """A square wave begun at a phase after a change of the counter, on an absolute schedule."""
    clock, load = board.clock, board.load
    _await_change(board)
    start_ns = clock.now_ns() + int(phase_s * 1e9)
    done = 0

    def one_period() -> Chunk:
        nonlocal done
        due_ns = start_ns + done * int(period_s * 1e9)
        wait_ns = due_ns - clock.now_ns()
        if wait_ns > 0:
            clock.sleep(wait_ns / 1e9)
        load.busy(period_s / 2)
        left_ns = due_ns + int(period_s * 1e9) - clock.now_ns()
        if left_ns > 0:
            clock.sleep(left_ns / 1e9)
        done += 1
        return Chunk(1)

    return energy_of(
        board.source, one_period, min_window_s=board.wave_s, ramp_s=0.5, settle_s=0.5, clock=clock
    )


def _await_change(board: Board) -> None:
    """Until the counter has changed, at most 0.5 s."""
    first = board.source.read().energy_mj
    for _ in range(500):
        board.clock.sleep(_POLL_S)
        if board.source.read().energy_mj != first:
            return


# --- idle, A/A, values ---------------------------------------------------------------------------


def idle_before(board: Board) -> Found:
    """Power before the load has run; with a context, where the load made one."""
    return _figure(idle_power(board.source, board.idle_s, clock=board.clock))


def after_load(board: Board) -> Found:
    """Power after work has ended: its fall, and where it comes to rest."""
    board.load.busy(2.0)
    start_ns, curve = board.clock.now_ns(), []
    while board.clock.now_ns() - start_ns < board.idle_s * 1e9:
        reading = board.source.read(state=True)
        milliwatts = reading.instant_mw if reading.instant_mw is not None else reading.average_mw
        curve.append(
            {
                "t_s": (reading.t_ns - start_ns) / 1e9,
                "power_w": None if milliwatts is None else milliwatts / 1e3,
                "clock_sm_mhz": reading.clock_sm_mhz,
            }
        )
        board.clock.sleep(0.5)
    resting = idle_power(board.source, board.idle_s, clock=board.clock)
    return {"curve": curve, "context_idle_w": _figure(resting)}


def aa_power(board: Board, rounds: int = 8) -> Found:
    """The same work as two arms in turns: the ratio of their power must contain 1."""
    run_chunk, drain = board.load.chunks("random")
    arms: tuple[list[float], list[float]] = ([], [])
    for k in range(2 * rounds):
        window = energy_of(
            board.source, run_chunk, min_window_s=board.window_s, drain=drain, clock=board.clock
        )
        if isinstance(window, Unavailable):
            return missing(window.reason)
        # In each round the other arm begins.
        arms[(k + k // 2) % 2].append(window.average_power_w)
    ratio = of_ratio(np.array(arms[0]), np.array(arms[1]), _AA_REL)
    return {"ratio": _figure(ratio), "a_w": arms[0], "b_w": arms[1]}


def gemm_values(board: Board) -> Found:
    """Power, time and clock of one matrix product with three kinds of values."""
    found: Found = {}
    for values in ("random", "zeros", "masked"):
        run_chunk, drain = board.load.chunks(values)
        window = energy_of(
            board.source, run_chunk, min_window_s=board.window_s, drain=drain, clock=board.clock
        )
        found[values] = (
            missing(window.reason) if isinstance(window, Unavailable) else window.to_dict()
        )
    return found
