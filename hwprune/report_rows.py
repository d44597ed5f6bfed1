"""What a report tells layer by layer: sizes kept of sizes, which tiles, the curves the choice was made by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hwprune.cost import Structure, dense_structure
from hwprune.distortion import Curve
from hwprune.units import Mask, Units, layers_of

POINTS = 24  # of a curve in a report: what a picture shows, at a few hundred bytes a curve


def layer_rows(units: Sequence[Units], structure: Mapping[str, Structure]) -> list[dict[str, Any]]:
    """One row a layer: `kept` of `of`, by what is counted (heads, qk, v, neurons).

    Args:
        units: of the model.
        structure: layer name -> what is left of it.
    """
    rows = []
    for layer in layers_of(units):
        kept = {k: v for k, v in asdict(structure[layer.name]).items() if v is not None}
        of = {k: v for k, v in asdict(dense_structure(layer)).items() if v is not None}
        rows.append({"layer": layer.name, "kept": kept, "of": of})
    return rows


def tile_rows(units: Sequence[Units], mask: Mask) -> list[dict[str, Any]]:
    """One row a weight cut by tiles: which are kept.

    Returns:
        linear; tile = [rows, columns] of one; kept of `of`; grid = one text a row of tiles, "1" = kept,
        as a hexadecimal number; width = tiles of a row.
    """
    rows = []
    for unit in units:
        tile = unit.slices[0].tile
        if unit.kind != "block" or tile is None or unit.name not in mask:
            continue
        grid = mask[unit.name].to("cpu", torch.bool)
        rows.append(
            {
                "linear": unit.slices[0].param.removesuffix(".weight"),
                "tile": list(tile),
                "kept": int(grid.sum()),
                "of": unit.count,
                "width": grid.shape[1],
                "grid": [_hex(line) for line in grid.tolist()],
            }
        )
    return rows


def _hex(line: Sequence[bool]) -> str:
    """Bits, first tile first, padded to whole digits with zeros at the end."""
    text = "".join("01"[bit] for bit in line)
    text += "0" * (-len(text) % 4)
    return f"{int(text, 2):0{len(text) // 4}x}"


def tile_grid(row: Mapping[str, Any]) -> list[list[bool]]:
    """The inverse: True = kept, [tile rows][tile columns].

    Raises:
        ValueError: the row is damaged.
    """
    width = int(row["width"])
    lines = []
    for text in row["grid"]:
        bits = f"{int(text, 16):0{4 * len(text)}b}"
        if not 0 <= len(bits) - width < 4:
            raise ValueError(f"{row.get('linear')}: {width} tiles a row, but {len(bits)} bits")
        lines.append([bit == "1" for bit in bits[:width]])
    return lines


def curve_rows(curves: Mapping[str, Curve], keep: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row a curve, thinned: what removing so many units was predicted to cost, and how many were kept.

    Returns:
        units, layer, kind, of, kept; removed = counts, ending with all; distortion = at each of them, in
        the unit of the report's distortion, before what allocation multiplies it by.
    """
    rows = []
    for name, curve in curves.items():
        count, kept = curve.units.count, int(keep.get(name, curve.units.count))
        steps = min(POINTS, count)
        removed = sorted({round(i * count / steps) for i in range(steps + 1)} | {count - kept})
        rows.append(
            {
                "units": name,
                "layer": curve.units.layer.name,
                "kind": curve.units.kind,
                "of": count,
                "kept": kept,
                "removed": removed,
                "distortion": [float(f"{float(curve.distortion[k]):.4g}") for k in removed],
            }
        )
    return rows
