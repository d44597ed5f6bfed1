"""Which layer an error is about: where NaN first shows, and which tensor was left out of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds NaN or Inf."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def broken_layer(model: nn.Module | None, rerun: Callable[[], object]) -> str:
    """Run again and say where NaN or Inf first shows.

    Args:
        model: whose modules are watched; None = nothing is known of the layers.
        rerun: calls the model.

    Returns:
        "in NAME (TYPE)", or a sentence's end that says it is none of them.
    """
    if model is None:
        return "in the model or the solver (pass model= to have the layer named)"
    seen: list[str] = []

    def watch(name: str, module: nn.Module, _: object, out: object) -> None:
        if not seen and not finite(*_floats(out)):
            seen.append(f"in {name or 'the model'} ({type(module).__name__})")

    with torch.no_grad(), _hooked(model, watch):
        rerun()
    return (
        seen[0] if seen else "in the solver's step or the guidance: every layer's output is finite"
    )


def broken_gradient(model: nn.Module | None, rerun: Callable[[], object]) -> str:
    """Run forward and backward again and say where a gradient is first NaN or Inf.

    Args:
        model: whose modules are watched.
        rerun: calls the model with gradients, and differentiates.

    Returns:
        As `broken_layer`; the layer is the last one whose output has a finite gradient no more.
    """
    if model is None:
        return "in the model or the solver (pass model= to have the layer named)"
    seen: list[str] = []

    def check(name: str, gradient: Tensor) -> None:
        if not seen and not finite(gradient):
            seen.append(f"behind the output of {name or 'the model'}")

    def watch(name: str, _: nn.Module, __: object, out: object) -> None:
        for tensor in _floats(out):
            if tensor.requires_grad:
                tensor.register_hook(partial(check, name))

    with _hooked(model, watch):
        rerun()
    return seen[0] if seen else "in front of every layer: in the solver's step or the first layer"


def unlisted(
    outputs: Sequence[Tensor], given: Iterable[Tensor], model: nn.Module | None
) -> list[str]:
    """Leaves that outputs depend on, that require grad, and that are not in `given`.

    Args:
        outputs: ends of a graph.
        given: tensors where the graph may end, leaves or not.
        model: for the names of its parameters.

    Returns:
        Their names, or their shapes where they are no parameter of the model.
    """
    kept = list(given)
    leaves = {id(t) for t in kept}
    ends = {t.grad_fn for t in kept if t.grad_fn is not None}
    names = {id(p): n for n, p in model.named_parameters()} if model is not None else {}
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    visited: set[Any] = set(waiting)
    found: list[str] = []
    while waiting:
        node: Any = waiting.pop()
        if node in ends:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in leaves:
            found.append(names.get(id(variable), f"a tensor of shape {tuple(variable.shape)}"))
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                waiting.append(following)
    return sorted(found)


def _floats(out: object) -> Iterator[Tensor]:
    """The floating-point tensors of a module's output."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, dict):
        for item in out.values():
            yield from _floats(item)
    elif isinstance(out, list | tuple):
        for item in out:
            yield from _floats(item)


@contextmanager
def _hooked(
    model: nn.Module, watch: Callable[[str, nn.Module, object, object], None]
) -> Iterator[None]:
    """Call `watch` after every module of a model; a child's turn comes before its parent's."""
    handles = [
        module.register_forward_hook(partial(watch, name)) for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
