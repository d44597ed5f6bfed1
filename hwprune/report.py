"""What a pruning run was asked, what it decided, and what came of it."""

from __future__ import annotations

import html
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hwprune.meter.estimate import Unavailable
from hwprune.meter.provenance import provenance


@dataclass(frozen=True, repr=False)
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
        layers: one row a layer: what is kept of it (`hwprune.report_rows`).
        calibration: images, weighting, bytes of the statistics, seed.
        seconds: step -> wall time.
        warnings: what the user should know.
        environment: versions and device.
        on_device: ratios to the dense model for budgets of latency and energy, "predicted" and "measured";
            empty where none was asked for.
        tiles: one row a weight cut by tiles: which are kept.
        curves: one row a curve that the choice was made by, thinned.
        plans: one row a plan that was tried on images (`hwprune.refine`): predicted and true distortion,
            whether it won; empty without refinement.
        objective: what the choice was made by, "second-order" or "lpvit".
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
    tiles: tuple[Mapping[str, Any], ...] = ()
    curves: tuple[Mapping[str, Any], ...] = ()
    plans: tuple[Mapping[str, Any], ...] = ()
    objective: str = "second-order"

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
        fields = asdict(self)
        on_device = fields.pop("on_device")
        return promised(fields, self.macs_ratio, self.params_ratio, on_device)

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
            *ratio_lines(self.on_device),
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return html_table(self.to_dict(), str(self).splitlines()[2:])


def html_table(told: Mapping[str, Any], notes: Sequence[str]) -> str:
    """A compact table for notebooks: MACs and parameters before and after, and lines below it.

    Args:
        told: `to_dict()` of a report.
        notes: plain text.
    """
    rows = []
    for key, name in (("macs", "MACs"), ("params", "parameters")):
        cells = f"<td>{told[f'dense_{key}'] / 1e6:.2f} M</td><td>{told[key] / 1e6:.2f} M</td>"
        rows.append(f"<tr><th>{name}</th>{cells}<td>{told[f'{key}_ratio']:.3f}</td></tr>")
    asked = ", ".join(f"{metric}={limit}" for metric, limit in told["budget"].items())
    head = "<tr><th></th><th>dense</th><th>pruned</th><th>ratio</th></tr>"
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    title = f"<caption>pruned to {html.escape(asked)}</caption>"
    return f"<table>{title}<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>{below}"


def ratio_lines(on_device: Mapping[str, Any]) -> list[str]:
    """A line a ratio to the dense model that was predicted or measured."""
    lines = []
    for when, found in on_device.items():
        for name, figure in found.items():
            if name.endswith("_ratio") and figure is not None:
                ends = f"[{figure['lo']:.3f}, {figure['hi']:.3f}]"
                lines.append(f"{name.replace('_', ' ')} {when}: {figure['value']:.3f} {ends}")
    return lines


def promised(
    fields: Mapping[str, Any],
    macs_ratio: float,
    params_ratio: float,
    on_device: Mapping[str, Any],
) -> dict[str, Any]:
    """A report's fields with the keys that DESIGN promises to scripts.

    Args:
        fields: of the report; `seconds` is by step.
        macs_ratio: kept fraction of the MACs.
        params_ratio: kept fraction of the parameters.
        on_device: "predicted" and "measured", where latency or energy was asked for.
    """
    unknown = {
        "latency_ratio": None,
        "energy_ratio": None,
        "memory_ratio": None,
        "reason": "budgets macs and params need no clock and no meter: nothing was timed in this run",
    }
    told = {
        **fields,
        "macs_ratio": macs_ratio,
        "params_ratio": params_ratio,
        "predicted": on_device.get("predicted", unknown),
        "measured": on_device.get("measured", unknown),
        "seconds": sum(fields["seconds"].values()),
        "seconds_by_step": fields["seconds"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions, the device the run used (None = the CPU) and the command, for provenance."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"command": command_line(), "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for package in (
        "hwprune",
        "timm",
        "transformers",
        "diffusers",
        "numpy",
        "scipy",
        "safetensors",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    place = device if device is not None else torch.device("cpu")
    about = provenance(place, Unavailable("not asked"))
    found["device"] = str(about["device"]["name"])
    found["os"] = str(about["os"])
    found["finished"] = str(about["started"])
    for name, key, unit in (
        ("commit", "commit", ""),
        ("threads", "threads", ""),
        ("CPU clock", "cpu_mhz", " MHz"),
        ("CPU governor", "cpu_governor", ""),
        ("load average", "load_average", ""),
        ("CUDA", "cuda", ""),
    ):
        value = about[key]
        if value is not None:
            found[name] = f"{value:.4g}{unit}" if isinstance(value, float) else f"{value}{unit}"
    if place.type == "cuda":
        found["GPU clock"] = _gpu_clock(place)
    return found


def command_line() -> str:
    """The command this process was started by, to be run again; a path to a program is its name alone."""
    program = Path(sys.argv[0] if sys.argv else "").name or "python"
    words = ["python", program] if program.endswith(".py") else [program]
    return shlex.join([*words, *sys.argv[1:]])


def _gpu_clock(device: torch.device) -> str:
    """Of the SMs now, or why it is not known."""
    try:
        return f"{torch.cuda.clock_rate(device)} MHz"
    except (RuntimeError, ModuleNotFoundError, AttributeError) as error:
        return f"not known: {' '.join(str(error).split())[:80]}"
