"""The operations of a model, read off a forward pass, or off its layers under a plan that is not realised yet.

Both ways agree exactly. What multiplies and is no operation of a profile is named, never left out silently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hwprune.cost import Structure, cut_linears, dense_structure, input_rows
from hwprune.layers import BlockSparseLinear
from hwprune.module_ops import activation, is_attention, op_of, pointwise
from hwprune.ops import Op
from hwprune.units import AttentionLayer, Layer, get_linear


class UncountedModules(ValueError):
    """A model multiplies where no operation of a profile stands for it, so its cost would be wrong."""


@dataclass(frozen=True)
class Counted:
    """What a forward is made of.

    Attributes:
        parts: (module name, operation) in the order they ran.
        left_out: module name -> multiply-accumulates of the batch that no operation stands for.
    """

    parts: tuple[tuple[str, Op], ...]
    left_out: Mapping[str, float]

    @property
    def ops(self) -> list[Op]:
        """The operations alone."""
        return [op for _, op in self.parts]


def operations(model: nn.Module, x: Tensor) -> list[Op]:
    """The linears, attentions, activations and layer norms of one forward, in order.

    A patch embedding is a linear over patches. Additions, rotations, gating products and other norms are no
    operations: they belong to the residual that `NetworkModel` fits. Products are those that torch's FLOP
    counter knows.

    Args:
        model: dense or realised.
        x: the batch it will run, in the type it will run in.

    Raises:
        UncountedModules: modules multiply that no operation stands for; says which.
        ValueError: a type that no profile measures.
    """
    return count_operations(model, x).ops


def count_operations(model: nn.Module, x: Tensor, *, partly: bool = False) -> Counted:
    """`operations` with the modules they belong to.

    Args:
        model: dense or realised.
        x: the batch.
        partly: hand back what was left out instead of raising.

    Raises:
        UncountedModules: not `partly`, and modules multiply that no operation stands for.
        ValueError: a type that no profile measures.
    """
    parts: list[tuple[str, Op]] = []
    stack: list[str] = []
    products = _Products(stack)
    handles = []
    modules = dict(model.named_modules())

    def enter(name: str) -> Any:
        return lambda *_: stack.append(name)

    def leave(name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            stack.pop()
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor) and given.numel():
                found = op_of(name, module, given, out)
                if found is not None:
                    parts.append((name, found))

        return hook

    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
    try:
        with torch.no_grad(), _evaluating(model), sdpa_kernel(SDPBackend.MATH), products:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    counted = {name for name, op in parts if op.kind in ("linear", "attention")}
    left = {
        name: macs
        for name, macs in products.macs.items()
        if name not in counted and not isinstance(modules[name], BlockSparseLinear)
    }
    if left and not partly:
        whole = sum(products.macs.values())
        told = ", ".join(
            f"{name or 'the model itself'} ({type(modules[name]).__name__}, {macs / whole:.1%})"
            for name, macs in sorted(left.items(), key=lambda item: -item[1])[:4]
        )
        raise UncountedModules(
            f"{len(left)} module(s) multiply in a way no profile measures: {told} of all "
            "multiply-accumulates; predict their cost otherwise, or measure the model"
        )
    return Counted(tuple(parts), left)


class _Products(TorchDispatchMode):
    """Adds up multiply-accumulates under the module that runs."""

    def __init__(self, stack: list[str]) -> None:
        from torch.utils.flop_counter import flop_registry  # brings triton where installed

        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: defaultdict[str, float] = defaultdict(float)
        self._stack, self._formulas = stack, flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None and self._stack:
            self.macs[self._stack[-1]] += formula(*args, **(kwargs or {}), out_val=out) / 2
        return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and back to what each module was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_operations(
    model: nn.Module,
    layer: Layer,
    keep: Structure,
    *,
    images: int,
    tokens: int,
    dtype: str,
) -> list[Op]:
    """The operations of one layer under a structure; an emptied layer has none.

    Args:
        model: dense, for the sizes.
        layer: of a family's `find_layers`.
        keep: what is left of it. Linears that it has `tiles` of run as tiles.
        images: of a batch.
        tokens: of an image in this layer.
        dtype: fp32, fp16 or bf16.

    Raises:
        ValueError: stored weights that are no whole number of tiles.
    """
    dense = dense_structure(layer)
    linears = _tiled if keep.weights is not None else _cut
    whole = dense if keep.weights is not None else keep
    if isinstance(layer, AttentionLayer):
        assert whole.heads is not None and whole.qk is not None and whole.v is not None
        if not whole.heads * whole.v:
            return []
    elif not whole.neurons:
        return []
    found = linears(model, layer, keep, images * tokens, dtype)
    return [*found, *_inner(model, layer, whole, images, tokens, dtype)]


def _cut(model: nn.Module, layer: Layer, keep: Structure, m: int, dtype: str) -> list[Op]:
    """The linears of a layer with whole units gone."""
    found = []
    for name, rows, columns in cut_linears(model, layer, keep):
        tile = (keep.tiles or {}).get(name)
        if tile is None:
            found.append(Op("linear", (m, rows, columns), dtype))
        else:
            grid = -(-rows // tile[0]) * -(-columns // tile[1])
            found.append(Op.tiles((m, rows, columns), dtype, tile, grid))
    return found


def stored_tiles(
    linear: nn.Linear, name: str, keep: Structure
) -> tuple[int, tuple[int, int]] | None:
    """How many tiles of which size a linear is left with; None where it stays dense.

    Raises:
        ValueError: its stored weights are no whole number of tiles, or more than there are.
    """
    block = (keep.tiles or {}).get(name)
    stored = (keep.weights or {}).get(name)
    if stored is None or (block is None and stored == linear.weight.numel()):
        return None
    if block is None or min(block) < 1:
        raise ValueError(f"{name}: expected the block of its tiles, got {block}")
    kept, rest = divmod(stored, block[0] * block[1])
    grid = -(-linear.out_features // block[0]) * -(-linear.in_features // block[1])
    if rest or not 0 <= kept <= grid:
        raise ValueError(
            f"{name}: expected 0 to {grid} whole tiles of {block}, got {stored} weights"
        )
    return kept, block


def _tiled(model: nn.Module, layer: Layer, keep: Structure, m: int, dtype: str) -> list[Op]:
    """The linears of a layer cut by tiles; those without tiles stay dense."""
    found = []
    for name in dict.fromkeys([rows.linear for rows, _ in input_rows(layer)] + [layer.out]):
        linear = get_linear(model, name)
        n, k = linear.out_features, linear.in_features
        tiled = stored_tiles(linear, name, keep)
        if tiled is None:
            found.append(Op("linear", (m, n, k), dtype))
        elif tiled[0]:
            found.append(Op.tiles((m, n, k), dtype, tiled[1], tiled[0]))
    return found


def _inner(
    model: nn.Module, layer: Layer, keep: Structure, images: int, tokens: int, dtype: str
) -> list[Op]:
    """Attention, or the activation of an MLP, and the norms inside."""
    module: Any = model.get_submodule(layer.name)
    m, found = images * tokens, []
    if isinstance(layer, AttentionLayer):
        assert keep.heads and keep.qk and keep.v
        if not is_attention(module):
            raise UncountedModules(
                f"{layer.name}: attention of type {type(module).__name__} is none that a profile measures"
            )
        span = layer.window or tokens
        found.append(Op("attention", (m // span, keep.heads, span, keep.qk, keep.v), dtype))
        for norm in ("q_norm", "k_norm"):
            if pointwise(getattr(module, norm, None)):
                found.append(Op("layer_norm", (m * keep.heads, keep.qk), dtype))
        wide = keep.heads * keep.v
        gate = getattr(module, "gate", None)
        if isinstance(gate, nn.Linear):
            found.append(Op("linear", (m, gate.out_features, gate.in_features), dtype))
    else:
        assert keep.neurons
        wide = keep.neurons
        kind = activation(module)
        if kind is not None:
            found.append(Op(kind, (m, wide), dtype))
    if pointwise(getattr(module, "norm", None)):
        found.append(Op("layer_norm", (m, wide), dtype))
    return found


def plan_operations(
    model: nn.Module,
    layers: Sequence[Layer],
    keep: Mapping[str, Structure],
    x: Tensor,
) -> list[Op]:
    """The operations of a whole model under a plan that is not realised.

    Args:
        model: dense.
        layers: its prunable layers.
        keep: layer name -> what is left of it; layers left out stay dense.
        x: the batch it will run.

    Raises:
        UncountedModules: as `operations`.
        ValueError: `keep` names a layer the model does not have.
    """
    names = {layer.name for layer in layers}
    if unknown := sorted(set(keep) - names):
        raise ValueError(
            f"expected layers of the model, got {unknown[0]!r}; it has {sorted(names)[:4]} ..."
        )
    parts = count_operations(model, x).parts
    found: list[Op] = []
    inside: dict[str, list[Op]] = {name: [] for name in names}
    for name, op in parts:
        owner = next((n for n in names if name == n or name.startswith(f"{n}.")), None)
        (found if owner is None else inside[owner]).append(op)
    for layer in layers:
        if layer.name not in keep:
            found += inside[layer.name]
            continue
        first = next((op for op in inside[layer.name] if op.kind == "linear"), None)
        if first is None:
            continue  # it does not run
        tokens = first.shape[0] // len(x)
        found += layer_operations(
            model,
            layer,
            keep[layer.name],
            images=len(x),
            tokens=tokens,
            dtype=first.dtype,
        )
    return found
