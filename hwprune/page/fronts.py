"""A Pareto front as `hwprune prune --sweep` writes it (front.json): what each budget cost, and lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwprune.page import words
from hwprune.page.facts import Table, items, part


@dataclass(frozen=True)
class Front:
    """Points of one sweep, and what their axes are.

    Attributes:
        x_label: the cost.
        y_label: the loss.
        points: each with x, y, label and here (whether it is the folder of the page).
    """

    x_label: str
    y_label: str
    points: tuple[Mapping[str, Any], ...]


def read(path: Path, folder: Path) -> Front | None:
    """The front of a file; None where it holds fewer than two points with figures.

    Args:
        path: of front.json: {"points": [...]}, each with budget, macs_ratio, params_ratio, distortion, and
            folder, measured, predicted where there are.
        folder: that the page is of.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    told = items(found, "points") if isinstance(found, Mapping) else []
    metrics = [metric for p in told for metric in part(p, "budget")]
    metric = metrics[0] if metrics else "macs"
    points = []
    for point in told:
        x, y = _cost(point, metric), _loss(point)
        if x is None or y is None:
            continue
        name = str(point.get("folder") or "")
        limits = ", ".join(f"{k}={words.plain(v)}" for k, v in part(point, "budget").items())
        here = bool(name) and Path(name).name == folder.resolve().name
        points.append({"x": x, "y": y, "label": limits or name, "here": here})
    if len(points) < 2:
        return None
    return Front(f"{metric}, of dense", "distortion on calibration images", tuple(points))


def _cost(point: Mapping[str, Any], metric: str) -> float | None:
    for when in ("measured", "predicted"):
        figure = part(point, when).get(f"{metric}_ratio")
        value = words.number(figure.get("value") if isinstance(figure, Mapping) else figure)
        if value is not None:
            return value
    return words.number(point.get(f"{metric}_ratio"))


def _loss(point: Mapping[str, Any]) -> float | None:
    found = point.get("distortion")
    if isinstance(found, Mapping):
        measured = words.number(found.get("measured"))
        return measured if measured is not None else words.number(found.get("predicted"))
    return words.number(found)


def drawn(found: Front) -> str:
    """The picture."""
    from hwprune.page.plots import front

    return front("front", found.x_label, found.y_label, found.points)


def table(found: Front) -> Table:
    """The same as a table."""
    rows = [
        [
            f"{p['label']}{' (this folder)' if p['here'] else ''}",
            words.quantity(p["x"], ""),
            words.quantity(p["y"], ""),
        ]
        for p in found.points
    ]
    return Table(("budget", found.x_label, found.y_label), rows)
