"""The operator `hwprune::block_sparse_linear`: which kernel runs it, its gradients, its shapes and its FLOPs.

On a GPU Triton, on a CPU the native kernel, anywhere else (and where either is missing or fails to
compile, said once) plain PyTorch. Opaque to torch.compile, safe in CUDA graphs: nothing in the Triton path
asks the device anything.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hwprune.kernels.block_sparse import native, plain, tiles
from hwprune.kernels.block_sparse.format import COLUMNS, ROWS, BlockSparseWeight, check_sizes

ACTS = ("none", "gelu", "gelu_tanh", "silu")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Density up to which block gather beats dense where there is no native kernel (`scripts/bench kernels`: 32-row
# tiles gain 1.4 or lose 0.7 at 0.25, by shape; 64-row tiles gain 1.2 to 1.8 there, and lose 0.7 at 0.5).
_GATHER_PAYS = {32: 0.1, 64: 0.3, 128: 0.3}


def apply_act(z: Tensor, act: str) -> Tensor:
    """The activation, by torch."""
    if act == "gelu":
        return F.gelu(z)
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if act == "silu" else z


def act_gradient(grad: Tensor, z: Tensor, act: str) -> Tensor:
    """grad times the activation's derivative at z."""
    if act == "none":
        return grad
    found: Tensor
    if act == "silu":
        found = torch.ops.aten.silu_backward(grad, z)
    else:
        approximate = "tanh" if act == "gelu_tanh" else "none"
        found = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    return found


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, or None (said once) where Triton is missing or too old for them."""
    try:
        from hwprune.kernels.block_sparse import gpu_backward

        return gpu_backward
    except Exception as error:  # an installed but broken Triton fails in many ways
        say_once(
            f"block-sparse layers run as plain PyTorch on this GPU: no usable Triton ({error})"
        )
        return None


@cache
def say_once(text: str) -> None:
    """One line on stderr, once a process."""
    print(f"hwprune: {text}", file=sys.stderr, flush=True)


@cache
def _device(index: int | None) -> tuple[tuple[int, int], int]:
    """(compute capability, processors) of a CUDA device; in the interpreter, those of an H200."""
    if index is None:
        return (9, 0), 132
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _on_triton(x: Tensor, block: tuple[int, int], weights: int = 1) -> ModuleType | None:
    """The Triton kernels where they take this input."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and x.dtype != torch.bfloat16
    if not (x.is_cuda or (interpreted and x.device.type == "cpu")):
        return None
    if x.dtype not in _FLOATS or block[0] not in ROWS or block[1] not in COLUMNS:
        return None
    capability = _device(x.device.index if x.is_cuda else None)[0]
    if (block, x.dtype) in _refused:
        return None
    if not tiles.fits(block, x.element_size(), capability, weights):
        say_once(f"tiles of {block} in {x.dtype} do not fit this GPU: plain PyTorch runs them")
        return None
    return _triton()


_refused: set[tuple[tuple[int, int], torch.dtype]] = set()


def _refuse(block: tuple[int, int], dtype: torch.dtype, error: Exception) -> None:
    """Remember tiles that this Triton cannot compile or this device cannot hold."""
    _refused.add((block, dtype))
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    say_once(f"tiles of {block} in {dtype} run as plain PyTorch, Triton refused them: {first}")


def _config(
    x_MK: Tensor, rows: int, block: tuple[int, int], weights: int = 1, act: str = "none"
) -> tiles.Config:
    capability, processors = _device(x_MK.device.index if x_MK.is_cuda else None)
    size = x_MK.element_size()
    return tiles.choose(
        len(x_MK), rows, block, size, capability, processors, weights=weights, act=act
    )


def _flat(t: Tensor) -> Tensor:
    """[..., D] -> [M, D] with a contiguous last dimension."""
    flat = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.reshape(t.shape[:-1].numel(), 0)
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def _halves(values: Tensor, gated: bool) -> list[Tensor]:
    return list(values.chunk(2)) if gated else [values]


def _weight(
    values: Tensor, idx: Tensor, crow: Tensor, order: Tensor, outputs: int, width: int
) -> BlockSparseWeight:
    return BlockSparseWeight(values, idx, crow, order, (outputs, width))


def linear_plain(x_MK: Tensor, weight: BlockSparseWeight) -> Tensor:
    """x Wᵀ in plain PyTorch, by gather where few tiles are stored."""
    if weight.density <= _GATHER_PAYS.get(weight.block[0], 0.3):
        return plain.product(x_MK, weight)
    return F.linear(x_MK, weight.to_dense())


@torch.library.custom_op("hwprune::block_sparse_linear", mutates_args=())
def block_sparse(
    x: Tensor,
    values: Tensor,
    idx: Tensor,
    crow: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    act: str,
    gated: bool,
    count: int,
) -> Tensor:
    """The product of `BlockSparseWeight`'s tensors; see `block_sparse_linear` and `block_sparse_glu`."""
    x_MK, shape = _flat(x), (*x.shape[:-1], out_features)
    weight = _weight(values, idx, crow, order, out_features, x.shape[-1])
    check_sizes(
        tokens=len(x_MK), stored=len(values), block=weight.block, shape=(out_features, x.shape[-1])
    )
    more = None if residual is None else residual.reshape(-1, out_features).contiguous()
    if len(x_MK) == 0 or out_features == 0:
        return x.new_zeros(shape)
    weights = 2 if gated else 1
    gpu = _on_triton(x_MK, weight.block, weights)
    if gpu is not None:
        config = _config(x_MK, weight.grid[0], weight.block, weights, act)
        launch = gpu.gpu_forward.launch
        try:
            out: Tensor = launch(x_MK, weight, bias, more, act, config, gated=gated, count=count)
            return out.view(shape)
        except gpu.gpu_forward.REFUSED as error:
            _refuse(weight.block, x.dtype, error)
    parts = []
    for i, part in enumerate(_halves(values, gated)):
        shift = bias if bias is None or not gated else bias[i * out_features :][:out_features]
        own, last = ("none", None) if gated else (act, more)
        if x.device.type == "cpu" and weight.block[1] % 2 == 0 and native.supports(x.dtype):
            tiles_ = part.contiguous()
            parts.append(native.linear(x_MK, tiles_, idx, crow, shift, last, out_features, own))
            continue
        z = linear_plain(x_MK, _weight(part, idx, crow, order, out_features, x.shape[-1]))
        z = apply_act(z if shift is None else z + shift, own)
        parts.append(z if last is None else z + last)
    if not gated:
        return parts[0].view(shape)
    product = parts[0] * apply_act(parts[1], act)
    return (product if more is None else product + more).view(shape)


@block_sparse.register_fake
def _(
    x: Tensor,
    values: Tensor,
    idx: Tensor,
    crow: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    act: str,
    gated: bool,
    count: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("hwprune::block_sparse_input_gradient", mutates_args=())
def input_gradient(
    grad: Tensor, values: Tensor, idx: Tensor, crow: Tensor, order: Tensor, in_features: int
) -> Tensor:
    """grad W: [..., N] -> [..., K]."""
    grad_MN = _flat(grad)
    weight = _weight(values, idx, crow, order, grad.shape[-1], in_features)
    shape = (*grad.shape[:-1], in_features)
    if len(grad_MN) == 0 or in_features == 0:
        return grad.new_zeros(shape)
    bn, bk = weight.block
    gpu = _on_triton(grad_MN, (bn, bk))
    if gpu is None:
        return plain.input_gradient(grad_MN, weight).view(shape)
    config = _config(grad_MN, weight.grid[1], (bk, bn))
    try:
        out: Tensor = gpu.input_gradient(grad_MN, weight, config)
    except gpu.gpu_forward.REFUSED as error:
        _refuse((bn, bk), grad.dtype, error)
        out = plain.input_gradient(grad_MN, weight)
    return out.view(shape)


@input_gradient.register_fake
def _(
    grad: Tensor, values: Tensor, idx: Tensor, crow: Tensor, order: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.custom_op("hwprune::block_sparse_weight_gradient", mutates_args=())
def weight_gradient(
    grad: Tensor, x: Tensor, values: Tensor, idx: Tensor, crow: Tensor, order: Tensor
) -> Tensor:
    """gradᵀ x on the stored tiles: [S, bn, bk]."""
    grad_MN, x_MK = _flat(grad), _flat(x)
    weight = _weight(values, idx, crow, order, grad.shape[-1], x.shape[-1])
    if len(grad_MN) == 0 or len(values) == 0:
        return torch.zeros_like(values)
    gpu = _on_triton(grad_MN, weight.block)
    if gpu is None:
        return plain.weight_gradient(grad_MN, x_MK, weight).contiguous()
    processors = _device(x.device.index if x.is_cuda else None)[1]
    try:
        out: Tensor = gpu.weight_gradient(grad_MN, x_MK, weight, processors)
    except gpu.gpu_forward.REFUSED as error:
        _refuse(weight.block, grad.dtype, error)
        out = plain.weight_gradient(grad_MN, x_MK, weight).contiguous()
    return out


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, idx: Tensor, crow: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, idx, crow, order, bias, residual, outputs, act, gated, count = inputs
    ctx.save_for_backward(x, values, idx, crow, order, bias)
    ctx.outputs, ctx.act, ctx.gated, ctx.count = outputs, act, gated, count
    ctx.residual_needed = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, values, bias and residual; the value before the activation is computed again."""
    x, values, idx, crow, order, bias = ctx.saved_tensors
    n, gated, act = ctx.outputs, ctx.gated, ctx.act
    tensors = (idx, crow, order)
    halves = _halves(values, gated)
    shifts = [None] * 2 if bias is None else [bias[:n], bias[n:]]

    def before(i: int) -> Tensor:
        found: Tensor = block_sparse(
            x, halves[i].contiguous(), *tensors, shifts[i], None, n, "none", False, ctx.count
        )
        return found

    if gated:
        gate = before(1)
        grads = [grad * apply_act(gate, act), act_gradient(grad * before(0), gate, act)]
    else:
        grads = [grad if act == "none" else act_gradient(grad, before(0), act)]
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        width = x.shape[-1]
        found = [
            input_gradient(g, part.contiguous(), *tensors, width)
            for g, part in zip(grads, halves, strict=True)
        ]
        grad_x = found[0] if len(found) == 1 else found[0] + found[1]
    if ctx.needs_input_grad[1]:
        found = [
            weight_gradient(g, x, part.contiguous(), *tensors)
            for g, part in zip(grads, halves, strict=True)
        ]
        grad_values = torch.cat(found) if gated else found[0]
    if bias is not None and ctx.needs_input_grad[5]:
        wide = torch.float32 if bias.element_size() < 4 else bias.dtype
        sums = [g.reshape(-1, n).sum(0, dtype=wide).to(bias.dtype) for g in grads]
        grad_bias = torch.cat(sums) if gated else sums[0]
    grad_residual = grad if ctx.residual_needed and ctx.needs_input_grad[6] else None
    return grad_x, grad_values, None, None, None, grad_bias, grad_residual, None, None, None, None


block_sparse.register_autograd(_backward, setup_context=_setup)


# Torch's counter knows no custom operator: without these it would say that a pruned layer costs nothing.
def _flops(x_shape: torch.Size, values_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(x_shape)[:-1].numel() * torch.Size(values_shape).numel()


def _weight_flops(
    grad_shape: torch.Size, _: Any, values_shape: torch.Size, *__: Any, **___: Any
) -> int:
    return _flops(grad_shape, values_shape)


register_flop_formula(torch.ops.hwprune.block_sparse_linear)(_flops)
register_flop_formula(torch.ops.hwprune.block_sparse_input_gradient)(_flops)
register_flop_formula(torch.ops.hwprune.block_sparse_weight_gradient)(_weight_flops)


def check_input(
    op: str,
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    *,
    weights: int = 1,
) -> None:
    """Refuse what the operator cannot take.

    Raises:
        ValueError: another width, dtype or device than the weight's, a bias or residual of another shape,
            an unknown activation; each says what was expected and what came.
    """
    outputs, width = weight.shape
    if act not in ACTS:
        raise ValueError(f"{op}: act: expected one of {', '.join(ACTS)}, got {act!r}")
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"{op}: expected inputs of width {width}, got {tuple(x.shape)}")
    if x.dtype != weight.values.dtype or x.device != weight.values.device:
        raise ValueError(
            f"{op}: expected x like the weight, {weight.values.dtype} on {weight.values.device}, got "
            f"{x.dtype} on {x.device}; move or cast one of them"
        )
    for name, tensor, shape in (
        ("bias", bias, (weights * outputs,)),
        ("residual", residual, (*x.shape[:-1], outputs)),
    ):
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name}: expected {x.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def run(
    op: str,
    x: Tensor,
    weight: BlockSparseWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    *,
    gated: bool,
    count: int,
) -> Tensor:
    """Check and multiply, in autocast's dtype where it is on for x's device, as F.linear does.

    Raises:
        ValueError: see `check_input`; `op` is the name it is told under.
    """
    kind, values = x.device.type, weight.values
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, values = x.to(dtype), values.to(dtype)
        bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
    weight = replace(weight, values=values)
    check_input(op, x, weight, bias, residual, act, weights=2 if gated else 1)
    tensors = (x, values, weight.idx, weight.crow, weight.order, bias, residual)
    out: Tensor = block_sparse(*tensors, weight.shape[0], act, gated, count)
    return out
