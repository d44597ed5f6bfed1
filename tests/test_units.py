"""Units against plain loops: who owns which entry, what a mask may look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hwprune.units import (
    AttentionLayer,
    MlpLayer,
    Rows,
    Slice,
    Units,
    check_mask,
    expand,
    full_mask,
    get_linear,
    layers_of,
    reduce,
)

TILES = [((70, 50), (32, 24)), ((5, 7), (8, 8)), ((6, 9), (1, 1)), ((33, 12), (16, 4))]
LINES = [
    # parameter shape, dimension, entries of each unit
    ((12, 5), 0, [[0, 1], [4, 5], [10, 2]]),
    ((5, 12), 1, [[3], [0], [11], [7]]),
    ((9,), 0, [[8, 0, 4]]),
    ((6, 4), 0, [[0, 3], [1, 4], [2, 5]]),
]


def mlp(stage: int = 0) -> MlpLayer:
    return MlpLayer(f"{stage}.mlp", stage, (Rows(f"{stage}.fc1", 0, 4),), f"{stage}.fc2", 4)


def attention(stage: int = 0) -> AttentionLayer:
    q, k, v = (Rows(f"{stage}.qkv", 4 * i, 4) for i in range(3))
    return AttentionLayer(f"{stage}.attn", stage, 2, 2, 0.5, q, k, v, f"{stage}.proj")


def neurons(count: int = 4) -> Units:
    return Units("0.mlp:neuron", mlp(), "neuron", (count,), ())


def owner(part: Slice, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(entry, unit) pairs by the definition of a slice, one entry at a time."""
    entries = [(i,) for i in range(shape[0])]
    if len(shape) == 2:
        entries = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    if part.tile is not None:
        return [(e, (e[0] // part.tile[0], e[1] // part.tile[1])) for e in entries]
    assert part.dim is not None and part.index is not None
    units = part.index.tolist()
    return [(e, (u,)) for e in entries for u, own in enumerate(units) if e[part.dim] in own]


def parts() -> list[tuple[Slice, tuple[int, ...], tuple[int, ...]]]:
    """Slice, parameter shape and grid shape of every case."""
    found: list[tuple[Slice, tuple[int, ...], tuple[int, ...]]] = []
    for shape, (rows, cols) in TILES:
        grid = (-(-shape[0] // rows), -(-shape[1] // cols))
        found.append((Slice("w", None, None, (rows, cols)), shape, grid))
    for line, dim, index in LINES:
        found.append((Slice("w", dim, torch.tensor(index)), line, (len(index),)))
    return found


each_slice = pytest.mark.parametrize(("part", "shape", "grid_shape"), parts())


@each_slice
def test_expand_gives_every_entry_the_value_of_its_unit_and_one_where_there_is_none(
    part: Slice, shape: tuple[int, ...], grid_shape: tuple[int, ...]
) -> None:
    grid = torch.randn(grid_shape, dtype=torch.float64)
    expected = torch.ones(shape, dtype=torch.float64)
    for entry, unit in owner(part, shape):
        expected[entry] = grid[unit]
    torch.testing.assert_close(expand(grid, part, torch.Size(shape)), expected, rtol=0, atol=0)


@each_slice
def test_reduce_adds_up_the_entries_of_each_unit(
    part: Slice, shape: tuple[int, ...], grid_shape: tuple[int, ...]
) -> None:
    entries = torch.randn(shape, dtype=torch.float64)
    expected = torch.zeros(grid_shape, dtype=torch.float64)
    for entry, unit in owner(part, shape):
        expected[unit] += entries[entry]
    torch.testing.assert_close(reduce(entries, part), expected, rtol=1e-12, atol=1e-12)


@each_slice
def test_expand_and_reduce_are_adjoint_on_the_entries_units_own(
    part: Slice, shape: tuple[int, ...], grid_shape: tuple[int, ...]
) -> None:
    entries = torch.randn(shape, dtype=torch.float64)
    grid = torch.randn(grid_shape, dtype=torch.float64)
    zero = torch.zeros(grid_shape, dtype=torch.float64)
    spread = expand(grid, part, torch.Size(shape)) - expand(zero, part, torch.Size(shape))
    left, right = (spread * entries).sum(), (grid * reduce(entries, part)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_bool_grid_expands_to_a_bool_mask() -> None:
    part = Slice("w", None, None, (2, 3))
    grid = torch.tensor([[True, False], [False, True]])
    assert expand(grid, part, torch.Size((3, 5))).tolist() == [
        [True, True, True, False, False],
        [True, True, True, False, False],
        [False, False, False, True, True],
    ]


def test_the_full_mask_keeps_every_unit_of_every_grid() -> None:
    tiles = Units("0.fc1:block", mlp(), "block", (2, 3), ())
    mask = full_mask([neurons(), tiles])
    assert {name: tuple(grid.shape) for name, grid in mask.items()} == {
        "0.mlp:neuron": (4,),
        "0.fc1:block": (2, 3),
    }
    assert all(grid.dtype == torch.bool and bool(grid.all()) for grid in mask.values())


def test_the_count_of_a_grid_of_tiles_is_rows_times_columns() -> None:
    assert Units("0.fc1:block", mlp(), "block", (2, 3), ()).count == 6


def test_a_mask_that_fits_is_accepted_also_where_it_names_only_some_units() -> None:
    check_mask([neurons()], {"0.mlp:neuron": torch.tensor([True, False, True, True])})
    check_mask([neurons()], {})


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"9.mlp:neuron": torch.ones(4) > 0}, "9.mlp:neuron.* no unit of this model.*0.mlp:neuron"),
        ({"0.mlp:neuron": torch.ones(4)}, "0.mlp:neuron: expected a bool mask, got torch.float32"),
        ({"0.mlp:neuron": torch.ones(5) > 0}, r"0.mlp:neuron: .* shape \(4,\), got \(5,\)"),
        ({"0.mlp:neuron": torch.ones(2, 2) > 0}, r"0.mlp:neuron: .* shape \(4,\), got \(2, 2\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_the_layer_named(
    mask: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_mask([neurons()], mask)


def test_a_mask_for_a_model_without_units_says_that_there_are_none() -> None:
    with pytest.raises(ValueError, match="the model has no units"):
        check_mask([], {"0.mlp:neuron": torch.ones(4) > 0})


def test_a_layer_that_is_no_linear_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    assert get_linear(model, "0") is model[0]
    with pytest.raises(ValueError, match=r"1: expected nn.Linear, got GELU; prune the dense model"):
        get_linear(model, "1")


def test_layers_come_once_each_in_the_order_the_model_runs_them() -> None:
    def unit(layer: AttentionLayer | MlpLayer, name: str) -> Units:
        return Units(name, layer, "neuron", (1,), ())

    units = [
        unit(mlp(1), "a"),
        unit(attention(1), "b"),
        unit(mlp(0), "c"),
        unit(attention(0), "d"),
        unit(attention(1), "e"),
    ]
    names = [layer.name for layer in layers_of(units)]
    assert names == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
