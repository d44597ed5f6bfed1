"""Learning gates: a killed run resumes to the same result, time is kept to, the best mask is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hwprune.allocate import Budget
from hwprune.budget_price import price_of
from hwprune.conditions import label_conditions
from hwprune.denoiser_cost import denoiser_cost
from hwprune.families.denoiser import find_layers, find_units
from hwprune.gating import gated
from hwprune.learning import Progress, Task
from hwprune.selection import METHODS
from hwprune.teacher import Sampler, draw, taught

pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, tiny_dit

TRAINED = ("ours", "top-k", "ecodiff", "per-step")


@contextmanager
def task(**asked: Any) -> Iterator[Task]:
    model = tiny_dit().requires_grad_(False)
    sampler = Sampler(model, label_conditions(model, flow(), [1, 2], steps=2))
    train, check = (taught(sampler, draw(sampler, s, 6, batch=3)) for s in ("train", "check"))
    units = find_units(model)
    cost = denoiser_cost(
        model,
        find_layers(model)[0],
        lambda: sampler.denoise(train[0])(train[0].start, torch.tensor(9.0)),
        3,
    )
    with gated(model, units) as gating:
        price, limit = price_of(gating.layout, cost, Budget(params=0.8))
        yield replace(Task(sampler, gating, price, limit, train, check, 12), **asked)


class Killed(Exception):
    pass


def killed_after(steps: int) -> Any:
    def watch(progress: Progress) -> None:
        if progress.step == steps:
            raise Killed

    return watch


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("when", [3, 10])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, method: str, when: int) -> None:
    choose = METHODS[method]
    with task() as plain:
        expected = choose(plain)
    state = tmp_path / "state.pt"
    with task(state=state, watch=killed_after(when)) as dying, pytest.raises(Killed):
        choose(dying)
    torch.manual_seed(99)
    torch.rand(5)
    with task(state=state) as going_on:
        got = choose(going_on)
    assert torch.equal(got.keep, expected.keep)
    assert got.losses == expected.losses and len(got.losses) == 12


def test_a_run_stopped_in_the_middle_of_an_update_resumes_from_before_it(tmp_path: Path) -> None:
    with task() as plain:
        expected = METHODS["ecodiff"](plain)
    state, calls = tmp_path / "state.pt", 0
    with task(state=state) as dying:
        final = dying.sampler.final

        def interrupted(*args: Any, **given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise KeyboardInterrupt
            return final(*args, **given)

        dying.sampler.final = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            METHODS["ecodiff"](dying)
    with task(state=state) as going_on:
        got = METHODS["ecodiff"](going_on)
    assert got.losses == expected.losses and torch.equal(got.keep, expected.keep)


def test_a_state_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    state.write_bytes(b"nonsense")
    with (
        task(state=state) as broken,
        pytest.raises(ValueError, match=r"state\.pt cannot be resumed"),
    ):
        METHODS["ours"](broken)


def test_time_that_runs_out_is_said_and_the_mask_meets_the_budget() -> None:
    with task(seconds=1e-9, updates=1000) as hurried:
        choice = METHODS["ours"](hurried)
        assert not choice.finished and "did not settle" in choice.note
        assert float(hurried.price(choice.keep.double())) <= hurried.budget + 1e-9


def test_the_number_of_updates_is_fitted_to_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock that goes on by 5 ms whenever it is looked at
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * 0.005)
    monkeypatch.setattr("hwprune.learning.time", clock)
    seen: list[Progress] = []
    with task(seconds=2.0, updates=100_000, watch=seen.append) as timed:
        choice = METHODS["ours"](timed)
    assert choice.finished, choice.note
    assert 3 <= choice.updates < 2000
    # The clock may end it a little early: from 80 % on the mask is settled.
    assert 0.8 * seen[-1].steps <= seen[-1].step <= seen[-1].steps < 2000
    assert seen[0].price == 1.0 and seen[-1].price <= timed.budget + 1e-9


def test_every_batch_is_used_once_a_round() -> None:
    used: list[tuple[int, ...]] = []
    with task() as one:
        final = one.sampler.final

        def seen(batch: Any, *args: Any, **given: Any) -> Any:
            if batch in one.train:
                used.append(batch.seeds)
            return final(batch, *args, **given)

        one.sampler.final = seen  # type: ignore[method-assign]
        METHODS["ours"](one)
    assert [len(set(used[i : i + 2])) for i in range(0, 12, 2)] == [2] * 6


def test_the_mask_kept_is_the_best_seen_on_the_check_images() -> None:
    masks: list[tuple[float, torch.Tensor]] = []
    with task(updates=40) as one:
        plain = Task.distance

        class Noting(Task):
            def distance(self, keep: torch.Tensor) -> float:
                masks.append((plain(self, keep), keep))
                return masks[-1][0]

        noting = Noting(**vars(one))
        choice = METHODS["ours"](noting)
    assert masks and torch.equal(choice.keep, min(masks, key=lambda m: m[0])[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_budget_it_was_given(method: str) -> None:
    with task() as one:
        choice = METHODS[method](one)
        price = float(one.price(choice.keep.double()))
    assert choice.keep.dtype == torch.bool
    assert one.budget - 0.02 < price <= one.budget + 1e-9
