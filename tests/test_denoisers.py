"""Guidance, timesteps and inputs reach a model as diffusers' own pipelines hand them over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoisers import Denoiser, model_time
from hwprune.solvers import Solver
from hwprune.trajectory import sample

LATENT, TIME = torch.arange(24.0).view(2, 3, 2, 2), torch.tensor(500)


class Recorder(nn.Module):
    """Returns a known function of its inputs and remembers them."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.channels, self.calls = channels, []

    def forward(
        self, latent: Tensor, *, timestep: Tensor, return_dict: bool = True, **inputs: Any
    ) -> tuple[Tensor]:
        self.calls.append({"latent": latent, "timestep": timestep, **inputs})
        text = inputs.get("text")
        shift = 0 if text is None else text.view(-1, 1, 1, 1)
        out = latent * self.weight + shift
        return (torch.cat([out, -out], 1)[:, : self.channels],)


def test_the_conditional_prediction_alone_needs_one_pass() -> None:
    model = Recorder()
    out = Denoiser(model, {"text": torch.tensor([1.0, 2.0])})(LATENT, TIME)
    assert torch.equal(out, LATENT + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    (call,) = model.calls
    assert call["timestep"].tolist() == [500, 500]


def test_guidance_mixes_the_two_branches_in_one_batch() -> None:
    model = Recorder()
    empty, given = {"text": torch.zeros(2)}, {"text": torch.tensor([1.0, 2.0])}
    out = Denoiser(model, given, empty, guidance=5.0)(LATENT, TIME)
    assert torch.equal(out, LATENT + 5 * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    (call,) = model.calls
    assert call["latent"].shape[0] == 4 and call["text"].tolist() == [0, 0, 1, 2]


def test_nested_inputs_lists_and_positions_are_paired_as_they_are() -> None:
    model = Recorder()
    ids = torch.zeros(7, 3)
    each = {"img_ids": ids, "sizes": [(1, 2), (3, 4)], "flag": None, "scale": 2.0}
    empty = {**each, "added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}}
    given = {**each, "added_cond_kwargs": {"time_ids": torch.ones(2, 6)}}
    Denoiser(model, given, empty, guidance=2.0)(LATENT, TIME)
    (call,) = model.calls
    assert call["img_ids"] is ids and call["flag"] is None and call["scale"] == 2.0
    assert call["sizes"] == [(1, 2), (3, 4)] * 2
    assert call["added_cond_kwargs"]["time_ids"].mean(1).tolist() == [0, 0, 1, 1]


def test_norm_keeping_guidance_has_the_conditional_norm() -> None:
    model = Recorder()
    empty, given = {"text": torch.zeros(2)}, {"text": torch.tensor([1.0, 2.0])}
    out = Denoiser(model, given, empty, guidance=5.0, keep_norm=True)(LATENT, TIME)
    conditional = LATENT + given["text"].view(2, 1, 1, 1)
    assert torch.allclose(out.norm(dim=-1), conditional.norm(dim=-1))


def test_embedded_guidance_is_one_number_an_image() -> None:
    model = Recorder()
    Denoiser(model, embedded_guidance=3.5)(LATENT, TIME)
    assert model.calls[0]["guidance"].tolist() == [3.5, 3.5]


def test_a_learned_variance_is_left_out() -> None:
    out = Denoiser(Recorder(channels=6))(LATENT, TIME)
    assert torch.equal(out, LATENT)


def test_the_model_sees_its_own_dtype_and_the_latent_keeps_its() -> None:
    model = Recorder().double()
    out = Denoiser(model)(LATENT, TIME)
    assert model.calls[0]["latent"].dtype == torch.float64 and out.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "expected"), [("FluxTransformer2DModel", 0.5), ("Recorder", 500), ("SanaLike", 500)]
)
def test_timesteps_are_scaled_as_pipelines_do(name: str, expected: float) -> None:
    model = type(name, (Recorder,), {})()
    assert float(model_time(model, TIME)) == expected


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"guidance": 2.0}, "unconditional is None; give the inputs of the empty prompt"),
    ({"inputs": {"a": 1}, "unconditional": {"b": 1}}, "do not pair up: a, b"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_inputs_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Denoiser(Recorder(), **options)


@pytest.mark.parametrize(
    ("empty", "given", "words"),
    [
        (
            torch.zeros(2, 5),
            torch.zeros(2, 7),
            r"text: \(2, 5\) unconditional, \(2, 7\) conditional",
        ),
        (1, 2, "text: expected two tensors or two equal values, got 1, 2"),
    ],
)
def test_branches_of_different_make_are_refused(empty: Any, given: Any, words: str) -> None:
    denoise = Denoiser(Recorder(), {"text": given}, {"text": empty}, guidance=2.0)
    with pytest.raises(ValueError, match=words):
        denoise(LATENT, TIME)


def test_a_prediction_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Recorder predicts \(2, 2, 2, 2\) for a latent of"):
        Denoiser(Recorder(channels=2))(LATENT, TIME)


def test_a_real_transformer_samples_as_its_pipeline_and_has_exact_gradients(
    shared_data: Path,
) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = shared_data / "dit_fashion"
    if not folder.is_dir():
        pytest.skip("no dit_fashion in ../shared/data, so no real diffusion transformer")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(3)
    model.requires_grad_(False)
    mask = torch.ones(4 * model.inner_dim, requires_grad=True)
    model.transformer_blocks[2].ff.net[2].register_forward_pre_hook(lambda _, a: (a[0] * mask,))
    labels = {"class_labels": torch.tensor([1, 8])}
    empty = {"class_labels": torch.tensor([1000, 1000])}
    start = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    denoise = Denoiser(model, labels, empty, guidance=2.0)
    ours = sample(denoise, Solver(scheduler), start, parameters=[mask])
    plain = start
    for t in scheduler.timesteps:
        both = torch.cat([empty["class_labels"], labels["class_labels"]])
        out = model(torch.cat([plain, plain]), t.expand(4), class_labels=both).sample
        guided = out[:2] + 2.0 * (out[2:] - out[:2])
        plain = scheduler.step(guided, t, plain).prev_sample
    assert torch.equal(ours, plain)
    (expected,) = torch.autograd.grad(plain.square().mean(), mask)
    (got,) = torch.autograd.grad(ours.square().mean(), mask)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
