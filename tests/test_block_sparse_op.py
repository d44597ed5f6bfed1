"""The operator inside torch: opcheck, compile, autocast, FLOPs, bad input; and the layer that drives it."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hwprune.kernels.block_sparse import native, op
from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_glu import block_sparse_glu, stack
from hwprune.kernels.block_sparse_linear import block_sparse_linear
from hwprune.layers import BlockSparseLinear, CompactLinear

ROOT = Path(__file__).resolve().parent.parent


def packed(dtype: torch.dtype = torch.float32, density: float = 0.5) -> BlockSparseWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    keep = torch.rand(3, 4, generator=generator) < density
    return BlockSparseWeight.from_dense(weight, keep, (32, 16))


def layer(density: float = 0.5) -> tuple[nn.Linear, Tensor, BlockSparseLinear]:
    torch.manual_seed(0)
    linear, keep = nn.Linear(64, 96), torch.rand(3, 4) < density
    return linear, keep, BlockSparseLinear.from_dense(linear, keep, (32, 16))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_passes(gated: bool, grad: bool) -> None:
    weight = packed()
    values = torch.cat([weight.values] * 2) if gated else weight.values
    x, bias = torch.randn(2, 5, 64), torch.randn(192 if gated else 96)
    residual = torch.randn(2, 5, 96)
    leaves = [t.clone().requires_grad_(grad) for t in (x, values, bias, residual)]
    args = (leaves[0], leaves[1], weight.idx, weight.crow, weight.order, *leaves[2:])
    torch.library.opcheck(op.block_sparse, (*args, 96, "gelu", gated, 0))
    torch.library.opcheck(op.block_sparse, (*args[:5], None, None, 96, "none", gated, 0))


def test_opcheck_passes_for_the_gradients() -> None:
    weight, grad, x = packed(), torch.randn(7, 96), torch.randn(7, 64)
    rest = (weight.values, weight.idx, weight.crow, weight.order)
    torch.library.opcheck(op.input_gradient, (grad, *rest, 64))
    torch.library.opcheck(op.weight_gradient, (grad, x, *rest))


def test_a_layer_compiles_whole_and_trains() -> None:
    _, _, sparse = layer()
    torch.compiler.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    for tokens in (5, 9, 130):  # the third with dynamic shapes
        x = torch.randn(tokens, 64, requires_grad=True)
        grads = []
        for run in (sparse, compiled):
            out = run(x)
            grads.append((out, *torch.autograd.grad(out.square().sum(), [x, *sparse.parameters()])))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype_as_linear_does() -> None:
    linear, _, sparse = layer(1.0)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = sparse(x), linear(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert sparse.values.grad is not None and sparse.values.grad.dtype == torch.float32
    assert sparse(x).dtype == torch.float32  # and not outside


def test_a_layer_on_the_meta_device_gives_shapes() -> None:
    _, _, sparse = layer()
    assert sparse.to("meta")(torch.zeros(2, 5, 64, device="meta")).shape == (2, 5, 96)


def test_torch_s_flop_counter_sees_the_stored_tiles() -> None:
    _, _, sparse = layer()
    x = torch.randn(2, 5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = sparse(x)
    assert counter.get_total_flops() == 2 * 10 * sparse.values.numel()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 10 * sparse.values.numel()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 63)}, r"expected inputs of width 64, got \(3, 63\)"),
        ({"x": torch.tensor(1.0)}, r"expected inputs of width 64, got \(\)"),
        (
            {"x": torch.zeros(3, 64, dtype=torch.float16)},
            "expected x like the weight, torch.float32",
        ),
        (
            {"x": torch.zeros(3, 64, device="meta")},
            "expected x like the weight, .* on cpu, got .* on meta",
        ),
        ({"bias": torch.zeros(95)}, r"bias: expected torch.float32 \(96,\), got .*\(95,\)"),
        ({"bias": torch.zeros(96).double()}, "bias: expected torch.float32"),
        ({"residual": torch.zeros(2, 96)}, r"residual: expected torch.float32 \(3, 96\)"),
        ({"act": "relu"}, "act: expected one of none, gelu, gelu_tanh, silu, got 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(
    change: dict[str, object], said: str
) -> None:
    given: dict[str, object] = {"x": torch.zeros(3, 64), "bias": torch.zeros(96)}
    given |= {"residual": torch.zeros(3, 96), "act": "gelu"}
    with pytest.raises(ValueError, match=said):
        block_sparse_linear(weight=packed(), **(given | change))  # type: ignore[arg-type]


def test_a_gated_layer_needs_two_matrices_of_one_pattern() -> None:
    weight = packed()
    other = BlockSparseWeight.from_dense(weight.to_dense(), torch.rand(3, 4) < 0.9, (32, 16))
    with pytest.raises(ValueError, match="need one pattern of tiles; keep the union"):
        stack(weight, other)
    odd = replace(weight, values=weight.values[:5])
    with pytest.raises(ValueError, match="expected tiles of two matrices"):
        block_sparse_glu(torch.zeros(3, 64), odd)
    with pytest.raises(ValueError, match=r"bias: expected torch.float32 \(192,\)"):
        block_sparse_glu(torch.zeros(3, 64), stack(weight, weight), torch.zeros(96))


def test_an_unknown_index_does_not_read_foreign_memory_natively() -> None:
    if not native.supports(torch.float32):
        pytest.skip(f"the native kernel does not run here: {native.why_not()}")
    weight = packed()
    for field, at, value in (("idx", 0, 99), ("idx", 0, -1), ("crow", 1, 999), ("crow", -1, 3)):
        tensor = getattr(weight, field).clone()
        tensor[at] = value
        with pytest.raises(RuntimeError, match=field):
            block_sparse_linear(torch.zeros(3, 64), replace(weight, **{field: tensor}))


class OldTriton:
    """Kernels of a Triton that lacks what they use."""

    class gpu_forward:  # noqa: N801 - stands for a module
        REFUSED = (AttributeError,)
        launches = 0

        @classmethod
        def launch(cls, *_: object, **__: object) -> Tensor:
            cls.launches += 1
            raise AttributeError("module 'triton' has no attribute 'make_tensor_descriptor'")

    @staticmethod
    def input_gradient(*_: object) -> Tensor:
        raise AttributeError("no such thing")

    weight_gradient = input_gradient


def test_a_triton_that_refuses_is_asked_once_and_plain_pytorch_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # CPU tensors take the GPU's road
    monkeypatch.setattr(op, "_triton", lambda: OldTriton)
    monkeypatch.setattr(op, "_refused", set())
    op.say_once.cache_clear()
    weight, x = packed(), torch.randn(5, 64, requires_grad=True)
    for _ in range(3):
        out = block_sparse_linear(x, weight)
        torch.testing.assert_close(out, F.linear(x, weight.to_dense()), rtol=1e-5, atol=1e-5)
    assert OldTriton.gpu_forward.launches == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run as plain PyTorch, Triton refused them: module" in said
    op._refused.clear()
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


def test_training_moves_stored_tiles_only_and_lowers_the_loss() -> None:
    _, keep, sparse = layer()
    x, target = torch.randn(200, 64), torch.randn(200, 96)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(sparse(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and losses == sorted(losses, reverse=True)
    assert torch.equal(sparse.tiles.keep(), keep)


def test_weights_changed_behind_autograd_s_back_are_seen_at_once() -> None:
    # An EMA swap writes through .data, which leaves no trace in a tensor's version: nothing may be cached.
    _, _, sparse = layer()
    x = torch.randn(200, 64)
    with torch.no_grad():
        before = sparse(x)
        sparse.values.data.mul_(2)
        after = sparse(x)
    assert sparse.bias is not None
    torch.testing.assert_close(
        after - sparse.bias, 2 * (before - sparse.bias), rtol=1e-4, atol=1e-5
    )


def test_copies_moves_and_pickles_keep_a_layer_s_answers() -> None:
    _, _, sparse = layer()
    x = torch.randn(5, 64)
    expected = sparse(x)
    stream = io.BytesIO()
    torch.save(sparse, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    fresh = BlockSparseLinear(64, 96, (32, 16), len(sparse.values), bias=True)
    fresh.load_state_dict(sparse.state_dict())
    for other in (copy.deepcopy(sparse), again, fresh, sparse.to("cpu")):
        assert torch.equal(other(x), expected) and other.count == sparse.count
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.idx.dtype == torch.int32
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_layer_whose_rows_hold_as_many_tiles_knows_it() -> None:
    linear = nn.Linear(64, 96)
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]) > 0
    even = BlockSparseLinear.from_dense(linear, keep, (32, 16))
    assert even.count == 2
    keep[0, 1] = True
    uneven = BlockSparseLinear.from_dense(linear, keep, (32, 16))
    assert uneven.count == 0
    loaded = BlockSparseLinear(64, 96, (32, 16), 6, bias=True)
    loaded.load_state_dict(even.state_dict())
    assert loaded.count == 2


DDP = """
import os, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from hwprune import BlockSparseLinear
def work(rank):
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["MEET"], 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = BlockSparseLinear.from_dense(nn.Linear(64, 96), torch.rand(3, 4) < 0.5, (32, 16))
    model = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(8, 64)
    model(x[rank::2]).square().mean().backward()
    shared = layer.values.grad.clone()
    layer.zero_grad()
    layer(x).square().mean().backward()
    torch.testing.assert_close(shared, layer.values.grad)
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(work, nprocs=2)
    print("ok")
"""


@pytest.mark.slow
def test_two_processes_train_it_together(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    env = os.environ | {
        "MEET": str(tmp_path / "meet"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("empty", ["rows", "columns", "both", "none", "all"])
def test_a_compact_layer_computes_the_whole_weight(bias: bool, empty: str) -> None:
    torch.manual_seed(0)
    weight, shift = torch.randn(12, 10).double(), torch.randn(12).double() if bias else None
    if empty in ("rows", "both", "all"):
        weight[2:7] = 0
    if empty in ("columns", "both"):
        weight[:, :4] = 0
    if empty == "all":
        weight.zero_()
    compact = CompactLinear.from_dense(weight, shift)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compact(x), F.linear(x, weight, shift))
    assert compact.weight.numel() == int((weight != 0).any(1).sum() * (weight != 0).any(0).sum())


WITHOUT_TRITON = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
import torch
from torch import nn
from hwprune import BlockSparseLinear
from hwprune.kernels.block_sparse import op
linear = nn.Linear(96, 128)
sparse = BlockSparseLinear.from_dense(linear, torch.rand(4, 3) < 0.6, (32, 32))
x = torch.randn(20, 96, requires_grad=True)
torch.testing.assert_close(sparse(x), nn.functional.linear(x, sparse.to_dense(), linear.bias))
sparse(x).sum().backward()
print(op._triton(), x.grad.shape)
"""


def test_where_there_is_no_triton_everything_else_works() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "None torch.Size([20, 96])"
    assert "run as plain PyTorch on this GPU: no usable Triton" in done.stderr
