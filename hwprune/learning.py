"""Learns gates: one update after the other within a number of them and a time, resumable to the same result.

The state (gates, optimiser, random generators, the best mask so far, time spent) goes to a file now and
then; a run that was killed goes on from it and ends with the mask it would have ended with.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hwprune.gates import HardConcreteGates, TopKGates
from hwprune.gating import Gating
from hwprune.prices import Price, keep_within
from hwprune.settling import SettlingGates
from hwprune.teacher import Batch, Sampler

_SAVE_EVERY_S = 30.0
_CHECKS = 10  # of the mask on other images, once it is within the budget
_TRIED = 3  # updates that are timed before their number is chosen to fit the time


Gates: TypeAlias = SettlingGates | HardConcreteGates | TopKGates
Loss: TypeAlias = Callable[
    [Batch, Tensor], tuple[Tensor, Tensor]
]  # (batch, gates) -> (loss, final)
MakeGates: TypeAlias = Callable[[int], Gates]  # number of updates -> gates


@dataclass(frozen=True)
class Progress:
    """Where learning stands.

    Attributes:
        step, steps: updates done and to do.
        loss: of the last update.
        price: of the gates as they are, of the dense model's.
        settled: share of the gates at exactly 0 or 1.
        seconds_left: estimated.
    """

    step: int
    steps: int
    loss: float
    price: float
    settled: float
    seconds_left: float


Watch: TypeAlias = Callable[[Progress], None]
Preview: TypeAlias = Callable[[Gating, Tensor], None]  # (gating, keep [N])


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to choose from, and what with.

    Attributes:
        sampler: of the dense model.
        gating: the hooks on its units.
        price: what the budget counts.
        budget: of the dense price.
        train: images to learn from.
        check: other images, to choose between masks.
        updates: of the gates, at most.
        seconds: for all updates; None = no limit.
        seed: of everything drawn.
        state: file to keep the state in; None = none.
        watch: told after each update.
        repaired: whether the mask that is chosen will be re-fitted.
        preview: shown each mask that is the best so far, with the gating it is in force by.
    """

    sampler: Sampler
    gating: Gating
    price: Price
    budget: float
    train: Sequence[Batch]
    check: Sequence[Batch]
    updates: int
    seconds: float | None = None
    seed: int = 0
    state: Path | None = None
    watch: Watch | None = None
    repaired: bool = False
    preview: Preview | None = None

    def distance(self, keep: Tensor) -> float:
        """Mean squared distance to the dense latents on the check images with a mask in force."""
        return float(self.sampler.distance(self.check, self.gating, keep.float()).mean())


@dataclass(eq=False)
class Choice:
    """A mask and how it came about.

    Attributes:
        keep: bool [N].
        wanted: [N], by which units are taken away or back where the mask turns out too dear or too cheap, the
            lowest first; what a unit costs is accounted for. None = all are kept.
        updates: done.
        settled: share of the gates at exactly 0 or 1 at the end.
        finished: False where time ran out before the gates had come down to the budget and settled.
        losses: of the updates.
        note: what the user should know, or "".
        spent_s: on updates, those before a kill included.
    """

    keep: Tensor
    wanted: Tensor | None = None
    updates: int = 0
    settled: float = 1.0
    finished: bool = True
    losses: list[float] = field(default_factory=list)
    note: str = ""
    spent_s: float = 0.0


def trajectory_loss(task: Task, *, each_step: bool = False) -> Loss:
    """Mean squared distance of the final latents to the dense model's, with gates in force throughout."""

    def loss(batch: Batch, flat: Tensor) -> tuple[Tensor, Tensor]:
        final = task.sampler.final(batch, task.gating, flat, each_step=each_step)
        return (final - batch.target.to(final)).square().mean(), final

    return loss


def learn(task: Task, make: MakeGates, loss: Loss, *, best: bool = True) -> Choice:
    """Train gates and choose their mask.

    Args:
        task: what to choose from.
        make: makes the gates for a number of updates.
        loss: of a batch under gates.
        best: take the best of the masks within the budget on the check images; False = the last one.

    Raises:
        FloatingPointError: NaN in the trajectory, with step and layer; the state before it is kept.
    """
    run = _Learning(task, make, loss, best)
    run.resume()
    try:
        while run.goes_on():
            run.update()
    finally:
        run.save()
    return run.choice()


class _Learning:
    """The loop's state."""

    def __init__(self, task: Task, make: MakeGates, loss: Loss, best: bool) -> None:
        self.task, self.make, self.loss, self.best = task, make, loss, best
        self.steps, self.spent_s, self.losses = task.updates, 0.0, list[float]()
        self.gates: Gates = make(self.steps)
        self.found: tuple[float, Tensor] | None = None
        self.mark = self.saved = time.monotonic()
        self.timed = task.seconds is None
        self.ready: dict[str, Any] = {}

    def goes_on(self) -> bool:
        """Whether there is an update to do, and the time for it."""
        late = self.task.seconds is not None and self.spent_s >= self.task.seconds
        return self.gates.step < self.steps and not late

    def update(self) -> None:
        """Learn from one batch."""
        batch = self._batch(self.gates.step)
        images = len(batch.seeds)
        flat = (
            self.gates.draw(images) if isinstance(self.gates, SettlingGates) else self.gates.draw()
        )
        value, final = self.loss(batch, flat)
        self.losses.append(float(value.detach()))
        self.gates.learn(value, final)
        self._fit_to_time()
        self._check()
        now = time.monotonic()
        self.spent_s, self.mark = self.spent_s + now - self.mark, now
        # An update that is interrupted has drawn noise already: what is saved is what was before it.
        self.ready = copy.deepcopy(self._state())
        if now - self.saved > _SAVE_EVERY_S:
            self.save()
        if self.task.watch is not None:
            self.task.watch(self._progress())

    def _batch(self, step: int) -> Batch:
        """Each batch once in a random order, then again in another: a function of the step alone."""
        count = len(self.task.train)
        draw = torch.Generator().manual_seed(self.task.seed * 1000 + step // count)
        return self.task.train[int(torch.randperm(count, generator=draw)[step % count])]

    def _fit_to_time(self) -> None:
        """After a few updates choose how many fit, and start again: the budget's ramp depends on it."""
        if self.timed or self.gates.step < _TRIED:
            return
        assert self.task.seconds is not None
        self.timed = True
        each = (time.monotonic() - self.mark + self.spent_s) / _TRIED
        # A fifth is for the checks and for a machine that slows down; what was tried counts.
        fits = int(0.8 * self.task.seconds / each) - _TRIED
        if fits < self.steps:
            self.steps = max(_TRIED, fits)
            self.gates, self.losses = self.make(self.steps), []

    def _check(self) -> None:
        """Now and then, and at the end: is this the best mask so far."""
        step, gates = self.gates.step, self.gates
        every = max(1, self.steps // (2 * _CHECKS))
        if not self.best or (step % every and step < self.steps):
            return
        if gates.settled() < 1 or gates.expected() > self.task.budget + 1e-9:
            return
        keep = gates.keep()
        if self.found is not None and bool((keep == self.found[1]).all()):
            return
        distance = self.task.distance(keep)
        if self.found is None or distance < self.found[0]:
            self.found = (distance, keep)
            if self.task.preview is not None:
                self.task.preview(self.task.gating, keep)

    def _progress(self) -> Progress:
        done, gates = self.gates.step, self.gates
        left = (self.steps - done) * self.spent_s / max(1, done)
        if self.task.seconds is not None:
            left = min(left, max(0.0, self.task.seconds - self.spent_s))
        return Progress(done, self.steps, self.losses[-1] if self.losses else 0.0, gates.expected(),
                        gates.settled(), left)  # fmt: skip

    def choice(self) -> Choice:
        """The mask learning ends with."""
        # The budget is reached after 60 % of the updates; from 80 % on little changes any more.
        done = self.gates.step >= (0.8 if self.found is not None else 1.0) * self.steps
        if self.found is not None:
            keep = self.found[1]
        elif done:
            keep = self.gates.keep()
        else:
            keep = _within(self.gates, self.task)
        note = ""
        if not done:
            note = (
                f"the gates did not settle: time ran out after {self.gates.step} of {self.steps} updates, with "
                f"the gates at {self.gates.expected():.3f} of the dense price for a budget of "
                f"{self.task.budget:.3f}; the best mask so far was kept. Give more time"
            )
        return Choice(
            keep,
            _wanted(self.gates, self.task),
            self.gates.step,
            self.gates.settled(),
            done,
            self.losses,
            note,
            self.spent_s,
        )

    def save(self) -> None:
        """Write the state, whole or not at all."""
        file = self.task.state
        self.saved = time.monotonic()
        if file is None or not self.ready:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".partial")
        torch.save(self.ready, fresh)
        fresh.replace(file)

    def _state(self) -> dict[str, Any]:
        found = None if self.found is None else {"distance": self.found[0], "keep": self.found[1]}
        return {
            "gates": self.gates.state_dict(),
            "steps": self.steps,
            "spent_s": self.spent_s,
            "losses": self.losses,
            "timed": self.timed,
            "found": found,
        }

    def resume(self) -> None:
        """Go on from the file, where there is one.

        Raises:
            ValueError: it cannot be read, or is of other gates.
        """
        file = self.task.state
        if file is None or not file.is_file():
            return
        try:
            state = torch.load(file, weights_only=True)
            self.steps, self.spent_s = int(state["steps"]), float(state["spent_s"])
            self.gates = self.make(self.steps)
            self.gates.load_state_dict(state["gates"])
            self.losses, self.timed = list(state["losses"]), bool(state["timed"])
            found = state["found"]
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            said = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{file} cannot be resumed from ({said}); delete it to start again"
            ) from error
        self.found = None if found is None else (float(found["distance"]), found["keep"])


def _within(gates: Gates, task: Task) -> Tensor:
    """The mask of gates that have not come down to the budget yet: the least wanted go at once."""
    if not isinstance(gates, SettlingGates) or gates.expected() <= task.budget + 1e-9:
        return gates.keep()
    worth = _wanted(gates, task)
    pool = gates.kept.nonzero()[:, 0]
    order = pool[worth[pool].argsort(descending=True, stable=True)]
    return keep_within(task.price, order, task.budget, len(worth))


def _wanted(gates: Gates, task: Task) -> Tensor:
    """How much each unit is wanted: [N], float64."""
    if isinstance(gates, SettlingGates):
        on = gates.kept.double().requires_grad_()
        (each,) = torch.autograd.grad(task.price(on), on)
        return gates.gain() / each.clamp_min(1e-12)
    score = gates.logit if isinstance(gates, HardConcreteGates) else gates.score
    return score.detach().double()
