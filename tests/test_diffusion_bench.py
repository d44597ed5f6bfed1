"""The parts of scripts/bench diffusion against other ways to compute them. The benchmark itself is not run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
bench = importlib.import_module("diffusion")
fashion = importlib.import_module("parts.fashion")
trajectories = importlib.import_module("parts.trajectories")

from fakes.tiny_diffusion import flow, tiny_dit  # noqa: E402

from hwprune.conditions import label_conditions  # noqa: E402
from hwprune.families.denoiser import find_units  # noqa: E402
from hwprune.realise import realise_  # noqa: E402
from hwprune.teacher import Sampler, draw  # noqa: E402


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=generator).double() @ torch.randn(6, 6).double()
    b = torch.randn(400, 6, generator=generator).double() + 1
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.real(linalg.sqrtm(cov_a @ cov_b))
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = float(mean) + np.trace(cov_a + cov_b - 2 * root)
    assert fashion.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert abs(fashion.frechet(a, a)) < 1e-6


def test_ssim_is_one_for_the_same_picture_and_falls_with_noise() -> None:
    a = torch.rand(3, 1, 28, 28) * 2 - 1
    assert torch.allclose(fashion.ssim(a, a), torch.ones(3, dtype=torch.float64))
    some, more = (fashion.ssim(a, a + s * torch.randn_like(a)).mean() for s in (0.1, 0.5))
    assert 1 > some > more > 0
    x, y = a[:1, :, :7, :7].double() / 2 + 0.5, a[1:2, :, :7, :7].double() / 2 + 0.5
    cov = ((x - x.mean()) * (y - y.mean())).mean()
    top = (2 * x.mean() * y.mean() + 1e-4) * (2 * cov + 9e-4)
    below = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (
        x.var(correction=0) + y.var(correction=0) + 9e-4
    )
    got = fashion.ssim(a[:1, :, :7, :7], a[1:2, :, :7, :7])
    assert float(got) == pytest.approx(float(top / below), rel=1e-6)


def test_fresh_seeds_are_none_that_pruning_draws() -> None:
    conditions = label_conditions(tiny_dit(), flow(), range(10), steps=2)
    fresh = fashion.fresh_batches(conditions, 50, 20)
    assert [len(b.start) for b in fresh] == [20, 20, 10]
    assert len({i for b in fresh for i in b.conditions}) > 7
    sampler = Sampler(tiny_dit(), conditions)
    used = [b.start for s in ("train", "check", "held") for b in draw(sampler, s, 60, batch=20)]
    every = torch.cat([*used, *(b.start for b in fresh)]).flatten(1)
    assert len(every.unique(dim=0)) == len(every) == 230


def test_what_units_hold_is_what_is_missing_once_all_are_gone() -> None:
    model = tiny_dit()
    before, held = sum(p.numel() for p in model.parameters()), bench.held_by_units(model)
    units = find_units(model)
    nothing = {u.name: torch.zeros(u.shape, dtype=torch.bool) for u in units}
    realise_(model, units, nothing)
    assert sum(p.numel() for p in model.parameters()) == before - held


@pytest.mark.parametrize("name", ["UniPC", "LCM"])
def test_gradients_are_compared_with_another_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trajectories.gradient_error(name, "unet", 3) < 1e-12
    monkeypatch.setattr(trajectories, "GUIDANCE", 3.0)
    real = trajectories.Denoiser

    def other(*args: Any, guidance: float, **given: Any) -> Any:
        return real(*args, guidance=guidance * 1.001, **given)

    monkeypatch.setattr(trajectories, "Denoiser", other)
    assert trajectories.gradient_error(name, "unet", 3) > 1e-6  # it would be seen


def test_rows_that_are_there_are_not_run_again_and_the_table_shows_them() -> None:
    row = {
        "part": "quality",
        "method": "ours",
        "budget": 0.8,
        "minutes": 15.0,
        "images": 128,
        "steps": 8,
        "drawn_steps": 20,
        "samples": 1000,
        "fresh": 256,
        "guidance": 1.5,
        "seed": 0,
        "latent_mse": 0.0123,
        "latent_mse_se": 0.001,
        "latent_mse_at_8": 0.0045,
        "frechet": 101.0,
        "frechet_dense": 97.0,
        "commit": "abc",
        "torch": "2",
    }
    assert bench._key(row) == bench._key({**row, "latent_mse": 1.0})
    assert bench._key(row) != bench._key({**row, "budget": 0.5})
    text = bench.table([row, {**row, "method": "obs", "budget": 0.5}])
    assert "| **ours** | 0.0123 ± 0.0010, 0.0045, 101.0 | not run | not run |" in text
    assert "| obs | not run | not run |" in text and "ecodiff" not in text


def test_without_its_data_it_says_so_and_adds_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    words = ["bench", "--parts", "quality", "--data", tmp_path, "--rows", file, "--work", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert bench.main() == 0
    assert "skipped: " in capsys.readouterr().out and not file.exists()
