"""The one road from a dense model to a smaller one: calibrate, price, allocate, repair, realise."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.allocate import Budget, Plan, allocate, select
from hwprune.checkpoint import describe_base
from hwprune.contract import Contract, contract, proven, settle, timed_images, told
from hwprune.cost import ModelCost, count_macs, model_cost
from hwprune.distortion import Curve, curves
from hwprune.families import timm_vit
from hwprune.realise import Shape, realise_, zero_
from hwprune.repair import repair_
from hwprune.report import Report, environment
from hwprune.report_rows import curve_rows, layer_rows, tile_rows
from hwprune.rotate import rotate_
from hwprune.statistics import (
    Statistics,
    calibrate,
    is_classifier,
    model_output,
    output_distance,
)
from hwprune.units import Mask, Units, full_mask, layers_of, vision_layer

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
    """

    units: Sequence[Units]
    statistics: Statistics
    curves: dict[str, Curve]
    cost: ModelCost
    gain: dict[str, float]
    seconds: dict[str, float]


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on exit every module has its mode again, and after a failure the model its all."""
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if child:
                setattr(modules[parent], child, module)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        raise
    finally:
        for name, module in model.named_modules():
            while name not in modes:  # new inside a rebuilt layer
                name = name.rpartition(".")[0]
            module.training = modes[name]


def _refuse_pruned(model: nn.Module) -> None:
    spec = getattr(model, "hwprune_spec", None)
    if isinstance(spec, Mapping) and spec.get("shape"):
        raise ValueError(
            f"{type(model).__name__} is pruned already, and a file can describe only one step from the "
            "dense model; prune the dense model with the smaller budget"
        )


def _on_device(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
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
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Analysis:
    """Calibrate a dense model and price the removal of every unit.

    Args:
        model: dense; unchanged.
        batches: calibration images [B, 3, height, width], label-free.
        kinds: unit kinds; None = all structured kinds the model allows.
        block: tile size for the kind block.
        seed: of the gradient probe.
        progress: called with (step, done, total).

    Raises:
        ValueError: see `find_units` and `calibrate`.
    """
    seconds: dict[str, float] = {}

    def report(step: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress(step, done, total)

    _refuse_pruned(model)
    units = timm_vit.find_units(model, kinds, block=block)
    batches = _on_device(model, batches)
    with _timed(seconds, "calibrate"):
        statistics = calibrate(model, units, batches, seed=seed, progress=report("calibrate"))
    with _timed(seconds, "curves"):
        found = curves(model, units, statistics, progress=report("curves"))
        cost = model_cost(model, layers_of(units), batches[0])
    return Analysis(units, statistics, found, cost, dict(GAIN), seconds)


def prune(
    model: nn.Module,
    batches: Sequence[Tensor],
    budget: Budget,
    *,
    device: str | None = None,
    kinds: Sequence[str] | None = None,
    repair: bool = True,
    seed: int = 0,
    block: tuple[int, int] = (32, 32),
    round_to: int = 8,
    timed_batch: int = 8,
    analysis: Analysis | None = None,
    progress: StepProgress | None = None,
) -> Report:
    """Prune a timm vision transformer in place to a budget, without training and without labels.

    Args:
        model: dense timm ViT; on return it is the smaller model (still the same `nn.Module`).
        batches: calibration images [B, 3, height, width], normalised as the model wants them.
        budget: e.g. Budget(macs=0.6); a limit of 1.0 or more leaves the model bit for bit as it is.
        device: device profile (name or file) for budgets of latency and energy; None = this machine's own.
            macs and params need none.
        kinds: unit kinds; None = head, neuron, qk, vo, whichever the model allows: at equal MACs they
            keep more accuracy than blocks (README, results).
        repair: re-fit what is kept in closed form.
        seed: of the calibration probe.
        block: tile size for the kind block.
        round_to: keep neurons in multiples of this.
        timed_batch: images of the batch whose latency or energy is limited.
        analysis: of this same model and these batches, to serve several budgets from one calibration
            (prune a deepcopy for each).
        progress: called with (step, done, total).

    Returns:
        Report.

    Raises:
        UnreachableBudget: the budget is out of reach; the model is unchanged.
        ValueError: bad input; the model is unchanged.
    """
    _refuse_pruned(model)
    base = describe_base(model)  # a model no file could describe is refused before the long work
    batches = _on_device(model, batches)
    terms = contract(model, budget, device, timed_images(batches, timed_batch), block)
    analysis = analysis or analyse(
        model, batches, kinds=kinds, block=block, seed=seed, progress=progress
    )
    seconds = dict(analysis.seconds)

    def solve(scale: Mapping[str, float]) -> tuple[Plan, Mask]:
        with _timed(seconds, "allocate"):
            plan = allocate(
                model,
                analysis.curves,
                analysis.cost,
                budget,
                round_to=round_to,
                gain=analysis.gain,
                pricer=None if terms is None else terms.pricer,
                scale=scale,
            )
            return plan, {**full_mask(analysis.units), **select(analysis.curves, plan)}

    def shaped(mask: Mask) -> nn.Module:
        assert terms is not None and terms.dense is not None
        trial = copy.deepcopy(terms.dense)
        realise_(trial, analysis.units, mask)
        return trial

    with _timed(seconds, "contract"):
        plan, mask = settle(terms, solve, shaped)
    job = _Job(analysis, plan, mask, budget, base, seconds, seed, terms)
    if all(bool(grid.all()) for grid in mask.values()):
        return _finish(model, job, {}, batches, 0.0, None)
    with _undone_on_failure(model):
        shape, distance = _cut_(model, analysis, mask, batches, repair, seconds, progress)
        with _timed(seconds, "prove"):
            proof = None if terms is None else proven(model, terms, plan)
        return _finish(model, job, shape, batches, distance, proof)


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


def _cut_(
    model: nn.Module,
    analysis: Analysis,
    mask: Mask,
    batches: Sequence[Tensor],
    repair: bool,
    seconds: dict[str, float],
    progress: StepProgress | None,
) -> tuple[Shape, float]:
    """Rotate, re-fit and realise; returns the shape and the mean distortion on the batches."""
    classifier = is_classifier(model)
    with torch.inference_mode():
        dense_out = [model_output(model, b).clone() for b in batches]
    with _timed(seconds, "repair"):
        _rotate(model, analysis, mask)
        if repair:
            step = None if progress is None else (lambda d, t: progress("repair", d, t))
            repair_(
                model,
                analysis.units,
                mask,
                analysis.statistics,
                batches,
                timm_vit.stages(model),
                progress=step,
            )
        else:
            zero_(model, analysis.units, mask)
    with torch.inference_mode():
        before = model_output(model, batches[0]).clone()
    with _timed(seconds, "realise"):
        shape = realise_(model, analysis.units, mask)
    with _timed(seconds, "check"), torch.inference_mode():
        outs = [model_output(model, b) for b in batches]
        _check_same(before, outs[0])
        distance = torch.cat(
            [
                output_distance(out, ref, classifier=classifier)
                for out, ref in zip(outs, dense_out, strict=True)
            ]
        )
    return shape, float(distance.mean())


def _rotate(model: nn.Module, analysis: Analysis, mask: Mask) -> None:
    for name, curve in analysis.curves.items():
        if curve.rotation is not None and not bool(mask[name].all()):
            layer = vision_layer(curve.units)
            rotate_(model, layer, curve.units.kind, curve.rotation)


def _check_same(masked_out: Tensor, realised_out: Tensor) -> None:
    """The realised model must say what the masked one said: no head mixed, no scale changed."""
    if not bool(torch.isfinite(realised_out).all()):
        raise RuntimeError("the realised model gives NaN or Inf on calibration images")
    error = float((masked_out.double() - realised_out.double()).norm())
    size = float(masked_out.double().norm())
    tolerance = 1e-3 if realised_out.dtype == torch.float32 else 5e-2
    if error > tolerance * max(size, 1e-6):
        raise RuntimeError(
            f"the realised model differs from the masked one by {error / size:.2e} of its output "
            f"(allowed {tolerance:.0e}); please report this model"
        )


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
    kinds = tuple(dict.fromkeys(u.kind for u in analysis.units))
    statistics = analysis.statistics
    report = Report(
        job.budget.given,
        kinds,
        macs,
        params,
        plan.dense_macs,
        int(plan.dense_params),
        {
            "predicted": plan.distortion,
            "measured": measured,
            "unit": "nats" if statistics.output == "kl" else "half squared feature distance",
        },
        tuple(layer_rows(analysis.units, plan.structure)),
        {
            "images": statistics.images,
            "weighting": statistics.weighting,
            "bytes": statistics.peak_bytes,
            "seed": job.seed,
        },
        job.seconds,
        (() if terms is None else terms.notes)
        + (() if shape else ("the budget allows the dense model: nothing was removed",)),
        environment(batches[0].device),
        {} if terms is None else told(terms, plan, proof),
        tuple(tile_rows(analysis.units, job.mask)),
        tuple(curve_rows(analysis.curves, plan.keep)),
    )
    model.hwprune_spec = {  # type: ignore[assignment]
        "version": 1,
        "base": job.base,
        "shape": shape,
        "kinds": list(kinds),
        "report": report.to_dict(),
    }
    return report
