"""A budget of a denoiser as one price of its gates: parameters, MACs, latency, energy, or several at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hwprune.budget import Budget, UnreachableBudget
from hwprune.denoiser_cost import DenoiserCost
from hwprune.gating import Layout
from hwprune.prices import Price, linear_price


def price_of(
    layout: Layout,
    cost: DenoiserCost,
    budget: Budget,
    timed: Mapping[str, tuple[Price, float]] | None = None,
) -> tuple[Price, float]:
    """What the budget counts, and how much of it is allowed; at least 1 = nothing has to go.

    Args:
        layout: of the gates.
        cost: of the dense denoiser.
        budget: what is asked.
        timed: latency or energy -> its price, and the dense model's seconds or joules.

    Raises:
        ValueError: a budget that nothing here counts.
        UnreachableBudget: more than all units would have to go.
    """
    timed = timed or {}
    dense = {"params": float(cost.params), "macs": float(cost.macs)}
    dense |= {name: whole for name, (_, whole) in timed.items()}
    strange = [name for name in budget.given if name not in dense]
    if strange:
        raise ValueError(f"budget {strange[0]}: expected one of {', '.join(dense)}")
    shares = {name: limit / dense[name] for name, limit in budget.limits(dense).items()}
    shares = {name: share for name, share in shares.items() if share < 1}
    if not shares:
        return (lambda keep: keep.double().mean()), 1.0
    prices = {
        name: timed[name][0]
        if name in timed
        else linear_price(layout, cost, "params" if name == "params" else "macs")
        for name in shares
    }
    nothing = torch.zeros(layout.count, dtype=torch.float64)
    for name, price in prices.items():
        least = float(price(nothing))
        if least > shares[name]:
            kinds = " and ".join(dict.fromkeys(unit.kind for unit in layout.units))
            raise UnreachableBudget(
                f"budget {name}={shares[name]:.3f} is out of reach: with every {kinds} removed "
                f"{least:.3f} of the dense {name} is left; allow more kinds "
                "(depth removes whole blocks), or a larger budget"
            )
    if len(prices) == 1:
        ((name, price),) = prices.items()
        return price, shares[name]
    limit = min(shares.values())

    def both(keep: Tensor) -> Tensor:
        # Each as the share of its way to the budget, on the scale of the tightest: all hold, or none does.
        ways = [(1 - price(keep)) / (1 - shares[name]) for name, price in prices.items()]
        return 1 - torch.stack(ways).min() * (1 - limit)

    return both, limit
