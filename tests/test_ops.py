"""Operations: what their keys refuse, what they count, and that what is timed is what the key says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwprune.layers import BlockSparseLinear, SlimAttention
from hwprune.ops import DTYPES, NAMES, Op, Pool, runnable
from hwprune.profile_ops import profile_ops

OPS = [
    Op("linear", (7, 24, 40), "fp32"),
    Op("attention", (2, 3, 5, 8, 4), "fp32"),
    Op("gelu", (6, 10), "fp32"),
    Op("silu", (6, 10), "fp32"),
    Op("layer_norm", (6, 10), "fp32"),
    Op.tiles((7, 40, 70), "fp32", (16, 32), 4),
]


def refused(kind: str, shape: tuple[int, ...], dtype: str = "fp32", *more: object) -> str:
    with pytest.raises(ValueError, match="expected") as said:
        Op(kind, shape, dtype, *more)  # type: ignore[arg-type]
    return str(said.value)


def test_what_is_no_operation_is_refused() -> None:
    assert "'conv'" in refused("conv", (1, 1, 1))
    assert "'fp8'" in refused("linear", (1, 1, 1), "fp8")
    assert "'csr'" in refused("linear", (1, 1, 1), "fp32", "csr")
    assert "('m', 'n', 'k')" in refused("linear", (1, 1))
    assert "got (0, 4)" in refused("gelu", (0, 4))
    for density in (0.0, -0.5, 1.5, math.nan):
        refused("linear", (1, 1, 1), "fp32", "block_sparse", density, (16, 16))
    refused("linear", (1, 1, 1), "fp32", "block_sparse", 0.5, (0, 0))
    refused("linear", (1, 1, 1), "fp32", "block_sparse", 0.5, (16, 0))
    refused("linear", (1, 1, 1), "fp32", "dense", 0.5)
    refused("linear", (1, 1, 1), "fp32", "dense", 1.0, (16, 16))
    refused("gelu", (1, 1), "fp32", "block_sparse", 0.5, (16, 16))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_an_operation_comes_back_from_its_dictionary(op: Op) -> None:
    assert Op.from_dict(op.to_dict()) == op


@pytest.mark.parametrize(
    "changed",
    [
        {"op": "conv"},
        {"op": ["linear"]},
        {"shape": {"m": 7, "n": 24}},
        {"shape": {"m": 7, "n": 24, "k": 40, "h": 3}},
        {"shape": {"m": 7, "n": 24, "k": 1.5}},
        {"shape": {"m": 7, "n": 24, "k": True}},
        {"shape": {"m": 7, "n": 24, "k": math.inf}},
        {"shape": [7, 24, 40]},
        {"density": "half"},
        {"block": [16]},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_dictionary_that_is_no_operation_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Op.from_dict({**OPS[0].to_dict(), **changed})


def test_counts_of_a_linear_by_hand() -> None:
    op = Op("linear", (7, 24, 40), "bf16")
    assert op.macs == 7 * 24 * 40
    assert op.weight_bytes == 2 * (24 * 40 + 24)
    assert op.activation_bytes == 2 * 7 * (24 + 40)


def test_counts_of_attention_by_hand() -> None:
    op = Op("attention", (2, 3, 5, 8, 4), "fp32")
    assert op.macs == 2 * 3 * 5 * 5 * (8 + 4)
    assert (op.weight_bytes, op.activation_bytes) == (0, 4 * 2 * 5 * 3 * (8 + 8 + 4 + 4))


@pytest.mark.parametrize("size", [(40, 70), (64, 64), (33, 95)])
def test_tiles_count_what_the_layer_stores(size: tuple[int, int]) -> None:
    linear = nn.Linear(size[1], size[0])
    keep = torch.rand(-(-size[0] // 16), -(-size[1] // 32)) < 0.5
    keep[0, 0] = True
    layer = BlockSparseLinear.from_dense(linear, keep, (16, 32))
    op = Op.tiles((7, *size), "fp32", (16, 32), len(layer.values))
    assert op.density == layer.density  # exactly: it is the key of an exact hit
    assert (op.kept_tiles, op.grid_tiles) == (len(layer.values), keep.numel())
    stored = [*layer.parameters(), *layer.buffers()]
    assert op.weight_bytes == sum(t.numel() * t.element_size() for t in stored)
    assert op.macs == 7 * layer.values.numel()


def test_names_and_types_are_each_others_inverse() -> None:
    assert {NAMES[dtype]: dtype for dtype in DTYPES.values()} == DTYPES


# --- what runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.kind} {op.impl}")
def test_what_runs_has_the_sizes_of_the_key(op: Op, dtype: str) -> None:
    op = Op(op.kind, op.shape, dtype, op.impl, op.density, op.block)
    out = runnable(op, Pool(torch.device("cpu"), 1 << 14))()
    sizes = {"linear": (7, op.shape[1]), "attention": (2, 5, 12)}.get(op.kind, (6, 10))
    assert (tuple(out.shape), out.dtype) == (sizes, DTYPES[dtype])
    assert bool(out.isfinite().all())


def test_what_runs_computes_the_operation() -> None:
    """The pool hands out the same numbers in the same order, so the oracle draws them again."""

    def again() -> Pool:
        return Pool(torch.device("cpu"), 1 << 14)

    fp32, pool = torch.float32, again()
    x, weight, bias = (pool.take(fp32, *s) for s in ((7, 24), (40, 24), (40,)))
    dense = runnable(Op("linear", (7, 40, 24), "fp32"), again())()
    torch.testing.assert_close(dense, x @ weight.T + bias)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(9, generator=generator).argsort().argsort().view(3, 3) < 4
    grown = keep.repeat_interleave(16, 0)[:40].repeat_interleave(8, 1)
    tiled = runnable(Op.tiles((7, 40, 24), "fp32", (16, 8), 4), again())()
    torch.testing.assert_close(tiled, x @ (weight * grown).T + bias, rtol=1e-5, atol=1e-4)
    whole = runnable(Op.tiles((7, 40, 24), "fp32", (16, 8), 9), again())()
    torch.testing.assert_close(whole, dense, rtol=1e-5, atol=1e-4)

    numbers = again().take(fp32, 6, 10)
    torch.testing.assert_close(runnable(OPS[2], again())(), F.gelu(numbers))
    torch.testing.assert_close(runnable(OPS[3], again())(), F.silu(numbers))
    pool = again()
    x, scale, shift = pool.take(fp32, 6, 10), pool.take(fp32, 10), pool.take(fp32, 10)
    torch.testing.assert_close(
        runnable(OPS[4], again())(), F.layer_norm(x, (10,), scale, shift, 1e-6)
    )
    qkv = again().take(fp32, 2, 5, 3 * 20)
    layer = SlimAttention(8, 3, 8, 4, scale=8**-0.5).eval()
    torch.testing.assert_close(runnable(OPS[1], again())(), layer.attend(qkv))


def test_a_call_computes_anew() -> None:
    call = runnable(OPS[0], Pool(torch.device("cpu"), 1 << 14))
    first = call()
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(call(), kept)


def test_a_pool_hands_out_whole_lines_and_starts_again() -> None:
    pool = Pool(torch.device("cpu"), 256)
    a, b = pool.take(torch.float32, 3), pool.take(torch.float32, 100)
    assert b.data_ptr() - a.data_ptr() == 64 * 4
    assert pool.take(torch.float32, 200).data_ptr() == a.data_ptr()  # 64 + 128 used: no room for it
    assert pool.take(torch.bfloat16, 1000).shape == (1000,)  # larger than the pool: its own


# --- which are measured --------------------------------------------------------------------------


def test_a_profile_measures_each_once_and_whole_networks_first() -> None:
    ops = profile_ops((8, 1), ("fp32", "bf16"))
    assert len(ops) == len(set(ops)) and {op.kind for op in ops} >= {"silu", "gelu", "layer_norm"}
    first = ops[: 2 * 2 * 12]
    assert {(op.kind, op.impl) for op in first} == {("linear", "dense")}
    assert Op("linear", (8 * 197, 2304, 768), "fp32") in first
    tiles = [op for op in ops if op.impl == "block_sparse"]
    assert all(op.density == op.kept_tiles / op.grid_tiles for op in tiles)
    assert {op.block for op in tiles} == {(64, 64), (32, 32), (64, 32), (128, 64)}


def test_diffusion_models_run_one_sample() -> None:
    assert not [op for op in profile_ops((8,), ("fp32",)) if op.shape[0] in (256, 4096, 4608)]
    alone = profile_ops((1,), ("fp32",))
    assert Op("linear", (4608, 12288, 3072), "fp32") in alone
    assert Op("attention", (1, 10, 4096, 64, 64), "fp32") in alone
