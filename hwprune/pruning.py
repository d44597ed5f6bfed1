"""The one road from a dense model to a smaller one: calibrate, price, allocate, repair, realise."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hwprune import families
from hwprune.analysis import (
    Analysis,
    Objective,
    StepProgress,
    analyse,
    on_device,
    refuse_pruned,
    timed,
)
from hwprune.base_model import describe_base, note_spec
from hwprune.budget import Budget
from hwprune.contract import Contract, contract, timed_images, told
from hwprune.cost import count_macs
from hwprune.cutting import cut_, undone_on_failure
from hwprune.lpvit_plan import check_lpvit
from hwprune.meter.modes import Mode
from hwprune.plan import Plan
from hwprune.planning import Planner
from hwprune.proof import is_dense, proven, settle
from hwprune.realise import Shape, realise_
from hwprune.report import Report, environment
from hwprune.report_rows import curve_rows, layer_rows, tile_rows
from hwprune.tiling import in_use
from hwprune.units import Mask

__all__ = ["Analysis", "analyse", "prune"]

# Plans to try. None, for speed: on ViT-Tiny 16 took 296 s where calibration, curves and repair take 100, and
# brought 3 to 6 % of the KL (see `hwprune.refine`). Worth asking for where a model is pruned to stay.
REFINE = 0
TILE = (32, 32)  # of the kind block, where nothing else is said


def prune(
    model: nn.Module,
    batches: Sequence[Tensor],
    budget: Budget,
    *,
    device: str | None = None,
    kinds: Sequence[str] | None = None,
    objective: Objective = "second-order",
    refine: int = REFINE,
    repair: bool = True,
    seed: int = 0,
    block: tuple[int, int] | None = None,
    round_to: int = 8,
    timed_batch: int = 8,
    timed_dtype: torch.dtype | None = None,
    mode: Mode | None = None,
    energy_weight: float = 0.0,
    analysis: Analysis | None = None,
    progress: StepProgress | None = None,
) -> Report:
    """Prune a vision transformer in place to a budget, without training and without labels.

    Args:
        model: dense, of timm (ViT, DeiT, DINO, EVA, CLIP, SigLIP, Swin) or of transformers (ViT, DeiT, DINOv2,
            CLIP, SigLIP); on return it is the smaller model (still the same `nn.Module`).
        batches: calibration images [B, 3, height, width], normalised as the model wants them.
        budget: e.g. Budget(macs=0.6); a limit of 1.0 or more leaves the model bit for bit as it is.
        device: device profile (name or file) for budgets of latency and energy; None = this machine's own.
            macs and params need none.
        kinds: unit kinds; None = head, neuron, qk, vo, whichever the model allows: at equal MACs they
            keep more accuracy than blocks (README, results). Blocks join them where the device's profile
            says that tiles are faster than as many multiply-accumulates of smaller dense layers.
        objective: what is least: "second-order", the curves' distortion; or "lpvit": the tiles (kind block)
            that LPViT's paper keeps at a budget of macs; without repair this is LPViT as published.
        refine: other plans to try, of which the truly best is kept; each is repaired on up to 64 of the images
            and judged on up to 192 others, a quarter of a repair's time. 0 = take the curves' word.
        repair: re-fit what is kept in closed form.
        seed: of the calibration probe.
        block: tile size for the kind block; None = those sizes that the device's profile says pay, side by
            side, and 32x32 where there is no profile or none pays.
        round_to: keep neurons in multiples of this.
        timed_batch: images of the batch whose latency, energy or memory is limited.
        timed_dtype: type of the weights when it will be run, where latency, energy or memory is limited; None =
            as they are. The weights stay as they are: cast them afterwards.
        mode: how it will be run where latency or energy is limited, "eager" or "graph" (a CUDA graph); None =
            as its profile was measured: a graph on a GPU, eager on a CPU.
        energy_weight: minimise distortion + energy_weight * (joules of the batch / joules of the dense model's)
            within the budget; needs a device with energy figures.
        analysis: of this same model and these batches, to serve several budgets from one calibration
            (prune a deepcopy for each).
        progress: called with (step, done, total).

    Returns:
        Report.

    Raises:
        UnreachableBudget: the budget is out of reach; the model is unchanged.
        ValueError: bad input; the model is unchanged.

    Example:
        >>> import torch
        >>> import hwprune
        >>> from hwprune.digits import digits_model
        >>> model = digits_model(pretrained=False)  # stands for yours
        >>> images = [torch.randn(8, 1, 16, 16)]
        >>> report = hwprune.prune(model, images, hwprune.Budget(macs=0.7))
        >>> report.macs_ratio <= 0.7
        True
    """
    refuse_pruned(model)
    if objective == "lpvit":
        check_lpvit([budget], kinds)
    if refine < 0:
        raise ValueError(f"refine: expected a number of plans to try, 0 or more, got {refine}")
    base = describe_base(model)  # a model no file could describe is refused before the long work
    batches = on_device(model, batches)
    layers, _ = families.of(model).find_layers(model)
    x = timed_images(batches, timed_batch)
    terms = contract(
        model,
        budget,
        device,
        x,
        layers,
        energy_weight=energy_weight,
        mode=mode,
        dtype=timed_dtype,
    )
    tries = refine if objective == "second-order" else 0
    analysis = analysis or analyse(
        model,
        batches,
        kinds=kinds,
        block=block or TILE,
        tiles=tiles_of(terms, kinds, block),
        objective=objective,
        seed=seed,
        progress=progress,
    )
    if analysis.objective != objective:
        raise ValueError(
            f"analysis: expected one made with objective={objective!r}, got {analysis.objective!r}; call "
            f"analyse(..., objective={objective!r})"
        )
    seconds = dict(analysis.seconds)
    planner = Planner(
        model,
        analysis,
        budget,
        terms,
        round_to=round_to,
        repair=repair,
        energy_weight=energy_weight,
    )
    tried: tuple[Mapping[str, Any], ...] = ()
    if tries:
        with timed(seconds, "refine"):
            tried = planner.refined(batches, tries, progress)

    every = analysis.units

    def solve(scale: Mapping[str, float]) -> tuple[Plan, Mask]:
        with timed(seconds, "allocate"):
            return planner.solve(scale)

    def shaped(plan: Plan, mask: Mask) -> nn.Module:
        assert terms is not None and terms.dense is not None
        trial = copy.deepcopy(terms.dense)
        realise_(trial, every, mask, plan.tiles)
        return trial

    with timed(seconds, "contract"):
        plan, mask = settle(terms, solve, shaped)
    units, mask = in_use(every, mask)
    analysis = replace(
        analysis, units=units, curves={n: c for n, c in analysis.curves.items() if n in mask}
    )
    allowed = tuple(dict.fromkeys(unit.kind for unit in every))
    job = _Job(
        analysis, plan, mask, budget, base, seconds, seed, terms, tried, energy_weight, allowed
    )
    if is_dense(plan, mask):
        return _finish(model, job, {}, batches, 0.0, None)
    with undone_on_failure(model):
        shape, distance = cut_(
            model, analysis, mask, batches, repair, seconds, progress, tiles=plan.tiles
        )
        with timed(seconds, "prove"):
            proof = None if terms is None else proven(model, terms, plan)
        return _finish(model, job, shape, batches, distance, proof)


def tiles_of(
    terms: Contract | None, kinds: Sequence[str] | None, block: tuple[int, int] | None
) -> tuple[tuple[int, int], ...]:
    """The tile sizes to choose from side by side: those that pay on the device, unless one was asked for."""
    wanted = block is None and (kinds is None or "block" in kinds)
    return terms.tiles if wanted and terms is not None else ()


def _unchanged(plan: Plan, mask: Mask) -> tuple[str, ...]:
    """What to say where no unit was removed."""
    if not all(bool(grid.all()) for grid in mask.values()):
        return ()
    if plan.tiles:
        return (
            f"no weight was removed: {len(plan.tiles)} linears stored as tiles, which this device runs faster, "
            "keep the budget",
        )
    return ("the budget allows the dense model: nothing was removed",)


@dataclass(frozen=True)
class _Job:
    """What a report tells besides what came out."""

    analysis: Analysis
    plan: Plan
    mask: Mask
    budget: Budget
    base: dict[str, object]
    seconds: dict[str, float]
    seed: int
    terms: Contract | None
    tried: tuple[Mapping[str, Any], ...] = ()
    energy_weight: float = 0.0
    kinds: tuple[str, ...] = ()


def _finish(
    model: nn.Module,
    job: _Job,
    shape: Shape,
    batches: Sequence[Tensor],
    measured: float,
    proof: dict[str, Any] | None,
) -> Report:
    """Write the report and leave the spec on the model for `save`."""
    analysis, plan, terms = job.analysis, job.plan, job.terms
    macs = count_macs(model, batches[0][:1])
    params = sum(p.numel() for p in model.parameters())
    for metric, got in (("macs", macs), ("params", float(params))):
        limit = plan.limits.get(metric, float("inf"))
        if shape and got > limit * 1.001:  # the plan's own count and torch's must agree
            raise RuntimeError(
                f"the realised model has {metric} {got:.6g}, the budget allows {limit:.6g}; please report "
                "this model"
            )
    statistics = analysis.statistics
    report = Report(
        job.budget.given,
        job.kinds,
        macs,
        params,
        plan.dense_macs,
        int(plan.dense_params),
        {
            "predicted": plan.distortion,
            "measured": measured,
            "unit": "nats" if statistics.output == "kl" else "half squared feature distance",
            **({"energy_weight": job.energy_weight} if job.energy_weight else {}),
        },
        tuple(layer_rows(analysis.units, plan.structure)),
        {
            "images": statistics.images,
            "weighting": statistics.weighting,
            "bytes": statistics.peak_bytes,
            "seed": job.seed,
        },
        job.seconds,
        (() if terms is None else terms.notes) + _unchanged(plan, job.mask),
        environment(batches[0].device),
        {} if terms is None else told(terms, plan, proof),
        tuple(tile_rows(analysis.units, job.mask)),
        tuple(curve_rows(analysis.curves, plan.keep)),
        job.tried,
        analysis.objective,
    )
    spec = {
        "version": 1,
        "base": job.base,
        "shape": shape,
        "kinds": list(job.kinds),
        "report": report.to_dict(),
    }
    note_spec(model, spec)
    return report
