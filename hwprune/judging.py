"""A model as a point of a front: its ratios to the dense model, predicted time and energy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hwprune.contract import device_costs
from hwprune.meter.compare import in_type
from hwprune.network import NetworkModel
from hwprune.operations import count_operations
from hwprune.predict import Prediction, UnknownOp
from hwprune.route import profile_here

Evaluate = Callable[[nn.Module], tuple[float, int]]  # to (top-1, images)


@dataclass(frozen=True, eq=False)
class Gauge:
    """Predicts a model's time and energy on a device, by the dense model's.

    Attributes:
        network: of the device; None where there is no profile.
        x: the batch.
        dense: of the dense model.
    """

    network: NetworkModel | None
    x: Tensor
    dense: Prediction | None

    @classmethod
    def of(cls, model: nn.Module, device: str | None, x: Tensor) -> Gauge:
        """A gauge on a named profile, or on this machine's own if it has one.

        Raises:
            ValueError: no profile of that name.
        """
        if device is not None:
            costs = device_costs(device, x.device, "latency")
        else:
            found = profile_here(x.device, "graph" if x.device.type == "cuda" else "eager")
            if found is None:
                return cls(None, x, None)
            costs = found
        network = NetworkModel(costs)
        return cls(network, x, _predict(network, model, x))

    def ratios(self, model: nn.Module) -> dict[str, dict[str, float] | None]:
        """latency_ratio and energy_ratio of a model, each value, lo, hi; null where nothing can be said."""
        nothing: dict[str, dict[str, float] | None] = {"latency_ratio": None, "energy_ratio": None}
        if self.network is None or self.dense is None:
            return nothing
        found = _predict(self.network, model, self.x)
        if found is None:
            return nothing
        ratio = found.latency_s / self.dense.latency_s
        spread = (found.hi_s - found.lo_s) / 2 / found.latency_s
        told = nothing | {"latency_ratio": _around(ratio, spread)}
        if found.energy_j is not None and self.dense.energy_j:
            told["energy_ratio"] = _around(found.energy_j / self.dense.energy_j, spread)
        return told


def _around(ratio: float, spread: float) -> dict[str, float]:
    return {"value": ratio, "lo": ratio * (1 - spread), "hi": ratio * (1 + spread)}


def _predict(network: NetworkModel, model: nn.Module, x: Tensor) -> Prediction | None:
    try:
        run = in_type(model, x.dtype)
        return network.predict(count_operations(run, x, partly=True).ops)
    except UnknownOp:  # the profile says nothing of some layer
        return None


@dataclass
class Judge:
    """Makes points of a front, as `hwprune.front` describes them.

    Attributes:
        gauge: of time and energy.
        evaluate: top-1 and the number of images; None = not measured.
        images: labelled images that accuracy was last measured on.
    """

    gauge: Gauge
    evaluate: Evaluate | None = None
    images: int | None = field(default=None, init=False)

    def point(self, method: str, model: nn.Module, told: Mapping[str, Any]) -> dict[str, Any]:
        """The point of a pruned model.

        Args:
            method: what chose it.
            model: pruned.
            told: budget, macs_ratio, params_ratio, distortion; predicted and measured where they are known.
        """
        predicted = dict(told.get("predicted") or {})
        for name, ratio in self.gauge.ratios(model).items():
            if predicted.get(name) is None:
                predicted[name] = ratio
        measured = told.get("measured") or {}
        ratios = {k: v for k, v in measured.items() if k.endswith("_ratio")}
        kept = ("budget", "macs_ratio", "params_ratio", "distortion")
        return {
            "method": method,
            **{key: told[key] for key in kept},
            "predicted": {k: v for k, v in predicted.items() if k.endswith("_ratio")},
            "measured": ratios,
            **self._accuracy(model),
            "folder": None,
            "refused": None,
        }

    def dense(self, model: nn.Module) -> dict[str, Any]:
        """The point of the dense model."""
        nothing = {"measured": 0.0, "predicted": 0.0}
        told = {"budget": {}, "macs_ratio": 1.0, "params_ratio": 1.0, "distortion": nothing}
        return self.point("dense", model, told)

    def _accuracy(self, model: nn.Module) -> dict[str, float | None]:
        if self.evaluate is None:
            return {"top1": None, "top1_se": None}
        top1, self.images = self.evaluate(model)
        return {"top1": top1, "top1_se": (top1 * (1 - top1) / self.images) ** 0.5}
