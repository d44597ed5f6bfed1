"""What a person sees of a sensor: samples as they pass, a view, a CSV, a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes.virtual import Board, FakeSource, Sensor, VirtualClock
from rich.console import Console

import hwprune
from hwprune.meter.estimate import Unavailable
from hwprune.meter.watch import Sample, Watched, bars, live, plot, view, write_csv


class Desk:
    """A watched source over a board of 200 W."""

    def __init__(self, **source: Any) -> None:
        self.clock = VirtualClock()
        self.board = Board(self.clock, 200.0)
        self.watched = Watched(FakeSource(Sensor(self.board), cap_w=350.0, **source))

    def measure(self, seconds: float = 5.0) -> list[Sample]:
        with hwprune.measure_energy("board", source=self.watched, clock=self.clock) as e:
            self.clock.sleep(seconds)
        assert e.energy_j == pytest.approx(200 * seconds, rel=0.05)
        return self.watched.samples


@pytest.mark.parametrize(
    "source",
    [{}, {"counter": False}, {"instant": False, "average": False}],
    ids=["all", "power", "counter"],
)
def test_samples_show_power_and_energy_whatever_the_board_answers(source: dict[str, bool]) -> None:
    samples = Desk(**source).measure()
    assert len(samples) > 20
    assert samples[0].t_s == 0 and samples[0].energy_j == 0
    last = samples[-1]
    assert last.energy_j == pytest.approx(200 * last.t_s, rel=0.05)
    known = [s.power_w for s in samples if s.power_w is not None]
    assert sum(known) / len(known) == pytest.approx(200, rel=0.1)
    assert last.clock_sm_mhz == 1980 and last.temperature_c == 50
    assert all(b.t_s > a.t_s for a, b in pairwise(samples))


def test_hours_keep_some_thousand_samples() -> None:
    desk = Desk()
    for _ in range(12_000):
        desk.watched.read()
        desk.clock.sleep(0.1)
    samples = desk.watched.samples
    assert 2000 < len(samples) <= 8192
    assert samples[-1].t_s == pytest.approx(1200, rel=0.01)
    assert samples[-1].energy_j == pytest.approx(200 * 1200, rel=0.01)


def test_a_failed_reading_is_no_sample() -> None:
    desk = Desk(twist=lambda r: dataclasses.replace(r, error="lost", energy_mj=None, lost=True))
    assert desk.watched.read().lost
    assert not desk.watched.samples
    assert "no reading yet" in shown(desk.watched)


def shown(watched: Watched | Unavailable) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(view("python train.py", 12.4, watched))
    return out.getvalue()


def test_the_view_shows_power_clocks_and_joules_so_far() -> None:
    desk = Desk()
    desk.measure()
    text = shown(desk.watched)
    for piece in ("python train.py", "12 s", "200.0 W of 350", "1980 MHz", "50 °C", " J", "█"):
        assert piece in text, text
    assert "not measured: no board" in shown(Unavailable("no board"))


def test_bars_are_drawn_from_zero() -> None:
    assert bars([0, 50, 100]) == "▁▅█"
    assert bars([]) == "" and bars([0.0]) == "▁"
    assert len(bars([1.0] * 100, width=10)) == 10


def test_nothing_is_drawn_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with live("work", Unavailable("no board")):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_csv_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    file = tmp_path / "curve.csv"
    write_csv([Sample(0, 1.5, None, None, 2619, None)], file)
    (row,) = csv.DictReader(file.open())
    assert row == {
        "t_s": "0",
        "power_w": "1.5",
        "energy_j": "",
        "clock_sm_mhz": "",
        "clock_mem_mhz": "2619",
        "temperature_c": "",
    }


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_shows_the_curves(tmp_path: Path, ending: str) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install hwprune[plot]"
    )
    file = tmp_path / f"curve.{ending}"
    plot(Desk().measure(), file, "work on FAKE-BOARD", cap_w=350.0)
    assert file.stat().st_size > 5000
    if ending == "svg":
        assert "power limit" in file.read_text()
    with pytest.raises(ValueError, match="nothing was read"):
        plot([Sample(0, None, None, None, None, None)], file, "")
