"""The road of a diffusion model: teacher latents, a mask learned through the trajectory, repair, realise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwprune.budget import ON_A_DEVICE, Budget
from hwprune.conditions import Conditions, component_of, conditions_of
from hwprune.denoiser_contract import denoiser_contract
from hwprune.denoiser_proof import Judge
from hwprune.denoisers import floating_dtype
from hwprune.diffusion_report import DiffusionReport
from hwprune.families.denoiser import find_units
from hwprune.gating import Gating, Layout, gated
from hwprune.groundwork import FACTORED, Groundwork, groundwork
from hwprune.guards import frozen_model, others_on_the_cpu, weights_back
from hwprune.learning import Choice, Preview, Task, Watch
from hwprune.pruned_config import KEY
from hwprune.realise import realise_
from hwprune.report import environment
from hwprune.selection import REPAIRED, method_named
from hwprune.teacher import Batch, Sampler, Split, draw, key_of, spread, taught
from hwprune.trajectory_repair import repair_trajectory_
from hwprune.units import Mask, full_mask

StepProgress = Callable[[str, int, int], None]  # (step, done, total)


def prune_diffusion(
    pipeline_or_denoiser: Any,
    conditions: Conditions | Sequence[int] | Sequence[str] | None,
    budget: Budget,
    *,
    steps: int = 8,
    scheduler: Any = None,
    guidance: float | None = None,
    device: str | torch.device | None = None,
    profile: str | None = None,
    method: str = "ours",
    kinds: Sequence[str] | None = None,
    repair: bool | None = None,
    updates: int = 200,
    minutes: float | None = None,
    images: int = 64,
    batch: int = 4,
    seed: int = 0,
    folder: str | Path | None = None,
    offload: bool = False,
    progress: StepProgress | None = None,
    watch: Watch | None = None,
    preview: Preview | None = None,
) -> DiffusionReport:
    """Prune a denoiser of diffusers in place, by what its removal does to the final latents.

    Args:
        pipeline_or_denoiser: a pipeline, whose unet or transformer becomes smaller; or that module alone.
        conditions: class labels; prompts (of a pipeline); None = neither; or `Conditions` made before,
            so that the encoders can be freed.
        budget: of the denoiser: Budget(params=0.8), Budget(macs=0.7); of one evaluation of it for a batch,
            with guidance for the doubled one, on a device: Budget(latency=0.8), Budget(energy=0.8); or
            several at once.
        steps: of the solver, while learning; 8 to 12 serve models that are later sampled with more.
        scheduler: of diffusers; None = the pipeline's.
        guidance: see `hwprune.conditions.conditions_of`.
        device: to move the denoiser to; None = where it is.
        profile: of the device that latency and energy are meant on, its name or file; None = this machine's.
        method: ours, or a baseline: see `hwprune.selection.METHODS`.
        kinds: any of head, neuron, depth, modulation; None = head and neuron.
        repair: re-fit what is kept in closed form; None = for ours, top-k and obs.
        updates: of the gates, at most.
        minutes: for the updates; None = no limit. The budget comes down as slowly as the time allows.
        images: to learn from; a quarter as many choose between masks, as many again judge the result.
        batch: images at a time.
        seed: of everything drawn.
        folder: keeps encoded prompts, teacher latents and the state of learning: a run that was killed goes
            on from there.
        offload: keep the latents of the steps on the CPU.
        progress: called with (step, done, total).
        watch: called after each update with loss, price, share of settled gates and time left.
        preview: called with the gating and the best mask so far, whenever a better one is found.

    Returns:
        DiffusionReport; `settled` is False where time ran out first, with the best mask so far.

    Raises:
        UnreachableBudget: even with every unit gone the model costs more, or no mask tried was as fast as
            asked for; the model is unchanged.
        ValueError: bad input; the model is unchanged.
        FloatingPointError: NaN in a trajectory, with step and layer; the model is unchanged.

    Example:
        >>> import hwprune
        >>> pipeline = hwprune.load("sdxl")  # doctest: +SKIP
        >>> budget = hwprune.Budget(params=0.8)
        >>> hwprune.prune_diffusion(pipeline, ["a cat", "a dog"], budget, steps=8)  # doctest: +SKIP
    """
    choose = method_named(method)
    _check(steps=steps, updates=updates, images=images, batch=batch)
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes: expected more than 0, got {minutes}")
    whole = hasattr(pipeline_or_denoiser, "components")
    model = component_of(pipeline_or_denoiser)[1] if whole else pipeline_or_denoiser
    if dict(getattr(model, "config", {})).get(KEY):
        raise ValueError(
            f"{type(model).__name__} is pruned already, and a file can describe only one step from the "
            "dense model; prune the dense model with the smaller budget"
        )
    repaired = method in REPAIRED if repair is None else repair
    keeping = None if folder is None else Path(folder)
    clock = _Clock(progress, timed=any(metric in ON_A_DEVICE for metric in budget.given))
    others = [kind for kind in kinds or () if kind != FACTORED]
    if others or not kinds:
        find_units(model, others or kinds)  # refused before the long work
    if not isinstance(conditions, Conditions):
        with clock("encode"):
            conditions = conditions_of(
                pipeline_or_denoiser,
                conditions,
                steps=steps,
                scheduler=scheduler,
                guidance=guidance,
                cache=keeping,
            )
    if device is not None:
        model.to(device)
    with (
        frozen_model(model),
        others_on_the_cpu(pipeline_or_denoiser, model, whole),
        ExitStack() as stack,
    ):
        sampler = Sampler(model, conditions, offload=offload)
        some = max(1, images // 4)
        with clock.on_device("contract"):
            first = draw(sampler, "train", min(images, batch), batch=batch, seed=seed)[0]
            terms = denoiser_contract(sampler, first, budget, profile, keeping)
        with clock("teacher"):
            counts: dict[Split, int] = {"train": images, "check": some, "held": some}
            sets = [
                taught(
                    sampler,
                    draw(sampler, split, count, batch=batch, seed=seed),
                    folder=keeping,
                    progress=clock.of(f"teacher, {split}"),
                )
                for split, count in counts.items()
            ]
        train, check, held = sets
        ground = stack.enter_context(
            groundwork(sampler, train, kinds, budget, _one_call(sampler, train[0]))
        )
        units = ground.units
        with clock.on_device("contract"):
            judge = Judge(model, units, ground.cost, ground.budget, terms)
        price, limit = judge.price()
        if limit >= 1 or ground.keeps_all():
            ground = ground.as_dense()
            choice = Choice(
                torch.ones(Layout(units).count, dtype=torch.bool),
                note="the budget allows the dense model: nothing was removed",
            )
            none = {"unrepaired": 0.0, "check": 0.0, "held": 0.0, "held_se": 0.0, "relative": 0.0}
            kept = full_mask(ground.units)
            return _finish(sampler, ground, judge, kept, budget, method, choice, none, sets, clock)
        with weights_back(model, units):
            with gated(model, units) as gating:
                said = [method, asdict(budget), profile, kinds, updates, minutes, seed, repaired]
                task = Task(
                    sampler=sampler,
                    gating=gating,
                    price=price,
                    budget=limit,
                    train=train,
                    check=check,
                    updates=updates,
                    seconds=None if minutes is None else 60 * minutes,
                    seed=seed,
                    state=_state_file(keeping, sampler, train, *said),
                    watch=watch,
                    repaired=repaired,
                    preview=preview,
                )
                with clock("learn"):
                    choice = choose(task)
                clock.seconds["learn"] = max(clock.seconds["learn"], choice.spent_s)
                with clock.on_device("contract"):
                    judge.settle(choice)
                distances = {"unrepaired": task.distance(choice.keep)}
                distances["check"] = distances["unrepaired"]
                if repaired:
                    with clock("repair"):
                        done = repair_trajectory_(
                            sampler, gating, choice.keep, train, check, progress=clock.of("repair")
                        )
                    distances["check"] = done.after
                mask = gating.layout.mask(choice.keep)
                before = _first_prediction(sampler, held[0], gating, choice.keep.float())
            with clock.on_device("prove"):
                judge.prove(mask)
            with clock("realise"):
                realise_(model, units, mask)
        with clock("judge"):
            _check_same(
                before, _first_prediction(sampler, held[0]), floating_dtype(model, torch.float32)
            )
            each = sampler.distance(held)
        distances |= _judged(each, [*train, *held])
        return _finish(sampler, ground, judge, mask, budget, method, choice, distances, sets, clock)


def _check(**given: int) -> None:
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


class _Clock:
    """Wall time by step, and progress."""

    def __init__(self, progress: StepProgress | None, *, timed: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._timed = progress, timed

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    @contextmanager
    def on_device(self, step: str) -> Iterator[None]:
        """A step that only budgets of latency and energy have; it is all of its own progress."""
        if not self._timed:
            yield
            return
        tell = self.of(step) or (lambda done, total: None)
        tell(0, 1)
        with self(step):
            yield
        tell(1, 1)

    def of(self, step: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        return None if progress is None else (lambda done, total: progress(step, done, total))


def _state_file(
    folder: Path | None, sampler: Sampler, train: Sequence[Batch], *said: Any
) -> Path | None:
    """Where the state of a run is kept, under a name made of all that decides it."""
    if folder is None:
        return None
    name = hashlib.sha256(json.dumps([key_of(sampler, train), *said]).encode()).hexdigest()[:24]
    return folder / f"learning-{name}.pt"


def _one_call(sampler: Sampler, batch: Batch) -> Callable[[], Tensor]:
    """One evaluation for one image, without guidance: what MACs are counted of."""
    denoise = sampler.conditions.denoiser(
        sampler.model, batch.conditions[:1], sampler.device, guided=False
    )
    latent = batch.start[:1].to(sampler.device)
    return lambda: denoise(latent, sampler.solver.timesteps[0])


@torch.no_grad()
def _first_prediction(
    sampler: Sampler, batch: Batch, gating: Gating | None = None, flat: Tensor | None = None
) -> Tensor:
    """The prediction in the first step."""
    denoise = sampler.denoise(batch)
    if gating is not None and flat is not None:
        denoise = gating.wrap(denoise, flat.to(sampler.device))
    latent = batch.start.to(sampler.device)
    sampler.solver.restore(sampler.solver.begin(latent))
    return denoise(sampler.solver.scaled(latent, 0), sampler.solver.timesteps[0])


def _check_same(masked: Tensor, realised: Tensor, dtype: torch.dtype) -> None:
    """The realised model must say what the masked one said."""
    off = float(
        (masked.double() - realised.double()).norm() / masked.double().norm().clamp_min(1e-12)
    )
    allowed = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    if not off <= allowed:
        raise RuntimeError(
            f"the realised model differs from the masked one by {off:.2e} of its prediction (allowed "
            f"{allowed:.0e}); please report this model"
        )


def _judged(each: Tensor, drawn: Sequence[Batch]) -> dict[str, float]:
    """Mean, its error, and the share of the variance of all that was drawn: one held image has none."""
    mean = float(each.mean())
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
    return {"held": mean, "held_se": error, "relative": mean / max(spread(drawn), 1e-300)}


def _finish(
    sampler: Sampler,
    ground: Groundwork,
    judge: Judge,
    mask: Mask,
    budget: Budget,
    method: str,
    choice: Choice,
    distances: dict[str, float],
    sets: Sequence[Sequence[Batch]],
    clock: _Clock,
) -> DiffusionReport:
    """Count what is left, write the report, and leave it on the model for `save`."""
    model, conditions = sampler.model, sampler.conditions
    macs, params = ground.cost.of(mask)
    counted = sum(p.numel() for p in model.parameters())
    if counted != params:  # the plan's own count and the model's must agree
        raise RuntimeError(
            f"the realised model has {counted} parameters, {params} were planned; please report this model"
        )
    rows = tuple(
        {"layer": u.layer.name, "kind": u.kind, "kept": int(mask[u.name].sum()), "of": u.count}
        for u in ground.units
    )
    counts = [sum(len(b.seeds) for b in batches) for batches in sets]
    report = DiffusionReport(
        budget={k: v for k, v in asdict(budget).items() if v is not None},
        method=method,
        kinds=tuple(dict.fromkeys(u.kind for u in ground.units)),
        macs=macs,
        params=counted,
        dense_macs=ground.dense.macs,
        dense_params=ground.dense.params,
        distance=distances,
        sampling={
            "steps": len(sampler.solver),
            "solver": sampler.solver.name,
            "guidance": conditions.guidance,
            "evaluations": conditions.evaluations,
        },
        images=dict(zip(("train", "check", "held"), counts, strict=True))
        | {"conditions": len(conditions.names)},
        learning={
            "updates": choice.updates,
            "at_0_or_1": choice.settled,
            "settled": choice.finished,
            "losses": choice.losses,
        },
        layers=rows,
        seconds=dict(clock.seconds),
        warnings=((choice.note,) if choice.note else ()) + judge.notes,
        environment=environment(sampler.device),
        on_device=judge.told(mask),
    )
    vars(model)["hwprune_spec"] = {"report": report.to_dict()}
    return report
