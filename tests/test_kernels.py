"""Every kernel against its own reference, dense products with zeros, and float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.layers import BlockSparseLinear

FOLDER = Path(__file__).resolve().parent.parent / "kernels"
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py"))
each_kernel = pytest.mark.parametrize("kernel", KERNELS)

Case = tuple[int, int, int, tuple[int, int], float]


def opened(kernel: str) -> ModuleType:
    return importlib.import_module(f"hwprune.kernels.{kernel}")


bsl, glu = opened("block_sparse_linear"), opened("block_sparse_glu")
each_case = pytest.mark.parametrize("case", bsl.CASES, ids=str)
ACTS = ("none", "gelu", "gelu_tanh", "silu")


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tiles(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, K], weight [N, K], bias [N], keep [grid]: a case made concrete."""
    tokens, width, outputs, (rows, cols), density = case
    generator = torch.Generator().manual_seed(tokens + width)
    grid = (-(-outputs // rows), -(-width // cols))
    keep = torch.rand(grid, generator=generator) < density
    sizes = ((tokens, width), (outputs, width), (outputs,))
    x, weight, bias = (draw(generator, dtype, *size) for size in sizes)
    return x, weight / width**0.5, bias, keep


def linear_arguments(case: Case, dtype: torch.dtype, act: str) -> dict[str, Any]:
    """What block_sparse_linear and its reference take."""
    x, weight, bias, keep = tiles(case, dtype)
    residual = draw(torch.Generator().manual_seed(1), dtype, len(x), len(weight))
    packed = BlockSparseWeight.from_dense(weight, keep, case[3])
    return {"x": x, "weight": packed, "bias": bias, "residual": residual, "act": act}


def gated_arguments(case: Case, dtype: torch.dtype, act: str) -> dict[str, Any]:
    """What block_sparse_glu and its reference take."""
    given = linear_arguments(case, dtype, act)
    value = given["weight"]
    gate = replace(value, values=value.values.flip(0) / 2)
    return given | {"weight": glu.stack(value, gate), "bias": torch.cat([given["bias"]] * 2) / 2}


# a kernel -> how to make its arguments from one of its CASES
MAKERS: dict[str, Callable[[Case, torch.dtype, str], dict[str, Any]]] = {
    "block_sparse_linear": linear_arguments,
    "block_sparse_glu": gated_arguments,
}


def zeroed(weight: Tensor, keep: Tensor, block: tuple[int, int]) -> Tensor:
    """The oracle: element (o, i) survives where its tile does."""
    rows, cols = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
    return weight * keep[rows][:, cols]


def widened(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    return wide | {"weight": replace(given["weight"], values=given["weight"].values.double())}


def off(found: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-12))


def test_there_are_kernels_and_each_has_a_maker() -> None:
    assert set(KERNELS) == set(MAKERS), "give the new kernel a maker above"


@each_kernel
def test_a_kernel_file_has_a_reference_an_op_of_its_name_and_cases(kernel: str) -> None:
    module = opened(kernel)
    assert callable(module.reference) and callable(getattr(module, kernel))
    assert len(module.CASES) > 3


@each_kernel
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_op_errs_no_more_than_the_dense_computation(
    kernel: str, dtype: torch.dtype, act: str
) -> None:
    module = opened(kernel)
    for case in module.CASES:
        given = MAKERS[kernel](case, dtype, act)
        out, exact = getattr(module, kernel)(**given), module.reference(**widened(given))
        assert out.dtype == dtype and out.shape == exact.shape
        dense = off(module.reference(**given), exact)
        assert off(out, exact) <= 1.5 * dense + 2 * torch.finfo(dtype).eps


@each_case
@pytest.mark.parametrize("biased", [True, False])
def test_tiles_multiply_as_the_dense_weight_with_zeros_does(case: Case, biased: bool) -> None:
    x, weight, bias, keep = tiles(case)
    packed = BlockSparseWeight.from_dense(weight, keep, case[3])
    shift = bias if biased else None
    expected = F.linear(x, zeroed(weight, keep, case[3]), shift)
    found = bsl.block_sparse_linear(x, packed, shift)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@each_kernel
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_dense_weight_with_zeros(
    kernel: str, act: str, dtype: torch.dtype
) -> None:
    module = opened(kernel)
    for case in module.CASES:
        given = MAKERS[kernel](case, dtype, act)
        probe = torch.randn(case[0], case[2], dtype=torch.float64)
        grads = []
        for call, args in (
            (getattr(module, kernel), given),
            (module.reference, widened(given)),
        ):
            leaves = [args["x"], args["weight"].values, args["bias"], args["residual"]]
            leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            weight = replace(args["weight"], values=leaves[1])
            out = call(leaves[0], weight, leaves[2], leaves[3], act)
            grads.append(torch.autograd.grad((out * probe.to(out.dtype)).sum(), leaves))
        for found, exact in zip(*grads, strict=True):
            assert off(found, exact) <= 50 * torch.finfo(dtype).eps


def test_gradients_agree_with_finite_differences() -> None:
    given = linear_arguments((3, 7, 5, (2, 4), 0.6), torch.float64, "gelu")
    weight = given["weight"]

    def op(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = bsl.block_sparse_linear(
            x, replace(weight, values=values), bias, residual, "gelu"
        )
        return out

    leaves = (given["x"], weight.values, given["bias"], given["residual"])
    assert torch.autograd.gradcheck(op, tuple(leaf.requires_grad_() for leaf in leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_case
def test_nan_where_only_dropped_tiles_look_does_not_leak(case: Case, dtype: torch.dtype) -> None:
    x, weight, bias, keep = tiles(case, dtype)
    unread = ~keep.any(0).repeat_interleave(case[3][1])[: case[1]]
    packed = BlockSparseWeight.from_dense(weight, keep, case[3])
    expected = bsl.block_sparse_linear(x, packed, bias)
    dirty = torch.where(unread, torch.tensor(float("nan"), dtype=dtype), x)
    assert torch.equal(bsl.block_sparse_linear(dirty, packed, bias), expected)
    # and a kept tile takes a NaN to its own rows only
    if len(packed.values) > 1:
        values = packed.values.clone()
        values[0, 0, 0] = float("nan")
        out = bsl.block_sparse_linear(x, replace(packed, values=values), bias)
        row = int(packed.row_of()[0]) * case[3][0]
        assert torch.isnan(out).any(0).nonzero()[:, 0].tolist() == [row]


@each_kernel
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 0), (1, 2, 3, 4)])
def test_any_number_of_leading_dimensions_is_kept(kernel: str, lead: tuple[int, ...]) -> None:
    given = MAKERS[kernel]((1, 40, 30, (8, 8), 0.5), torch.float64, "gelu")
    x, residual = torch.randn(*lead, 40).double(), torch.randn(*lead, 30).double()
    given |= {"x": x, "residual": residual}
    out = getattr(opened(kernel), kernel)(**given)
    assert out.shape == (*lead, 30)
    torch.testing.assert_close(out, opened(kernel).reference(**given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 150])
def test_inputs_of_any_strides_give_the_same(dtype: torch.dtype, tokens: int) -> None:
    given = linear_arguments((tokens, 66, 96, (32, 32), 0.5), dtype, "none")
    expected = bsl.block_sparse_linear(**given)
    x = given["x"]
    wide = torch.full((tokens, 101), float("nan"), dtype=dtype)
    wide[:, 7:73] = x
    for view in (x.T.contiguous().T, wide[:, 7:73], x[:, None].expand(-1, 1, -1)[:, 0]):
        found = bsl.block_sparse_linear(**given | {"x": view})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_same_call_gives_the_same_bits() -> None:
    given = linear_arguments((197, 192, 576, (32, 32), 0.7), torch.float32, "gelu")
    first = bsl.block_sparse_linear(**given)
    assert all(torch.equal(bsl.block_sparse_linear(**given), first) for _ in range(3))


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
        "idx": (4,),
        "crow": (4,),
        "order": (3,),
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
