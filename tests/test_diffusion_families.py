"""Every family of denoisers goes the whole road: learned, re-fitted, realised, saved, opened."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hwprune
from hwprune.conditions import Conditions, timed
from hwprune.prompt_inputs import _portion
from hwprune.teacher import Sampler, draw

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

FOLDER = Path(__file__).resolve().parent.parent / "hwprune" / "families"
TINY: dict[str, Callable[[], Any]] = {}
for path in sorted(FOLDER.glob("*.py")):
    if "\ndef tiny(" in path.read_text():
        module = importlib.import_module(f"hwprune.families.{path.stem}")
        for function, make in inspect.getmembers(module, inspect.isfunction):
            if function.startswith("tiny"):
                TINY[f"{path.stem}.{function}"] = make


def opened(which: str) -> tuple[Any, Conditions]:
    """A tiny model whose weights are not small, and two things for it to draw."""
    model, latent, inputs = TINY[which]()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)
    parts: tuple[Mapping[str, Any], ...] = tuple(_portion(inputs, i, 2) for i in (0, 1))
    scheduler = timed(diffusers.FlowMatchEulerDiscreteScheduler(), 2)
    return model, Conditions(("a", "b"), parts, None, 1.0, scheduler, tuple(latent.shape[1:]))


@pytest.mark.parametrize("method", ["ours", "obs", "taylor"])
@pytest.mark.parametrize("which", TINY)
def test_every_family_is_pruned_repaired_and_opens_again(
    which: str, method: str, tmp_path: Path
) -> None:
    model, conditions = opened(which)
    asked = {"kinds": ("head", "neuron", "depth")} if method == "ours" else {}
    report = hwprune.prune_diffusion(
        model,
        conditions,
        hwprune.Budget(macs=0.8),
        method=method,
        updates=6,
        images=4,
        batch=2,
        repair=True,
        **asked,
    )
    assert 0.5 < report.macs_ratio <= 0.8
    assert report.distance["check"] <= report.distance["unrepaired"]
    hwprune.save(model, tmp_path / "x")
    again = hwprune.load(tmp_path / "x")
    assert isinstance(again, torch.nn.Module)

    def final(one: torch.nn.Module) -> Tensor:
        sampler = Sampler(one, conditions)
        with torch.no_grad():
            return sampler.final(draw(sampler, "held", 2, batch=2)[0])

    assert torch.equal(final(again), final(model))
