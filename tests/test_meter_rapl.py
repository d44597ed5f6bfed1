"""CPU packages through a folder like /sys/class/powercap: wraps, permissions, nothing counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.virtual import VirtualClock

import hwprune
from hwprune.meter.energy_window import Chunk, EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.open import open_source
from hwprune.meter.rapl import RaplSource, open_rapl
from hwprune.meter.window import energy_of

RANGE_UJ = 262_143_328_850  # of a real package: 874 s at 300 W


class Tree:
    """A powercap folder whose packages draw constant power by a virtual clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, VirtualClock()
        self._drawing: list[tuple[Path, int, float]] = []
        self._start = self.clock.now_ns()

    def add(self, zone: str, name: str, uj: int = 0, watts: float = 0.0) -> Path:
        at = self.folder / zone
        at.mkdir()
        (at / "name").write_text(name + "\n")
        (at / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (at / "constraint_0_power_limit_uw").write_text("300000000\n")
        (at / "energy_uj").write_text(f"{uj}\n")
        self._drawing.append((at / "energy_uj", uj, watts))
        return at

    def now(self) -> None:
        """Write what the counters show at this moment."""
        seconds = (self.clock.now_ns() - self._start) / 1e9
        for file, uj, watts in self._drawing:
            file.write_text(f"{int(uj + watts * seconds * 1e6) % (RANGE_UJ + 1)}\n")

    def open(self) -> RaplSource:
        source = open_rapl(self.clock, self.folder)
        assert isinstance(source, RaplSource), source
        read = source.read
        source.read = lambda state=False: (self.now(), read(state))[1]  # type: ignore[method-assign]
        return source


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def joules_after(tree: Tree, source: RaplSource, seconds: float) -> float:
    first = source.read()
    tree.clock.sleep(seconds)
    last = source.read()
    assert first.energy_mj is not None and last.energy_mj is not None and first.epoch == last.epoch
    return (last.energy_mj - first.energy_mj) / 1e3


def test_packages_are_added_and_their_parts_are_not(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", 5_000, 100.0)
    tree.add("intel-rapl:0:0", "core", 0, 70.0)
    tree.add("intel-rapl:0:1", "dram", 0, 20.0)
    tree.add("intel-rapl:1", "package-1", 0, 50.0)
    tree.add("intel-rapl:2", "psys", 0, 500.0)
    tree.add("intel-rapl:3", "package-1", 0, 50.0)  # the same die again
    tree.add("intel-rapl-mmio:0", "package-0", 0, 100.0)
    source = tree.open()
    assert source.caps.identity == "package-0,package-1" and source.caps.scope == "package"
    assert joules_after(tree, source, 10) == pytest.approx(1500, rel=1e-6)


def test_two_dies_of_one_package_are_two(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0-die-0", 0, 100.0)
    tree.add("intel-rapl:1", "package-0-die-1", 0, 60.0)
    assert joules_after(tree, tree.open(), 10) == pytest.approx(1600, rel=1e-6)


def test_one_wrap_is_exact(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", RANGE_UJ - 1_000_000, 250.0)
    tree.add("intel-rapl:1", "package-1", 17, 50.0)
    source = tree.open()
    assert joules_after(tree, source, 30) == pytest.approx(9000, abs=1e-3)


def test_many_wraps_are_followed_while_it_is_read(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", 0, 299.0)
    source = tree.open()
    first = source.read()
    for _ in range(27):  # three hours, a wrap each quarter of one
        tree.clock.sleep(400)
        last = source.read()
    assert first.energy_mj is not None and last.energy_mj is not None
    assert (last.energy_mj - first.energy_mj) / 1e3 == pytest.approx(299 * 27 * 400, rel=1e-9)
    assert last.epoch == first.epoch


def test_a_block_with_a_wrap_inside_is_measured(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", RANGE_UJ - 4_000_000_000, 299.0)
    with hwprune.measure_energy("rapl", source=tree.open(), clock=tree.clock) as e:
        tree.clock.sleep(30)
    assert e.energy_j == pytest.approx(299 * 30, rel=1e-3)
    assert e.scope == "package" and e.uncertainty_rel is not None and e.uncertainty_rel < 1e-3


def test_what_may_have_wrapped_unseen_is_not_compared(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", 0, 300.0)
    source = tree.open()
    first = source.read()
    tree.clock.sleep(RANGE_UJ / 1e6 / 300 + 100)
    assert source.read().epoch > first.epoch


def test_energy_of_work_on_a_cpu(tree: Tree) -> None:
    tree.add("intel-rapl:0", "package-0", 0, 42.0)
    source = tree.open()

    def work() -> Chunk:
        tree.clock.sleep(0.1)
        return Chunk(4)

    found = energy_of(source, work, clock=tree.clock, idle_w=12.0)
    assert isinstance(found, EnergyWindow)
    assert found.flags == ("no_cross_check",) and found.status == "ok"
    assert found.energy_per_iteration_j == pytest.approx(42 * 0.025, rel=2e-3)
    assert found.dynamic_energy_j == pytest.approx(30 * found.duration_s, rel=2e-3)


@pytest.mark.parametrize(
    ("break_it", "piece"),
    [
        (lambda zone: (zone / "energy_uj").unlink(), "is no more"),
        (lambda zone: (zone / "energy_uj").write_text("nonsense"), "could not be read"),
    ],
)
def test_a_counter_that_breaks_gives_no_figure(
    tree: Tree, break_it: Callable[[Path], object], piece: str
) -> None:
    zone = tree.add("intel-rapl:0", "package-0", 0, 42.0)
    source = open_rapl(tree.clock, tree.folder)
    assert isinstance(source, RaplSource)
    with hwprune.measure_energy("rapl", source=source, clock=tree.clock) as e:
        tree.clock.sleep(1)
        break_it(zone)
        tree.clock.sleep(1)
    assert e.energy_j is None and piece in e.reason and e.duration_s == pytest.approx(2)


def test_what_cannot_be_had_is_told(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_rapl(powercap=tree.folder / "nowhere")
    assert isinstance(found, Unavailable) and "shows no RAPL" in found.reason
    assert isinstance(open_rapl(powercap=tree.folder), Unavailable)
    tree.add("intel-rapl:0", "psys")
    found = open_rapl(powercap=tree.folder)
    assert isinstance(found, Unavailable) and "no CPU package" in found.reason
    zone = tree.add("intel-rapl:1", "package-0")
    read = Path.read_text

    def forbidden(path: Path, *words: str, **options: str) -> str:
        if path == zone / "energy_uj":  # root, who runs some tests, may read anything
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words, **options)

    monkeypatch.setattr(Path, "read_text", forbidden)
    found = open_rapl(powercap=tree.folder)
    assert isinstance(found, Unavailable) and "root" in found.reason
    assert "energy_uj" in found.reason


@pytest.mark.parametrize("spec", ["rapl", "cpu"])
def test_this_machine_gives_joules_or_a_reason(spec: str) -> None:
    source = open_source(spec)
    if isinstance(source, Unavailable):
        assert source.reason
    else:
        assert source.read().energy_mj is not None
    with hwprune.measure_energy(spec) as e:
        sum(i * i for i in range(1_000_000))
    assert (e.energy_j is None) == bool(e.reason)
    assert e.duration_s is not None and e.duration_s > 0
