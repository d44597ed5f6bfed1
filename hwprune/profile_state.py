"""What a profile run has measured so far, on disk, so that a stopped run goes on; one run at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hwprune.ops import Op

try:
    import fcntl
except ImportError:  # Windows: two runs into one file are not told apart there
    fcntl = None  # type: ignore[assignment]


@dataclass
class State:
    """Per operation one time a round.

    Attributes:
        times_s: operation -> seconds of a call in each round; the first warmed up.
        worst_s: operation -> 95 % quantile of single calls.
        rounds: whole ones after the first pass.
    """

    times_s: dict[Op, list[float]] = field(default_factory=dict)
    worst_s: dict[Op, float] = field(default_factory=dict)
    rounds: int = 0

    def add(self, op: Op, seconds: float, worst_s: float) -> None:
        """One more time."""
        self.times_s.setdefault(op, []).append(seconds)
        self.worst_s[op] = max(self.worst_s.get(op, 0.0), worst_s)

    def save(self, path: Path, key: str) -> None:
        """Write, then move into place.

        Args:
            path: of the file.
            key: of the device and versions that it is of.
        """
        found = [
            {"op": op.to_dict(), "times_s": times, "worst_s": self.worst_s[op]}
            for op, times in self.times_s.items()
        ]
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            fresh.write_text(
                json.dumps({"key": key, "rounds": self.rounds, "ops": found}), encoding="utf-8"
            )
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, key: str) -> tuple[State, str]:
        """What a stopped run left, and a line to say about it; "" where there is nothing to say.

        A file of another device or other versions, or one that is damaged, is left aside.
        """
        if not path.exists():
            return cls(), ""
        anew = f"{path.name} is left aside and the run starts anew:"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] != key:
                return cls(), f"{anew} another device or other versions wrote it"
            state = cls(rounds=_count(found["rounds"]))
            for entry in found["ops"]:
                op = Op.from_dict(entry["op"])
                state.times_s[op] = [_seconds(t) for t in entry["times_s"]]
                state.worst_s[op] = _seconds(entry["worst_s"])
                if not state.times_s[op]:
                    raise ValueError("an operation without a time")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            return cls(), f"{anew} {type(error).__name__}: {str(error)[:100]}"
        return state, f"goes on after {state.rounds} round(s) with {len(state.times_s)} operations"


def _seconds(told: object) -> float:
    if not isinstance(told, int | float) or not 0 < told < math.inf:
        raise ValueError(f"expected seconds, got {told!r}")
    return float(told)


def _count(told: object) -> int:
    if not isinstance(told, int) or isinstance(told, bool) or told < 0:
        raise ValueError(f"expected a number of rounds, got {told!r}")
    return told


@contextlib.contextmanager
def claimed(path: Path | None) -> Iterator[None]:
    """Nobody else measures into this file meanwhile; a killed process lets go of it.

    Raises:
        ValueError: another run does.
    """
    if path is None or fcntl is None:
        yield
        return
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another run is measuring into {path.name}, and two would disturb each other: wait for it, "
                "or name another file"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
