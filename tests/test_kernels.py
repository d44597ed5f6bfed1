"""Every kernel against its own reference, dense products with zeros, and float64."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.layers import BlockSparseLinear

FOLDER = Path(__file__).resolve().parent.parent / "kernels"
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py"))
each_kernel = pytest.mark.parametrize("kernel", KERNELS)

Case = tuple[int, int, int, tuple[int, int], float]


def opened(kernel: str) -> ModuleType:
    return importlib.import_module(f"hwprune.kernels.{kernel}")


bsl = opened("block_sparse_linear")
each_case = pytest.mark.parametrize("case", bsl.CASES, ids=str)


def tiles(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, K], weight [N, K], bias [N], keep [grid]: a case made concrete."""
    tokens, width, outputs, (rows, cols), density = case
    generator = torch.Generator().manual_seed(tokens + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    grid = (-(-outputs // rows), -(-width // cols))
    keep = torch.rand(grid, generator=generator) < density
    return draw(tokens, width), draw(outputs, width), draw(outputs), keep


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    """What block_sparse_linear and its reference take."""
    x, weight, bias, keep = tiles(case, dtype)
    values, row_index, col_index = bsl.pack(weight, keep, case[3])
    return {
        "x": x,
        "values": values,
        "row_index": row_index,
        "col_index": col_index,
        "bias": bias,
        "out_features": case[2],
    }


# parameter names of a reference -> how to make its arguments from one of its CASES
MAKERS: dict[tuple[str, ...], Callable[[Case, torch.dtype], dict[str, object]]] = {
    ("x", "values", "row_index", "col_index", "bias", "out_features"): arguments,
}


def zeroed(weight: Tensor, keep: Tensor, block: tuple[int, int]) -> Tensor:
    """The oracle: element (o, i) survives where its tile does."""
    rows, cols = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
    return weight * keep[rows][:, cols]


def test_there_are_kernels() -> None:
    assert "block_sparse_linear" in KERNELS


@each_kernel
def test_a_kernel_file_has_a_reference_an_op_of_its_name_and_cases(kernel: str) -> None:
    module = opened(kernel)
    assert callable(module.reference) and callable(getattr(module, kernel))
    assert len(module.CASES) > 3


@each_kernel
def test_the_arguments_of_a_reference_are_ones_these_tests_can_make(kernel: str) -> None:
    names = tuple(inspect.signature(opened(kernel).reference).parameters)
    assert names in MAKERS, "give the new kind of kernel a maker above"


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_op_agrees_with_its_reference_on_all_cases(kernel: str, dtype: torch.dtype) -> None:
    module = opened(kernel)
    make = MAKERS[tuple(inspect.signature(module.reference).parameters)]
    for case in module.CASES:
        out = getattr(module, kernel)(**make(case, dtype))
        exact = module.reference(**make(case, torch.float64))
        assert out.dtype == dtype and out.shape == exact.shape
        # Sums of up to K terms of size 1, inputs rounded once: eps times a few √K of them.
        size = 4 * (case[1] ** 0.5 + 1) * torch.finfo(dtype).eps * 4
        torch.testing.assert_close(out.double(), exact, rtol=size, atol=size)


@each_case
@pytest.mark.parametrize("biased", [True, False])
def test_tiles_multiply_as_the_dense_weight_with_zeros_does(case: Case, biased: bool) -> None:
    x, weight, bias, keep = tiles(case)
    given = arguments(case) | {"bias": bias if biased else None}
    expected = F.linear(x, zeroed(weight, keep, case[3]), bias if biased else None)
    torch.testing.assert_close(bsl.block_sparse_linear(**given), expected, rtol=0, atol=1e-12)


@each_case
def test_gradients_are_those_of_the_dense_weight_with_zeros(case: Case) -> None:
    x, weight, bias, keep = tiles(case)
    given = arguments(case)
    leaves = [given[n].requires_grad_() for n in ("x", "values", "bias")]  # type: ignore[attr-defined]
    probe = torch.randn(case[0], case[2], dtype=torch.float64)
    found = torch.autograd.grad((bsl.block_sparse_linear(**given) * probe).sum(), leaves)
    dense = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = F.linear(dense[0], zeroed(dense[1], keep, case[3]), dense[2])
    expected = torch.autograd.grad((out * probe).sum(), dense)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-11)
    tile_gradient = bsl.pack(expected[1], keep, case[3])[0]
    torch.testing.assert_close(found[1], tile_gradient, rtol=0, atol=1e-11)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-11)


def test_gradients_agree_with_finite_differences() -> None:
    given = arguments((3, 7, 5, (2, 3), 0.6))

    def op(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return bsl.block_sparse_linear(**given | {"x": x, "values": values, "bias": bias})

    leaves = tuple(given[n].requires_grad_() for n in ("x", "values", "bias"))  # type: ignore[attr-defined]
    assert torch.autograd.gradcheck(op, leaves)


@each_case
def test_packing_and_unpacking_gives_the_kept_weights_bit_for_bit(case: Case) -> None:
    _, weight, _, keep = tiles(case, torch.float32)
    packed = bsl.pack(weight, keep, case[3])
    assert torch.equal(bsl.unpack(*packed, tuple(weight.shape)), zeroed(weight, keep, case[3]))
    assert len(packed[0]) == int(keep.sum())


@each_case
def test_stored_tiles_are_sorted_by_row_then_column(case: Case) -> None:
    _, weight, _, keep = tiles(case)
    _, row_index, col_index = bsl.pack(weight, keep, case[3])
    places = list(zip(row_index.tolist(), col_index.tolist(), strict=True))
    assert places == [tuple(p) for p in keep.nonzero().tolist()]
    assert row_index.dtype == col_index.dtype == torch.int32


@each_case
def test_nan_in_a_dropped_tile_does_not_leak(case: Case) -> None:
    x, weight, bias, keep = tiles(case)
    expected = F.linear(x, zeroed(weight, keep, case[3]), bias)
    kept_entries = zeroed(torch.ones_like(weight), keep, case[3]) > 0
    values, row_index, col_index = bsl.pack(
        torch.where(kept_entries, weight, float("nan")), keep, case[3]
    )
    out = bsl.block_sparse_linear(x, values, row_index, col_index, bias, case[2])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_nan_in_a_kept_tile_reaches_only_its_own_rows() -> None:
    case = (4, 32, 48, (16, 16), 1.0)
    given = arguments(case)
    given["values"][2, 5, 0] = float("nan")  # type: ignore[index]  # tile row 1, its sixth row
    bad = torch.isnan(bsl.block_sparse_linear(**given)).any(0)
    assert bad.nonzero()[:, 0].tolist() == [16 + 5]


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 0), (1, 2, 3, 4)])
def test_any_number_of_leading_dimensions_is_kept(lead: tuple[int, ...]) -> None:
    case = (1, 20, 30, (8, 8), 0.5)
    given = arguments(case) | {"x": torch.randn(*lead, 20, dtype=torch.float64)}
    out = bsl.block_sparse_linear(**given)
    assert out.shape == (*lead, 30)
    torch.testing.assert_close(out, bsl.reference(**given), rtol=0, atol=1e-12)


def test_inputs_that_are_not_contiguous_give_the_same() -> None:
    case = (12, 20, 30, (8, 8), 0.5)
    given = arguments(case)
    strided = given | {"x": given["x"].T.contiguous().T}  # type: ignore[attr-defined]
    assert torch.equal(bsl.block_sparse_linear(**strided), bsl.block_sparse_linear(**given))


def module(keep: Tensor, bias: bool = True) -> tuple[nn.Linear, BlockSparseLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(50, 70, bias=bias).double()
    return linear, BlockSparseLinear.from_dense(linear, keep, (32, 24))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_made_from_a_linear_computes_its_kept_tiles(bias: bool) -> None:
    keep = torch.rand(3, 3) < 0.5
    linear, sparse = module(keep, bias)
    x = torch.randn(2, 5, 50, dtype=torch.float64)
    expected = F.linear(x, zeroed(linear.weight, keep, (32, 24)), linear.bias)
    torch.testing.assert_close(sparse(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(sparse.to_dense(), zeroed(linear.weight, keep, (32, 24)))
    assert sparse.density == int(keep.sum()) / 9


def test_a_layer_shares_no_memory_with_the_linear_it_came_from() -> None:
    linear, sparse = module(torch.ones(3, 3, dtype=torch.bool))
    before = sparse.to_dense()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(sparse.to_dense(), before)
    assert sparse.bias is not None and bool((sparse.bias != 0).any())


def test_the_state_of_a_layer_is_its_tiles_their_places_and_the_bias() -> None:
    _, sparse = module(torch.eye(3) > 0)
    state = {name: tuple(t.shape) for name, t in sparse.state_dict().items()}
    assert state == {
        "values": (3, 32, 24),
        "row_index": (3,),
        "col_index": (3,),
        "bias": (70,),
    }


@pytest.mark.parametrize(
    "keep", [torch.ones(3, 3), torch.ones(2, 3) > 0, torch.ones(9) > 0], ids=lambda k: str(k.shape)
)
def test_a_grid_that_does_not_fit_the_weight_is_refused(keep: Tensor) -> None:
    with pytest.raises(ValueError, match=r"keep: expected bool \(3, 3\) .* in tiles of \(32, 24\)"):
        module(keep)


def test_tiles_without_a_side_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1, got \(0, 8\)"):
        BlockSparseLinear(4, 4, (0, 8), 0, bias=True)


@pytest.mark.parametrize("width", [49, 51, 72, 100])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    _, sparse = module(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"expected inputs of width 50, got \(2, {width}\)"):
        sparse(torch.randn(2, width, dtype=torch.float64))


def test_the_gradient_of_nothing_kept_is_zero() -> None:
    _, sparse = module(torch.zeros(3, 3, dtype=torch.bool))
    x = torch.randn(2, 50, dtype=torch.float64, requires_grad=True)
    sparse(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) == 0
