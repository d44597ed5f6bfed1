"""What a person sees of a sensor: a live view on the terminal, a CSV and a picture at the end.

Nothing is polled for it: it looks on while the meter reads.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Capabilities, EnergySource, Reading

_EVERY_S = 0.09  # samples closer than that show the polling, not the device
_MOST = 8192  # samples kept; then every other one goes
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Sample:
    """One point of the curve; what the device does not tell is None.

    Attributes:
        t_s: since the first one.
        energy_j: since the first one: the counter, or power added up where there is none.
    """

    t_s: float
    power_w: float | None
    energy_j: float | None
    clock_sm_mhz: float | None
    clock_mem_mhz: float | None
    temperature_c: float | None


class Watched:
    """A source whose readings are remembered as they pass.

    Attributes:
        samples: oldest first, at most some thousands.
    """

    def __init__(self, source: EnergySource) -> None:
        self.samples: list[Sample] = []
        self._source = source
        self._every_s = _EVERY_S
        self._first: Reading | None = None
        self._last: Reading | None = None
        self._state: Reading | None = None

    @property
    def caps(self) -> Capabilities:
        """The source's."""
        return self._source.caps

    def read(self, state: bool = False) -> Reading:
        """The source's reading, remembered."""
        reading = self._source.read(state)
        if not reading.error:
            self._remember(reading)
        return reading

    def foreign(self) -> tuple[int, ...] | Unavailable:
        """The source's."""
        return self._source.foreign()

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _remember(self, reading: Reading) -> None:
        if reading.clock_sm_mhz is not None or reading.temperature_c is not None:
            self._state = reading
        if self._first is None:
            self._first = reading
        last = self._last or reading
        gap_s = (reading.t_ns - last.t_ns) / 1e9
        if self.samples and gap_s < self._every_s:
            return
        self._last = reading
        milliwatts = reading.instant_mw if reading.instant_mw is not None else reading.average_mw
        power_w = None if milliwatts is None else milliwatts / 1e3
        if reading.energy_mj is not None and self._first.energy_mj is not None:
            energy_j: float | None = (reading.energy_mj - self._first.energy_mj) / 1e3
            if power_w is None and gap_s > 0 and last.energy_mj is not None:
                power_w = (reading.energy_mj - last.energy_mj) / 1e3 / gap_s
        else:
            before = self.samples[-1].energy_j if self.samples else 0.0
            energy_j = (
                None if before is None or power_w is None else before + power_w * max(gap_s, 0.0)
            )
        state = self._state
        self.samples.append(
            Sample(
                t_s=(reading.t_ns - self._first.t_ns) / 1e9,
                power_w=power_w,
                energy_j=energy_j,
                clock_sm_mhz=state.clock_sm_mhz if state else None,
                clock_mem_mhz=state.clock_mem_mhz if state else None,
                temperature_c=state.temperature_c if state else None,
            )
        )
        if len(self.samples) > _MOST:
            self.samples = self.samples[::2]
            self._every_s *= 2


def bars(values: Sequence[float], width: int = 60) -> str:
    """The last values as a row of bars, from zero to the highest."""
    shown = list(values)[-width:]
    highest = max(shown, default=0.0) or 1.0
    return "".join(
        _BARS[min(len(_BARS) - 1, int(max(0.0, v) / highest * len(_BARS)))] for v in shown
    )


def view(title: str, seconds: float, watched: Watched | Unavailable) -> Table:
    """The live view at one moment."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(title, f"{seconds:.0f} s")
    if isinstance(watched, Unavailable):
        grid.add_row("energy", f"not measured: {watched.reason}")
        return grid
    samples = watched.samples
    if not samples:
        grid.add_row(watched.caps.device, "no reading yet")
        return grid
    now, power = samples[-1], [s.power_w for s in samples if s.power_w is not None]
    cap = "" if watched.caps.cap_w is None else f" of {watched.caps.cap_w:.0f}"
    cells = [
        ("power", now.power_w, f"W{cap}", 1),
        ("energy so far", now.energy_j, "J", 1),
        ("SM clock", now.clock_sm_mhz, "MHz", 0),
        ("memory clock", now.clock_mem_mhz, "MHz", 0),
        ("temperature", now.temperature_c, "°C", 0),
    ]
    for name, value, unit, digits in cells:
        if value is not None:
            grid.add_row(name, f"{value:.{digits}f} {unit}")
    if power:
        grid.add_row("", bars(power))
    return grid


@contextmanager
def live(
    title: str, watched: Watched | Unavailable, *, per_second: float = 1.0, quiet: bool = False
) -> Iterator[None]:
    """Show the view while a block runs: on stderr, and only on a terminal.

    Args:
        title: what is measured.
        watched: the source, or why there is none.
        per_second: how often it is drawn. Drawing takes about 1 ms of the process that may be the measured one.
        quiet: draw nothing.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    start = time.perf_counter()
    with Live(
        get_renderable=lambda: view(title, time.perf_counter() - start, watched),
        console=console,
        refresh_per_second=per_second,
        transient=True,
    ):
        yield


def write_csv(samples: Sequence[Sample], file: Path) -> None:
    """One line a sample; what is not known is empty."""
    names = [f.name for f in dataclasses.fields(Sample)]
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(names)
        for sample in samples:
            writer.writerow(
                "" if (value := getattr(sample, name)) is None else f"{value:.6g}" for name in names
            )


def plot(samples: Sequence[Sample], file: Path, title: str, cap_w: float | None = None) -> None:
    """Power, clocks and temperature over time, as the file's ending says (png, svg, pdf).

    Args:
        samples: at least one.
        file: where to.
        title: above it.
        cap_w: the power limit, drawn as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing to draw, or an ending matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a picture needs matplotlib, which is not installed: pip install 'hwprune[plot]'"
        ) from error
    curves: list[tuple[str, list[tuple[str, Callable[[Sample], float | None]]]]] = [
        ("power, W", [("power", lambda s: s.power_w)]),
        ("clock, MHz", [("SM", lambda s: s.clock_sm_mhz), ("memory", lambda s: s.clock_mem_mhz)]),
        ("temperature, °C", [("GPU", lambda s: s.temperature_c)]),
    ]
    known = [
        (unit, [(name, get) for name, get in lines if any(get(s) is not None for s in samples)])
        for unit, lines in curves
    ]
    known = [(unit, lines) for unit, lines in known if lines]
    if not known:
        raise ValueError(f"{file}: nothing was read that could be drawn")
    figure = Figure(figsize=(8, 1 + 2 * len(known)), layout="constrained")
    axes = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title)
    for axis, (unit, lines) in zip(axes, known, strict=True):
        for name, get in lines:
            points = [(s.t_s, value) for s in samples if (value := get(s)) is not None]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        if unit.startswith("power"):
            if cap_w is not None:
                axis.axhline(cap_w, color="grey", linestyle=":", label="power limit")
            axis.set_ylim(bottom=0)
        if len(axis.get_lines()) > 1:
            axis.legend(loc="lower right", fontsize="small")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("time, s")
    figure.savefig(file, dpi=120)
