"""Scores and re-fits along the trajectory, against what they must be by construction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import trajectory_repair
from hwprune.conditions import Conditions, label_conditions, timed
from hwprune.families.denoiser import find_units
from hwprune.gating import Gating, gated
from hwprune.learning import Task
from hwprune.selection import _forced_loss
from hwprune.teacher import Batch, Sampler, draw, taught
from hwprune.trajectory_repair import repair_trajectory_
from hwprune.trajectory_scores import (
    dense_steps,
    moments_along,
    obs,
    readers,
    step_weights,
    taylor,
)

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, tiny_dit  # noqa: E402

Scene = tuple[Sampler, Gating, tuple[Batch, ...], tuple[Batch, ...]]


@contextmanager
def scene(model: nn.Module | None = None, scheduler: Any = None) -> Iterator[Scene]:
    model = (model or tiny_dit()).requires_grad_(False)
    found = label_conditions(model, scheduler or flow(), [1, 2], steps=3, guidance=1.5)
    sampler = Sampler(model, found)
    train, check = (taught(sampler, draw(sampler, s, 12, batch=6)) for s in ("train", "check"))
    with gated(model, find_units(model)) as gating:
        yield sampler, gating, train, check


class Scaled(nn.Module):
    """Predicts a multiple of the latent: every derivative of its trajectory is known."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, latent: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.factor * latent,)


def test_step_weights_are_what_an_error_there_does_to_the_final_latent() -> None:
    scheduler = timed(flow(), 5)
    sampler = Sampler(
        Scaled().requires_grad_(False), Conditions(("",), ({},), None, 1.0, scheduler, (1, 4, 4))
    )
    change = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).double()
    growth = 1 + 0.7 * change
    exact = torch.stack([change[k] * growth[k + 1 :].prod() for k in range(5)]).square()
    got = step_weights(sampler, draw(sampler, "train", 3, batch=3))
    torch.testing.assert_close(got, exact / exact.mean(), rtol=1e-5, atol=0)


def test_dense_steps_are_those_of_the_trajectory() -> None:
    for scheduler in (flow(), diffusers.DPMSolverMultistepScheduler()):
        with scene(scheduler=scheduler) as (sampler, _, train, _):
            steps = []
            for step, latent, _prediction in dense_steps(sampler, train[0]):
                sampler.solver.scaled(torch.randn_like(latent), step)
                steps.append(latent)
            solver = sampler.solver
            state = solver.begin(steps[0])
            assert torch.equal(steps[0], train[0].start)
            last = sampler.denoise(train[0])(steps[2], solver.timesteps[2])
            if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
                gap = scheduler_gap(solver, state, steps[2], last)
                torch.testing.assert_close(gap, train[0].target)


def scheduler_gap(solver: Any, state: Any, latent: Tensor, prediction: Tensor) -> Tensor:
    sigmas = solver._scheduler.sigmas
    return latent + (sigmas[3] - sigmas[2]) * prediction


def test_moments_are_weighted_means_of_what_a_projection_reads() -> None:
    with scene() as (sampler, gating, train, _):
        name = "transformer_blocks.1.ff.net.2"
        seen: list[Tensor] = []
        module = sampler.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with torch.no_grad():
            sampler.final(train[0])
        handle.remove()
        rows = [x.flatten(0, -2).double() for x in seen]
        keep = torch.ones(gating.layout.count)
        keep[gating.layout.places["transformer_blocks.1.ff:neuron"]] = 0
        # Its own gates change nothing before the second step: what is read is read before them.
        for values, flat in (((0.5, 2.0, 1.0), None), ((3.0, 0.0, 0.0), keep)):
            weights = torch.tensor(values, dtype=torch.float64)
            found = moments_along(sampler, train[:1], [name], weights, gating, flat)[name]
            total = sum(w * len(r) for w, r in zip(values, rows, strict=True))
            second = sum(w * (r.T @ r) for w, r in zip(values, rows, strict=True)) / total
            torch.testing.assert_close(found.second(centred=False), second, rtol=1e-4, atol=1e-6)
            mean = sum(w * r.sum(0) for w, r in zip(values, rows, strict=True)) / total
            torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-6)


def test_taylor_is_the_slope_of_the_loss_in_each_gate() -> None:
    with scene() as (sampler, gating, train, _):
        scores = taylor(sampler, gating, train[:1])
        place = int(scores.argmax())
        step, total = 1e-2, 0.0
        solver = sampler.solver
        for k in range(len(solver)):
            values = []
            sigma = solver._scheduler.sigmas[k]
            clean = train[0].target
            noisy = sigma * train[0].start + (1 - sigma) * clean
            for sign in (1, -1):
                flat = torch.ones(gating.layout.count)
                flat[place] += sign * step
                denoise = gating.wrap(sampler.denoise(train[0]), flat)
                with torch.no_grad():
                    off = denoise(noisy, solver.timesteps[k]) - (train[0].start - clean)
                values.append(float(off.double().square().mean()))
            total += (values[0] - values[1]) / (2 * step)
        assert float(scores[place]) == pytest.approx(abs(total), rel=0.02)


def duplicated() -> nn.Module:
    """Neuron 1 of a block is neuron 0 again: either can go without loss, if the other takes its weight."""
    model = tiny_dit()
    ff = model.transformer_blocks[1].ff.net
    with torch.no_grad():
        ff[0].proj.weight[1], ff[0].proj.bias[1] = ff[0].proj.weight[0], ff[0].proj.bias[0]
        ff[2].weight[:, :2] *= 5
    return model


def test_a_duplicated_neuron_is_replaced_without_loss() -> None:
    with scene(duplicated()) as (sampler, gating, train, check):
        keep = torch.ones(gating.layout.count, dtype=torch.bool)
        place = gating.layout.places["transformer_blocks.1.ff:neuron"]
        keep[place.start + 1] = False
        done = repair_trajectory_(sampler, gating, keep, train, check)
        assert (done.groups, done.kept) == (1, 1)
        assert done.after < 1e-4 * done.before
        scores = obs(sampler, gating, train)[place]
        assert float(scores[:2].min()) < 0.2 * float(scores[:2].max())  # the second one is dear


def test_what_is_not_cut_and_what_the_mask_drops_keep_their_weights() -> None:
    with scene() as (sampler, gating, train, check):
        before = {k: v.clone() for k, v in sampler.model.state_dict().items()}
        keep = torch.ones(gating.layout.count, dtype=torch.bool)
        place = gating.layout.places["transformer_blocks.1.ff:neuron"]
        keep[place.start : place.start + 20] = False
        done = repair_trajectory_(sampler, gating, keep, train, check)
        assert done.after < done.before
        changed = {
            k for k, v in sampler.model.state_dict().items() if not torch.equal(v, before[k])
        }
        name = "transformer_blocks.1.ff.net.2"
        assert changed == {f"{name}.weight", f"{name}.bias"}
        now = sampler.model.get_submodule(name).weight
        assert torch.equal(now[:, :20], before[f"{name}.weight"][:, :20])
        far = float(sampler.distance(check, gating, keep.float()).mean())
        assert far == pytest.approx(done.after)


def test_an_emptied_layer_leaves_its_mean_in_the_bias() -> None:
    with scene() as (sampler, gating, train, check):
        keep = torch.ones(gating.layout.count, dtype=torch.bool)
        keep[gating.layout.places["transformer_blocks.2.attn1:head"]] = False
        done = repair_trajectory_(sampler, gating, keep, train, check)
        assert done.kept == 1 and done.after < done.before


def test_a_re_fit_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trajectory_repair.moments_along

    def misleading(*args: Any, **given: Any) -> Any:
        found = real(*args, **given)
        for moments in found.values():  # as of another model: everything in another place
            moments.square = moments.square.flip(0, 1) * 50
            moments.line = moments.line.flip(0) * 50
        return found

    monkeypatch.setattr(trajectory_repair, "moments_along", misleading)
    with scene() as (sampler, gating, train, check):
        before = {k: v.clone() for k, v in sampler.model.state_dict().items()}
        keep = torch.rand(gating.layout.count, generator=torch.Generator().manual_seed(0)) < 0.9
        done = repair_trajectory_(sampler, gating, keep, train, check)
        assert (done.kept, done.after) == (0, done.before)
        now = sampler.model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in before.items())


def test_blocks_share_passes_where_there_are_more_than_allowed() -> None:
    with scene() as (sampler, gating, train, check):
        keep = torch.rand(gating.layout.count, generator=torch.Generator().manual_seed(0)) < 0.8
        counts = [
            repair_trajectory_(sampler, gating, keep, train, check, groups=most).groups
            for most in (12, 2, 1)
        ]
        assert counts == [3, 2, 1]


def test_the_per_step_loss_is_zero_for_the_dense_model_and_forced() -> None:
    with scene() as (sampler, gating, train, check):
        task = Task(sampler, gating, lambda keep: keep.mean(), 0.5, train, check, 1)
        loss = _forced_loss(task)
        flat = torch.ones(gating.layout.count)
        value, final = loss(train[0], flat)
        assert float(value) < 1e-10 and final.shape == (3, 6, 1, 8, 8)
        flat[:50] = 0
        by_hand = []
        for step, latent, prediction in dense_steps(sampler, train[0]):
            denoise = gating.wrap(sampler.denoise(train[0]), flat)
            with torch.no_grad():
                by_hand.append(denoise(latent, sampler.solver.timesteps[step]) - prediction)
        assert float(loss(train[0], flat)[0]) == pytest.approx(
            float(torch.stack(by_hand).square().mean()), rel=1e-5
        )


def test_readers_are_the_output_projections() -> None:
    names = set(readers(find_units(tiny_dit())))
    outs = {f"transformer_blocks.{i}.{n}" for i in range(3) for n in ("attn1.to_out.0", "ff.net.2")}
    assert names == outs
