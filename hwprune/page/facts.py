"""The tables of a report: what was asked and came of it, before and after, and where it all comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwprune.page.words import (
    MISSING,
    count,
    estimate,
    nbytes,
    number,
    percent,
    plain,
    quantity,
    ratio,
)

Report = Mapping[str, Any]
_METRICS = ("macs", "params")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row.

    Attributes:
        header: column names; () for none.
        rows: cells.
        notes: lines below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def is_diffusion(report: Report) -> bool:
    """Whether the report is of a denoiser."""
    return "distance" in report


def metric_name(report: Report, metric: str) -> str:
    """What macs and params are of."""
    if metric == "params":
        return "parameters"
    return "MACs of an evaluation" if is_diffusion(report) else "MACs of an image"


def part(report: Report, key: str) -> dict[str, Any]:
    """An object of the report; {} where it is not there or is something else."""
    found = report.get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def items(report: Report, key: str) -> list[dict[str, Any]]:
    """A list of objects of the report."""
    found = report.get(key)
    return [dict(x) for x in found if isinstance(x, Mapping)] if isinstance(found, list) else []


def asked(report: Report) -> Table:
    """Each limit: asked, predicted, measured, kept or not."""
    predicted, measured = part(report, "predicted"), part(report, "measured")
    rows, reasons = [], []
    for metric, limit in part(report, "budget").items():
        relative = number(limit) is not None and float(limit) <= 1
        told = f"at most {plain(limit)}{' of the dense model' if relative else ''}"
        if metric in _METRICS:
            name, got = metric_name(report, metric), number(report.get(f"{metric}_ratio"))
            now = got if relative else number(report.get(metric))
            text = f"{ratio(got, 1)} of dense ({count(report.get(metric))}), counted"
            within = "–" if now is None else _verdict(now <= float(limit) * 1.001)
            rows.append([name, told, text, text, within])
            continue
        before, after = (found.get(f"{metric}_ratio") for found in (predicted, measured))
        within = "–"
        if relative and isinstance(after, Mapping) and number(after.get("value")) is not None:
            lowest = number(after.get("lo"))
            if after["value"] <= float(limit):
                within = "yes"
            elif lowest is not None and lowest <= float(limit):
                within = "within its interval"
            else:
                within = "no"
        if number(_value(after)) is None:
            reasons.append(f"{metric} was not measured: {measured.get('reason', 'no reason told')}")
        rows.append([metric, told, _of_dense(before), _of_dense(after), within])
    return Table(("", "asked", "predicted", "measured", "kept"), rows, reasons)


def _value(figure: object) -> object:
    return figure.get("value") if isinstance(figure, Mapping) else None


def _of_dense(figure: object) -> str:
    text = estimate(figure)
    return text if text == MISSING else f"{text} of dense"


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


_ARM_ROWS = (
    ("latency of a batch, median", "latency_s", "s"),
    ("latency of a batch, 95th percentile", "latency_p95_s", "s"),
    ("CPU time of a batch", "cpu_time_s", "s"),
    ("images a second", "throughput_per_s", ""),
    ("power", "average_power_w", "W"),
    ("energy of an image", "energy_j", "J"),
    ("peak memory", "peak_memory_bytes", "bytes"),
)


def before_after(report: Report, stored_bytes: int | None) -> Table:
    """Every figure of the dense and of the pruned model; what was not measured says why.

    Args:
        report: with what `hwprune report --with` added.
        stored_bytes: of the tensor files in the folder; None = unknown.
    """
    rows: list[list[str]] = []
    notes: list[str] = []
    rows += _accuracy(report, notes)
    rows += _timed(report, notes)
    for metric in _METRICS:
        name = metric_name(report, metric)
        dense, now = report.get(f"dense_{metric}"), report.get(metric)
        rows.append([name, count(dense), count(now), ratio(now, dense)])
    params, dense_params = number(report.get("params")), number(report.get("dense_params"))
    if stored_bytes is not None and params and dense_params:
        dense_bytes = stored_bytes * dense_params / params
        rows.append(
            [
                "weights on disk",
                f"{nbytes(dense_bytes)} (computed)",
                nbytes(stored_bytes),
                ratio(stored_bytes, dense_bytes),
            ]
        )
    return Table(("", "dense", "pruned", "pruned / dense"), rows, notes)


def _accuracy(report: Report, notes: list[str]) -> list[list[str]]:
    """Top-1 and top-5 rows, or why there are none."""
    found = {str(r.get("of")): r for r in items(report, "evaluations")}
    if is_diffusion(report):
        return []
    if not found:
        notes.append(
            "accuracy was not evaluated in this run, which knows no labels: `hwprune eval FOLDER --data DATA "
            "--json eval.json`, then `hwprune report FOLDER --with eval.json`"
        )
        return [["top-1", MISSING, MISSING, "–"]]
    rows = []
    for key, name in (("top1", "top-1"), ("top5", "top-5")):
        cells = []
        for arm in ("dense", "pruned"):
            result = found.get(arm, {})
            value, images = number(result.get(key)), number(result.get("images"))
            error = (value * (1 - value) / images) ** 0.5 if value is not None and images else None
            cells.append(percent(value, error))
        if key == "top1" or any(cell != MISSING for cell in cells):
            values = [number(found.get(arm, {}).get(key)) for arm in ("pruned", "dense")]
            known = values[0] is not None and values[1] is not None
            change = f"{100 * (values[0] - values[1]):+.2f} points" if known else "–"  # type: ignore[operator]
            rows.append([name, *cells, change])
    told = sorted({f"{r.get('data')}, {r.get('images')} images" for r in found.values()})
    notes.append(f"accuracy on {'; '.join(told)}; ± is the standard error")
    return rows


def _timed(report: Report, notes: list[str]) -> list[list[str]]:
    """Rows of latency, power, energy and memory, from the run itself or a measurement added later."""
    added = items(report, "measurements")
    source = added[-1] if added else part(report, "measured")
    arms = part(source, "arms")
    settings = part(source, "settings")
    names = list(arms)
    if not names:
        reason = part(report, "measured").get("reason", "this run timed nothing")
        how = "`hwprune measure FOLDER --against DENSE --json m.json` and `hwprune report FOLDER --with m.json`"
        if is_diffusion(report):
            how = "a budget of latency or energy on a profile of this machine has them measured"
        notes.append(f"latency, power and energy were not measured: {reason}; {how}")
        return [[name, MISSING, MISSING, "–"] for name, _, unit in _ARM_ROWS if unit != "bytes"]
    pruned = part(arms, names[0])
    dense = part(arms, names[1]) if len(names) > 1 else {}
    rows, missing = [], dict[str, list[str]]()
    for name, key, unit in _ARM_ROWS:
        cells = []
        for arm in (dense, pruned):
            figure = arm.get(key)
            cells.append(nbytes(_value(figure)) if unit == "bytes" else estimate(figure, unit))
        rows.append([name, *cells, ratio(_value(pruned.get(key)), _value(dense.get(key)))])
        if isinstance(pruned.get(key), Mapping) and "reason" in pruned[key]:
            missing.setdefault(str(pruned[key]["reason"]), []).append(name)
    notes += [f"{', '.join(names)}: not measured: {reason}" for reason, names in missing.items()]
    told = {k: settings[k] for k in ("batch", "dtype", "mode", "l2", "device") if k in settings}
    if told:
        notes.append(f"timed with {plain(told)}; figures are medians with 95 % intervals")
    return rows


def distance(report: Report) -> Table | None:
    """How far the pruned denoiser's final latents are from the dense one's."""
    far, counts = part(report, "distance"), part(report, "images")
    if not far:
        return None
    error = quantity(far.get("held_se"), "")
    rows = [
        [
            f"held-out images ({plain(counts.get('held'))})",
            f"{quantity(far.get('held'), '')} ± {error}",
            percent(far.get("relative")),
        ],
        [
            f"images masks were chosen by ({plain(counts.get('check'))})",
            quantity(far.get("check"), ""),
            "",
        ],
        ["the same, before repair", quantity(far.get("unrepaired"), ""), ""],
    ]
    header = ("final latents", "mean squared distance", "of the dense latents' variance")
    return Table(header, rows)


def distortion(report: Report) -> Table | None:
    """What the output lost, as the curves predicted it and as it was measured."""
    loss = part(report, "distortion")
    if not loss:
        return None
    images = plain(part(report, "calibration").get("images"))
    rows = [
        ["predicted by the curves", quantity(loss.get("predicted"), "")],
        [f"measured on the {images} calibration images", quantity(loss.get("measured"), "")],
    ]
    return Table(("", str(loss.get("unit", ""))), rows)


def plans(report: Report) -> Table | None:
    """Every plan that was tried on images, as the curves predicted it and as it truly was."""
    tried = items(report, "plans")
    if not tried:
        return None
    rows = [
        [
            "by the curves alone" if i == 0 else f"{i}",
            quantity(row.get("predicted"), ""),
            f"{quantity(row.get('true'), '')} ± {quantity(row.get('true_se'), '')}",
            plain(row.get("images")),
            ratio(row.get("macs"), report.get("dense_macs")),
            "kept" if row.get("won") else "",
        ]
        for i, row in enumerate(tried)
    ]
    header = ("plan", "predicted", "true", "images", "of MACs", "")
    return Table(
        header,
        rows,
        ["true: cut, repaired on some images and run on others; fewer images where it fell behind"],
    )


def provenance(report: Report) -> list[tuple[str, Table]]:
    """Calibration, times by step, versions and the machine."""
    tables = []
    for title, key in (
        ("Calibration", "calibration"),
        ("Sampling", "sampling"),
        ("Images", "images"),
        ("Learning", "learning"),
        ("Environment", "environment"),
        ("Seconds by step", "seconds_by_step"),
    ):
        found = part(report, key)
        rows = [[k, plain(v)] for k, v in found.items() if k not in ("command", "losses")]
        if rows:
            tables.append((title, Table((), rows)))
    return tables


def command(report: Report) -> str:
    """The command to re-run, where one was recorded."""
    return str(part(report, "environment").get("command", ""))


def kept_by_kind(report: Report) -> dict[str, list[tuple[str, int, int]]]:
    """Kind -> (layer, kept, of), of either form of report."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    names = {"qk": "q/k channels of a head", "v": "v/o channels of a head"}
    for row in items(report, "layers"):
        layer = str(row.get("layer"))
        if isinstance(row.get("kept"), Mapping):
            of = part(row, "of")
            cells = [(k, v, of[k]) for k, v in row["kept"].items() if k in of]
        else:
            cells = [(str(row.get("kind")), row.get("kept"), row.get("of"))]
        for kind, kept, whole in cells:
            if number(kept) is not None and number(whole):
                title = names.get(kind, kind if kind.endswith("s") else f"{kind}s")
                title = re.sub(r"^depths$", "blocks of the network", title)
                found.setdefault(title, []).append((layer, int(kept), int(whole)))
    return found
