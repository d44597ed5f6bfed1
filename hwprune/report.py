"""What a pruning run was asked, what it decided, and what came of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Report:
    """The record of one run; `to_dict` is what `report.json` holds.

    Attributes:
        budget: what was asked, e.g. {"macs": 0.6}.
        kinds: unit kinds that were allowed.
        macs, params: of the pruned model, counted by torch's FLOP counter on the realised model and
            by its parameters.
        dense_macs, dense_params: of the dense model.
        distortion: "predicted" by the curves and "measured" on the calibration images, mean over
            images, in "unit" (nats of KL to the dense model, or half the squared feature distance).
        layers: one row a layer: what is kept of it.
        calibration: images, weighting, bytes of the statistics, seed.
        seconds: step -> wall time.
        warnings: what the user should know.
        environment: versions and device.
        on_device: ratios to the dense model for budgets of latency and energy, "predicted" and "measured";
            empty where none was asked for.
    """

    budget: Mapping[str, float | str]
    kinds: tuple[str, ...]
    macs: float
    params: int
    dense_macs: float
    dense_params: int
    distortion: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]
    calibration: Mapping[str, Any]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    on_device: Mapping[str, Any] = field(default_factory=dict)

    @property
    def macs_ratio(self) -> float:
        """Kept fraction of the MACs."""
        return self.macs / self.dense_macs

    @property
    def params_ratio(self) -> float:
        """Kept fraction of the parameters."""
        return self.params / self.dense_params

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the keys DESIGN promises to scripts."""
        return promised(self, self.on_device)

    def __str__(self) -> str:
        """A few lines for a terminal."""
        macs, dense_macs = self.macs / 1e6, self.dense_macs / 1e6
        params, dense_params = self.params / 1e6, self.dense_params / 1e6
        loss = self.distortion
        lines = [
            f"MACs    {dense_macs:10.1f} M -> {macs:10.1f} M  ({self.macs_ratio:.3f})",
            f"params  {dense_params:10.2f} M -> {params:10.2f} M  ({self.params_ratio:.3f})",
            f"distortion {loss['measured']:.4g} {loss['unit']} on the calibration images "
            f"(predicted {loss['predicted']:.4g})",
        ]
        for when, found in self.on_device.items():
            for name, figure in found.items():
                if isinstance(figure, Mapping):
                    ends = f"[{figure['lo']:.3f}, {figure['hi']:.3f}]"
                    lines.append(f"{name.replace('_', ' ')} {when}: {figure['value']:.3f} {ends}")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def promised(report: Any, on_device: Mapping[str, Any]) -> dict[str, Any]:
    """A report's fields with the keys that DESIGN promises to scripts.

    Args:
        report: a dataclass with seconds by step and the two ratios.
        on_device: "predicted" and "measured", where latency or energy was asked for.
    """
    unknown = {
        "latency_ratio": None,
        "energy_ratio": None,
        "reason": "budgets macs and params need no clock and no meter: nothing was timed in this run",
    }
    return {
        **json.loads(json.dumps(asdict(report))),
        "macs_ratio": report.macs_ratio,
        "params_ratio": report.params_ratio,
        "predicted": dict(on_device.get("predicted", unknown)),
        "measured": dict(on_device.get("measured", unknown)),
        "seconds": sum(report.seconds.values()),
        "seconds_by_step": dict(report.seconds),
    }


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions and the device the run used (None = the CPU), for provenance."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("hwprune", "timm", "numpy", "scipy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    on_gpu = device is not None and device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    return found
