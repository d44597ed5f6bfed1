"""What any saved folder holds: a vision transformer, a denoiser of diffusers, or a pipeline around one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hwprune import shards
from hwprune.checkpoint import library_of
from hwprune.denoiser_checkpoint import read_denoiser
from hwprune.families.denoiser import find_layers
from hwprune.spec import CheckpointError
from hwprune.structure import describe
from hwprune.units import CoupledLayer

_ASKED = ("budget", "distance", "sampling", "images", "seconds", "warnings", "environment")


def describe_folder(folder: Path) -> dict[str, Any]:
    """The structure and the provenance of a folder, JSON-able; no weight is read.

    Args:
        folder: written by hwprune; of a pipeline, the denoiser in it is described.

    Returns:
        As `hwprune.structure.describe`. For denoisers macs come from the report, or are None; layers have
        heads, neurons, modulations or blocks as [kept, of].

    Raises:
        CheckpointError: nothing we can read is there, or it is damaged; says what opens it.
    """
    place = _denoiser_in(folder)
    if place is not None:
        return describe_denoiser(place)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so no model lies in it; expected a folder written by hwprune prune "
            "or prune-diffusion"
        )
    if folder.is_dir() and library_of(folder) == "diffusers":
        return describe_denoiser(folder)
    return describe(folder)


def _denoiser_in(folder: Path) -> Path | None:
    """The denoiser's own folder in that of a pipeline, or of its parts."""
    if (folder / "config.json").is_file():
        return None
    found = [folder / n for n in ("transformer", "unet") if (folder / n / "config.json").is_file()]
    return found[0] if found else None


def describe_denoiser(folder: Path) -> dict[str, Any]:
    """A denoiser of diffusers; see `describe_folder`."""
    found = read_denoiser(folder)
    dense, held = found.dense(), found.empty
    shape: Mapping[str, Any] = found.entry["shape"] if found.entry is not None else {}
    report = shards.read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    layers, left = find_layers(dense)
    removed = [name for name, entry in shape.items() if entry["type"] == "removed"]
    rows = []
    for layer in layers:
        if isinstance(layer, CoupledLayer):
            inside = any(layer.name == b or layer.name.startswith(f"{b}.") for b in removed)
            whole = layer.count
            kept = 0 if inside else shape.get(layer.name, {}).get("kept", whole)
            row: dict[str, Any] = {"layer": layer.name, f"{layer.kind}s": [kept, whole]}
            sizes = _sizes(dense, held, layer.name, moved=bool(removed))
            rows.append({**row, "params": sizes[1], "dense_params": sizes[0]})
    for name in removed:
        rows.append(
            {"layer": name, "blocks": [0, 1], "params": 0, "dense_params": _size(dense, name)}
        )
    params, dense_params = _size(held, ""), _size(dense, "")
    macs, dense_macs = report.get("macs"), report.get("dense_macs")
    if not macs or not dense_macs:
        macs = dense_macs = None
    return {
        "folder": str(folder),
        "format": "pruned" if shape else "dense model",
        "base": {"library": "diffusers", "architecture": type(held).__name__},
        "kinds": list(report.get("kinds", [])),
        "macs": macs,
        "dense_macs": dense_macs,
        "macs_ratio": None if macs is None else macs / dense_macs,
        "params": params,
        "dense_params": dense_params,
        "params_ratio": params / dense_params,
        "bytes": found.stored_bytes,
        "layers": rows,
        "left_dense": left,
        "provenance": {key: report[key] for key in _ASKED if key in report},
    }


def _size(model: nn.Module, name: str) -> int:
    return sum(p.numel() for p in model.get_submodule(name).parameters())


def _sizes(
    dense: nn.Module, held: nn.Module, name: str, *, moved: bool
) -> tuple[int | None, int | None]:
    """Parameters of a module before and now; None where removed blocks gave the others new numbers."""
    try:
        before = _size(dense, name)
        return before, None if moved else _size(held, name)
    except AttributeError:  # a layer's name need not be a module's
        return None, None
