"""A device's measurements: one JSON a device in profiles/, written by `hwprune profile`, never by hand.

Schema hwprofile/1: units in the names, null with a reason for what was not measured, a hash over the
content. A profile whose hash does not fit, whose numbers are synthetic, or which another device wrote is
refused or flagged, never used silently.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwprune.ops import Op

SCHEMA = "hwprofile/1"
MODES = ("eager", "compile", "graph")
L2_STATES = ("hot", "cold")
_DRIVER = Path("/proc/driver/nvidia/version")
FOLDER = Path(__file__).resolve().parent / "profiles"


class ProfileError(ValueError):
    """A file is no profile, or not one to rely on."""


@dataclass(frozen=True)
class Entry:
    """One operation, measured.

    Attributes:
        op: what ran.
        latency_s: median over rounds.
        lo_s, hi_s: its 95 % interval.
        rounds: how many.
        p95_s: of single calls.
        power_w: average while it ran, or None.
        energy_j: of one call, or None.
        status: "ok", "ambiguous", "unsteady"; with the reason where energy is None.
        mode: eager, compile or graph.
        l2: hot or cold.
        values: what the data were.
    """

    op: Op
    latency_s: float
    lo_s: float
    hi_s: float
    rounds: int
    p95_s: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    status: str = "ok"
    mode: str = "eager"
    l2: str = "hot"
    values: str = "normal"

    def to_dict(self) -> dict[str, Any]:
        """As the schema has it: microseconds, watts, microjoules."""
        micro = 1e6
        return {
            **self.op.to_dict(),
            "values": self.values,
            "mode": self.mode,
            "l2": self.l2,
            "latency_us": {
                "median": _digits(self.latency_s * micro),
                "ci": [_digits(self.lo_s * micro), _digits(self.hi_s * micro)],
                "n_rounds": self.rounds,
                "p95": None if self.p95_s is None else _digits(self.p95_s * micro),
            },
            "power_w": None if self.power_w is None else _digits(self.power_w),
            "energy_uj": None if self.energy_j is None else _digits(self.energy_j * micro),
            "status": self.status,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Entry:
        """The inverse of `to_dict`.

        Raises:
            ProfileError: a field is missing, or a figure is not positive and finite.
        """
        try:
            told = found["latency_us"]
            lo, hi = told["ci"]
            figures = [_figure(told["median"]), _figure(lo), _figure(hi)]
            energy, power, p95 = found["energy_uj"], found["power_w"], told.get("p95")
            entry = cls(
                Op.from_dict(dict(found)),
                figures[0] / 1e6,
                figures[1] / 1e6,
                figures[2] / 1e6,
                rounds=int(told["n_rounds"]),
                p95_s=None if p95 is None else _figure(p95) / 1e6,
                power_w=None if power is None else _figure(power),
                energy_j=None if energy is None else _figure(energy) / 1e6,
                status=str(found["status"]),
                mode=str(found["mode"]),
                l2=str(found["l2"]),
                values=str(found["values"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProfileError(f"expected an entry of {SCHEMA}, got {found!r}: {error!r}") from None
        optional = (entry.p95_s, entry.energy_j, entry.power_w)
        measured = [*figures, *(f for f in optional if f is not None)]
        if not all(math.isfinite(f) and f > 0 for f in measured):
            raise ProfileError(
                f"expected positive figures, null for what was not measured, got {dict(found)!r}"
            )
        if not entry.lo_s <= entry.latency_s <= entry.hi_s or entry.rounds < 1:
            raise ProfileError(
                f"expected a median within its interval, of one round or more, got {dict(found)!r}"
            )
        if entry.mode not in MODES or entry.l2 not in L2_STATES:
            raise ProfileError(
                f"expected a mode of {', '.join(MODES)} and l2 of {', '.join(L2_STATES)}, got {dict(found)!r}"
            )
        return entry


@dataclass(frozen=True)
class DeviceProfile:
    """All measurements of a device.

    Attributes:
        name: the file's name without .json.
        device: what it is: type, name, cores or SMs, threads.
        software: versions.
        sensor: of energy, or {"source": null, "reason": ...}.
        entries: the measurements.
        provenance: when, how, by which command; noise and A/A ratio of the run.
        synthetic: nobody measured its figures; for tests only.
        transferred: in what this machine differs from that of the figures; "" where it does not, or where
            nobody asked.
    """

    name: str
    device: Mapping[str, Any]
    software: Mapping[str, Any]
    sensor: Mapping[str, Any]
    entries: tuple[Entry, ...]
    provenance: Mapping[str, Any]
    synthetic: bool = False
    transferred: str = ""

    @property
    def key(self) -> str:
        """What must agree for its figures to be this machine's: device name and threads."""
        return device_key(self.device)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form with the content's hash."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "synthetic": self.synthetic,
            "device": dict(self.device),
            "software": dict(self.software),
            "sensor": dict(self.sensor),
            "entries": [entry.to_dict() for entry in self.entries],
            "provenance": {k: v for k, v in self.provenance.items() if k != "content_sha256"},
        }
        found["provenance"]["content_sha256"] = content_hash(found)
        return found

    def save(self, path: Path) -> None:
        """Write, re-read to check, then move into place.

        Raises:
            ProfileError: it does not read back.
            OSError: the disk refuses; what was there stays.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            lines = json.dumps(self.to_dict(), indent=1)
            fresh.write_text(lines + "\n", encoding="utf-8")
            read_profile(fresh, allow_synthetic=self.synthetic)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def _figure(told: object) -> float:
    if not isinstance(told, int | float) or isinstance(told, bool):
        raise ValueError(f"expected a number, got {told!r}")
    return float(told)


def _digits(figure: float) -> float:
    """Nine digits: more than any clock has, and the same after another reading and writing."""
    return float(f"{figure:.9g}")


def device_key(device: Mapping[str, Any]) -> str:
    """The name of a device, and the threads of a CPU."""
    threads = device.get("threads")
    return f"{device.get('name')}" + (f", {threads} thread(s)" if threads else "")


def file_name(key: str) -> str:
    """A device's key as a file name: nvidia-h200, amd-epyc-1-thread."""
    return re.sub(r"[^a-z0-9]+", "-", key.lower().replace("(s)", "")).strip("-")


def content_hash(found: Mapping[str, Any]) -> str:
    """SHA-256 over everything but the hash itself."""
    about = {k: v for k, v in found.get("provenance", {}).items() if k != "content_sha256"}
    text = json.dumps({**found, "provenance": about}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_profile(path: Path, *, allow_synthetic: bool = False) -> DeviceProfile:
    """Read and check a profile.

    Raises:
        ProfileError: not JSON, another schema, synthetic, edited by hand, or an impossible figure.
        FileNotFoundError: no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"{path}: expected JSON, got {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ProfileError(f"{path}: expected schema {SCHEMA}, got {schema!r}; measure it again")
    if found.get("synthetic") is not False and not allow_synthetic:
        raise ProfileError(f"{path}: its numbers are synthetic, nobody measured them")
    about = found.get("provenance")
    if not isinstance(about, dict) or about.get("content_sha256") != content_hash(found):
        raise ProfileError(
            f"{path}: the content does not fit its hash: it was edited after it was measured; restore "
            "it, or measure again with `hwprune profile`"
        )
    try:
        entries = tuple(Entry.from_dict(entry) for entry in found["entries"])
        device, software, sensor = (dict(found[p]) for p in ("device", "software", "sensor"))
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: expected the parts of {SCHEMA}, got {error!r}") from None
    keys = Counter((e.op, e.mode, e.l2, e.values) for e in entries)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ProfileError(f"{path}: an operation is listed twice: {twice[0]}")
    if not entries:
        raise ProfileError(f"{path}: expected measured operations, got none")
    synthetic = found.get("synthetic") is not False
    return DeviceProfile(path.stem, device, software, sensor, entries, about, synthetic)


def list_devices(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Profiles by name: those that ship with hwprune, then the user's own, which go before them."""
    own = os.environ.get("HWPRUNE_PROFILES")
    places = [FOLDER, *([Path(own)] if own else []), *folders]
    found = [path for place in places for path in sorted(place.glob("*.json"))]
    return {
        path.stem: path for path in found if not path.name.startswith(".")
    }  # of a run under way


def load_device(
    name: str | Path, *, for_device: str | None = None, force: bool = False
) -> DeviceProfile:
    """A profile by name or file.

    Args:
        name: as `list_devices` has it, or a path to a .json file.
        for_device: key of the machine that predictions are for (`profiling.this_device`); None = nobody
            compares.
        force: take another device's profile all the same, marked as transferred.

    Raises:
        ProfileError: not a profile, no such name (says which there are), or another device's.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ProfileError(f"expected a profile, found no file {path}")
    else:
        known = list_devices()
        if str(name) not in known:
            there = ", ".join(sorted(known)) or "none"
            raise ProfileError(
                f"expected a device of: {there}; got {str(name)!r}; `hwprune profile` measures this machine"
            )
        path = known[str(name)]
    profile = read_profile(path)
    return profile if for_device is None else for_this_device(profile, for_device, force=force)


def for_this_device(profile: DeviceProfile, key: str, *, force: bool = False) -> DeviceProfile:
    """A profile compared with the machine it shall speak for.

    Args:
        profile: as read.
        key: of that machine.
        force: take another device's profile all the same.

    Returns:
        The profile, `transferred` where the device, torch, triton or the driver is another; warns then.

    Raises:
        ProfileError: another device, and not `force`.
    """
    if profile.key != key and not force:
        raise ProfileError(
            f"{profile.name} was measured on {profile.key}, this is {key}; `hwprune profile` measures this "
            "machine (force=True predicts all the same)"
        )
    reasons = [] if profile.key == key else [f"measured on {profile.key}, not on {key}"]
    here = software_here()
    for name in ("torch", "triton", "driver"):
        then, now = profile.software.get(name), here.get(name)
        if then is not None and now is not None and then != now:
            reasons.append(f"{name} {then}, here {now}")
    if not reasons:
        return profile
    reason = "; ".join(reasons)
    warnings.warn(
        f"profile {profile.name}: {reason}; its predictions are less certain", stacklevel=3
    )
    return replace(profile, transferred=reason)


def software_here() -> dict[str, str | None]:
    """Versions that times depend on: torch, triton, and the driver where there is an NVIDIA GPU."""
    found: dict[str, str | None] = {}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    driver = _DRIVER.read_text().split() if _DRIVER.is_file() else []
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15 ..."; open modules say more words before it.
    found["driver"] = next((w for w in driver if w[0].isdigit() and w.count(".") >= 1), None)
    return found
