"""A Pareto front as `hwprune prune --sweep` writes it (`hwprune.front`), as a picture and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwprune.page import words
from hwprune.page.facts import Table, items, part

_OURS = "hwprune"


@dataclass(frozen=True)
class Front:
    """Points of one sweep, and what their axes are.

    Attributes:
        x_label: the cost.
        y_label: the loss, or the accuracy.
        points: each with method, x, y, label and here (whether it is the folder of the page).
        refused: (budget, reason) of those that could not be kept.
    """

    x_label: str
    y_label: str
    points: tuple[Mapping[str, Any], ...]
    refused: tuple[tuple[str, str], ...] = ()

    def lines(self) -> dict[str, list[Mapping[str, Any]]]:
        """Method -> its points, the cheapest first; ours first."""
        found: dict[str, list[Mapping[str, Any]]] = {_OURS: []}
        for point in sorted(self.points, key=lambda p: float(p["x"])):
            found.setdefault(str(point["method"]), []).append(point)
        return {name: points for name, points in found.items() if points}


def read(path: Path, folder: Path) -> Front | None:
    """The front of a file; None where it holds fewer than two points with figures.

    Args:
        path: of front.json.
        folder: that the page is of.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, Mapping):
        return None
    told = [*items(found, "points"), *items(found, "baselines")]
    metric = str(found.get("metric") or "macs")
    judged = bool(told) and all(
        words.number(p.get("top1")) is not None for p in told if _cost(p, metric)
    )
    points, refused = [], []
    for point in [*told, *([part(found, "dense")] if judged else [])]:
        limits = ", ".join(f"{k}={words.plain(v)}" for k, v in part(point, "budget").items())
        if point.get("refused"):
            refused.append((limits, str(point["refused"])))
            continue
        x, y = _cost(point, metric), words.number(point.get("top1")) if judged else _loss(point)
        if x is None or y is None:
            continue
        name = str(point.get("folder") or "")
        here = bool(name) and Path(name).name == folder.resolve().name
        method = str(point.get("method") or _OURS)
        told_as = {"x": x, "y": 100 * y if judged else y, "label": limits or "dense", "here": here}
        points.append({"method": _OURS if method == "dense" else method, **told_as})
    if len(points) < 2:
        return None
    unit = words.plain(found.get("unit") or "")
    loss = f"distortion, {unit}" if unit else "distortion"
    return Front(
        f"{metric}, of dense", "top-1, %" if judged else loss, tuple(points), tuple(refused)
    )


def judged(path: Path, folder: Path) -> list[dict[str, Any]]:
    """The accuracy of the dense model and of this folder's, where the sweep measured it.

    Args:
        path: of front.json.
        folder: that the page is of.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(found, Mapping):
        return []
    mine = [
        p
        for p in items(found, "points")
        if Path(str(p.get("folder") or ".")).name == folder.resolve().name
    ]
    told = {"images": found.get("top1_images"), "data": "the labelled images of the sweep"}
    return [
        {"of": of, "top1": point["top1"], **told}
        for of, point in (("dense", part(found, "dense")), ("pruned", mine[0] if mine else {}))
        if words.number(point.get("top1")) is not None
    ]


def _cost(point: Mapping[str, Any], metric: str) -> float | None:
    for when in ("measured", "predicted"):
        value = words.number(part(part(point, when), f"{metric}_ratio").get("value"))
        if value is not None:
            return value
    return words.number(point.get(f"{metric}_ratio"))


def _loss(point: Mapping[str, Any]) -> float | None:
    found = part(point, "distortion")
    measured = words.number(found.get("measured"))
    return measured if measured is not None else words.number(found.get("predicted"))


def drawn(found: Front) -> str:
    """The picture."""
    from hwprune.page.plots import front

    return front("front", found.x_label, found.y_label, found.lines())


def table(found: Front) -> Table:
    """The same as a table."""
    rows = [
        [
            f"{p['label']}{' (this folder)' if p['here'] else ''}",
            str(p["method"]),
            words.quantity(p["x"], ""),
            words.quantity(p["y"], ""),
        ]
        for points in found.lines().values()
        for p in points
    ]
    notes = [f"{limits or 'a budget'} was refused: {reason}" for limits, reason in found.refused]
    return Table(("budget", "method", found.x_label, found.y_label), rows, notes)
