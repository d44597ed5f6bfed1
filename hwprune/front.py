"""The Pareto front of a sweep: what each budget costs and loses, beside the dense model and baselines.

`front.json` is {"version", "metric", "unit", "images", "top1_images", "dense", "points", "baselines"}. A point
is what its report says of it, with the same keys: "budget", "folder", "macs_ratio", "params_ratio",
"distortion" {"measured", "predicted"}, "predicted" and "measured" (each with "latency_ratio" and
"energy_ratio": {"value", "lo", "hi"} or null), and "method", "top1", "top1_se" (null without labels), "refused"
(null, or why this budget cannot be kept; then the figures are null). "dense" is such a point of ratio 1,
"baselines" are points of other methods at the same budgets, which are not saved.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwprune.report import Report

FILES = ("front.json", "front.svg", "front.png")
_COSTS = {"latency": "latency", "energy": "energy", "macs": "MACs", "params": "parameters"}
# Colours and greys that stand on white and on black alike: contrast at least 3 with both.
_INK = "#808080"
_COLOURS = {"hwprune": "#2f81d7", "magnitude": "#c2681c", "lpvit": "#8f63c9"}
_OTHER = "#3f9a4f"


@dataclass(frozen=True)
class Front:
    """What a sweep found.

    Attributes:
        metric: that was swept.
        unit: of the distortion.
        images: calibration images the distortion is measured on.
        dense: point of the dense model.
        points: one a budget, as asked for, the largest first.
        baselines: points of other methods.
        top1_images: labelled images, where accuracy was measured.
        reports: of the points that could be kept.
    """

    metric: str
    unit: str
    images: int
    dense: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]
    baselines: tuple[Mapping[str, Any], ...] = ()
    top1_images: int | None = None
    reports: tuple[Report, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What front.json holds."""
        return {
            "version": 1,
            "metric": self.metric,
            "unit": self.unit,
            "images": self.images,
            "top1_images": self.top1_images,
            "dense": dict(self.dense),
            "points": [dict(point) for point in self.points],
            "baselines": [dict(point) for point in self.baselines],
        }

    def write(self, folder: Path) -> list[str]:
        """Write front.json, and front.svg and front.png where matplotlib is installed.

        Args:
            folder: made if it is not there.

        Returns:
            The names of the files written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        (folder / FILES[0]).write_text(text, encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            return [FILES[0]]
        figure = drawn(self.to_dict())
        figure.savefig(folder / FILES[1], format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(folder / FILES[2], format="png", transparent=True, dpi=160)
        return list(FILES)


def cost_of(point: Mapping[str, Any], metric: str) -> Mapping[str, float] | None:
    """A point's cost in a metric: measured, else predicted, as value, lo, hi of the dense model's."""
    for when in ("measured", "predicted"):
        found = (point.get(when) or {}).get(f"{metric}_ratio")
        if found is not None:
            return dict(found)
    ratio = point.get(f"{metric}_ratio")
    return None if ratio is None else {"value": ratio, "lo": ratio, "hi": ratio}


def drawn(front: Mapping[str, Any]) -> Any:
    """A matplotlib figure: one panel for each cost that is known, readable on light and on dark.

    Args:
        front: as in front.json.
    """
    import matplotlib
    from matplotlib.figure import Figure

    every = [front["dense"], *front["points"], *front["baselines"]]
    metrics = [m for m in _COSTS if any(cost_of(p, m) is not None for p in every[1:])]
    accuracy = front["dense"].get("top1") is not None
    style = {
        **matplotlib.rcParamsDefault,
        "svg.fonttype": "none",
        "svg.hashsalt": "hwprune",
        "font.size": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(2.9 * max(len(metrics), 1) + 0.6, 3.4), layout="constrained")
        panels = figure.subplots(1, max(len(metrics), 1), sharey=True, squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=False):
            _panel(panel, front, metric, accuracy)
        panels[0].set_ylabel(
            f"top-1 on {front['top1_images']} images"
            if accuracy
            else f"distortion, {front['unit']}"
        )
        shown: dict[str, Any] = {}
        for panel in panels:
            handles, names = panel.get_legend_handles_labels()
            shown = dict(zip(names, handles, strict=True)) | shown
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside upper center",
            ncols=max(len(shown), 1),
            labelcolor=_INK,
        )
        figure.canvas.draw()  # inside the style: labels take their colours now
    return figure


def _panel(panel: Any, front: Mapping[str, Any], metric: str, accuracy: bool) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in [*front["points"], *front["baselines"]]:
        lines.setdefault(point["method"], []).append(point)
    for method, points in lines.items():
        shown = [
            (cost, point)
            for point in points
            if (cost := cost_of(point, metric)) is not None and _loss(point, accuracy) is not None
        ]
        if not shown:
            continue
        colour = _COLOURS.get(method, _OTHER)
        x = [cost["value"] for cost, _ in shown]
        y = [_loss(point, accuracy) for _, point in shown]
        ends = [_measured(point, metric) or (x[i], x[i]) for i, (_, point) in enumerate(shown)]
        panel.errorbar(
            x,
            y,
            xerr=[
                [a - low for a, (low, _) in zip(x, ends, strict=True)],
                [high - a for a, (_, high) in zip(x, ends, strict=True)],
            ],
            yerr=[point["top1_se"] for _, point in shown] if accuracy else None,
            label=method,
            color=colour,
            marker="o" if method == "hwprune" else "s",
            markersize=4,
            linewidth=1.2 if method == "hwprune" else 0.8,
            elinewidth=0.8,
        )
    panel.plot([1.0], [front["dense"]["top1"] if accuracy else 0.0], "D", color=_INK, label="dense")
    by = {
        when
        for p in front["points"]
        for when in ("measured", "predicted")
        if _known(p, when, metric)
    }
    how = (
        "" if metric in ("macs", "params") else (" measured" if "measured" in by else " predicted")
    )
    panel.set_xlabel(f"{_COSTS[metric]}{how}, of dense")
    panel.grid(color=_INK, alpha=0.25, linewidth=0.5)


def _measured(point: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """The interval of a measured ratio; predicted ones are too wide to draw."""
    found = (point.get("measured") or {}).get(f"{metric}_ratio")
    return None if found is None else (found["lo"], found["hi"])


def _known(point: Mapping[str, Any], when: str, metric: str) -> bool:
    return (point.get(when) or {}).get(f"{metric}_ratio") is not None


def _loss(point: Mapping[str, Any], accuracy: bool) -> float | None:
    found = point.get("top1") if accuracy else (point.get("distortion") or {}).get("measured")
    return None if found is None else float(found)


def refused(method: str, budget: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """A point of a budget that cannot be kept."""
    nothing = ("folder", "macs_ratio", "params_ratio", "distortion", "predicted", "measured")
    return {
        "method": method,
        "budget": dict(budget),
        **dict.fromkeys((*nothing, "top1", "top1_se")),
        "refused": reason,
    }


def steps(first: float, last: float, count: int) -> Sequence[float]:
    """`count` ratios from the first to the last, evenly.

    Raises:
        ValueError: not both within (0, 1], or fewer than two.
    """
    if not (0 < first <= 1 and 0 < last <= 1) or count < 2 or first == last:
        raise ValueError(
            f"sweep: expected FIRST:LAST:COUNT with two different ratios in (0, 1] and at least 2 points, like "
            f"0.9:0.4:6, got {first:g}:{last:g}:{count}"
        )
    each = (last - first) / (count - 1)
    return [round(first + each * i, 6) for i in range(count)]
