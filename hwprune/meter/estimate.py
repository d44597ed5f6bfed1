"""A measured figure with its interval, and what stands in its place when there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure somebody measured, in the unit of its field's name.

    Attributes:
        value: the point estimate (a median over rounds unless said otherwise).
        lo, hi: ends of the 95 % interval, lo <= value <= hi.
        n: independent rounds (or windows) it rests on.
        flags: what the reader must know, e.g. "ambiguous", "unsteady", "sensor_disagreement".
    """

    value: float
    lo: float
    hi: float
    n: int
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no figure.

        Raises:
            ValueError: not finite, or the value outside its interval.
        """
        if not all(map(math.isfinite, (self.value, self.lo, self.hi))):
            raise ValueError(
                f"expected finite figures, got {self.value}, [{self.lo}, {self.hi}]; a figure that could "
                "not be measured is Unavailable(reason)"
            )
        if not self.lo <= self.value <= self.hi:
            raise ValueError(f"expected lo <= value <= hi, got {self.lo}, {self.value}, {self.hi}")

    @property
    def half_width_rel(self) -> float:
        """Half the interval, relative to the value."""
        return (self.hi - self.lo) / 2 / abs(self.value) if self.value else math.inf

    def contains(self, value: float) -> bool:
        """Whether the interval covers `value`."""
        return self.lo <= value <= self.hi

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found: dict[str, Any] = {"value": self.value, "lo": self.lo, "hi": self.hi, "n": self.n}
        return found | ({"flags": list(self.flags)} if self.flags else {})


@dataclass(frozen=True)
class Unavailable:
    """No figure, and why. It is false, and it has no value: it cannot pass for zero.

    Attributes:
        reason: one sentence, fit for the user: what is missing and what would help.
    """

    reason: str

    def __bool__(self) -> bool:
        """False: `if energy: ...` reads well."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: null with the reason."""
        return {"value": None, "reason": self.reason}
