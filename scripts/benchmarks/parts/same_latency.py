"""How much a method may keep so that its model takes a given share of the dense one's time, as measured."""

from collections.abc import Callable
from dataclasses import dataclass

SLOWER = 0.01  # of the budget: what a rival may take beyond it, so that noise does not cost it
CLOSE = 0.03  # of the budget left unused that is not worth another try


@dataclass(frozen=True)
class Found:
    """The strength of a method.

    Attributes:
        share: what it may keep, of its own measure (multiply-accumulates).
        latency: measured at that share, of dense.
        tries: every (share, latency) measured, in order.
        at_most: everything may be kept: it is faster than asked with nothing removed.
    """

    share: float
    latency: float
    tries: tuple[tuple[float, float], ...]
    at_most: bool = False


def share_at(
    latency: float,
    measured: Callable[[float], float],
    *,
    least: float,
    most: float,
    tries: int = 6,
) -> Found:
    """The largest share that takes no longer, by the secant inside a bracket.

    Args:
        latency: asked, of dense.
        measured: share -> latency of the model that keeps it, of dense.
        least: share not to go below.
        most: share not to go above.
        tries: models to make and time.

    Raises:
        ValueError: nothing tried is as fast.
    """
    seen: list[tuple[float, float]] = []
    low, high = least, most  # too little, too much
    best: tuple[float, float] | None = None
    share = most
    for _ in range(tries):
        got = measured(share)
        seen.append((share, got))
        if got <= latency * (1 + SLOWER):
            best = max(best or (share, got), (share, got))
            low = max(low, share)
            if share >= most:
                return Found(share, got, tuple(seen), at_most=True)
            if got >= latency * (1 - CLOSE):
                break
        else:
            high = min(high, share)
        share = _next(seen, latency, low, high)
    if best is None:
        fastest = min(seen, key=lambda pair: pair[1])
        raise ValueError(
            f"{tries} models were timed and none is as fast as {latency:.2f} of dense; the fastest keeps "
            f"{fastest[0]:.3f} and takes {fastest[1]:.3f}"
        )
    return Found(*best, tuple(seen))


def _next(seen: list[tuple[float, float]], latency: float, low: float, high: float) -> float:
    """Where the line through the two tries nearest in time meets the latency; the middle where it leaves."""
    aim = latency * (1 - CLOSE / 3)
    near = sorted(seen, key=lambda pair: abs(pair[1] - aim))[:2]
    if len(near) == 1:
        (share, got), slope = near[0], 1.0
    else:
        (share, got), (other, then) = near
        slope = (got - then) / (share - other) if share != other else 0.0
    guess = share + (aim - got) / slope if slope > 0 else (low + high) / 2
    inside = low + 0.02 * (high - low), high - 0.02 * (high - low)
    return guess if inside[0] <= guess <= inside[1] else (low + high) / 2
