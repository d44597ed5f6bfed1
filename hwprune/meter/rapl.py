"""Energy of CPU packages through RAPL, as Linux shows it under /sys/class/powercap.

Packages only: cores, DRAM and the platform are parts of each other, and adding them counts joules twice. The
counter of a package wraps (about every quarter of an hour at 300 W), which is followed exactly as long as it is
read often enough.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Capabilities, Reading

POWERCAP = Path("/sys/class/powercap")
_GUESSED_LIMIT_W = 500.0  # where a package does not state its limit: above any socket sold


@dataclass
class _Package:
    """One package's counter.

    Attributes:
        name: "package-0".
        file: of microjoules.
        range_uj: where it wraps.
        limit_w: most it may draw for long.
        last_uj: as last read.
    """

    name: str
    file: Path
    range_uj: int
    limit_w: float
    last_uj: int

    @property
    def blind_ns(self) -> float:
        """Unread for longer, it could have wrapped unseen (half its range at its limit)."""
        return self.range_uj / 2 / self.limit_w * 1e3


class RaplSource:
    """All packages of this machine, added up; open it with `open_rapl`."""

    def __init__(self, packages: list[_Package], missing: dict[str, str], clock: Clock) -> None:
        self._packages = packages
        self._clock = clock
        self._last_ns = clock.now_ns()
        self._total_uj = 0
        self._epoch = 0
        self._lost = ""
        self._caps = Capabilities(
            backend="rapl",
            device=_processor(),
            scope="package",
            counter=True,
            instant=False,
            average=False,
            refresh_s=0.001,
            continuous=True,
            cap_w=None,
            identity=",".join(p.name for p in packages),
            mapping="index",
            missing=missing,
        )

    @property
    def caps(self) -> Capabilities:
        """A counter of energy alone."""
        return self._caps

    def read(self, state: bool = False) -> Reading:
        """One reading of every package; the sum since it was opened, wraps followed."""
        before = self._clock.now_ns()
        if self._lost:
            return Reading(before, error=self._lost, lost=True)
        try:
            found = [int(p.file.read_text()) for p in self._packages]
        except FileNotFoundError as error:
            self._lost = f"RAPL is gone: {error.filename} is no more"
            return Reading(before, error=self._lost, lost=True)
        except (OSError, ValueError) as error:
            reason = f"RAPL could not be read: {error}"
            return Reading(before, status={"energy_mj": reason}, error=reason)
        after = self._clock.now_ns()
        for package, value_uj in zip(self._packages, found, strict=True):
            if after - self._last_ns > package.blind_ns:
                self._epoch += 1  # it may have wrapped more than once since it was last read
            self._total_uj += (value_uj - package.last_uj) % package.range_uj
            package.last_uj = value_uj
        self._last_ns = after
        return Reading(
            t_ns=(before + after) // 2,
            took_ns=after - before,
            energy_mj=self._total_uj / 1e3,
            epoch=self._epoch,
        )

    def foreign(self) -> tuple[int, ...] | Unavailable:
        """A CPU always has other processes."""
        return Unavailable("a CPU package serves every process of the machine")

    def close(self) -> None:
        """Nothing is kept open."""


def open_rapl(clock: Clock | None = None, powercap: Path = POWERCAP) -> RaplSource | Unavailable:
    """Opens the packages of this machine.

    Args:
        clock: a test's own.
        powercap: a test's own folder.
    """
    if not powercap.is_dir():
        return Unavailable(
            f"no {powercap}: this system (a container or a virtual machine, or not Linux) shows no RAPL"
        )
    packages: dict[str, _Package] = {}
    missing: dict[str, str] = {}
    # intel-rapl:0 is a package (AMD's too), intel-rapl:0:0 a part of it, intel-rapl-mmio:0 the same again.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith("package") or name in packages:
                continue
            packages[name] = _Package(
                name,
                zone / "energy_uj",
                int((zone / "max_energy_range_uj").read_text()) + 1,
                _limit_w(zone),
                int((zone / "energy_uj").read_text()),
            )
        except PermissionError as error:
            return Unavailable(
                f"{error.filename} may be read by root alone (since CVE-2020-8694): run as root, or ask for "
                "the right to read it"
            )
        except (OSError, ValueError) as error:
            missing[zone.name] = str(error)
    if not packages:
        why = f" ({'; '.join(f'{k}: {v}' for k, v in missing.items())})" if missing else ""
        return Unavailable(f"{powercap} shows no CPU package{why}")
    return RaplSource(list(packages.values()), missing, clock or RealClock())


def _limit_w(zone: Path) -> float:
    """The long-term power limit a package states."""
    try:
        watts = int((zone / "constraint_0_power_limit_uw").read_text()) / 1e6
    except (OSError, ValueError):
        return _GUESSED_LIMIT_W
    return watts if watts > 0 else _GUESSED_LIMIT_W


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"
