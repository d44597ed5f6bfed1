"""Times calls against each other on a CPU: every call once a round, in random order, ratios paired by round."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.rounds import of_ratio, orders

Call = Callable[[], Any]


def times_s(calls: Mapping[str, Call], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of each call and round, after one round that warms up and is not counted.

    With one thread its own CPU time, which no neighbour on the machine adds to; with more, wall time.
    """
    now = clock()
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for order, _ in zip(orders(list(calls), seed), range(rounds), strict=False):
        for name in order:
            start = now()
            calls[name]()
            found[name].append(now() - start)
    return found


def clock() -> Callable[[], float]:
    """What `times_s` reads."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def speedup(times: Mapping[str, list[float]], of: str, over: str) -> dict[str, Any]:
    """How many times faster `of` is than `over`: value, lo, hi, n.

    Raises:
        RuntimeError: the clock gave no figures.
    """
    found: Estimate | Unavailable = of_ratio(times[over], times[of], 0.02)
    if not found:
        raise RuntimeError(found.reason)
    assert isinstance(found, Estimate)
    return found.to_dict()
