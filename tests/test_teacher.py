"""Teacher latents: sets that share nothing, computed once, kept under a name that says all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwprune.conditions import label_conditions
from hwprune.teacher import Sampler, Split, draw, spread, taught

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, tiny_dit  # noqa: E402

SPLITS: tuple[Split, ...] = ("train", "check", "held")


def sampler(labels: list[int] | None = None, **asked: Any) -> Sampler:
    model = tiny_dit().requires_grad_(False)
    found = label_conditions(
        model, asked.pop("scheduler", flow()), labels or [1, 2], steps=3, **asked
    )
    return Sampler(model, found)


def test_no_two_sets_and_no_two_runs_share_a_first_latent() -> None:
    seeds = [
        {s for batch in draw(sampler(), split, 50, batch=7, seed=run) for s in batch.seeds}
        for split in SPLITS
        for run in (0, 1)
    ]
    assert [len(some) for some in seeds] == [50] * 6
    assert len(set.union(*seeds)) == 300


def test_batches_hold_as_many_images_as_asked_for_and_every_condition() -> None:
    batches = draw(sampler([0, 1, 2]), "train", 10, batch=4)
    assert [len(batch.start) for batch in batches] == [4, 4, 2]
    assert {i for batch in batches for i in batch.conditions} == {0, 1, 2}


def test_with_many_conditions_the_held_out_ones_are_others() -> None:
    many = sampler(list(range(10)) + list(range(10)))
    used = {
        split: {i for batch in draw(many, split, 60, batch=5) for i in batch.conditions}
        for split in SPLITS
    }
    assert used["train"] == used["check"]
    assert not used["train"] & used["held"]
    assert len(used["train"] | used["held"]) == 20


def test_a_first_latent_is_a_function_of_its_seed_alone() -> None:
    wide, narrow = draw(sampler(), "held", 6, batch=6), draw(sampler(), "held", 6, batch=2)
    assert torch.equal(wide[0].start, torch.cat([batch.start for batch in narrow]))


def test_latents_are_computed_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sampler()
    batches = draw(first, "train", 5, batch=2)
    found = taught(first, batches, folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(found[1].target, first.final(batches[1]))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the model ran again")

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "final", forbidden)
        again = taught(sampler(), batches, folder=tmp_path)
    assert all(torch.equal(a.target, b.target) for a, b in zip(found, again, strict=True))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])  # a disk that was full
    again = taught(sampler(), batches, folder=tmp_path)
    assert all(torch.equal(a.target, b.target) for a, b in zip(found, again, strict=True))


def test_anything_that_changes_the_latents_changes_their_name(tmp_path: Path) -> None:
    other = sampler()
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.001)
    every = [
        sampler(),
        sampler([1, 3]),
        sampler(guidance=2.0),
        sampler(scheduler=diffusers.DDIMScheduler(clip_sample=False)),
        other,
    ]
    for i, one in enumerate(every):
        taught(one, draw(one, "train", 2, batch=2), folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == i + 1
    taught(every[0], draw(every[0], "train", 2, batch=2, seed=1), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_solver_noise_is_the_same_for_teacher_and_student() -> None:
    noisy = sampler(scheduler=diffusers.EulerAncestralDiscreteScheduler())
    batches = taught(noisy, draw(noisy, "train", 4, batch=2))
    assert float(noisy.distance(batches).max()) == 0.0
    assert spread(batches) > 0.01
