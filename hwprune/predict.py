"""What an operation will cost on a profiled device: exact hits verbatim, interpolation with an interval.

Latency is interpolated as log(t / speed-of-light) over the logarithms of the sizes (and of the density), by a
thin-plate spline within one family of operations, where speed-of-light is max(work / best rate, bytes
/ best bandwidth) seen on this device: what is left is smooth. Power is interpolated, energy is power x
latency. Intervals come from held-out residuals of the family. Never assumes monotonicity: measured steps
are reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RBFInterpolator

from hwprune.device import DeviceProfile, Entry
from hwprune.ops import Op

Floats = npt.NDArray[np.float64]

_NEIGHBOURS = 48  # of a local spline; a family has tens to hundreds of entries
_SMOOTHING = 1e-3
_FOLDS = 8
_FEWEST = 6  # entries below which a family is not interpolated
_LEVEL = 0.95


class UnknownOp(LookupError):
    """No entry of the profile says anything about this operation."""


@dataclass(frozen=True)
class Prediction:
    """What an operation costs.

    Attributes:
        latency_s: of one call, with lo_s and hi_s around it (95 %).
        energy_j: of one call, or None.
        tier: "hit" (measured verbatim), "interpolated" or "extrapolated".
    """

    latency_s: float
    lo_s: float
    hi_s: float
    energy_j: float | None
    tier: str


class CostModel:
    """Predicts operations of a profiled device.

    Args:
        profile: its measurements.
        mode: eager, compile or graph; entries of other modes are not used.
        l2: hot or cold.

    Raises:
        ValueError: the profile has no entries of this mode.
    """

    def __init__(self, profile: DeviceProfile, mode: str = "eager", l2: str = "hot") -> None:
        """Sort the entries by family."""
        self.profile = profile
        self.entries = {e.op: e for e in profile.entries if (e.mode, e.l2) == (mode, l2)}
        if not self.entries:
            raise ValueError(f"{profile.name}: expected entries of {mode}, {l2} L2, got none")
        self._families: dict[tuple[Any, ...], _Family] = {}
        for op, entry in self.entries.items():
            self._families.setdefault(op.family, _Family()).entries.append(entry)

    def predict(self, op: Op) -> Prediction:
        """The cost of an operation.

        Raises:
            UnknownOp: no measured operation is of its kind, implementation, block and type.
        """
        hit = self.entries.get(op)
        if hit is not None:
            return Prediction(hit.latency_s, hit.lo_s, hit.hi_s, hit.energy_j, "hit")
        family = self._families.get(op.family)
        if family is None or len(family.entries) < _FEWEST:
            known = sorted({f[:3] for f in self._families})
            raise UnknownOp(
                f"{self.profile.name} says nothing about {op}: it knows {known}; measure it with "
                "`hwprune profile`"
            )
        return family.predict(op)

    def held_out_errors(self) -> dict[tuple[Any, ...], Floats]:
        """Relative errors of latencies predicted without the entry's whole site (M, N, K), by family."""
        return {
            key: np.expm1(np.abs(family.residuals))
            for key, family in self._families.items()
            if len(family.entries) >= _FEWEST
        }


class _Family:
    """Operations of one kind, implementation, block and type."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    @cached_property
    def rates(self) -> tuple[float, float]:
        """Best work a second and bytes a second of the family."""
        work = max(e.op.macs / e.latency_s for e in self.entries)
        bytes_ = max(_bytes(e.op) / e.latency_s for e in self.entries)
        return work, bytes_

    def light_s(self, op: Op) -> float:
        """The time at the family's best rates."""
        work, bytes_ = self.rates
        return max(op.macs / work, _bytes(op) / bytes_)

    @cached_property
    def points(self) -> Floats:
        """Where the entries lie: [entries, features]."""
        return np.asarray([features(e.op) for e in self.entries])

    @cached_property
    def logs(self) -> Floats:
        """log(t / speed-of-light): [entries]."""
        return np.asarray([math.log(e.latency_s / self.light_s(e.op)) for e in self.entries])

    @cached_property
    def residuals(self) -> Floats:
        """Held-out errors of the logarithm; sites are held out whole, densities and all."""
        sites = sorted({e.op.shape for e in self.entries})
        fold_of = {site: i % _FOLDS for i, site in enumerate(_shuffled(sites))}
        folds = np.asarray([fold_of[e.op.shape] for e in self.entries])
        found = np.zeros(len(self.entries))
        for fold in set(folds.tolist()):
            out = folds == fold
            if (~out).sum() < _FEWEST:
                continue
            fitted = fit(self.points[~out], self.logs[~out])
            found[out] = self.logs[out] - fitted(self.points[out])
        return found

    @cached_property
    def spline(self) -> Any:
        return fit(self.points, self.logs)

    def predict(self, op: Op) -> Prediction:
        """Interpolate."""
        point = np.asarray(features(op))
        low, high = self.points.min(0), self.points.max(0)
        inside = bool((point >= low - 1e-9).all() and (point <= high + 1e-9).all())
        # Outside, the utilisation of the edge is held: a spline's slope means nothing there.
        log = float(self.spline(np.clip(point, low, high)[None])[0])
        spread = float(np.quantile(np.abs(self.residuals), _LEVEL))
        if not inside:
            spread = 2 * spread + 0.1 * float(np.abs(point - np.clip(point, low, high)).max())
        light_s = self.light_s(op)
        latency_s = light_s * math.exp(log)
        power_w = self._power_w(point)
        return Prediction(
            latency_s,
            latency_s * math.exp(-spread),
            latency_s * math.exp(spread),
            None if power_w is None else power_w * latency_s,
            "interpolated" if inside else "extrapolated",
        )

    def _power_w(self, point: Floats) -> float | None:
        """Average power of the nearest entries that have one, weighted by distance."""
        told = [(i, e.power_w) for i, e in enumerate(self.entries) if e.power_w is not None]
        if len(told) < _FEWEST:
            return None
        away = np.linalg.norm(self.points[[i for i, _ in told]] - point, axis=1)
        nearest = np.argsort(away)[:3]
        weights = 1 / (away[nearest] + 1e-3)
        powers = np.asarray([told[i][1] for i in nearest])
        return float((weights * powers).sum() / weights.sum())


def features(op: Op) -> list[float]:
    """Logarithms of the sizes, and of the density of tiles."""
    return [*map(math.log2, op.shape), *([math.log2(op.density)] if op.block[0] else [])]


def fit(points: Floats, logs: Floats) -> Any:
    """A smooth function through the points; directions in which nothing varies are left out."""
    varies = np.ptp(points, axis=0) > 1e-9
    if not varies.any():
        middle = float(np.median(logs))
        return lambda at: np.full(len(at), middle)
    used = points[:, varies]
    # A plane needs independent directions: where sizes move together a constant goes under the spline.
    plane = np.linalg.matrix_rank(np.c_[np.ones(len(used)), used]) == used.shape[1] + 1
    spline = RBFInterpolator(
        used,
        logs,
        neighbors=min(_NEIGHBOURS, len(used)) if len(used) > _NEIGHBOURS else None,
        kernel="thin_plate_spline" if plane else "linear",
        degree=1 if plane else 0,
        smoothing=_SMOOTHING,
    )
    return lambda at: spline(at[:, varies])


def total(predictions: Iterable[Prediction]) -> Prediction:
    """One after the other: figures add; errors of different operations partly cancel.

    Intervals add in quadrature, and half of the linear sum goes on top for what all errors share.
    """
    found = list(predictions)
    value = sum(p.latency_s for p in found)
    up = [p.hi_s - p.latency_s for p in found]
    down = [p.latency_s - p.lo_s for p in found]
    joined = [0.5 * math.sqrt(sum(e * e for e in side)) + 0.5 * sum(side) for side in (down, up)]
    energies = [p.energy_j for p in found]
    energy = None if any(e is None for e in energies) else sum(e for e in energies if e is not None)
    tiers = {p.tier for p in found}
    order = ("extrapolated", "interpolated", "hit")
    tier = next((t for t in order if t in tiers), "hit")
    return Prediction(value, max(0.0, value - joined[0]), value + joined[1], energy, tier)


def _bytes(op: Op) -> float:
    return op.weight_bytes + op.activation_bytes


def _shuffled(sites: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    order = np.random.default_rng(0).permutation(len(sites))
    return [sites[i] for i in order]
