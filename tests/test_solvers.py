"""Every scheduler of diffusers is replayed exactly, or refused by name; none is ever changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hwprune.solvers import Solver, State

diffusers = pytest.importorskip("diffusers")

STEPS = 5


def made() -> dict[str, Any]:
    """Every scheduler class that can be built and set without arguments."""
    found = {}
    for name in sorted(dir(diffusers)):
        if not name.endswith("Scheduler"):
            continue
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.set_timesteps(STEPS)
        except Exception:  # arguments wanted, or a package that is not here
            continue
        found[name] = scheduler
    return found


MADE = made()
NAMED = {
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}


def walk(solver: Solver) -> tuple[list[State], Tensor]:
    """All states of a run with a prediction that is no constant."""
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 2, 2, generator=draw)
    states, state = [], solver.begin(latent)
    for step in range(len(solver)):
        states.append(state)
        latent = solver.restore(state)
        prediction = torch.sin(solver.scaled(latent, step))
        noise = torch.Generator().manual_seed(step)
        state = solver.capture(solver.advance(prediction, latent, step, noise))
    return states, state.tensors[0]


def as_text(scheduler: Any) -> str:
    return repr(sorted((k, repr(v)) for k, v in vars(scheduler).items()))


@pytest.mark.parametrize("name", MADE)
def test_every_scheduler_is_replayed_exactly_or_refused_by_name(name: str) -> None:
    before = as_text(MADE[name])
    try:
        solver = Solver(MADE[name])
    except ValueError as error:
        assert name not in NAMED and str(error).startswith(name)
        return
    finally:
        assert as_text(MADE[name]) == before
    states, final = walk(solver)
    for step in reversed(range(len(solver))):  # from any state the end is the same
        state = states[step]
        for again in range(step, len(solver)):
            latent = solver.restore(state)
            prediction = torch.sin(solver.scaled(latent, again))
            noise = torch.Generator().manual_seed(again)
            state = solver.capture(solver.advance(prediction, latent, again, noise))
        assert torch.equal(state.tensors[0], final)
    assert as_text(MADE[name]) == before


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("DDIMScheduler", 1),
        ("EulerDiscreteScheduler", 1),
        ("FlowMatchEulerDiscreteScheduler", 1),
        ("DPMSolverMultistepScheduler", 3),  # the latent and two predictions
        ("UniPCMultistepScheduler", 6),  # two timesteps too, and the sample before
    ],
)
def test_a_state_is_the_latent_and_what_the_solver_remembers(name: str, tensors: int) -> None:
    states, _ = walk(Solver(MADE[name]))
    assert len(states[0].tensors) == 1
    assert len(states[-1].tensors) == tensors


def test_all_named_solvers_are_there() -> None:
    assert set(MADE) >= NAMED


def test_a_scheduler_without_timesteps_is_refused_with_the_call_that_sets_them() -> None:
    for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ValueError, match=r"call scheduler\.set_timesteps\(STEPS\) first"):
            Solver(scheduler)


def test_eta_is_refused_where_the_step_takes_none() -> None:
    assert len(Solver(MADE["DDIMScheduler"], eta=1.0)) == STEPS
    with pytest.raises(ValueError, match="EulerDiscreteScheduler: its step takes no eta"):
        Solver(MADE["EulerDiscreteScheduler"], eta=1.0)


class Odd(diffusers.DDIMScheduler):
    """DDIM with a habit that cannot be replayed."""

    habit = ""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
        out = super().step(model_output, timestep, sample, return_dict=False)[0]
        if self.habit == "draws":
            out = out + torch.rand(())
        if self.habit == "detaches":
            out = out.detach()
        if self.habit == "remembers":
            self.memory = object()
        if self.habit == "fails":
            raise KeyError("a table")
        return (out,)


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ("draws", r"step 0 of 5 cannot be replayed.*DPM\+\+ 2M.*a second time it gives another"),
        ("detaches", r"step 0 of 5 cannot be replayed.*its result has no gradient"),
        ("remembers", r"Odd\.memory is a object, whose state cannot be captured"),
        ("fails", r"step 0 of 5 cannot be replayed.*KeyError: 'a table'"),
    ],
)
def test_a_step_that_cannot_be_replayed_is_refused_by_name(habit: str, words: str) -> None:
    scheduler = Odd()
    scheduler.set_timesteps(STEPS)
    scheduler.habit = habit
    with pytest.raises(ValueError, match=f"Odd.*{words}"):
        Solver(scheduler)


def test_a_scheduler_inside_a_scheduler_is_refused() -> None:
    inner = diffusers.DDIMScheduler()
    scheduler = diffusers.UniPCMultistepScheduler(solver_p=inner)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler\.solver_p is a DDIMScheduler"):
        Solver(scheduler)


def test_a_used_scheduler_is_refused_no_less_than_it_starts_afresh() -> None:
    used = copy.deepcopy(MADE["DPMSolverMultistepScheduler"])
    used.set_timesteps(STEPS)
    _, fresh = walk(Solver(used))
    latent = torch.randn(1, 4, 2, 2)
    for t in used.timesteps[:2]:
        latent = used.step(latent, t, latent).prev_sample
    used.set_timesteps(STEPS)
    _, again = walk(Solver(used))
    assert torch.equal(fresh, again)
