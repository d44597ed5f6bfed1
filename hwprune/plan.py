"""A plan: how much of every layer is kept, what that is predicted to cost, and the mask it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hwprune.cost import Structure
from hwprune.distortion import Curve
from hwprune.units import Mask


@dataclass(frozen=True)
class Plan:
    """How much of every layer is kept, and what that is predicted to cost.

    Attributes:
        keep: units name -> kept units.
        structure: layer name -> what is left of it (several linears of one layer merged).
        distortion: predicted, in the unit of the curves.
        macs, params: predicted, of the whole model.
        dense_macs, dense_params: of the dense model.
        limits: metric -> absolute limit.
        latency_s, energy_j: predicted for a batch, where a device was asked for; None otherwise.
        dense_latency_s, dense_energy_j: of the dense model.
        weight_bytes, activation_bytes: predicted for a batch, where memory was asked for; None otherwise.
        dense_memory_bytes: both together, of the dense model.
        bound: no plan within the limits has a smaller distortion (plus weighted energy, where that was asked
            for); the plan's own where it is exactly the best.
    """

    keep: Mapping[str, int]
    structure: Mapping[str, Structure]
    distortion: float
    macs: float
    params: float
    dense_macs: float
    dense_params: float
    limits: Mapping[str, float] = field(default_factory=dict)
    latency_s: float | None = None
    energy_j: float | None = None
    dense_latency_s: float | None = None
    dense_energy_j: float | None = None
    weight_bytes: float | None = None
    activation_bytes: float | None = None
    dense_memory_bytes: float | None = None
    bound: float = 0.0

    @property
    def macs_ratio(self) -> float:
        """Kept fraction of the MACs."""
        return self.macs / self.dense_macs

    @property
    def params_ratio(self) -> float:
        """Kept fraction of the parameters."""
        return self.params / self.dense_params

    @property
    def tiles(self) -> dict[str, tuple[int, int]]:
        """linear -> (rows, columns) of its tiles, for all that run as tiles; names of the realised model."""
        return {n: t for found in self.structure.values() for n, t in (found.tiles or {}).items()}

    @property
    def memory_bytes(self) -> float | None:
        """Weights and activations at the worst moment, where memory was asked for."""
        if self.weight_bytes is None or self.activation_bytes is None:
            return None
        return self.weight_bytes + self.activation_bytes


def select(curves: Mapping[str, Curve], plan: Plan) -> Mask:
    """The mask a plan stands for: each curve's order, cut at the kept count.

    Raises:
        ValueError: the plan names units the curves do not have.
    """
    missing = [name for name in plan.keep if name not in curves]
    if missing:
        raise ValueError(
            f"{missing[0]}: in the plan but without a curve; allocate from these curves"
        )
    return {name: curves[name].kept(count) for name, count in plan.keep.items()}
