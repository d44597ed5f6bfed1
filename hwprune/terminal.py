"""What the command line shows: progress with time left, tables within 100 columns, JSON files.

Progress goes to stderr and only to a terminal; results go to stdout. NO_COLOR, which --no-color sets, is
honoured by rich.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

WIDTH = 100  # columns; tables are no wider, on a terminal or in a file
STDOUT = "-"  # the word for --json


class Steps:
    """The steps of a command, each with its share done and the time left; silent when piped."""

    def __init__(self, *, still: bool = False) -> None:
        """Make it; nothing shows before a step is reported.

        Args:
            still: draw only when a step is reported, without the thread that else redraws ten times a
                second: it would take its millisecond from whatever is being timed.
        """
        console = Console(stderr=True)
        self._still = still
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            auto_refresh=not still,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Steps:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wipe the bars and give the terminal back as it was."""
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` of a step is through, with a word on how it stands."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total, note="")
        self._progress.update(self._tasks[step], completed=done, total=total, note=note)
        if self._still:
            self._progress.refresh()

    def of(self, step: str) -> Callable[[int, int], None]:
        """The same for one step: called with (done, total)."""
        return lambda done, total: self(step, done, total)


def show(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *after: str,
    left: bool = False,
) -> None:
    """Print a title, a table and lines to stdout.

    Args:
        title: above the table.
        header: column names; "" for all leaves the header out.
        rows: cells; the first column is text, the others are figures.
        after: lines below, wrapped.
        left: the other columns are text too, whole words to a line.
    """
    console = Console(highlight=False, soft_wrap=False)
    # In a file there is no width to fit to but our own.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    table = Table(box=SIMPLE, show_header=any(header), header_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i and not left else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a path may hold [brackets]
    console.print(title, style="bold", markup=False, overflow="fold")
    console.print(table)
    for line in after:
        console.print(line, markup=False, overflow="fold")


def check_json(target: str | None) -> None:
    """Refuse a place for JSON that cannot be written, before the long work.

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: its folder cannot be written.
        IsADirectoryError: it is a folder.
    """
    if target in (None, STDOUT):
        return
    path = Path(str(target))
    if path.is_dir():
        raise IsADirectoryError(f"--json {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: no such folder {path.parent}; make it first")
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--json {path}: the folder {path.parent} cannot be written")


def write_json(target: str, found: Mapping[str, Any]) -> None:
    """Write JSON to a file, whole or not at all, or to stdout for "-".

    Raises:
        OSError: it cannot be written; a file that was there is as it was.
    """
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    path = Path(target).resolve()  # through a link, whose target is replaced and not the link
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():  # a pipe or /dev/null: nothing to replace
            path.write_text(text, encoding="utf-8")
        else:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
    except OSError as error:
        raise OSError(f"--json {target} could not be written: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def figure(value: float, like: float | None = None) -> str:
    """A count in the unit a person reads: 1.258 G, 5.717 M; in the unit of `like` where given."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value if like is None else like) >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:.0f}"


def on_device_lines(report: Mapping[str, Any]) -> list[str]:
    """A line a metric of the device: what was measured, what was predicted."""
    lines = []
    for metric in ("latency", "energy", "memory"):
        words = []
        for when in ("measured", "predicted"):
            figure = report[when].get(f"{metric}_ratio")
            if figure:
                ends = f"[{figure['lo']:.3f}, {figure['hi']:.3f}]"
                words.append(f"{figure['value']:.3f} {ends} {when}")
        if words:
            lines.append(f"{metric}, of dense: {', '.join(words)}")
    return lines


def show_report(report: Mapping[str, Any], next_step: str, *notes: str) -> None:
    """Print what a pruning run did.

    Args:
        report: `Report.to_dict()`, with model, out, format and page.
        next_step: a command to go on with.
        notes: what the user should know of the model; empty ones are left out.
    """
    loss, seconds = report["distortion"], report["seconds_by_step"]
    took = ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())
    after = [
        f"distortion: {loss['measured']:.4g} {loss['unit']} on {report['calibration']['images']} "
        f"calibration images (predicted {loss['predicted']:.4g})",
        *_plans_line(report.get("plans", ()), loss["unit"]),
        *on_device_lines(report),
        f"time: {report['seconds']:.1f} s ({took})",
        *(f"warning: {warning}" for warning in report["warnings"]),
        *(f"note: {note}" for note in notes if note),
        *([f"note: {_DENSE_FORM}"] if report["format"] == "dense" else []),
    ]
    title = f"{report['model']} -> {report['out']}"
    show(title, ("", "dense", "pruned", "kept"), _totals(report), *after)
    show_next(next_step, report.get("page"))


def _plans_line(plans: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """What trying other plans brought; nothing where none was tried."""
    won = next((i for i, plan in enumerate(plans) if plan["won"]), None)
    if won is None:
        return []
    first, best = plans[0], plans[won]
    what = "the first is kept" if won == 0 else f"number {won} is kept"
    return [
        f"plans tried: {len(plans)}, {what}: {best['true']:.4g} +- {best['true_se']:.2g} {unit} on "
        f"{best['images']} images (the curves' own plan: {first['true']:.4g})"
    ]


def show_next(next_step: str, page: str | None) -> None:
    """Print where the page is and how to go on, not wrapped: both are there to be copied."""
    if page is not None:
        print(f"report: {page}")
    print(f"next: {next_step}")


def show_folder(found: Mapping[str, Any]) -> None:
    """Print what a folder holds, as `hwprune.structure.describe` tells it."""
    layers, told = found["layers"], found["provenance"]
    by_tiles = any("tiles" in row for row in layers)
    columns = []
    for name in ("heads", "qk", "v", "neurons", "tiles", "modulations", "blocks"):
        cells = [row[name] for row in layers if name in row]
        if any(kept < of for kept, of in cells) or (cells and not by_tiles):
            columns.append(name)
    rows = [
        [
            row["layer"],
            *(f"{row[c][0]} of {row[c][1]}" if c in row else "" for c in columns),
            *_params_of(row),
        ]
        for row in layers
    ]
    title = f"{found['folder']}: {found['base']['architecture']}, {found['bytes'] / 1e6:.1f} MB"
    show(title, ("", "dense", "here", "kept"), _totals(found))
    after = [f"note: {_DENSE_FORM}"] if found["format"] == "dense" else []
    after += [f"left dense: {reason}" for reason in found["left_dense"]]
    if "budget" in told:
        asked = ", ".join(
            f"{what}={value if isinstance(value, str) else format(value, 'g')}"
            for what, value in told["budget"].items()
        )
        images = told.get("calibration", {}).get("images")
        by = f"pruned to {asked} by {', '.join(found['kinds'])}"
        after.append(by if images is None else f"{by}, {images} calibration images")
    if "environment" in told:
        used = {k: v for k, v in told["environment"].items() if k != "command"}
        after.append("with " + ", ".join(f"{k} {v}" for k, v in used.items()))
    names = ["q/k" if name == "qk" else name for name in columns]
    show("layers", ("layer", *names, "params", "kept"), rows, *after)


def _params_of(row: Mapping[str, Any]) -> list[str]:
    """Parameters of a layer and their share; empty where its name is another one in the pruned model."""
    if row["params"] is None:
        return ["", ""]
    share = row["params"] / row["dense_params"] if row["dense_params"] else 1.0
    return [figure(row["params"], row["dense_params"]), f"{share:.3f}"]


_DENSE_FORM = "saved in dense form: zeros in the original shapes, which run at the dense cost"


def _totals(found: Mapping[str, Any]) -> list[list[str]]:
    """The rows for MACs and parameters: dense, now, kept."""
    return [
        [
            name,
            figure(dense := found[f"dense_{key}"]),
            figure(found[key], dense),
            f"{found[key] / dense:.3f}",
        ]
        for name, key in (("MACs of an image", "macs"), ("parameters", "params"))
        if found[key] is not None
    ]
