"""Which units of a denoiser go: our method and the baselines, one function each, behind one signature.

A method gets a `Task` and gives a `Choice`; all see the same images, the same budget and the same time.
Scores that need an order over layers are tried in two ways, ranked over all layers by what they give for their
price and ranked within each layer, and the better one on the check images is taken: a favour to baselines.

Sources: EcoDiff, arXiv 2412.02852, with the settings of its SDXL configuration; Diff-Pruning's Taylor
over informative timesteps, arXiv 2305.10924; OBS-Diff's timestep-weighted moments, arXiv 2510.06751.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hwprune import criteria, trajectory_scores
from hwprune.compensation import compensable, compensated
from hwprune.gates import HardConcreteGates, TopKGates
from hwprune.learning import Choice, Task, learn, trajectory_loss
from hwprune.prices import keep_within
from hwprune.settling import SettlingGates
from hwprune.teacher import Batch

Method: TypeAlias = Callable[[Task], Choice]


def ours(task: Task) -> Choice:
    """Gates that are 0 or 1 and within the budget at every step, learned through the whole trajectory.

    Where the result will be re-fitted, they are learned with the re-fit in force.
    """
    if not task.repaired:
        return learn(task, lambda updates: _settling(task, updates), trajectory_loss(task))
    sampler = task.sampler
    names = compensable(sampler.model, task.gating.layout.units)
    weights = trajectory_scores.step_weights(sampler, task.train[:1])
    moments = trajectory_scores.moments_along(sampler, task.train, names, weights)
    with compensated(sampler.model, task.gating, moments) as gating:
        inner = replace(task, gating=gating)
        # With the re-fit in force the curvature alone says what goes: 8 updates on a small DiT ended at 0.016
        # with no trust in the gradient, at 0.021 with 0.3; without the re-fit in force at 0.022 and 0.039.
        return learn(
            inner, lambda updates: _settling(inner, updates, trust=0.0), trajectory_loss(inner)
        )


def _settling(task: Task, updates: int, trust: float = 0.3) -> SettlingGates:
    return SettlingGates(
        task.gating.layout, task.price, task.budget, steps=updates, seed=task.seed, trust=trust
    )


def top_k(task: Task) -> Choice:
    """Straight-through top-k under the budget, learned through the whole trajectory."""

    def make(updates: int) -> TopKGates:
        return TopKGates(task.gating.layout, task.price, task.budget, steps=updates)

    return learn(task, make, trajectory_loss(task))


def ecodiff(task: Task) -> Choice:
    """EcoDiff as published: hard concrete with noise of its own in each step, L1 of the logits, a threshold."""
    steps = len(task.sampler.solver)

    def make(updates: int) -> HardConcreteGates:
        return HardConcreteGates(
            task.gating.layout,
            task.price,
            task.budget,
            steps=updates,
            delta=0.5,
            initial=3.0,
            rate=0.1,
            beta=0.5,
            weight_decay=0.01,
            rows=steps,
            accumulate=4,
            seed=task.seed,
        )

    choice = learn(task, make, trajectory_loss(task, each_step=True), best=False)
    if choice.finished:
        choice.note = (
            f"hard concrete gates end soft, as published: {choice.settled:.1%} of them at exactly 0 or 1, the "
            "others cut by a threshold on their logits"
        )
    return choice


def per_step(task: Task) -> Choice:
    """Our gates under the loss of single steps, each taken from the dense model's own latent."""
    return learn(task, lambda updates: _settling(task, updates), _forced_loss(task), best=False)


def _forced_loss(task: Task) -> Callable[[Batch, Tensor], tuple[Tensor, Tensor]]:
    """Mean squared distance of each step's result to the dense one's, from the dense latent and history."""
    sampler = task.sampler

    def loss(batch: Batch, flat: Tensor) -> tuple[Tensor, Tensor]:
        denoise = sampler.denoise(batch)
        flat = flat.to(sampler.device)
        gated = task.gating.wrap(denoise, flat)
        off = []
        for step, latent, prediction in trajectory_scores.dense_steps(sampler, batch):
            time = sampler.solver.timesteps[step]
            scaled = sampler.solver.scaled(latent, step)

            def predict(x: Tensor, t: Tensor = time) -> Tensor:
                return gated(x, t)

            ours = checkpoint(predict, scaled, use_reentrant=False)
            off.append(ours - prediction)
        final = torch.stack(off)
        return final.square().mean(), final

    return loss


def magnitude(task: Task) -> Choice:
    """L2 norm of a unit's weights."""
    gating = task.gating
    model = task.sampler.model
    scores = criteria.magnitude(model, gating.layout.units, [])
    return _better(task, gating.layout.join(scores))


def random(task: Task) -> Choice:
    """A random order."""
    layout = task.gating.layout
    draw = torch.Generator().manual_seed(task.seed)
    order = torch.randperm(layout.count, generator=draw)
    keep = keep_within(task.price, order, task.budget, layout.count)
    return Choice(keep, -order.argsort().double())


def taylor(task: Task) -> Choice:
    """First order of the diffusion loss, over the timesteps that say something (Diff-Pruning)."""
    return _better(task, trajectory_scores.taylor(task.sampler, task.gating, task.train))


def obs(task: Task) -> Choice:
    """Optimal brain surgeon on each output projection, moments weighted over timesteps (OBS-Diff)."""
    return _better(task, trajectory_scores.obs(task.sampler, task.gating, task.train))


def _better(task: Task, scores: Tensor) -> Choice:
    """The better of two masks on the check images: ranked over all layers, or within each.

    Args:
        task: what to choose from.
        scores: [N], higher = keep.
    """
    size = task.gating.layout.count
    on = torch.ones(size, dtype=torch.float64, requires_grad=True)
    (each,) = torch.autograd.grad(task.price(on), on)
    overall = scores.double() / each.clamp_min(1e-12)
    within = torch.empty(size, dtype=torch.float64)
    for place in task.gating.layout.places.values():
        part = scores[place]
        rank = part.argsort().argsort().double().add(0.5) / len(part)
        within[place] = torch.where(part.isinf(), part.double(), rank)
    masks = [
        keep_within(task.price, s.argsort(descending=True, stable=True), task.budget, size)
        for s in (overall, within)
    ]
    distances = [task.distance(mask) for mask in masks]
    first = distances[0] <= distances[1]
    said = "ranked over all layers" if first else "ranked within each layer"
    if first:
        return Choice(masks[0], overall, note=said)
    return Choice(masks[1], within, note=said)


# Ours is the default; `obs` compensates by least squares, as OBS does, so repair is part of it.
METHODS: Mapping[str, Method] = {
    "ours": ours,
    "top-k": top_k,
    "ecodiff": ecodiff,
    "per-step": per_step,
    "magnitude": magnitude,
    "random": random,
    "taylor": taylor,
    "obs": obs,
}
REPAIRED = ("ours", "top-k", "obs")  # what a baseline publishes has no re-fit


def method_named(name: str) -> Method:
    """A method.

    Raises:
        ValueError: no such, with those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
