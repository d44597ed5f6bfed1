"""Calibrate a dense model and price the removal of every unit: all that does not depend on the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from hwprune.cost import ModelCost, model_cost
from hwprune.distortion import Curve, curves
from hwprune.lpvit import Scored
from hwprune.lpvit_plan import KINDS as LPVIT_KINDS
from hwprune.lpvit_plan import check_lpvit, score
from hwprune.statistics import Statistics, calibrate
from hwprune.tiling import find_units
from hwprune.units import Units, layers_of

Objective = Literal["second-order", "lpvit"]
OBJECTIVES: tuple[Objective, ...] = ("second-order", "lpvit")
StepProgress = Callable[[str, int, int], None]  # (step, done, total)


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that does not depend on the budget: one analysis serves any number of budgets.

    Attributes:
        units: what may be removed.
        statistics: of the calibration pass.
        curves: units name -> distortion curve.
        cost: dense cost and tokens.
        gain: kind -> factor on its curves.
        seconds: step -> wall time.
        lpvit: what LPViT found, where blocks are to be chosen by it; there are no curves then.
        factors: units name -> a further factor on its curve, found by refining another budget.
    """

    units: Sequence[Units]
    statistics: Statistics
    curves: dict[str, Curve]
    cost: ModelCost
    gain: dict[str, float]
    seconds: dict[str, float]
    lpvit: Scored | None = None
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """What blocks are chosen by."""
        return "second-order" if self.lpvit is None else "lpvit"


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the wall time of what runs inside to a step."""
    start = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def refuse_pruned(model: nn.Module) -> None:
    """Refuse a model that was cut before.

    Raises:
        ValueError: it was.
    """
    spec = getattr(model, "hwprune_spec", None)
    if isinstance(spec, Mapping) and spec.get("shape"):
        raise ValueError(
            f"{type(model).__name__} is pruned already, and a file can describe only one step from the "
            "dense model; prune the dense model with the smaller budget"
        )


def on_device(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches where the model is, in its type."""
    parameter = next(model.parameters())
    return [b.to(parameter.device, parameter.dtype) for b in batches if len(b)]


# Second-order curves are exact for small changes; further out the softmax makes q/k (and, less, v)
# errors cost more than predicted. Medians of true over predicted KL on unseen images, ViT-Tiny, one layer
# at a time (benchmark `curve-normalisation`): q/k 27, v 22, neurons 12; what counts here is their ratio.
GAIN = {"qk": 3.0, "vo": 1.5, "neuron": 1.0, "head": 1.5, "block": 1.0}


def analyse(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    kinds: Sequence[str] | None = None,
    block: tuple[int, int] = (32, 32),
    tiles: Sequence[tuple[int, int]] = (),
    objective: Objective = "second-order",
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Analysis:
    """Calibrate a dense model and price the removal of every unit.

    Args:
        model: dense; unchanged.
        batches: calibration images [B, 3, height, width], label-free.
        kinds: unit kinds; None = all structured kinds the model allows.
        block: tile size for the kind block.
        tiles: tile sizes of the kind block to offer side by side, in place of `block`; they are offered beside
            `kinds`.
        objective: "second-order", or "lpvit": the kind block alone, chosen as LPViT's paper does.
        seed: of the gradient probe.
        progress: called with (step, done, total).

    Raises:
        ValueError: an unknown objective; see `find_units` and `calibrate`.

    Example:
        >>> import torch
        >>> import hwprune
        >>> from hwprune.digits import digits_model
        >>> model = digits_model(pretrained=False)
        >>> images = [torch.randn(8, 1, 16, 16)]
        >>> analysis = hwprune.analyse(model, images, kinds=["neuron"])
        >>> hwprune.prune(model, images, hwprune.Budget(macs=0.8), analysis=analysis).kinds
        ('neuron',)
    """
    seconds: dict[str, float] = {}

    def report(step: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress(step, done, total)

    refuse_pruned(model)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected {' or '.join(OBJECTIVES)}, got {objective!r}")
    if objective == "lpvit":
        check_lpvit((), kinds)
        kinds = LPVIT_KINDS
    units = find_units(model, kinds, block, tiles)
    batches = on_device(model, batches)
    with timed(seconds, "calibrate"):
        statistics = calibrate(model, units, batches, seed=seed, progress=report("calibrate"))
    with timed(seconds, "curves"):
        cost = model_cost(model, layers_of(units), batches[0])
        if objective == "lpvit":
            scores = score(model, units, batches, block)
            return Analysis(units, statistics, {}, cost, {}, seconds, scores)
        found = curves(model, units, statistics, progress=report("curves"))
    return Analysis(units, statistics, found, cost, dict(GAIN), seconds)
