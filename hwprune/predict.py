"""What an operation will cost on a profiled device: exact hits verbatim, interpolation with an interval.

Latency is interpolated as log(t / speed-of-light) over the logarithms of the sizes (and of the density), by a
thin-plate spline within one family of operations, where speed-of-light is max(work / best rate, bytes
/ best bandwidth) seen on this device: what is left is smooth. Power is interpolated, energy is power x
latency. Intervals come from held-out residuals of the family. Never assumes monotonicity: measured steps
are reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RBFInterpolator

from hwprune.device import L2_STATES, MODES, DeviceProfile, Entry, for_this_device
from hwprune.ops import Op
from hwprune.predict_power import PowerModel

Floats = npt.NDArray[np.float64]

_NEIGHBOURS = 48  # of a local spline; a family has tens to hundreds of entries
_SMOOTHING = 1e-3
_FOLDS = 8
_FEWEST = 6  # entries below which a family is not interpolated
_LEVEL = 0.95
_UNKNOWN_SPREAD = math.log(2)  # where nothing could be held out
_TIERS = ("transferred", "extrapolated", "interpolated", "hit")  # the least certain first


class UnknownOp(LookupError):
    """No entry of the profile says anything about this operation."""


@dataclass(frozen=True)
class Prediction:
    """What an operation, or several, cost.

    Attributes:
        latency_s: of one call, with lo_s and hi_s around it (95 %).
        energy_j: of one call, or None where the profile has no power.
        tier: "hit" (measured verbatim), "interpolated", "extrapolated", or "transferred" from another
            device or other software.
        energy_lo_j, energy_hi_j: around energy_j.
    """

    latency_s: float
    lo_s: float
    hi_s: float
    energy_j: float | None
    tier: str
    energy_lo_j: float | None = None
    energy_hi_j: float | None = None


class CostModel:
    """Predicts operations of a profiled device.

    Args:
        profile: its measurements; `device.for_this_device` says whether they are of this machine.
        mode: eager, compile or graph; entries of other modes are not used.
        l2: hot or cold.
        values: what the data were: normal, zeros or real:<hash>.

    Raises:
        ValueError: another mode or l2, or the profile has no such entries.
    """

    def __init__(
        self, profile: DeviceProfile, mode: str = "eager", l2: str = "hot", values: str = "normal"
    ) -> None:
        """Sort the entries by family."""
        if mode not in MODES or l2 not in L2_STATES:
            raise ValueError(
                f"expected a mode of {', '.join(MODES)} and l2 of {', '.join(L2_STATES)}, got {mode!r}, {l2!r}"
            )
        self.profile = profile
        self.axes = wanted = (mode, l2, values)
        self.entries = {e.op: e for e in profile.entries if (e.mode, e.l2, e.values) == wanted}
        if not self.entries:
            there = sorted({(e.mode, e.l2, e.values) for e in profile.entries})
            raise ValueError(f"{profile.name}: expected entries of {wanted}, got only {there}")
        # Nothing on this device was ever quicker: the launch of one operation.
        self.floor_s = min(e.latency_s for e in self.entries.values())
        by_family: dict[tuple[Any, ...], list[Entry]] = {}
        for op, entry in self.entries.items():
            by_family.setdefault(op.family, []).append(entry)
        self._families = {key: _Family(entries) for key, entries in by_family.items()}
        idle_w = profile.sensor.get("idle_w")
        self._power = PowerModel(list(self.entries.values()), idle_w)

    @property
    def mode(self) -> str:
        """How what was measured was run."""
        return self.axes[0]

    def for_device(self, key: str, *, force: bool = False) -> CostModel:
        """This model for a machine, marked where the profile is another's; warns then.

        Args:
            key: of the machine (`profiling.this_device`).
            force: take another device's profile all the same.

        Raises:
            ProfileError: another device's, and not `force`.
        """
        compared = for_this_device(self.profile, key, force=force)
        return self if compared is self.profile else CostModel(compared, *self.axes)

    def predict(self, op: Op) -> Prediction:
        """The cost of an operation.

        Raises:
            UnknownOp: no measured operation is of its kind, implementation, block and type.
        """
        hit, family = self.entries.get(op), self._families.get(op.family)
        if hit is not None:
            latency_s, lo_s, hi_s, tier = hit.latency_s, hit.lo_s, hit.hi_s, "hit"
        elif family is not None and len(family.entries) >= _FEWEST:
            latency_s, spread, tier = family.predict(op)
            latency_s = max(latency_s, self.floor_s)
            lo_s, hi_s = latency_s * math.exp(-spread), latency_s * math.exp(spread)
            lo_s = max(lo_s, min(self.floor_s, latency_s))
        else:
            known = sorted(
                {f[:3] for f in self._families if len(self._families[f].entries) >= _FEWEST}
            )
            raise UnknownOp(
                f"{self.profile.name} says nothing about {op}: it knows {known}; measure it with "
                "`hwprune profile`"
            )
        if self.profile.transferred:
            # How far another machine is off nobody measured: at least a factor of two either way.
            tier, lo_s, hi_s = "transferred", lo_s / 2, hi_s * 2
        found = Prediction(latency_s, lo_s, hi_s, None, tier)
        power = self._power.predict(op, latency_s)
        if hit is not None and hit.energy_j is not None and hit.power_w is not None:
            spread = self._power.spread_of_hit
            found = replace(found, energy_j=hit.energy_j)
            power = (hit.power_w, hit.power_w / (1 + spread), hit.power_w * (1 + spread))
        if power is None:
            return found
        watts, low_w, high_w = power
        return replace(
            found,
            energy_j=found.energy_j if found.energy_j is not None else watts * latency_s,
            energy_lo_j=min(low_w * lo_s, watts * latency_s),
            energy_hi_j=max(high_w * hi_s, watts * latency_s),
        )

    def held_out_errors(self, *, inside: bool = False) -> dict[tuple[Any, ...], Floats]:
        """Relative errors of latencies predicted without the entry's whole site (all densities), by family.

        Args:
            inside: only entries within the range of what was left, not those at its edges.
        """
        found = {}
        for key, family in self._families.items():
            residuals, within = family.held_out
            errors = np.abs(np.expm1(-residuals[within] if inside else -residuals))
            if errors.size:
                found[key] = errors
        return found


class _Family:
    """Operations of one kind, implementation, block and type."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.points: Floats = np.asarray([features(e.op) for e in self.entries])
        self.work_per_s = max(e.op.macs / e.latency_s for e in self.entries)
        self.bytes_per_s = max(_bytes(e.op) / e.latency_s for e in self.entries)
        logs = [math.log(e.latency_s / self.light_s(e.op)) for e in self.entries]
        self.logs: Floats = np.asarray(logs)  # never below 0: nothing beats the best rates seen

    def light_s(self, op: Op) -> float:
        """The time at the family's best rates: of work and of bytes a second."""
        return max(op.macs / self.work_per_s, _bytes(op) / self.bytes_per_s)

    @cached_property
    def spline(self) -> Callable[[Floats], Floats]:
        """log(t / speed-of-light) at points [n, features]."""
        return fit(self.points, self.logs)

    @cached_property
    def held_out(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """log(measured / predicted without its site) of the entries that can be held out; whether inside."""
        sites = sorted({e.op.shape for e in self.entries})
        fold_of = {site: i % _FOLDS for i, site in enumerate(_shuffled(sites))}
        residuals, within = [], []
        for fold in range(_FOLDS):
            out = [e for e in self.entries if fold_of[e.op.shape] == fold]
            rest = [e for e in self.entries if fold_of[e.op.shape] != fold]
            if not out or len(rest) < _FEWEST - 2:
                continue
            others = _Family(rest)
            for entry in out:
                seconds, beyond = others.middle_s(entry.op)
                residuals.append(math.log(entry.latency_s / seconds))
                within.append(beyond == 0)
        return np.asarray(residuals), np.asarray(within, dtype=bool)

    @cached_property
    def spreads(self) -> tuple[float, float]:
        """Half the 95 % interval of the logarithm, inside the range and at its edge."""
        residuals, within = self.held_out
        inside = _quantile(np.abs(residuals[within]))
        edge = _quantile(np.abs(residuals[~within])) if (~within).any() else 0.0
        return inside, max(2 * inside, edge)

    def middle_s(self, op: Op) -> tuple[float, float]:
        """Interpolated seconds, and how far outside the range it lies (powers of two)."""
        point = np.asarray(features(op))
        # Outside, the utilisation of the edge is held: a spline's slope means nothing there.
        held = np.clip(point, self.points.min(0), self.points.max(0))
        beyond = float(np.abs(point - held).max())
        log = max(0.0, float(self.spline(held[None])[0]))
        return self.light_s(op) * math.exp(log), beyond if beyond > 1e-9 else 0.0

    def predict(self, op: Op) -> tuple[float, float, str]:
        """(seconds, half the 95 % interval of their logarithm, tier)."""
        seconds, beyond = self.middle_s(op)
        inside, edge = self.spreads
        if beyond:
            return seconds, edge + 0.1 * beyond, "extrapolated"
        return seconds, inside, "interpolated"


def features(op: Op) -> list[float]:
    """Logarithms of the sizes, and of the density of tiles.

    Attention has the wider of its two head widths, padded to a multiple of four as `SlimAttention.attend` does,
    their sum, and whether anything is padded, which takes copies: 3.2 ms at widths 42 and 36, a ViT-Tiny's 3
    heads of 64 take 3.5 ms.
    """
    if op.kind == "attention":
        b, h, t, d, e = op.shape
        wide = -(-max(d, e) // 4) * 4
        return [*map(math.log2, (b, h, t, wide, d + e)), float(min(d, e) < wide)]
    return [*map(math.log2, op.shape), *([math.log2(op.density)] if op.block[0] else [])]


def fit(points: Floats, logs: Floats) -> Callable[[Floats], Floats]:
    """A smooth function through the points; directions in which nothing varies are left out."""
    varies = np.ptp(points, axis=0) > 1e-9
    if not varies.any():
        middle = float(np.median(logs))
        return lambda at: np.full(len(at), middle)
    used = points[:, varies]
    # A plane needs independent directions: where sizes move together a constant goes under the spline.
    plane = np.linalg.matrix_rank(np.c_[np.ones(len(used)), used]) == used.shape[1] + 1
    local = len(used) > _NEIGHBOURS and _plane_everywhere(used)
    spline = RBFInterpolator(
        used,
        logs,
        neighbors=_NEIGHBOURS if local else None,
        kernel="thin_plate_spline" if plane else "linear",
        degree=1 if plane else 0,
        smoothing=_SMOOTHING,
    )
    return lambda at: np.asarray(spline(at[:, varies]))


def _plane_everywhere(used: Floats) -> bool:
    """Whether the nearest neighbours of every point span all directions, as a local plane must."""
    for point in used:
        near = used[np.argsort(np.linalg.norm(used - point, axis=1))[:_NEIGHBOURS]]
        if np.linalg.matrix_rank(np.c_[np.ones(len(near)), near]) <= used.shape[1]:
            return False
    return True


def total(predictions: Iterable[Prediction]) -> Prediction:
    """One after the other: figures add; errors of different operations partly cancel.

    Intervals add half in quadrature and half linearly: a part of the errors is shared by all.
    """
    found = list(predictions)
    value, lo, hi = _sum([(p.latency_s, p.lo_s, p.hi_s) for p in found])
    tiers = {p.tier for p in found}
    tier = next((t for t in _TIERS if t in tiers), "hit")
    energies = [
        (p.energy_j, p.energy_lo_j, p.energy_hi_j)
        for p in found
        if p.energy_j is not None and p.energy_lo_j is not None and p.energy_hi_j is not None
    ]
    if not found or len(energies) < len(found):
        return Prediction(value, lo, hi, None, tier)
    energy, energy_lo, energy_hi = _sum(energies)
    return Prediction(value, lo, hi, energy, tier, energy_lo, energy_hi)


def _sum(figures: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The sum of values, and its interval."""
    value = math.fsum(v for v, _, _ in figures)
    down = [v - lo for v, lo, _ in figures]
    up = [hi - v for v, _, hi in figures]
    joined = [0.5 * math.hypot(*side) + 0.5 * math.fsum(side) for side in (down, up)]
    return value, max(0.0, value - joined[0]), value + joined[1]


def _quantile(sizes: Floats) -> float:
    """The 95 % quantile of the next one: where there are too few for it, twice the largest."""
    if not len(sizes):
        return _UNKNOWN_SPREAD
    rank = math.ceil((len(sizes) + 1) * _LEVEL)
    return float(np.sort(sizes)[rank - 1] if rank <= len(sizes) else 2 * sizes.max())


def _bytes(op: Op) -> float:
    return op.weight_bytes + op.activation_bytes


def _shuffled(sites: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    order = np.random.default_rng(0).permutation(len(sites))
    return [sites[i] for i in order]
