"""Encoded prompts on disk: the same again, not encoded twice, and never those of other encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwprune import prompt_cache
from hwprune.conditions import conditions_of, prompt_conditions

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from fakes import tiny_diffusion  # noqa: E402
from fakes.tiny_diffusion import stable_diffusion  # noqa: E402

PROMPTS = [f"a {chr(97 + i)}" for i in range(11)]


def counted(pipeline: Any) -> list[int]:
    """How many prompts each call of the text encoder had."""
    calls: list[int] = []

    def count(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else named["input_ids"]))

    pipeline.text_encoder.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.mark.parametrize("which", ["stable_diffusion", "sdxl", "sd3", "flux", "pixart", "qwen"])
def test_the_second_run_has_the_same_inputs_and_encodes_one_prompt(
    which: str, tmp_path: Path
) -> None:
    make = getattr(tiny_diffusion, which)
    pipeline = make(tmp_path / "tokens")
    fresh = prompt_conditions(pipeline, PROMPTS, steps=2)
    first = prompt_conditions(pipeline, PROMPTS, steps=2, cache=tmp_path / "c")
    calls = counted(pipeline)
    again = prompt_conditions(pipeline, PROMPTS, steps=2, cache=tmp_path / "c")
    assert sum(calls) <= 2  # the prompt, and the empty one
    for found in (first, again):
        assert found.names == fresh.names and found.guidance == fresh.guidance
        assert found.shape == fresh.shape
        assert torch.equal(found.scheduler.timesteps, fresh.scheduler.timesteps)
        assert (found.empty is None) == (fresh.empty is None)
        for one, other in zip(found.inputs, fresh.inputs, strict=True):
            assert prompt_cache.same(one, other) and one.keys() == other.keys()
    assert exactly(again.inputs, first.inputs) and exactly(again.empty, first.empty)


def exactly(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(exactly(one[key], other[key]) for key in other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) or all(map(exactly, one, other))
    return bool(one == other)


def test_other_encoders_prompts_steps_or_guidance_are_encoded_anew(tmp_path: Path) -> None:
    pipeline, cache = stable_diffusion(tmp_path / "tokens"), tmp_path / "c"
    before = prompt_conditions(pipeline, PROMPTS, steps=2, cache=cache)
    calls = counted(pipeline)
    for prompts, steps, guidance in (
        (PROMPTS[:5], 2, None),
        (PROMPTS, 3, None),
        (PROMPTS, 2, 2.0),
    ):
        calls.clear()
        prompt_conditions(pipeline, prompts, steps=steps, guidance=guidance, cache=cache)
        assert sum(calls) >= len(prompts)
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    calls.clear()
    after = prompt_conditions(pipeline, PROMPTS, steps=2, cache=cache)
    assert sum(calls) >= len(PROMPTS)
    assert not prompt_cache.same(before.inputs[3], after.inputs[3])
    calls.clear()
    prompt_conditions(pipeline, PROMPTS, steps=2, cache=cache)  # the file is of the new ones now
    assert sum(calls) <= 2


@pytest.mark.parametrize("broken", [b"", b"\x10\0\0\0\0\0\0\0{}", b"no safetensors at all"])
def test_a_file_that_cannot_be_read_is_written_again(broken: bytes, tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path / "tokens")
    first = prompt_conditions(pipeline, PROMPTS[:3], steps=2, cache=tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    whole = file.read_bytes()
    file.write_bytes(broken)
    again = prompt_conditions(pipeline, PROMPTS[:3], steps=2, cache=tmp_path / "c")
    assert exactly(again.inputs, first.inputs)
    assert len(file.read_bytes()) == len(whole)


def test_what_fits_no_file_is_encoded_each_time(tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    assert not prompt_cache.write(file, [{"odd": object()}], [])
    assert not file.exists() and prompt_cache.read(file, {}) is None


def test_every_kind_of_value_comes_back_as_it_went(tmp_path: Path) -> None:
    inputs = [
        {
            "a": torch.arange(3),
            "b": {"c": torch.ones(1, 2, dtype=torch.bfloat16), "none": None, "yes": True},
            "shapes": [[(1, 4, 4)], 2.5, "word"],
        }
    ]
    file = tmp_path / "x" / "prompts.safetensors"
    assert prompt_cache.write(file, inputs, [])
    found = prompt_cache.read(file, inputs[0])
    assert found is not None
    ((again,), empty) = found
    assert empty == []
    assert exactly(again["a"], inputs[0]["a"]) and again["shapes"] == inputs[0]["shapes"]
    assert again["b"]["c"].dtype == torch.bfloat16 and again["b"]["none"] is None


def test_pruning_from_prompts_keeps_them_in_its_folder(tmp_path: Path) -> None:
    import hwprune

    pipeline = stable_diffusion(tmp_path / "tokens")
    hwprune.prune_diffusion(
        pipeline,
        ["a b", "c"],
        hwprune.Budget(params=0.95),
        steps=2,
        updates=4,
        images=4,
        batch=2,
        folder=tmp_path / "work",
        method="magnitude",
    )
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "work").iterdir())
    assert names.count("prompts") == 1 and names.count("teacher") == 3
    calls = counted(pipeline)
    conditions_of(pipeline, ["a b", "c"], steps=2, cache=tmp_path / "work")
    assert sum(calls) <= 2
