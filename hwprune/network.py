"""A network's time from its operations: their sum, and a residual fitted to whole networks that were measured.

`operations` reads the operations off a forward pass, `layer_operations` off a layer under a choice of
structure, so that a plan is priced before it is realised. What is no operation of a profile (the patch
embedding, residual additions, the interpreter) is the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwprune.cost import Structure, dense_structure, input_rows
from hwprune.layers import BlockSparseLinear, SlimAttention
from hwprune.ops import DTYPES, Op
from hwprune.predict import CostModel, Prediction, total
from hwprune.units import AttentionLayer, Layer, get_linear

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def operations(model: nn.Module, x: Tensor) -> list[Op]:
    """The linears, attentions, GELUs and layer norms of one forward, in order.

    Args:
        model: dense or realised; timm's attention modules and ours are known, other attention counts
            by its linears only.
        x: the batch it will run, in the type it will run in.
    """
    found: list[Op] = []

    def linear(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given = args[0]
        m, n, k = given.numel() // given.shape[-1], out.shape[-1], given.shape[-1]
        dtype = NAMES[given.dtype]
        if isinstance(module, BlockSparseLinear):
            if len(module.values):
                block = (int(module.block[0]), int(module.block[1]))
                found.append(Op("linear", (m, n, k), dtype, "block_sparse", module.density, block))
        else:
            found.append(Op("linear", (m, n, k), dtype))

    def attention(module: Any, args: tuple[Any, ...], out: Any) -> None:
        given = args[0]
        d = getattr(module, "qk_width", None) or module.head_dim
        e = getattr(module, "v_width", None) or module.head_dim
        shape = (given.shape[0], module.num_heads, given.shape[1], d, e)
        found.append(Op("attention", shape, NAMES[given.dtype]))

    def pointwise(kind: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            given = args[0]
            shape = (given.numel() // given.shape[-1], given.shape[-1])
            found.append(Op(kind, shape, NAMES[given.dtype]))

        return hook

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | BlockSparseLinear):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, SlimAttention) or _is_timm_attention(module):
            handles.append(module.register_forward_hook(attention))
        elif isinstance(module, nn.GELU):
            handles.append(module.register_forward_hook(pointwise("gelu")))
        elif isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(pointwise("layer_norm")))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_timm_attention(module: nn.Module) -> bool:
    return hasattr(module, "num_heads") and hasattr(module, "head_dim") and hasattr(module, "qkv")


def layer_operations(
    model: nn.Module,
    layer: Layer,
    keep: Structure,
    *,
    images: int,
    tokens: int,
    dtype: str,
    block: tuple[int, int] = (0, 0),
) -> list[Op]:
    """The operations of one layer under a structure; an emptied layer has none.

    Args:
        model: dense, for the sizes.
        layer: of a family's `find_layers`.
        keep: what is left of it. With `weights` (stored weights of each linear) linears run as tiles.
        images: of a batch.
        tokens: of an image in this layer.
        dtype: fp32, fp16 or bf16.
        block: of the tiles, where `keep.weights` is given.
    """
    m = images * tokens
    out = get_linear(model, layer.out)
    dense = dense_structure(layer)
    if keep.weights is not None:
        found = []
        for name in dict.fromkeys([rows.linear for rows, _ in input_rows(layer)] + [layer.out]):
            linear = get_linear(model, name)
            n, k = linear.out_features, linear.in_features
            grid = -(-n // block[0]) * -(-k // block[1])
            density = keep.weights.get(name, n * k) / (grid * block[0] * block[1])
            if density >= 1:
                found.append(Op("linear", (m, n, k), dtype))
            elif density > 0:
                found.append(Op("linear", (m, n, k), dtype, "block_sparse", density, block))
        return [*found, *_inner(layer, dense, images, tokens, dtype)]
    widths = _widths(layer, keep)
    if min(widths.values()) == 0:
        return []
    sums: dict[str, int] = {}
    for rows, field in input_rows(layer):
        sums[rows.linear] = sums.get(rows.linear, 0) + widths[field]
    linears = [(wide, get_linear(model, name).in_features) for name, wide in sums.items()]
    found = [Op("linear", (m, n, k), dtype) for n, k in linears]
    inner = widths["neurons" if keep.neurons is not None else "v"]
    found.append(Op("linear", (m, out.out_features, inner), dtype))
    return [*found, *_inner(layer, keep, images, tokens, dtype)]


def _widths(layer: Layer, keep: Structure) -> dict[str, int]:
    if isinstance(layer, AttentionLayer):
        assert keep.heads is not None and keep.qk is not None and keep.v is not None
        return {"qk": keep.heads * keep.qk, "v": keep.heads * keep.v}
    assert keep.neurons is not None
    return {"neurons": keep.neurons}


def _inner(layer: Layer, keep: Structure, images: int, tokens: int, dtype: str) -> list[Op]:
    """Attention, or the GELU of an MLP."""
    if isinstance(layer, AttentionLayer):
        assert keep.heads and keep.qk and keep.v
        return [Op("attention", (images, keep.heads, tokens, keep.qk, keep.v), dtype)]
    assert keep.neurons
    return [Op("gelu", (images * tokens, keep.neurons), dtype)]


@dataclass(frozen=True)
class NetworkModel:
    """Prices whole networks on a device.

    Attributes:
        costs: of operations.
        offset_s: the residual of a forward: what is no operation.
        scale: of the sum of operations, 1 where one network was measured.
        spread_rel: of the residual fit, over the networks it was fitted to.
    """

    costs: CostModel
    offset_s: float = 0.0
    scale: float = 1.0
    spread_rel: float = 0.0

    @classmethod
    def fitted(cls, costs: CostModel, seen: Sequence[tuple[Sequence[Op], float]]) -> NetworkModel:
        """Fit the residual to measured networks.

        Args:
            costs: of operations.
            seen: (operations, measured seconds of a forward) of at least one network; from three on the
                scale is fitted too.

        Raises:
            ValueError: none given.
        """
        if not seen:
            raise ValueError("expected at least one measured network, got none")
        sums = np.asarray([costs_of(costs, ops).latency_s for ops, _ in seen])
        times = np.asarray([seconds for _, seconds in seen])
        scale, offset = 1.0, float(np.median(times - sums))
        if len(seen) >= 3 and np.ptp(sums) > 0.1 * sums.max():
            scale, offset = (float(v) for v in np.polyfit(sums, times, 1, w=1 / times))
        spread = float(np.abs((scale * sums + offset) / times - 1).max())
        return cls(costs, offset, scale, spread if len(seen) > 2 else 0.0)

    def predict(self, ops: Sequence[Op]) -> Prediction:
        """Latency and energy of one forward with these operations.

        Raises:
            UnknownOp: the profile says nothing about one of them.
        """
        found = costs_of(self.costs, ops)
        extra = self.spread_rel * found.latency_s
        ends = (
            self.scale * end + self.offset_s for end in (found.latency_s, found.lo_s, found.hi_s)
        )
        value, lo, hi = ends
        energy = None if found.energy_j is None else found.energy_j * value / found.latency_s
        return Prediction(value, max(0.0, lo - extra), hi + extra, energy, found.tier)


def costs_of(costs: CostModel, ops: Sequence[Op]) -> Prediction:
    """The sum of operations; each different one is looked up once."""
    known: Mapping[Op, Prediction] = {op: costs.predict(op) for op in set(ops)}
    return total(known[op] for op in ops)
