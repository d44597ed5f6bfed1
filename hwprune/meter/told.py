"""A measurement as a person reads it: figures in their units, a table of 100 columns, what to know of it."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from hwprune.meter.energy_window import FLAGS as WINDOW_FLAGS
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.memory import Memory

if TYPE_CHECKING:
    from hwprune.meter.measurement import Measurement

WIDTH = 100
FLAGS = {
    **WINDOW_FLAGS,
    "few_rounds": "so few rounds that the interval is their range and covers less than 95 %",
    "few_calls": "too few calls for a 95th percentile: it is the slowest but a few",
    "short_warm_up": "warmed up by fewer than 20 calls, because they are long",
    "compiles_all_the_time": "something is compiled in every call, and is part of its time",
    "launch_bound": "the device waits for the host; try --mode graph",
    "preempted": "other processes held the CPU for more than a tenth of its time: its ratio to others still "
    "stands, its latency is that of a busy machine",
    "gaps": "more than 2 % of the time lies between the calls",
    "grad_enabled": "it switches gradients on by itself, and pays for it",
    "was_training": "it was in train mode, and was measured in eval mode",
    "writes_its_weights": "it changed its own parameters while it ran",
    "output_changed": "its output after the timing is not that of before",
    "inputs_not_varied": "the inputs cannot be varied, so that it really computes was not checked",
    "constant_inputs": "the inputs hold one value only; real data is slower and hotter",
    "cache_size_assumed": "the size of the last-level cache is not told; 64 MiB were assumed",
}


def quantity(value: float, unit: str) -> str:
    """A number in the size of unit a person reads: 12.34 ms, 3.210 J, 812.0 µs."""
    if not unit:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    size, prefix = next(
        ((s, p) for s, p in ((1, ""), (1e-3, "m"), (1e-6, "µ")) if abs(value) >= s), (1e-9, "n")
    )
    return f"{value / size:.4g} {prefix}{unit}"


def figure(found: Estimate | Unavailable, unit: str) -> str:
    """A figure with half its interval; "-" where there is none."""
    if isinstance(found, Unavailable):
        return "-"
    mark = "?" if "few_rounds" in found.flags else ""
    return f"{quantity(found.value, unit)} ±{100 * found.half_width_rel:.2g}%{mark}"


def _peak(found: Memory | Unavailable) -> str:
    return "-" if isinstance(found, Unavailable) else f"{found.peak_bytes / 1e6:.1f} MB"


def table(measurement: Measurement) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one column an arm. A row that says nothing for any arm is left out."""
    arms = list(measurement.arms.values())
    main = measurement.model.name
    ratios = [measurement.ratio(main, arm.name) for arm in arms[1:]]
    named = [
        ("latency, p50", [figure(a.latency_s, "s") for a in arms]),
        ("latency, p95", [figure(a.latency_p95_s, "s") for a in arms]),
        ("images a second", [figure(a.throughput_per_s, "") for a in arms]),
        ("CPU time a call", [figure(a.cpu_time_s, "s") for a in arms]),
        ("peak memory", [_peak(a.memory) for a in arms]),
        ("power", [figure(a.average_power_w, "W") for a in arms]),
        ("energy an image", [figure(a.energy_j, "J") for a in arms]),
        (f"{main} / it: latency", ["", *(figure(r.latency, "") for r in ratios)]),
        ("  which is", ["", *(r.latency_verdict for r in ratios)]),
        (f"{main} / it: CPU time", ["", *(figure(r.cpu_time, "") for r in ratios)]),
        (f"{main} / it: energy", ["", *(figure(r.energy, "") for r in ratios)]),
        ("  which is", ["", *(r.energy_verdict for r in ratios)]),
    ]
    rows = [[name, *cells] for name, cells in named if any(c not in ("", "-") for c in cells)]
    return ["", *(arm.name for arm in arms)], rows


def notes(measurement: Measurement) -> list[str]:
    """The lines below the table."""
    found, settings, arms = [], measurement.settings, measurement.arms.values()
    split = measurement.split()
    if not isinstance(split, Unavailable):
        main = measurement.model.name
        found.append(
            f"split of the latency: value (masked / dense) {figure(split.value.latency, '')}, structure "
            f"({main} / masked) {figure(split.structure.latency, '')}; its own weights by random ones "
            f"{figure(split.weights.latency, '')}"
        )
    before, after = measurement.noise_rel
    rounds = len(next(iter(measurement.rounds_s.values()), ()))
    found.append(
        f"A/A {figure(measurement.aa.latency, '')}; {rounds} rounds, {len(measurement.discarded)} discarded; "
        f"noise of the machine {100 * before:.1f} % before, {100 * after:.1f} % after"
    )
    found.append(
        f"batch {settings['batch']}, {settings['dtype']}, {settings['mode']}, {settings['l2']} caches, "
        f"{settings['device']}"
    )
    if measurement.energy_reason and settings["energy"]:
        found.append(f"energy unavailable: {measurement.energy_reason}")
    found += [f"{arm.name} has no figures: {arm.error}" for arm in arms if arm.error]
    for flag in dict.fromkeys(flag for arm in arms for flag in arm.flags):
        which = ", ".join(arm.name for arm in arms if flag in arm.flags)
        found.append(f"warning: {which}: {FLAGS.get(flag, flag)}")
    return [*found, *(f"warning: {warning}" for warning in measurement.warnings)]


def text(measurement: Measurement) -> str:
    """The table and the lines below it, at most 100 columns wide."""
    header, rows = table(measurement)
    drawn = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(header):
        drawn.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        highlight=False,
        markup=False,
        force_terminal=False,
        color_system=None,
    )
    console.print(drawn)
    for note in notes(measurement):
        console.print(note)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def html_text(measurement: Measurement) -> str:
    """The same as HTML, for notebooks."""
    header, rows = table(measurement)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes(measurement))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
