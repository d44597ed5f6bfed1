"""`hwprune prune --sweep`: the words it takes, the folders it writes, the table it prints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwprune.terminal import Steps, show

if TYPE_CHECKING:
    from torch import nn

    from hwprune.budget import Budget
    from hwprune.front import Front
    from hwprune.report import Report

FILES = ("front.json", "front.svg", "front.png")  # hwprune.front's, which imports torch
POINT = re.compile(r"[01](\.\d+)?")  # a folder of a point: its ratio
_WORDS = re.compile(r"(?:([a-z]+)=)?([\d.]+):([\d.]+):(\d{1,3})")


@dataclass(frozen=True)
class Points:
    """What is swept.

    Attributes:
        metric: that is limited in steps.
        budgets: one a point.
        folders: one a point, by its ratio.
    """

    metric: str
    budgets: tuple[Budget, ...]
    folders: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, budgets: Sequence[str], device: str | None) -> Points:
        """From --sweep [METRIC=]FIRST:LAST:COUNT and the words of --budget.

        The metric is that of --sweep, or of a --budget without an amount; else latency where a device is
        named, and MACs where none is. A --budget with an amount holds at every point.

        Raises:
            ValueError: anything else.
        """
        from hwprune.budget import Budget
        from hwprune.front import steps

        found = _WORDS.fullmatch(text.strip())
        if found is None:
            raise ValueError(
                f"--sweep: expected [METRIC=]FIRST:LAST:COUNT like 0.9:0.4:6 or latency=0.9:0.4:6, got {text!r}"
            )
        bare = [word.strip() for word in budgets if "=" not in word]
        fixed = [word for word in budgets if "=" in word]
        named = [*([found[1]] if found[1] else []), *bare]
        if len(named) > 1:
            raise ValueError(f"--sweep: expected one metric to sweep, got {' and '.join(named)}")
        metric = named[0] if named else "macs" if device is None else "latency"
        try:
            ratios = steps(float(found[2]), float(found[3]), int(found[4]))
        except ValueError as error:
            raise ValueError(
                f"--{error}" if str(error).startswith("sweep") else f"--sweep: {error}"
            ) from None
        every = tuple(Budget.parse([f"{metric}={ratio}", *fixed]) for ratio in ratios)
        folders = tuple(f"{ratio:.2f}" for ratio in ratios)
        if len(set(folders)) < len(folders):
            folders = tuple(f"{ratio:g}" for ratio in ratios)
        return cls(metric, every, folders)

    def folder_of(self, report: Report) -> str:
        """The folder of a report's point."""
        asked = [budget.given for budget in self.budgets]
        return self.folders[asked.index(dict(report.budget))]


def saver(
    points: Points, out: Path, save: Callable[[nn.Module, Path], None]
) -> Callable[[nn.Module, Report], str]:
    """What saves each point in its own folder of `out`."""

    def each(model: nn.Module, report: Report) -> str:
        name = points.folder_of(report)
        save(model, out / name)
        return name

    return each


def judge(
    data: str, class_map: str | None, model: nn.Module, steps: Steps
) -> Callable[[nn.Module], tuple[float, int]]:
    """What measures top-1 of a model on labelled images."""
    from hwprune.data import evaluate, open_dataset

    images = open_dataset(data, model, class_map=class_map)

    def top1(pruned: nn.Module) -> tuple[float, int]:
        device = str(next(pruned.parameters()).device)
        found = evaluate(pruned, images, batch=64, device=device, progress=steps.of("evaluate"))
        return found.top1, found.images

    return top1


def remove_others(front: Front, out: Path) -> None:
    """Remove the points of a sweep that was there before and is replaced."""
    saved = {point["folder"] for point in front.points}
    for path in out.iterdir():
        if path.is_dir() and POINT.fullmatch(path.name) and path.name not in saved:
            shutil.rmtree(path)


def show_front(front: Front, out: Path, files: Sequence[str], notes: Sequence[str]) -> None:
    """Print the points, and where the picture is."""
    from hwprune.front import cost_of

    accuracy = front.dense["top1"] is not None
    rows = []
    for point in [front.dense, *front.points, *front.baselines]:
        asked = point["budget"].get(front.metric)
        row = [point["method"], "" if asked is None else f"{asked:g}"]
        for metric in ("macs", "params", "latency", "energy"):
            found = None if point["refused"] else cost_of(point, metric)
            row.append("" if found is None else f"{found['value']:.3f}")
        row.append(_loss(point))
        row += [_top1(point)] if accuracy else []
        rows.append(row)
    titles = ["", front.metric, "MACs", "params", "latency", "energy", f"distortion, {front.unit}"]
    kept = [c for c in range(len(titles)) if any(row[c] for row in rows)]
    names = [titles[c] for c in kept] + (["top-1"] if accuracy else [])
    body = [[row[c] for c in kept] + (row[len(titles) :]) for row in rows]
    after = [
        f"{point['budget']}: {point['refused']}"
        for point in [*front.points, *front.baselines]
        if point["refused"]
    ]
    timed = [p for p in front.points if (p["measured"] or {}).get("latency_ratio")]
    if any(row[4] for row in rows):
        after.append(f"latency and energy: {'measured' if timed else 'predicted'}, of dense")
    after += [f"note: {note}" for note in notes]
    after.append(f"written: {', '.join(str(out / name) for name in files)}")
    show(f"{len(front.points)} budgets -> {out}", names, body, *after)


def _loss(point: Mapping[str, Any]) -> str:
    found = (point["distortion"] or {}).get("measured")
    return "refused" if found is None else f"{found:.4g}"


def _top1(point: Mapping[str, Any]) -> str:
    if point["top1"] is None:
        return ""
    return f"{100 * point['top1']:.2f} ± {100 * point['top1_se']:.2f} %"
