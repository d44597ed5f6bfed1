"""Gates with the re-fit in force: what is lost is predicted, and a gate takes only what nobody else knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hwprune.compensation import Compensation, compensable, compensated
from hwprune.conditions import label_conditions
from hwprune.families.denoiser import find_units
from hwprune.gating import gated
from hwprune.teacher import Batch, Sampler, draw, taught
from hwprune.trajectory_scores import Moments, moments_along, readers

pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, tiny_dit

Scene = tuple[Sampler, Compensation, Batch, dict[str, Moments]]
FF, HEADS = "transformer_blocks.1.ff:neuron", "transformer_blocks.1.attn1:head"


@contextmanager
def scene(
    memory_bytes: int = 1 << 30, kinds: tuple[str, ...] = ("head", "neuron")
) -> Iterator[Scene]:
    model = tiny_dit().requires_grad_(False)
    sampler = Sampler(model, label_conditions(model, flow(), [1, 2], steps=2, guidance=1.5))
    (batch,) = taught(sampler, draw(sampler, "train", 8, batch=8))
    units = find_units(model, kinds)
    names = compensable(model, units, memory_bytes=memory_bytes)
    moments = moments_along(sampler, [batch], names, torch.ones(2))
    with gated(model, units) as gating, compensated(model, gating, moments) as found:
        yield sampler, found, batch, moments


def off(found: Compensation, name: str, *places: int) -> Tensor:
    keep = torch.ones(found.layout.count)
    for place in places:
        keep[found.layout.places[name].start + place] = 0
    return keep


def test_all_gates_open_is_the_dense_model_and_no_gates_leave_no_trace() -> None:
    with scene() as (sampler, found, batch, _), torch.no_grad():
        model = sampler.model
        got = sampler.final(batch, found, torch.ones(found.layout.count))
        torch.testing.assert_close(got, batch.target, rtol=1e-4, atol=1e-5)
        assert torch.equal(sampler.final(batch), batch.target)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_lost_columns_are_the_least_squares_prediction_from_the_kept() -> None:
    with scene() as (_, found, _, moments), torch.no_grad():
        name = "transformer_blocks.1.ff.net.2"
        found.set(off(found, FF, 0, 5, 9))
        x = torch.randn(2, 16, 96)
        got = found.read(found.projections[name], x)
        found.set(None)
        kept = torch.ones(96, dtype=torch.bool)
        kept[[0, 5, 9]] = False
        second = moments[name].second(centred=True)
        second = second + (1e-2 * float(second.diagonal().mean()) + 1e-12) * torch.eye(96)
        centred = x.double() - moments[name].mean
        weights = torch.linalg.solve(second[kept][:, kept], second[kept][:, ~kept])
        lost = centred[..., kept] @ weights + moments[name].mean[~kept]
        torch.testing.assert_close(got[..., kept], x[..., kept], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[..., ~kept].double(), lost, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "gone", "next_"), [(FF, (0, 5, 9), 17), (HEADS, (0,), 2)])
def test_closing_a_gate_is_the_mask_without_that_unit(
    name: str, gone: tuple[int, ...], next_: int
) -> None:
    """The step a gate's gradient is measured along is the very change that removing its unit makes."""
    with scene() as (sampler, found, batch, _), torch.no_grad():
        mask, without = off(found, name, *gone), off(found, name, *gone, next_)
        rows = mask.repeat(8, 1)
        rows[1:] = without  # the first row is the mask that is settled for
        mixed = sampler.final(batch, found, rows)
        both = [sampler.final(batch, found, keep) for keep in (mask, without)]
        torch.testing.assert_close(mixed[0], both[0][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mixed[1:], both[1][1:], rtol=1e-3, atol=1e-4)
        assert float((both[0] - both[1]).abs().max()) > 1e-2
        # And opening the only closed gate is the dense model.
        rows = off(found, name, next_).repeat(8, 1)
        rows[1:] = 1
        reopened = sampler.final(batch, found, rows)
        torch.testing.assert_close(reopened[1:], batch.target[1:], rtol=1e-3, atol=1e-4)


def test_a_removed_unit_has_a_gradient_and_compensation_helps() -> None:
    with scene() as (sampler, found, batch, _):
        keep = torch.ones(found.layout.count)
        keep[found.layout.places[FF].start : found.layout.places[FF].start + 30] = 0
        flat = keep.repeat(8, 1).requires_grad_()
        final = sampler.final(batch, found, flat)
        (gradient,) = torch.autograd.grad((final - batch.target).square().mean(), flat)
        assert float(gradient[:, found.layout.places[FF]].abs().min(1).values.max()) > 0
        with_it = float(sampler.distance([batch], found, keep).mean())
        without = float(sampler.distance([batch], found.plain, keep).mean())
        assert with_it < 0.5 * without


def test_what_does_not_fit_into_the_memory_is_only_gated() -> None:
    model = tiny_dit()
    units = find_units(model)
    every = compensable(model, units)
    assert every == list(readers(units))
    narrow = compensable(model, units, memory_bytes=3 * 16 * 24**2)
    assert narrow == [name for name in every if "attn1" in name]
    assert compensable(model, units, memory_bytes=100) == []
    with scene(3 * 16 * 24**2) as (sampler, found, batch, _), torch.no_grad():
        keep = off(found, FF, 0, 1, 2, 3)
        compensated_ = sampler.final(batch, found, keep)
        torch.testing.assert_close(compensated_, sampler.final(batch, found.plain, keep))


def test_removed_blocks_are_removed() -> None:
    with scene(kinds=("head", "neuron", "depth")) as (sampler, found, batch, _), torch.no_grad():
        keep = off(found, "transformer_blocks.1:depth", 0)
        got = sampler.final(batch, found, keep)
        torch.testing.assert_close(got, sampler.final(batch, found.plain, keep))
        assert float((got - batch.target).abs().max()) > 1e-2
