"""The operations one model may come to have under pruning: what a profile for that model alone measures.

A few dozen instead of a thousand, so that a minute is enough to ask for a latency of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hwprune import families
from hwprune.cost import Structure, dense_structure
from hwprune.operations import count_operations, plan_operations
from hwprune.ops import Op
from hwprune.profile_ops import KEPT
from hwprune.units import Layer

_MULTIPLE = 8  # of neurons and channels: what allocation keeps them in


def model_ops(model: nn.Module, x: Tensor) -> list[Op]:
    """Operations of a model whole and cut, the most useful first, none twice.

    Args:
        model: a dense vision transformer.
        x: the batch that is to be timed, e.g. of zeros.

    Raises:
        ValueError: no family knows the model, or it multiplies where no operation of a profile stands.
    """
    layers, _ = families.of(model).find_layers(model)
    found = dict.fromkeys(count_operations(model, x, partly=True).ops)
    for share in sorted(KEPT, key=lambda s: abs(s - 0.6)):  # near the budgets people ask for first
        for cut in _cuts(layers, share):
            found.update(dict.fromkeys(plan_operations(model, layers, cut, x)))
    return list(found)


def _cuts(layers: list[Layer], share: float) -> Iterator[dict[str, Structure]]:
    """Every layer at a share of its heads, of its q/k, of its v/o, of all; MLPs at that of their neurons."""
    whole = {layer.name: dense_structure(layer) for layer in layers}
    for fields in (("qk", "v"), ("heads",), ("heads", "qk", "v"), ("qk",), ("v",)):
        yield {name: _at(full, (*fields, "neurons"), share) for name, full in whole.items()}


def _at(full: Structure, fields: tuple[str, ...], share: float) -> Structure:
    """A structure with some fields at a share, rounded as allocation rounds them."""
    sizes = {key: getattr(full, key) for key in ("heads", "qk", "v", "neurons")}
    for key in fields:
        size = sizes[key]
        if size is None:
            continue
        step = 1 if key == "heads" or size < 2 * _MULTIPLE else _MULTIPLE
        sizes[key] = min(size, max(step, step * round(share * size / step)))
    return Structure(**sizes)
