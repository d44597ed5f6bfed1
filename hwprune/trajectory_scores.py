"""Scores and moments of a denoiser's units along its own trajectories, without training.

What is gathered: the inputs of output projections in every step, weighted by what an error of the
prediction in that step does to the final latent; and the gradient of the diffusion loss in gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.coupled import weight_module
from hwprune.gating import Gating
from hwprune.obs import damped_inverse, eliminate_groups
from hwprune.teacher import Batch, Sampler
from hwprune.trajectory import sample
from hwprune.units import Units

_INFORMATIVE = 0.05  # Diff-Pruning drops timesteps whose loss is below this share of the largest


@torch.no_grad()
def dense_steps(sampler: Sampler, batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, latent before it, the dense model's prediction there) of one trajectory."""
    solver, denoise = sampler.solver, sampler.denoise(batch)
    state = solver.begin(batch.start.to(sampler.device))
    generator = sampler.generator(batch)
    for step in range(len(solver)):
        latent = solver.restore(state)
        prediction = denoise(solver.scaled(latent, step), solver.timesteps[step])
        state = solver.capture(solver.advance(prediction, latent, step, generator))
        yield step, latent, prediction
        solver.restore(state)  # whoever was given the step may have used the solver


def step_weights(sampler: Sampler, batches: Sequence[Batch], *, seed: int = 0) -> Tensor:
    """What a unit error of the prediction in each step does to the final latent: [T], mean 1.

    The squared norm of the final latent's derivative in that step's prediction, from the pull-back of
    random signs: unbiased, and it holds for every solver, history included.
    """
    solver = sampler.solver
    total = torch.zeros(len(solver), dtype=torch.float64)
    place = {float(t): i for i, t in enumerate(solver.timesteps.tolist())}
    draw = torch.Generator().manual_seed(seed)
    for batch in batches:
        shape = (len(solver), *batch.start.shape)
        nudge = torch.zeros(shape, device=sampler.device, requires_grad=True)
        denoise = sampler.denoise(batch)

        def nudged(
            latent: Tensor, time: Tensor, nudge: Tensor = nudge, call: Any = denoise
        ) -> Tensor:
            prediction: Tensor = call(latent, time)
            return prediction + nudge[place[float(time)]]

        final = sample(
            nudged,
            solver,
            batch.start.to(sampler.device),
            parameters=[nudge],
            generator=sampler.generator(batch),
            model=sampler.model,
        )
        signs = (torch.randint(0, 2, final.shape, generator=draw) * 2 - 1).to(final)
        (pulled,) = torch.autograd.grad(final, nudge, signs)
        total += pulled.double().flatten(1).square().sum(1).cpu()
    # A solver that evaluates a timestep twice (Heun) has one weight for both.
    total = total[[place[float(t)] for t in solver.timesteps.tolist()]]
    return total / total.mean().clamp_min(1e-300)


@contextmanager
def gathered(
    model: nn.Module, names: Sequence[str], weight_of: Any
) -> Iterator[dict[str, Moments]]:
    """Moments of what some linears read, before any gate, while the model runs.

    Args:
        model: the denoiser.
        names: of linears or pointwise convolutions.
        weight_of: called without arguments: the weight of the step the model is in.
    """
    found = {name: Moments(weight_module(model, name)) for name in names}
    handles = []
    try:
        for moments in found.values():

            def read(module: nn.Module, args: tuple[Tensor, ...], own: Moments = moments) -> None:
                own.add(args[0], float(weight_of()))

            # First of the hooks, so that gates have not been multiplied in yet.
            handles.append(moments.module.register_forward_pre_hook(read, prepend=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Moments:
    """Weighted first and second moments of what a projection reads: [I] and [I, I], float64."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        """Start empty."""
        self.module = module
        inputs = module.weight.shape[1]
        where = module.weight.device
        self.square = torch.zeros(inputs, inputs, dtype=torch.float64, device=where)
        self.line = torch.zeros(inputs, dtype=torch.float64, device=where)
        self.weight = 0.0

    def add(self, x: Tensor, weight: float) -> None:
        """Add one call's input, [..., I], or [B, I, H, W] of a convolution."""
        if isinstance(self.module, nn.Conv2d):
            x = x.movedim(1, -1)
        rows = x.detach().flatten(0, -2)
        # Products in float32, sums in float64: half precision would lose the covariance.
        rows = rows.double() if rows.device.type == "cpu" else rows.float()
        self.square += weight * (rows.T @ rows).double()
        self.line += weight * rows.sum(0).double()
        self.weight += weight * len(rows)

    @property
    def mean(self) -> Tensor:
        """[I]."""
        return self.line / max(self.weight, 1e-300)

    def second(self, *, centred: bool) -> Tensor:
        """[I, I], about the mean or about zero."""
        second = self.square / max(self.weight, 1e-300)
        return second - torch.outer(self.mean, self.mean) if centred else second


def readers(units: Sequence[Units]) -> dict[str, list[tuple[Units, Tensor]]]:
    """Output projections by name, with the columns [U, E] each layer's units own there."""
    found: dict[str, list[tuple[Units, Tensor]]] = {}
    for unit in units:
        for part in unit.slices:
            linear, _, tensor = part.param.rpartition(".")
            if unit.kind != "depth" and tensor == "weight" and part.dim == 1:
                assert part.index is not None
                found.setdefault(linear, []).append((unit, part.index))
    return found


def moments_along(
    sampler: Sampler,
    batches: Sequence[Batch],
    names: Sequence[str],
    weights: Tensor,
    gating: Gating | None = None,
    flat: Tensor | None = None,
) -> dict[str, Moments]:
    """Moments of some projections' inputs over whole trajectories.

    Args:
        sampler: of the model.
        batches: what to draw.
        names: of the projections.
        weights: [T], of each step.
        gating: the hooks, where `flat` shall be in force.
        flat: gates.
    """
    step = 0

    def begun(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1

    handle = sampler.model.register_forward_pre_hook(begun, with_kwargs=True)
    try:
        with gathered(sampler.model, names, lambda: weights[step - 1]) as found, torch.no_grad():
            for batch in batches:
                step = 0
                sampler.final(batch, gating, flat)
    finally:
        handle.remove()
    return found


def obs(sampler: Sampler, gating: Gating, batches: Sequence[Batch]) -> Tensor:
    """What the best re-fit leaves of a unit's removal, greedily, of its layer's output: [N], higher = keep.

    Moments are weighted over timesteps by a logarithmic decrease from the first step of the trajectory (1.1) to
    the last (0.1 or a little more), in the manner of OBS-Diff. Depth units have no columns: they are kept.
    """
    layout = gating.layout
    steps = len(sampler.solver)
    falling = 1 - torch.log1p(torch.arange(steps).double()) / torch.log1p(torch.tensor(steps))
    found = moments_along(sampler, batches, list(readers(layout.units)), falling + 0.1)
    scores = torch.zeros(layout.count, dtype=torch.float64)
    parts = layout.split(scores)
    for name, owners in readers(layout.units).items():
        weight = weight_module(sampler.model, name).weight.detach().double().cpu().flatten(1)
        second = found[name].second(centred=False).cpu()
        inverse = damped_inverse(second)
        energy = float(((weight @ second) * weight).sum())
        for unit, index in owners:
            order, curve = eliminate_groups(weight, inverse, index)
            parts[unit.name][order] += curve[1:] / max(energy, 1e-300)
    for unit in layout.units:
        if unit.kind == "depth":
            parts[unit.name] += float("inf")
    return scores


def taylor(sampler: Sampler, gating: Gating, batches: Sequence[Batch]) -> Tensor:
    """|dL/dgate| of the diffusion loss on the dense model's own samples, summed over timesteps: [N].

    Timesteps whose loss is below 5 % of the largest are left out (Diff-Pruning).

    Raises:
        ValueError: a scheduler that cannot add noise to a sample, or whose model predicts what is not known.
    """
    solver, scheduler = sampler.solver, sampler.conditions.scheduler
    losses, gradients = [], []
    for step in range(len(solver)):
        time = solver.timesteps[step]
        total, loss = torch.zeros(gating.layout.count, dtype=torch.float64), 0.0
        for batch in batches:
            flat = torch.ones(gating.layout.count, device=sampler.device, requires_grad=True)
            noise = batch.start.to(sampler.device) / solver.start_scale
            clean = batch.target.to(sampler.device)
            noisy, wanted = _noised(scheduler, clean, noise, time)
            solver.restore(solver.begin(noisy))
            prediction = gating.wrap(sampler.denoise(batch), flat)(solver.scaled(noisy, step), time)
            value = (prediction - wanted).square().mean()
            (gradient,) = torch.autograd.grad(value, flat)
            total += gradient.double().cpu()
            loss += float(value.detach())
        losses.append(loss)
        gradients.append(total)
    told = [
        g for g, value in zip(gradients, losses, strict=True) if value >= _INFORMATIVE * max(losses)
    ]
    return torch.stack(told).sum(0).abs()


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """A sample with noise of a timestep, and what the model shall predict of it."""
    name = type(scheduler).__name__
    kind = getattr(
        scheduler.config, "prediction_type", "flow" if "FlowMatch" in name else "epsilon"
    )
    each = time.reshape(1).expand(len(clean))
    if hasattr(scheduler, "add_noise"):
        noisy = scheduler.add_noise(clean, noise, each)
    elif hasattr(scheduler, "scale_noise"):
        noisy = scheduler.scale_noise(clean, each, noise)
    else:
        raise ValueError(f"{name} cannot add noise to a sample, which method taylor needs")
    if kind == "epsilon":
        return noisy, noise
    if kind == "sample":
        return noisy, clean
    if kind.startswith("flow"):
        return noisy, noise - clean
    if kind == "v_prediction" and hasattr(scheduler, "get_velocity"):
        return noisy, scheduler.get_velocity(clean, noise, each)
    raise ValueError(
        f"{name} predicts {kind!r}, which method taylor does not know; use another method"
    )
