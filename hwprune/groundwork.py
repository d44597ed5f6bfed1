"""What pruning a denoiser starts from: its units, what they cost, and budgets in absolute terms.

With the kind modulation the model is factored here first, which makes it a little smaller (R components of
I + 1 + O entries are no larger than the O x I before): costs of units are of the factored model, budgets and
the report of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from hwprune.allocate import Budget
from hwprune.denoiser_cost import DenoiserCost, denoiser_cost
from hwprune.families.denoiser import find_layers, find_units
from hwprune.modulation import factored_modulation
from hwprune.teacher import Batch, Sampler
from hwprune.units import Units

FACTORED = "modulation"


@dataclass(frozen=True, eq=False)
class Groundwork:
    """What there is to remove.

    Attributes:
        units: of the kinds asked for.
        cost: of the model as it is now, factored or not.
        dense: of the dense model.
        budget: in absolute terms.
        undo: puts the dense linears back, where there are factors.
    """

    units: Sequence[Units]
    cost: DenoiserCost
    dense: DenoiserCost
    budget: Budget
    undo: Callable[[], None]

    def keeps_all(self) -> bool:
        """Whether the budget allows the dense model."""
        dense = {"macs": float(self.dense.macs), "params": float(self.dense.params)}
        limits = {m: v for m, v in self.budget.given.items() if m in dense}
        return len(limits) == len(self.budget.given) and all(
            float(limit) >= dense[metric] for metric, limit in limits.items()
        )

    def as_dense(self) -> Groundwork:
        """The same with nothing factored."""
        self.undo()
        units = [unit for unit in self.units if unit.kind != FACTORED]
        return replace(self, units=units, cost=self.dense)


@contextmanager
def groundwork(
    sampler: Sampler,
    train: Sequence[Batch],
    kinds: Sequence[str] | None,
    budget: Budget,
    call: Callable[[], Tensor],
) -> Iterator[Groundwork]:
    """Find units and count their cost; after a failure inside, the model has its dense linears again.

    Args:
        sampler: of the dense model.
        train: batches whose conditions factors are made for.
        kinds: any of head, neuron, depth, modulation; None = head and neuron.
        budget: as asked for.
        call: evaluates the model for one image.

    Raises:
        ValueError: an unknown kind, or no unit of the kinds.
    """
    model = sampler.model
    dense = denoiser_cost(model, find_layers(model)[0], call, 1)
    counted = (
        Budget(macs=budget.macs, params=budget.params) if budget.macs or budget.params else None
    )
    absolute = budget
    if counted is not None:
        whole = {"macs": float(dense.macs), "params": float(dense.params)}
        absolute = replace(budget, **counted.limits(whole))
    factored = FACTORED in (kinds or ())
    with factored_modulation(sampler, train) if factored else nullcontext(_nothing) as undo:
        cost = denoiser_cost(model, find_layers(model)[0], call, 1) if factored else dense
        yield Groundwork(find_units(model, kinds), cost, dense, absolute, undo)


def _nothing() -> None:
    """Where nothing was factored, nothing is put back."""
