"""The operations one denoiser may come to have under pruning: what a profile for that model alone measures."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hwprune.denoiser_operations import evaluation_operations, layer_parts
from hwprune.denoiser_price import NEURONS
from hwprune.families.denoiser import find_layers
from hwprune.ops import Op
from hwprune.profile_ops import KEPT
from hwprune.units import CoupledLayer


def denoiser_ops(model: nn.Module, call: Callable[[], object]) -> list[Op]:
    """Operations of a denoiser whole and cut, the most useful first, none twice.

    Args:
        model: dense.
        call: evaluates it once, with the batch that is meant.

    Raises:
        ValueError: no family knows the model.
    """
    counted = evaluation_operations(model, call)
    layers = [x for x in find_layers(model)[0] if isinstance(x, CoupledLayer) and x.count > 1]
    parts = {layer.name: layer_parts(layer, counted, layers) for layer in layers}
    found = dict.fromkeys(counted.ops)

    def cut(layer: CoupledLayer, kept: int) -> None:
        ops = (part.cut(layer.count - kept) for part in parts[layer.name])
        found.update(dict.fromkeys(op for op in ops if op is not None))

    for share in sorted(KEPT, key=lambda s: abs(s - 0.6)):  # near the budgets people ask for first
        for layer in layers:
            step = NEURONS if layer.kind == "neuron" and layer.count >= 2 * NEURONS else 1
            cut(layer, min(layer.count, max(step, step * round(share * layer.count / step))))
    for layer in layers:  # of heads there are few, and each count is a price of its own
        if layer.kind == "head":
            for kept in range(1, layer.count):
                cut(layer, kept)
    return list(found)
