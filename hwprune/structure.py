"""What a saved folder holds, layer by layer, from its spec and tensor headers; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwprune import families
from hwprune.checkpoint import empty_model, library_of, read_folder
from hwprune.cost import Structure, count_macs, dense_structure, layer_params
from hwprune.families.vision_units import linears_of
from hwprune.images import input_size
from hwprune.timm_base import create_empty
from hwprune.transformers_checkpoint import empty_models
from hwprune.units import AttentionLayer, Layer, get_linear


def describe(folder: Path) -> dict[str, Any]:
    """The structure and the provenance of a folder, JSON-able.

    Args:
        folder: written by `hwprune.save`, of timm or of transformers.

    Returns:
        format ("pruned" or "dense"); base; params and macs of the model in the folder, dense_params and
        dense_macs of its base, and their ratios; bytes of the tensor files; layers, each with its name,
        params, dense_params and what applies of heads, qk, v, neurons, tiles as [kept, of]; provenance.

    Raises:
        CheckpointError: the folder describes a model that cannot be built, or does not fit its tensors.
    """
    if library_of(folder) == "transformers":
        spec, held, dense, stored_bytes = empty_models(folder)
        size: Sequence[int] = input_size(dense)
    else:
        found = read_folder(folder)
        spec, stored_bytes, size = found.spec, found.stored_bytes, found.cfg["input_size"]
        held, dense = empty_model(found), create_empty(spec, found.cfg)
    report, zeroed = spec["report"], spec.get("zeroed") or {}
    layers, left = families.of(dense).find_layers(dense)
    params, dense_params = _params(held), _params(dense)
    dense_macs = report.get("dense_macs") or _macs(dense, size)
    macs = dense_macs if not spec["shape"] else report.get("macs") or _macs(held, size)
    rows = [_row(dense, layer, spec["shape"] or zeroed) for layer in layers]
    asked = ("budget", "distortion", "calibration", "seconds", "warnings", "environment")
    return {
        "folder": str(folder),
        "format": "dense" if zeroed else "pruned",
        "base": spec["base"],
        "kinds": spec["kinds"],
        "macs": macs,
        "dense_macs": dense_macs,
        "macs_ratio": macs / dense_macs,
        "params": params,
        "dense_params": dense_params,
        "params_ratio": params / dense_params,
        "bytes": stored_bytes,
        "layers": rows,
        "left_dense": left,
        "provenance": {key: report[key] for key in asked if key in report},
    }


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, input_size: Sequence[int]) -> float:
    """Counted on the meta device: shapes alone, no weights."""
    return count_macs(model, torch.zeros(1, *input_size, device="meta"))


def _row(dense: nn.Module, layer: Layer, shape: Mapping[str, Any]) -> dict[str, Any]:
    """One layer: what is kept of what."""
    full = dense_structure(layer)
    entry = shape.get(layer.name)
    first: list[int] = next((shape[n]["block"] for n in linears_of(layer) if n in shape), [])
    # A layer cut in whole units may store all that is left as tiles.
    sides = first if entry is None else []
    tiles, weights = [0, 0], {}
    for name in linears_of(layer) if sides else ():
        size = get_linear(dense, name).weight.shape
        mine = shape[name]["block"] if name in shape else sides
        whole = math.prod(-(-n // side) for n, side in zip(size, mine, strict=True))
        kept_tiles = shape[name]["kept"] if name in shape else whole
        tiles = [tiles[0] + kept_tiles, tiles[1] + whole]
        weights[name] = kept_tiles * math.prod(mine) if name in shape else math.prod(size)
    if entry is None:
        kept = Structure(weights=weights) if sides else full
    elif isinstance(layer, AttentionLayer):
        kept = Structure(*(entry.get(key, 0) for key in ("heads", "qk", "v")))
    else:
        kept = Structure(neurons=entry.get("neurons", 0))
    row: dict[str, Any] = {
        "layer": layer.name,
        "params": layer_params(dense, layer, kept),
        "dense_params": layer_params(dense, layer, full),
    }
    for key in ("heads", "qk", "v", "neurons"):
        whole = getattr(full, key)
        if whole is not None:
            row[key] = [whole if sides else getattr(kept, key), whole]
    if sides:
        row["tiles"] = tiles
    return row
