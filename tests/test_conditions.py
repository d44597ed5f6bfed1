"""What is drawn: labels with the model's own empty class, prompts exactly as the pipeline encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwprune.conditions import (
    component_of,
    conditions_of,
    empty_class,
    label_conditions,
    prompt_conditions,
)
from hwprune.teacher import Sampler, draw

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes.tiny_diffusion import flow, flux, pixart, qwen, sd3, sdxl, stable_diffusion, tiny_dit  # noqa: E402

PROMPTS = ["a cat", "dogs", "x y z"]


def test_the_empty_class_is_the_row_beyond_the_classes() -> None:
    assert empty_class(tiny_dit()) == 10
    guided = label_conditions(tiny_dit(), flow(), [3, 7], steps=2, guidance=2.0)
    assert guided.empty is not None and guided.evaluations == 4
    assert [int(e["class_labels"]) for e in guided.empty] == [10, 10]
    alone = conditions_of(tiny_dit(), None, steps=2, scheduler=flow())
    assert (alone.names, alone.empty, alone.evaluations) == (("10",), None, 2)


def test_guidance_by_labels_is_the_mixture_of_both_predictions() -> None:
    model = tiny_dit()
    found = label_conditions(model, flow(), [3, 7], steps=2, guidance=2.5)
    latent, time = torch.randn(2, 1, 8, 8), torch.tensor(500.0)
    with torch.no_grad():
        got = found.denoiser(model, [1, 0], torch.device("cpu"))(latent, time)

        def predicted(*labels: int) -> torch.Tensor:
            given = {"timestep": time.expand(2), "class_labels": torch.tensor(labels)}
            return model(latent, **given, return_dict=False)[0]

        without, given = predicted(10, 10), predicted(7, 3)
    torch.testing.assert_close(got, without + 2.5 * (given - without))


PIPELINES = {"sd": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart}


@pytest.mark.parametrize(
    ("which", "guidance", "mixed"),
    [
        ("sd", None, 7.5),
        ("sd", 3.0, 3.0),
        ("sd", 1.0, 1.0),
        ("sdxl", None, 5.0),
        ("sdxl", 1.0, 1.0),
        ("sd3", None, 7.0),
        ("flux", None, 1.0),  # its guidance is an input of the model
        ("flux", 2.0, 1.0),
        ("pixart", None, 4.5),
    ],
)
def test_prompts_give_the_latents_of_the_pipeline_itself(
    tmp_path: Path, which: str, guidance: float | None, mixed: float
) -> None:
    pipeline = PIPELINES[which](tmp_path)
    _, model = component_of(pipeline)
    found = prompt_conditions(pipeline, PROMPTS, steps=3, guidance=guidance)
    assert found.guidance == mixed
    sampler = Sampler(model.requires_grad_(False), found)
    (batch,) = draw(sampler, "train", 3, batch=3)
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    expected = pipeline(
        [PROMPTS[i] for i in batch.conditions],
        num_inference_steps=3,
        latents=batch.start / sampler.solver.start_scale,
        output_type="latent",
        **asked,
    ).images
    with torch.no_grad():
        got = sampler.final(batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_guidance_by_a_second_call_gives_the_latents_of_the_pipeline_itself(
    tmp_path: Path, guidance: float | None
) -> None:
    pipeline = qwen(tmp_path)
    found = prompt_conditions(pipeline, PROMPTS, steps=3, guidance=guidance)
    assert found.guidance == (guidance or 1.0) and found.keep_norm
    assert (found.empty is None) == (guidance is None)
    sampler = Sampler(pipeline.transformer.requires_grad_(False), found)
    (batch,) = draw(sampler, "train", 3, batch=3)
    pipeline.set_progress_bar_config(disable=True)
    asked = {} if guidance is None else {"negative_prompt": [" "] * 3, "true_cfg_scale": guidance}
    expected = pipeline(
        [PROMPTS[i] for i in batch.conditions],
        num_inference_steps=3,
        latents=batch.start / sampler.solver.start_scale,
        output_type="latent",
        **asked,
    ).images
    with torch.no_grad():
        got = sampler.final(batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


def test_more_prompts_than_are_encoded_at_once_are_the_same_prompts(tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path)
    many = prompt_conditions(pipeline, [f"a {chr(97 + i)}" for i in range(11)], steps=2)
    one = prompt_conditions(pipeline, ["a k"], steps=2)
    key = "encoder_hidden_states"
    torch.testing.assert_close(many.inputs[10][key], one.inputs[0][key])
    assert many.empty is not None and one.empty is not None
    torch.testing.assert_close(many.empty[10][key], one.empty[0][key])


def test_a_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path)
    pipeline.set_progress_bar_config(desc="mine")
    prompt_conditions(pipeline, ["a"], steps=2)
    assert pipeline._progress_bar_config == {"desc": "mine"}
    assert not pipeline.unet._forward_pre_hooks


def test_nothing_asked_of_a_pipeline_is_its_empty_prompt_without_guidance(tmp_path: Path) -> None:
    found = conditions_of(stable_diffusion(tmp_path), None, steps=2)
    assert (found.names, found.empty, found.guidance) == (("",), None, 1.0)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pipeline, model = stable_diffusion(tmp_path), tiny_dit()
    with pytest.raises(ValueError, match="expected 0 to 9, got 11"):
        label_conditions(model, flow(), [1, 11], steps=2)
    with pytest.raises(ValueError, match="at least one class"):
        label_conditions(model, flow(), [], steps=2)
    with pytest.raises(ValueError, match="takes no class labels"):
        label_conditions(pipeline.unet, flow(), [1], steps=2)
    with pytest.raises(ValueError, match="at least one and none of them empty"):
        prompt_conditions(pipeline, [], steps=2)
    with pytest.raises(ValueError, match="none of them empty"):
        prompt_conditions(pipeline, ["a", "  "], steps=2)
    with pytest.raises(ValueError, match="alone cannot read prompts"):
        conditions_of(pipeline.unet, ["a"], steps=2, scheduler=flow())
    with pytest.raises(ValueError, match="give its scheduler"):
        conditions_of(model, [1], steps=2)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        conditions_of(model, [1], steps=0, scheduler=flow())
    with pytest.raises(ValueError, match="cannot be set to 2000 steps"):
        conditions_of(model, [1], steps=2000, scheduler=diffusers.DDIMScheduler())
    pipeline.unet = None
    with pytest.raises(ValueError, match="has no denoiser hwprune can cut"):
        component_of(pipeline)


def test_guidance_without_an_empty_class_is_refused() -> None:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=4,
        num_class_embeds=5,
    )
    with pytest.raises(ValueError, match="has no empty class"):
        label_conditions(unet, flow(), [1], steps=2, guidance=2.0)
    assert label_conditions(unet, flow(), [4], steps=2).names == ("4",)
