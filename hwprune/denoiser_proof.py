"""Masks of a denoiser cut and measured until one keeps its budget, and the finished model measured once more.

On the profile's own device a cut that takes as much of every layer is timed before learning, which sets
the price right; the mask that was learned is cut and timed before it is re-fitted, and is tightened, or
loosened, in the gates' own order. What no mask keeps is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hwprune.budget import ON_A_DEVICE, Budget, UnreachableBudget
from hwprune.budget_price import price_of
from hwprune.contract import measured_keys, prove
from hwprune.denoiser_contract import DenoiserContract
from hwprune.denoiser_cost import DenoiserCost
from hwprune.gating import Layout
from hwprune.guards import hookless
from hwprune.learning import Choice
from hwprune.meter.estimate import Estimate
from hwprune.prices import Price, keep_within
from hwprune.realise import realise_
from hwprune.units import Mask, Units

ATTEMPTS = 4
_CLOSE = 0.03  # of the budget left unused that is not worth another try

Priced: TypeAlias = Callable[[DenoiserContract], tuple[Price, float]]


@dataclass(eq=False)
class Judge:
    """The budget of one run: its price while masks are learned, its proof at the end.

    Attributes:
        model: the denoiser, dense but for the factors of its modulation, until it is realised.
        units: that may go.
        cost: parameters and MACs.
        budget: what is asked.
        terms: of latency and energy; None where neither is asked for.
        proof: of the finished model; None before, or where nothing can be measured.
    """

    model: nn.Module
    units: Sequence[Units]
    cost: DenoiserCost
    budget: Budget
    terms: DenoiserContract | None
    proof: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Set the prices of latency and energy right."""
        if self.terms is not None:
            self.terms = calibrated(self.terms, self.model, self.units)

    def price(self) -> tuple[Price, float]:
        """See `price_of`."""
        return self._price(self.terms)

    def _price(self, terms: DenoiserContract | None) -> tuple[Price, float]:
        layout = Layout(self.units)
        return price_of(
            layout, self.cost, self.budget, None if terms is None else terms.timed(layout)
        )

    def settle(self, choice: Choice) -> None:
        """Change the mask of a choice until it keeps the budget as measured; see `settled`."""
        if self.terms is not None:
            assert choice.wanted is not None
            self.terms, choice.keep = settled(
                self.terms, self.model, self.units, choice.keep, choice.wanted, self._price
            )

    def prove(self, mask: Mask) -> None:
        """Measure the finished model; see `proven`."""
        if self.terms is not None:
            self.proof = proven(self.terms, self.model, self.units, mask)

    def told(self, mask: Mask) -> dict[str, Any]:
        """What the report says of the device; empty where nothing was asked of one."""
        if self.terms is None:
            return {}
        layout = Layout(self.units)
        return told(self.terms, layout, layout.join(dict(mask)) > 0, self.proof)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.terms is None:
            return ()
        proof = self.proof or {}
        unseen = {m: proof[m] for m in self.terms.shares if m in proof}
        return self.terms.notes + tuple(
            f"{metric} could not be measured ({found.reason}): its budget is kept as predicted"
            for metric, found in unseen.items()
            if not isinstance(found, Estimate)
        )


def _measured(
    terms: DenoiserContract, model: nn.Module, units: Sequence[Units], mask: Mask
) -> dict[str, Any]:
    """The proof of a mask, on a copy of the model that is cut by it."""
    assert terms.dense is not None
    trial = hookless(model)
    realise_(trial, units, mask)
    terms.dense.to(terms.place)  # it waits on the CPU between proofs
    try:
        return prove(trial, terms.dense, dict(terms.inputs))
    finally:
        terms.dense.to("cpu")


def calibrated(
    terms: DenoiserContract, model: nn.Module, units: Sequence[Units]
) -> DenoiserContract:
    """The contract with prices set right by timing a cut that takes as much of every layer.

    Args:
        terms: of the profile alone.
        model: to cut a copy of.
        units: that may go.
    """
    asked = {metric: share for metric, share in terms.shares.items() if share < 1}
    if terms.dense is None or not asked:
        return terms
    layout = Layout(units)
    prices = {metric: terms.predicted(layout, metric) for metric in asked}

    def tightest(keep: Tensor) -> Tensor:
        return torch.stack([price(keep) / asked[m] for m, price in prices.items()]).max()

    least = float(tightest(torch.zeros(layout.count, dtype=torch.float64)))
    keep = keep_within(tightest, uniform_order(layout), max(1.0, least), layout.count)
    wanted = torch.arange(layout.count, 0, -1).double()
    keep = filled(terms, layout, keep, wanted, tightest, max(1.0, least))
    if bool(keep.all()):
        return terms

    def gains() -> dict[str, float]:
        proof = _measured(terms, model, units, layout.mask(keep))
        return dict(terms.corrected(layout, keep, proof).gains)

    said = json.dumps([[unit.name, unit.count] for unit in units])
    name = f"gains of {hashlib.sha256(said.encode()).hexdigest()[:16]}"
    return replace(terms, gains=terms.known.once(name, gains))


def uniform_order(layout: Layout) -> Tensor:
    """An order whose first units are the same share of every layer; blocks go last, or evenly spread."""
    ranks = torch.empty(layout.count, dtype=torch.float64)
    alone = all(unit.kind == "depth" for unit in layout.units)
    for i, unit in enumerate(layout.units):
        place = layout.places[unit.name]
        if unit.kind == "depth":
            ranks[place] = (i * 0.6180339887) % 1 if alone else -1.0
        else:
            ranks[place] = (torch.arange(unit.count) + 0.5) / unit.count
    return ranks.argsort(stable=True)


def filled(
    terms: DenoiserContract,
    layout: Layout,
    keep: Tensor,
    wanted: Tensor,
    price: Price,
    limit: float,
) -> Tensor:
    """A mask whose layers have counts that are worth it: filled up where that is free, else cut down.

    Args:
        terms: whose tables say which counts are.
        layout: of the gates.
        keep: bool [N], within the limit.
        wanted: [N], the most wanted units first.
        price: of everything the budget asks for.
        limit: of that.

    Returns:
        bool [N], within the limit.
    """
    keep = keep.clone()
    for name, steps in terms.tables.steps.items():
        place = layout.places.get(name)
        if place is None:
            continue
        count = int(keep[place].sum())
        goal = int(steps[count])
        if goal == count:
            continue
        lower = steps[steps <= count]
        order = ordered(keep[place], wanted[place])
        for number in (goal, int(lower.max()) if len(lower) else 0):
            trial = keep.clone()
            trial[place] = False
            trial[place.start + order[:number]] = True
            if number < count or float(price(trial.double())) <= limit + 1e-9:
                keep = trial
                break
    return keep


def ordered(keep: Tensor, wanted: Tensor) -> Tensor:
    """Places of kept units, then of the others, each by how much they are wanted."""
    by_worth = wanted.argsort(descending=True, stable=True)
    return torch.cat([by_worth[keep[by_worth]], by_worth[~keep[by_worth]]])


def settled(
    terms: DenoiserContract,
    model: nn.Module,
    units: Sequence[Units],
    keep: Tensor,
    wanted: Tensor,
    priced: Priced,
) -> tuple[DenoiserContract, Tensor]:
    """A mask that keeps its budget as measured, and uses it: within 3 % where a few tries find one.

    Time depends on shapes, not on weights: each mask is tried on a copy that is cut but not re-fitted.

    Args:
        terms: of the budget.
        model: to cut copies of.
        units: of the mask.
        keep: bool [N], as learned.
        wanted: [N], the order in which units are taken away or back.
        priced: a contract -> the price of everything the budget asks for, and its limit.

    Returns:
        The contract as it was last set right, and the mask.

    Raises:
        UnreachableBudget: no mask tried keeps the budget on this machine; says what was reached.
    """
    layout = Layout(units)
    price, limit = priced(terms)
    keep = filled(terms, layout, keep, wanted, price, limit)
    order = ordered(keep, wanted)
    best: tuple[bool, float, Tensor] | None = None  # whether its middle is within too, use, mask
    reached = ""
    for _ in range(ATTEMPTS):
        if terms.dense is None or bool(keep.all()):
            return terms, keep
        proof = _measured(terms, model, units, layout.mask(keep))
        if not terms.use(proof):  # nothing could be measured, which the report says
            return terms, keep
        used, kept = terms.use(proof), terms.use(proof) <= 1
        reached = _reached(terms, proof)
        # One whose interval alone reaches the limit will do, but the finished model is measured anew.
        score = (kept, used if kept else -used)
        if terms.kept(proof) and (best is None or score > best[:2]):
            best = (*score, keep)
        if best is not None and best[0] and (best[1] >= 1 - _CLOSE or not kept):
            break
        terms = terms.corrected(layout, keep, proof)
        try:
            price, limit = priced(terms)
            # A step past the limit by half of what is close enough, so that noise does not decide.
            aim = limit * (1 - _CLOSE / 2)
            if kept and float(price(keep.double())) >= aim:
                break  # what is left unused another budget does not give away
            again = keep_within(price, order, aim, layout.count)
            again = filled(terms, layout, again, wanted, price, aim)
        except ValueError:  # out of reach
            break
        if torch.equal(again, keep):
            break
        keep = again
    if best is None:
        raise UnreachableBudget(
            f"up to {ATTEMPTS} masks were cut and timed, and none keeps the budget on this machine; the last: "
            f"{reached}; loosen the budget, or measure the device again with `hwprune profile`"
        )
    return terms, best[2]


def proven(
    terms: DenoiserContract, model: nn.Module, units: Sequence[Units], mask: Mask
) -> dict[str, Any] | None:
    """Measured ratios of the finished model, re-fitted and cut; None where this machine is not the device.

    Args:
        terms: of the budget.
        model: re-fitted, not cut yet; a copy is.
        units: of the mask.
        mask: True = keep.

    Raises:
        UnreachableBudget: they are over the limit by more than the interval, where the mask tried before was
            not: the machine does not hold still.
    """
    if terms.dense is None:
        return None
    proof = _measured(terms, model, units, mask)
    if not terms.kept(proof):
        proof = _measured(terms, model, units, mask)  # one round of noise is no verdict
    if not terms.kept(proof):
        raise UnreachableBudget(
            f"the finished model is over its budget: {_reached(terms, proof)}, though its mask was not; this "
            "machine is too noisy to keep a contract on: use a quieter one, or loosen the budget"
        )
    return proof


def _reached(terms: DenoiserContract, proof: Mapping[str, Any]) -> str:
    return ", ".join(f"{metric} {proof[metric].value:.3f} of dense" for metric in terms.seen(proof))


def told(
    terms: DenoiserContract, layout: Layout, keep: Tensor, proof: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The keys `predicted` and `measured` of a report: figures, or null with a reason."""
    predicted: dict[str, Any] = {}
    for metric in ON_A_DEVICE:
        key = f"{metric}_ratio"
        predicted[key] = None
        if metric in terms.whole:
            ratio, spread = (
                float(terms.predicted(layout, metric)(keep.double())),
                terms.tables.spread_rel,
            )
            predicted[key] = {
                "value": ratio,
                "lo": ratio * (1 - spread),
                "hi": ratio * (1 + spread),
            }
        elif terms.tables.joules is None:
            predicted["reason"] = f"{terms.profile} has no energy figures"
        else:
            predicted["reason"] = f"{metric} was not asked for"
    return {"predicted": predicted, "measured": measured_keys(proof, terms.notes)}
