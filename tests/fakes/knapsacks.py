"""Knapsacks with curves made up, and the best of all their combinations, tried one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hwprune.allocate import Choices
from hwprune.cost import ModelCost, model_cost
from hwprune.distortion import Curve
from hwprune.option import Option, dense_option
from hwprune.rotate import Rotation
from hwprune.units import Units, layers_of

FIELDS = {"macs": "macs", "params": "params", "latency": "latency_s", "energy": "energy_j"}


def identity(heads: int, width: int) -> Rotation:
    """The rotation that turns nothing."""
    eye = torch.eye(width, dtype=torch.float64).expand(heads, width, width)
    tail = torch.arange(width, -1, -1, dtype=torch.float64).expand(heads, width + 1)
    return Rotation(eye, eye, tail)


def made_up(units: Sequence[Units], seed: int) -> dict[str, Curve]:
    """Convex random curves of very different sizes, so that choices matter."""
    draw, found = random.Random(seed), {}
    for unit in units:
        steps = sorted(draw.random() ** 3 for _ in range(unit.count))
        size = 10 ** draw.uniform(-3, 1)
        curve = torch.tensor([0.0, *itertools.accumulate(steps)], dtype=torch.float64) * size
        order = list(range(unit.count))
        draw.shuffle(order)
        heads = getattr(unit.layer, "heads", 1)
        rotation = identity(heads, unit.count) if unit.kind in ("qk", "vo") else None
        found[unit.name] = Curve(unit, torch.tensor(order), curve, rotation)
    return found


def problem(
    model: nn.Module, units: Sequence[Units], seed: int, image: torch.Tensor
) -> tuple[dict[str, Curve], ModelCost]:
    """Made-up curves of a model's units, and its cost."""
    return made_up(units, seed), model_cost(model, layers_of(units), image)


def spent(choices: Choices, chosen: Sequence[Option], metric: str) -> float:
    """What a choice costs, counted down from the dense model; memory is weights and the highest peak."""
    dense = [dense_option(options) for _, options in choices.groups]
    if metric == "memory":

        def bytes_of(options: Sequence[Option]) -> tuple[float, float]:
            peaks = [choices.floor_bytes, *(o.peak_bytes for o in options)]
            return sum(o.weight_bytes for o in options), max(peaks)

        (before, high), (after, now) = bytes_of(dense), bytes_of(chosen)
        return choices.dense["memory"] - before - high + after + now
    name = FIELDS[metric]
    saved = sum(getattr(a, name) - getattr(b, name) for a, b in zip(dense, chosen, strict=True))
    return choices.dense[metric] - saved


def best_of_all(choices: Choices, limits: Mapping[str, float]) -> float:
    """The least distortion plus weighted energy of all combinations within the limits; inf for none."""
    best = math.inf
    whole = choices.dense.get("energy", 1.0)
    for chosen in itertools.product(*(options for _, options in choices.groups)):
        if all(spent(choices, chosen, m) <= v * (1 + 1e-12) for m, v in limits.items()):
            loss = sum(o.distortion for o in chosen)
            if choices.energy_weight:
                loss += choices.energy_weight * sum(o.energy_j for o in chosen) / whole
            best = min(best, loss)
    return best
