"""The stored form of a block-sparse weight: bit-exact, ordered, checked, transposed, compacted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from hwprune.kernels.block_sparse.format import (
    COLUMNS,
    LARGEST,
    ROWS,
    BlockSparseWeight,
    balanced,
    check_sizes,
)

SHAPES = [(130, 100, (32, 64)), (64, 64, (64, 64)), (33, 77, (64, 16)), (200, 300, (128, 128))]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_density = pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
Shape = tuple[int, int, tuple[int, int]]


def made(
    shape: Shape, density: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, BlockSparseWeight]:
    outputs, width, block = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, width, generator=generator).to(dtype)
    grid = (-(-outputs // block[0]), -(-width // block[1]))
    keep = torch.rand(grid, generator=generator) < density
    if density == 0.4 and grid[0] > 2:
        keep[1] = False  # an empty row
    return weight, keep, BlockSparseWeight.from_dense(weight, keep, block)


def zeroed(weight: Tensor, keep: Tensor, block: tuple[int, int]) -> Tensor:
    rows, cols = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
    return torch.where(keep[rows][:, cols], weight, torch.zeros((), dtype=weight.dtype))


@each_shape
@each_density
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_and_unpacking_gives_the_kept_weights_bit_for_bit(
    shape: Shape, density: float, dtype: torch.dtype
) -> None:
    weight, keep, packed = made(shape, density, dtype)
    weight[0, 0] = float("nan")
    packed = BlockSparseWeight.from_dense(weight, keep, shape[2])
    expected = zeroed(weight, keep, shape[2])
    assert torch.equal(packed.to_dense().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(packed.keep(), keep)
    packed.check()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", COLUMNS)
def test_every_tile_the_kernels_take_can_be_stored(rows: int, cols: int) -> None:
    weight, keep, packed = made((rows + 3, 2 * cols + 1, (rows, cols)), 0.5)
    assert packed.block == (rows, cols) and packed.grid == (2, 3)
    assert torch.equal(packed.to_dense(), zeroed(weight, keep, (rows, cols)))


@each_shape
@each_density
def test_tiles_are_sorted_with_one_entry_of_padding_and_long_rows_first(
    shape: Shape, density: float
) -> None:
    _, keep, packed = made(shape, density)
    places = list(zip(packed.row_of().tolist(), packed.idx[:-1].tolist(), strict=True))
    assert places == [tuple(p) for p in keep.nonzero().tolist()]
    assert packed.idx.dtype == packed.crow.dtype == packed.order.dtype == torch.int32
    assert len(packed.idx) == len(packed.values) + 1 and int(packed.idx[-1]) == 0
    lengths = packed.crow.diff()[packed.order.long()]
    assert bool((lengths.diff() <= 0).all())


@each_shape
@each_density
def test_the_transpose_lists_each_column_s_tiles(shape: Shape, density: float) -> None:
    _, keep, packed = made(shape, density)
    ccol, ridx, perm = packed.transposed()
    assert ccol.dtype == ridx.dtype == perm.dtype == torch.int32
    assert len(ridx) == len(perm) == len(packed.values) + 1
    for column in range(keep.shape[1]):
        span = slice(int(ccol[column]), int(ccol[column + 1]))
        assert ridx[span].tolist() == keep[:, column].nonzero()[:, 0].tolist()
        assert bool((packed.idx[perm[span].long()] == column).all())
        assert packed.row_of()[perm[span].long()].tolist() == ridx[span].tolist()


@each_shape
@each_density
def test_compaction_drops_what_is_wholly_empty_and_nothing_else(
    shape: Shape, density: float
) -> None:
    weight, keep, packed = made(shape, density)
    small, rows, cols = packed.compacted()
    small.check()
    whole = zeroed(weight, keep, shape[2])
    assert torch.equal(small.to_dense(), whole[rows][:, cols])
    dropped = torch.ones_like(whole)
    dropped[rows[:, None], cols] = 0
    assert float((whole * dropped).abs().sum()) == 0
    assert small.grid == (int(keep.any(1).sum()), int(keep.any(0).sum()))


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_a_balanced_mask_keeps_the_best_of_each_row(density: float) -> None:
    scores = torch.rand(7, 12, generator=torch.Generator().manual_seed(0))
    keep = balanced(scores, density)
    count = round(12 * density)
    assert keep.sum(1).tolist() == [count] * 7
    for row, mask in zip(scores, keep, strict=True):
        if 0 < count < 12:
            assert float(row[mask].min()) >= float(row[~mask].max())


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_outside_0_to_1_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density: expected a fraction in \[0, 1\]"):
        balanced(torch.rand(2, 2), density)


def test_plain_tensors_go_through_safetensors() -> None:
    _, _, packed = made(SHAPES[0], 0.4)
    fields = ("values", "idx", "crow", "order")
    stored = load(save({name: getattr(packed, name) for name in fields}))
    assert torch.equal(
        BlockSparseWeight(**stored, shape=packed.shape).to_dense(), packed.to_dense()
    )


def broken(packed: BlockSparseWeight, field: str, at: int, value: int) -> BlockSparseWeight:
    tensor = getattr(packed, field).clone()
    tensor[at] = value
    return replace(packed, **{field: tensor})


@pytest.mark.parametrize(
    ("field", "at", "value", "said"),
    [
        ("idx", 0, 2, "idx: expected block-columns in"),
        ("idx", 0, -1, "idx: expected block-columns in"),
        ("idx", -1, 99, "idx: expected block-columns in"),
        ("idx", 1, 0, "rising block-columns within each block-row"),
        ("crow", 0, 1, "crow: expected to rise from 0"),
        ("crow", -1, 1000, "crow: expected to rise from 0"),
        ("crow", 2, 100, "crow: expected to rise from 0"),
        ("order", 0, 1, "order: expected each of 5 block-rows once"),
        ("order", 0, 7, "order: expected each of 5 block-rows once"),
    ],
)
def test_indices_that_would_read_foreign_memory_are_refused(
    field: str, at: int, value: int, said: str
) -> None:
    _, _, packed = made(SHAPES[0], 1.0)
    packed.check()
    with pytest.raises(ValueError, match=said):
        broken(packed, field, at, value).check()


@pytest.mark.parametrize("field", ["idx", "crow", "order"])
def test_tensors_of_another_type_or_length_are_refused(field: str) -> None:
    _, _, packed = made(SHAPES[0], 0.4)
    tensor = getattr(packed, field)
    for other in (tensor.long(), tensor[:-1], tensor.float(), tensor[None]):
        with pytest.raises(ValueError, match=f"{field}: expected int32"):
            replace(packed, **{field: other}).check()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"tokens": LARGEST + 1}, "tokens"),
        ({"stored": LARGEST // 64 + 1}, "rows of all stored tiles"),
        ({"shape": (LARGEST + 1, 4)}, "out_features"),
        ({"shape": (4, LARGEST + 1)}, "in_features"),
    ],
)
def test_counts_beyond_int32_are_refused_by_name(given: dict[str, object], name: str) -> None:
    fits = {
        "tokens": LARGEST,
        "stored": LARGEST // 64,
        "block": (64, 64),
        "shape": (LARGEST, LARGEST),
    }
    check_sizes(**fits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name}: expected at most {LARGEST}"):
        check_sizes(**fits | given)  # type: ignore[arg-type]
