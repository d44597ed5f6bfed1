"""What a mask costs as a differentiable function of gates: the regulariser that counts what the user pays.

A price maps the probability (or the fact, 0 or 1) that each unit is kept to the cost of the model
relative to the dense one. Budgets are met by a multiplier, so there is no weight to tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hwprune.denoiser_cost import DenoiserCost
from hwprune.gating import Layout

Price: TypeAlias = Callable[[Tensor], Tensor]  # flat [N] in [0, 1] -> scalar, 1 = the dense model


def linear_price(
    layout: Layout,
    cost: DenoiserCost,
    metric: Literal["params", "macs"] = "params",
    of: Literal["model", "units"] = "model",
) -> Price:
    """Parameters or MACs, in expectation over independent gates; exact where gates are 0 or 1.

    Args:
        layout: of the gates.
        cost: of the dense denoiser.
        metric: what is counted.
        of: what 1 means: the whole dense model, or all that the units can remove of it.

    Returns:
        The price. Units inside a removed block cost nothing whatever their gates say. What goes with the
        last unit of a layer alone (q/k norms, some 100 parameters) is counted as kept.

    Raises:
        ValueError: a unit whose cost is not known.
    """
    dense = float(cost.params if metric == "params" else cost.macs)
    each = torch.zeros(layout.count, dtype=torch.float64)  # of a head or neuron; 0 for blocks
    owner = torch.full((layout.count,), -1)  # flat place of the block a unit sits in
    for unit in layout.units:
        place = layout.places[unit.name]
        if unit.name in cost.blocks:
            continue
        if unit.name not in cost.units:
            raise ValueError(
                f"{unit.name}: its cost is not known; count the cost of the same model"
            )
        own = cost.units[unit.name]
        each[place] = own.params if metric == "params" else own.macs
        block = layout.places.get(f"{own.block}:depth")
        if block is not None:
            owner[place] = block.start
    whole = torch.zeros(layout.count, dtype=torch.float64)
    for name, (macs, params) in cost.blocks.items():
        if name in layout.places:
            whole[layout.places[name]] = params if metric == "params" else macs
    inside = owner >= 0
    index = owner.clamp_min(0)

    if of == "units":
        dense = float((whole + each * ~inside).sum())

    def price(keep: Tensor) -> Tensor:
        p = keep.double().cpu() if keep.device.type != "cpu" else keep.double()
        alive = torch.where(inside, p[index], torch.ones_like(p))
        gone = (whole * (1 - p)).sum() + (each * alive * (1 - p)).sum()
        return 1 - gone / dense

    return price


def table_price(
    layout: Layout,
    tables: Mapping[str, Tensor],
    dense: float,
    blocks: Mapping[str, float] | None = None,
) -> Price:
    """A measured cost (seconds, joules) by how many units of each layer are kept.

    Args:
        layout: of the gates.
        tables: units name -> [count + 1], the layer's cost with 0 to all units kept, never falling; layers
            without a table cost the same whatever is kept.
        dense: cost of the whole dense model, in the same unit.
        blocks: depth units name -> cost of the whole dense block; what it has beside its layers with tables
            goes with it.

    Returns:
        The price, linear between counts. Units inside a removed block cost nothing whatever their gates say.
        Its gradient is that of the tables' lower convex hulls: of a staircase (a GPU's tiles) a unit
        would otherwise cost nothing, or as much as a whole tile.

    Raises:
        ValueError: a table of another length, or one that falls.
    """
    for name, table in tables.items():
        place = layout.places.get(name)
        if place is None or len(table) != place.stop - place.start + 1:
            raise ValueError(
                f"{name}: expected a table with one entry for each number of kept units, 0 to all, got "
                f"{len(table)}"
            )
        if bool((table.diff() < 0).any()):
            raise ValueError(f"{name}: expected a table that never falls as units are added")
    hulls = {name: lower_hull(table) for name, table in tables.items()}
    tables = {name: table.double() for name, table in tables.items()}
    inside: dict[str, list[str]] = {name: [] for name in blocks or {} if name in layout.places}
    outside: list[str] = []
    for unit in layout.units:
        if unit.name in tables:
            held = (f"{name}:depth" for name in _parents(unit.layer.name))
            inside.get(next((name for name in held if name in inside), ""), outside).append(
                unit.name
            )
    beside = {
        name: max(0.0, (blocks or {})[name] - sum(float(tables[n][-1]) for n in names))
        for name, names in inside.items()
    }
    rest = dense - sum(float(table[-1]) for table in tables.values()) - sum(beside.values())

    def price(keep: Tensor) -> Tensor:
        parts = layout.split(keep.double().cpu() if keep.device.type != "cpu" else keep.double())

        def cost(name: str) -> Tensor:
            kept = parts[name].sum()
            value = _between(tables[name], kept.detach())
            hull = _between(hulls[name], kept)
            return value + hull - hull.detach()

        total = sum((cost(name) for name in outside), torch.tensor(rest, dtype=torch.float64))
        for name, names in inside.items():
            whole = sum((cost(n) for n in names), torch.tensor(beside[name], dtype=torch.float64))
            total = total + parts[name].sum() * whole
        return total / dense

    return price


def _parents(name: str) -> list[str]:
    """The modules a module is in, the nearest first."""
    found = []
    while "." in name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found


def _between(table: Tensor, kept: Tensor) -> Tensor:
    """A table at a number that need not be whole."""
    low = kept.detach().floor().long().clamp(0, len(table) - 2)
    return table[low] + (kept - low) * (table[low + 1] - table[low])


def lower_hull(table: Tensor) -> Tensor:
    """The largest convex function below a table: [n] -> [n], float64."""
    values = table.double().tolist()
    corners: list[int] = []
    for i, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (values[b] - values[a]) * (i - a) < (value - values[a]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    found = np.interp(np.arange(len(values)), corners, [values[i] for i in corners])
    return torch.from_numpy(found)


def keep_within(price: Price, order: Tensor, budget: float, size: int) -> Tensor:
    """Keep the units that come first in an order, as many as the budget allows.

    Args:
        price: monotone in each unit.
        order: places, the most wanted first; what is not among them is not kept.
        budget: the price must not be above it.
        size: N, the number of gates.

    Returns:
        bool [N].

    Raises:
        ValueError: even with everything removed the price is above the budget.
    """

    def first(count: int) -> Tensor:
        keep = torch.zeros(size, dtype=torch.bool)
        keep[order[:count]] = True
        return keep

    slack = 1e-9  # of rounding in a price that is a sum of a million terms
    if float(price(first(0).double())) > budget + slack:
        floor = float(price(first(0).double()))
        raise ValueError(
            f"budget {budget:.4g} cannot be reached: with every unit removed the model costs "
            f"{floor:.4g} of the dense one; allow more kinds, or a larger budget"
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if float(price(first(middle).double())) <= budget + slack:
            low = middle
        else:
            high = middle - 1
    return first(low)


@dataclass
class Multiplier:
    """A multiplier that drives a price to its budget, whatever the scale of the loss.

    It is proportional and integral in the excess, and counted in units of the ratio of the two gradients'
    norms: with these gains 100 and 400 steps end within 0.01 of the budget for losses from 1e-3 to 30.

    Attributes:
        integral: what the excess has summed up to, never negative.
        ratio: running ratio of the norms, loss to price; 0 = nothing seen yet.
    """

    integral: float = 0.0
    ratio: float = 0.0

    def weight(self, excess: float, loss_norm: float, price_norm: float) -> float:
        """The weight of the price's gradient at this step.

        Args:
            excess: price - budget.
            loss_norm: norm of the loss's gradient with respect to some parameters.
            price_norm: norm of the price's gradient with respect to the same.
        """
        # Where the loss has no gradient yet (all gates saturated) the price alone gives the direction.
        now = max(loss_norm, 1e-12) / max(price_norm, 1e-12)
        self.ratio = now if self.ratio == 0 else 0.9 * self.ratio + 0.1 * now
        # Bounded: logits that start far from where gates close would wind it up meanwhile.
        self.integral = max(0.0, self.integral + max(-0.02, min(0.02, excess)))
        return max(0.0, self.integral + 30 * excess) * self.ratio

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"integral": self.integral, "ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.integral, self.ratio = float(state["integral"]), float(state["ratio"])
