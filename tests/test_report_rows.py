"""What a report tells of layers, tiles and curves, against the masks and models it tells of."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from hwprune.pruning import prune
from hwprune.report import command_line, environment
from hwprune.report_rows import tile_grid, tile_rows

pytest.importorskip("timm")

from hwprune import Budget
from hwprune.families import timm_vit
from hwprune.layers import BlockSparseLinear


def test_tiles_are_told_as_they_are_stored() -> None:
    torch.manual_seed(0)
    model, x = timm_vit.example()
    report = prune(model, [x, x + 0.1], Budget(macs=0.8), kinds=["block"], block=(16, 20))
    told = json.loads(json.dumps(report.to_dict()))["tiles"]
    assert told and {row["linear"] for row in told} <= {n for n, _ in model.named_modules()}
    cut = 0
    for row in told:
        layer = model.get_submodule(row["linear"])
        grid = torch.tensor(tile_grid(row))
        assert int(grid.sum()) == row["kept"] and grid.numel() == row["of"]
        if isinstance(layer, BlockSparseLinear):
            cut += 1
            # The layer's own weight, tile by tile, is the oracle.
            weight = layer.to_dense().detach()
            high, wide = row["tile"]
            for r, line in enumerate(grid.tolist()):
                for c, kept in enumerate(line):
                    tile = weight[r * high : (r + 1) * high, c * wide : (c + 1) * wide]
                    assert kept == bool(tile.any()), (row["linear"], r, c)
    assert cut


@pytest.mark.parametrize("width", [1, 3, 4, 5, 17])
def test_a_grid_of_any_width_comes_back(width: int) -> None:
    torch.manual_seed(width)
    model, _ = timm_vit.example()
    unit = timm_vit.find_units(model, ["block"], block=(16, 20))[0]
    grid = torch.rand(5, width) < 0.5
    grid[0, 0] = False  # leading zeros must not be lost
    (row,) = tile_rows([unit], {unit.name: grid})
    assert tile_grid(row) == grid.tolist()
    with pytest.raises(ValueError, match="tiles a row"):
        tile_grid({**row, "width": width + 4})


def test_layers_and_curves_are_told_with_what_they_are_of() -> None:
    torch.manual_seed(0)
    model, x = timm_vit.example()
    report = prune(model, [x, x + 0.1], Budget(macs=0.7))
    for row in report.layers:
        assert set(row["kept"]) == set(row["of"])
        assert all(0 <= row["kept"][key] <= row["of"][key] for key in row["of"])
    assert any(row["kept"] != row["of"] for row in report.layers)
    for curve in report.curves:
        assert curve["removed"][0] == 0 and curve["removed"][-1] == curve["of"]
        assert curve["of"] - curve["kept"] in curve["removed"]
        assert curve["distortion"] == sorted(curve["distortion"])
        assert curve["distortion"][0] == 0


def test_the_command_is_told_so_that_a_shell_reads_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["hwprune", "prune", "my model", "--out", "a'b"]
    monkeypatch.setattr("sys.argv", ["bin/hwprune", *words[1:]])

    assert shlex.split(command_line()) == words
    assert environment()["command"] == command_line()
    monkeypatch.setattr("sys.argv", ["scripts/prune.py", "x"])
    assert command_line() == "python prune.py x"
