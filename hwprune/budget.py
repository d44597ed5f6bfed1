"""What a pruned model may cost: MACs, parameters, latency, energy, memory; relative or absolute."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METRICS = ("macs", "params", "latency", "energy", "memory")
ON_A_DEVICE = ("latency", "energy")  # what only a device profile can predict
_WITH_UNITS = ("latency", "energy", "memory")  # a bare number is a ratio, whatever its size
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "latency": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
    "energy": {"": 1.0, "J": 1.0, "mJ": 1e-3, "kJ": 1e3},
    "memory": {"": 1.0, **_BYTES},
}


class UnreachableBudget(ValueError):
    """No plan meets the budget; the message says what is reachable, layer by layer."""


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, relative to the dense one or absolute.

    macs and params are ratios up to 1 and counts above. latency, energy and memory are ratios; an absolute
    value is a string with its unit, "4.2ms", "0.9J" or "1.5GiB".

    Attributes:
        macs: true multiply-accumulates of one image.
        params: parameters.
        latency: time of a batch on a device.
        energy: of a batch on a device.
        memory: bytes of the weights and of the activations of a batch, at the worst moment of a forward.

    Example:
        >>> import hwprune
        >>> hwprune.Budget(latency=0.7, params="50M").given
        {'params': '50M', 'latency': 0.7}
    """

    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    energy: float | str | None = None
    memory: float | str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty or non-positive budget."""
        if not self.given:
            raise ValueError(
                f"Budget: expected at least one of {', '.join(METRICS)}; e.g. Budget(macs=0.6)"
            )
        for metric, value in self.given.items():
            if not _amount(metric, value) > 0:
                raise ValueError(f"Budget: {metric} must be above 0, got {value}")
            if metric in _WITH_UNITS and not _unit(value) and _amount(metric, value) > 1:
                raise ValueError(
                    f"Budget: {metric}={value} is more than the dense model's; a ratio is at most 1, an "
                    f'absolute value has its unit: latency="4.2ms", energy="0.9J", memory="120MB"'
                )

    @property
    def given(self) -> dict[str, float | str]:
        """The metrics that are limited."""
        found = {metric: getattr(self, metric) for metric in METRICS}
        return {metric: value for metric, value in found.items() if value is not None}

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Budget:
        """From command-line words like "macs=0.6", "params=50M", "latency=4.2ms", "memory=1.5GiB".

        Raises:
            ValueError: unknown metric, no number, or one metric twice.
        """
        found: dict[str, float | str] = {}
        for text in texts:
            metric, _, value = (part.strip() for part in text.partition("="))
            if metric not in METRICS or not value:
                raise ValueError(
                    f"budget: expected {' or '.join(m + '=NUMBER' for m in METRICS)}, with a unit where "
                    f"absolute (macs=0.6, params=50M, latency=4.2ms, memory=120MB), got {text!r}"
                )
            if metric in found:
                raise ValueError(f"budget: {metric} given twice")
            amount = _amount(metric, value)
            found[metric] = value if metric in _WITH_UNITS and _unit(value) else amount
        return cls(**found)  # type: ignore[arg-type]

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """metric -> absolute limit for a model whose dense costs are given."""
        found = {}
        for metric, value in self.given.items():
            amount = _amount(metric, value)
            relative = not _unit(value) if metric in _WITH_UNITS else amount <= 1
            found[metric] = amount * dense[metric] if relative else amount
        return found


def check_energy_weight(weight: float) -> None:
    """Refuse what is no weight of energy beside the distortion.

    Raises:
        ValueError: negative, infinite or NaN.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"energy_weight: expected a number of at least 0, got {weight}")


def _unit(value: float | str) -> str:
    """The unit of a limit; "" for a bare number."""
    return value.lstrip("0123456789.eE+- ").strip() if isinstance(value, str) else ""


def _amount(metric: str, value: float | str) -> float:
    """The number of a limit, its unit applied.

    Raises:
        ValueError: no number, or a unit that the metric does not have.
    """
    if not isinstance(value, str):
        return float(value)
    units = _UNITS[metric]
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"budget: {metric}: expected a number, or one with {known}, got {value!r}")
    try:
        return float(match[1]) * units[match[2]]
    except ValueError:
        raise ValueError(f"budget: {match[1]!r} is no number in {metric}={value}") from None
