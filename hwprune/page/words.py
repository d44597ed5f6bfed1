"""Figures as a person reads them: counts and quantities in their units, ratios with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "not measured"


def number(value: object) -> float | None:
    """A finite number of a report; None for anything else, however the file was damaged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: object) -> str:
    """5.717 M, 480.2 K."""
    found = number(value)
    if found is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(found) >= size:
            return f"{found / size:.4g} {unit}"
    return f"{found:.4g}"


def nbytes(value: object) -> str:
    """22.87 MB."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{found / 1e6:.2f} MB" if found >= 1e5 else f"{found / 1e3:.1f} KB"


def quantity(value: object, unit: str) -> str:
    """12.34 ms, 3.21 J; a plain number without a unit."""
    found = number(value)
    if found is None:
        return MISSING
    if not unit:
        return f"{found:.4g}" if abs(found) < 1e4 else f"{found:.0f}"
    sizes = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))
    size, prefix = next(((s, p) for s, p in sizes if abs(found) >= s), (1e-9, "n"))
    return f"{found / size:.4g} {prefix}{unit}"


def estimate(found: object, unit: str = "") -> str:
    """A figure with its 95 % interval: 0.612 [0.605, 0.620]."""
    if not isinstance(found, Mapping) or number(found.get("value")) is None:
        return MISSING
    text = quantity(found["value"], unit)
    lo, hi = number(found.get("lo")), number(found.get("hi"))
    if lo is None or hi is None:
        return text
    return f"{text} [{quantity(lo, unit)}, {quantity(hi, unit)}]"


def ratio(above: object, below: object) -> str:
    """One number by another, without an interval."""
    top, base = number(above), number(below)
    return f"{top / base:.3f}" if top is not None and base else "–"


def percent(value: object, error: float | None = None) -> str:
    """98.16 %, with its standard error."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{100 * found:.2f} %" if error is None else f"{100 * found:.2f} ± {100 * error:.2f} %"


def plain(value: Any) -> str:
    """Any JSON value in a table."""
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)
