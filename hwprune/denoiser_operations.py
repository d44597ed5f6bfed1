"""The operations of a denoiser, read off one evaluation, and what becomes of a layer's when units leave it.

Functions of torch are watched, not classes of modules: diffusers has its own GELUs, norms and attention
processors, and all of them end in the same few functions. What multiplies and is no operation of a profile
(convolutions, linear attention) is named, never left out silently.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hwprune.operations import Counted
from hwprune.ops import NAMES, Op
from hwprune.units import CoupledLayer

_POINTWISE = {F.gelu: "gelu", F.silu: "silu"}


@dataclass(frozen=True)
class Part:
    """One operation of a layer, and how units make it up.

    Attributes:
        op: of the dense layer.
        dim: which of its sizes goes with the units; None = none, it is there while one unit is.
        each: entries of that size a unit makes up.
        share: of the operation that is this layer's; below 1 where another layer has a part of it, as heads
            and neurons have of FLUX's fused projections.
    """

    op: Op
    dim: int | None
    each: int
    share: float = 1.0

    def cut(self, gone: int) -> Op | None:
        """The operation without some units; None where nothing of it is left."""
        if self.dim is None:
            return self.op
        left = self.op.shape[self.dim] - gone * self.each
        if left <= 0:
            return None
        shape = list(self.op.shape)
        shape[self.dim] = left
        return replace(self.op, shape=tuple(shape))


def evaluation_operations(model: nn.Module, call: Callable[[], object]) -> Counted:
    """What one evaluation of a denoiser is made of.

    Cross-attention of T queries and S keys counts as self-attention of sqrt(T S) tokens: the same work.

    Args:
        model: dense or pruned.
        call: evaluates it once, with the batch that is meant.

    Raises:
        ValueError: linears or attention in a type that no profile measures.
    """
    stack: list[str] = []
    products = _Products(stack)
    watched = _Watched(stack, products)
    with torch.no_grad(), _named(model, stack), products, watched:
        call()
    return Counted(tuple(watched.parts), dict(products.macs))


@contextmanager
def _named(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules that run on the stack."""
    handles = []

    def enter(name: str) -> Any:
        return lambda *_: stack.append(name)

    def leave(*_: object) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):
    """Adds up the multiply-accumulates that no operation stands for, under the module that runs."""

    def __init__(self, stack: list[str]) -> None:
        from torch.utils.flop_counter import flop_registry  # brings triton where installed

        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: defaultdict[str, float] = defaultdict(float)
        self.counted = False  # inside an operation
        self._stack, self._formulas = stack, flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None and not self.counted:
            name = self._stack[-1] if self._stack else ""
            self.macs[name] += formula(*args, **(kwargs or {}), out_val=out) / 2
        return out


class _Watched(TorchFunctionMode):
    """Notes the calls of torch's functions that are operations of a profile."""

    def __init__(self, stack: list[str], products: _Products) -> None:
        super().__init__()
        self.parts: list[tuple[str, Op]] = []
        self._stack, self._products = stack, products

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = self._stack[-1] if self._stack else ""
        op = _op_of(name, func, args, given)
        if op is None:
            return func(*args, **given)
        self.parts.append((name, op))
        self._products.counted = True
        try:
            return func(*args, **given)
        finally:
            self._products.counted = False


def _op_of(name: str, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Op | None:
    """The operation a call is, or None."""

    def argument(place: int, key: str, default: Any = None) -> Any:
        return args[place] if len(args) > place else given.get(key, default)

    if func is F.linear:
        x, weight = argument(0, "input"), argument(1, "weight")
        if not x.numel() or not weight.numel():  # what is left of a layer without units
            return None
        n, k = weight.shape
        return Op("linear", (x.numel() // k, n, k), _dtype(name, x))
    if func is F.conv2d:
        x, weight = argument(0, "input"), argument(1, "weight")
        stride, padding = argument(3, "stride", 1), argument(4, "padding", 0)
        dilation, groups = argument(5, "dilation", 1), argument(6, "groups", 1)
        if not _patches(weight, stride, padding, dilation, groups):
            return None
        n, k = weight.shape[0], weight[0].numel()
        return Op("linear", (x.numel() // k, n, k), _dtype(name, x))
    if func is F.scaled_dot_product_attention:
        q, k, v = argument(0, "query"), argument(1, "key"), argument(2, "value")
        tokens = round(math.sqrt(q.shape[-2] * k.shape[-2]))
        batch = math.prod(q.shape[:-3])
        shape = (batch, q.shape[-3], tokens, q.shape[-1], v.shape[-1])
        return Op("attention", shape, _dtype(name, q)) if min(shape) else None
    x = argument(0, "input")
    if not isinstance(x, Tensor) or x.dtype not in NAMES or not x.numel():
        return None
    if func in _POINTWISE:
        wide = x.shape[1] if x.ndim == 4 else x.shape[-1]  # of a map its channels
        return Op(_POINTWISE[func], (x.numel() // wide, wide), NAMES[x.dtype])
    if func is F.layer_norm:
        wide = math.prod(argument(1, "normalized_shape"))
        return Op("layer_norm", (x.numel() // wide, wide), NAMES[x.dtype])
    return None


def _patches(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether windows neither overlap nor leave gaps: a linear over patches, or pixels."""

    def both(value: Any) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else tuple(value)

    if groups != 1 or both(dilation) != (1, 1):
        return False
    plain = padding == "valid" if isinstance(padding, str) else both(padding) == (0, 0)
    return plain and both(stride) == tuple(weight.shape[2:])


def _dtype(name: str, x: Tensor) -> str:
    if x.dtype not in NAMES:
        raise ValueError(
            f"{name or 'the model'}: expected {', '.join(sorted(NAMES.values()))}, got {x.dtype}, which no "
            "profile measures"
        )
    return NAMES[x.dtype]


def layer_parts(
    layer: CoupledLayer, counted: Counted, others: Sequence[CoupledLayer] = ()
) -> list[Part]:
    """The operations of a layer of heads or neurons.

    Args:
        layer: of a family's `find_layers`.
        counted: of the dense model.
        others: all layers, to see what is shared with one of them.

    Returns:
        Parts; empty where the layer did not run.
    """
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for run in layer.inputs:
        rows[run.linear] = rows.get(run.linear, 0) + layer.width
    for out in layer.outputs:
        columns[out.linear] = columns.get(out.linear, 0) + layer.width
    away = [other for other in others if other is not layer]
    shared = {run.linear for other in away for run in other.inputs}
    shared |= {run.linear for other in away for run in other.outputs}
    # A layer that is one linear has its activation beside it: FLUX's proj_mlp and act_mlp.
    alone = layer.name in rows
    scope = layer.name.rpartition(".")[0] if alone else layer.name
    found = []
    for name, op in counted.parts:
        if op.kind == "linear" and (name in rows or name in columns):
            dim, each = (1, rows[name]) if name in rows else (2, columns[name])
            own = each * layer.count / op.shape[dim]
            found.append(Part(op, dim, each, own if name in shared else 1.0))
        elif name == scope or name.startswith(f"{scope}."):
            part = _inner(layer, op)
            if part.dim is not None or not alone:
                found.append(part)
    return found


def _inner(layer: CoupledLayer, op: Op) -> Part:
    """An operation between the linears of a layer."""
    if op.kind == "attention" and layer.kind == "head" and op.shape[1] == layer.count:
        return Part(op, 1, 1)
    if op.kind in ("gelu", "silu", "layer_norm"):
        m, n = op.shape
        wide = layer.count * layer.width
        if n % wide == 0:
            return Part(op, 1, n // layer.count)
        if layer.kind == "head" and n == layer.width and m % layer.count == 0:
            return Part(op, 0, m // layer.count)  # a norm of each head
    return Part(op, None, 0)


def block_operations(name: str, counted: Counted) -> list[Op]:
    """All operations of a block, by its name."""
    return [op for where, op in counted.parts if where == name or where.startswith(f"{name}.")]
