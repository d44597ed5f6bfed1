"""What a pipeline hands its denoiser for prompts: it is run up to that call, by its own encoders.

So there is no list of pipelines here. Where guidance runs the denoiser once for the prompt and once for the
empty one (Qwen-Image's `true_cfg_scale`), the empty prompt is asked for like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwprune import prompt_cache

_ENCODED_AT_ONCE = 8  # prompts; a text encoder of 5 B parameters takes 1 GB of activations for them
_ONCE = ("img_ids", "txt_ids")  # positions: the same for every image of a batch
_LATENTS = ("hidden_states", "sample")
_TEXT, _TEXT_MASK = "encoder_hidden_states", "encoder_hidden_states_mask"

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Inputs of a denoiser for some prompts.

    Attributes:
        inputs: for each prompt, batches of one.
        empty: for each prompt's empty one; () = no guidance by it.
        weight: of that guidance.
        shape: of a latent.
        keep_norm: see `hwprune.denoisers.Denoiser`.
    """

    inputs: tuple[Inputs, ...]
    empty: tuple[Inputs, ...]
    weight: float
    shape: tuple[int, ...]
    keep_norm: bool


def encoded(
    pipeline: Any,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None,
    cache: Path | None = None,
) -> Encoded:
    """Encode prompts.

    Args:
        pipeline: of diffusers, unchanged.
        model: its denoiser.
        prompts: at least one.
        steps: of the solver, which the pipeline sets.
        guidance: None = the pipeline's own default.
        cache: folder that keeps encoded prompts.

    Raises:
        ValueError: the pipeline calls its denoiser in a way that is not known here.
    """
    twice = _guides_by_a_second_call(pipeline, model)
    asked = None if twice else guidance
    kept = None
    found: tuple[Sequence[Inputs], Sequence[Inputs]] | None = None
    if (
        cache is not None
    ):  # one prompt sets the scheduler, and tells whether the encoders are those of the file
        first, _, shape = _portions(pipeline, model, prompts[:1], steps, asked)
        kind = f"{type(pipeline).__name__} {type(model).__name__}"
        kept = prompt_cache.cache_file(cache, kind, prompts, steps, guidance)
        found = prompt_cache.read(kept, first[0])
    if found is None:
        inputs: list[Inputs] = []
        empty: list[Inputs] = []
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            some = prompts[start : start + _ENCODED_AT_ONCE]
            given, without, shape = _portions(pipeline, model, some, steps, asked)
            inputs, empty = [*inputs, *given], [*empty, *without]
        if twice and guidance is not None and guidance > 1:
            blank, _, _ = _portions(pipeline, model, [" "], steps, asked)
            empty = blank * len(prompts)
        found = inputs, empty
        if kept is not None:
            prompt_cache.write(kept, inputs, empty)
    every = _padded([*found[0], *found[1]], model)
    inputs, empty = every[: len(prompts)], every[len(prompts) :]
    weight = float(guidance) if empty and guidance is not None else 1.0
    return Encoded(tuple(inputs), tuple(empty), weight, shape, twice)


def _guides_by_a_second_call(pipeline: Any, model: nn.Module) -> bool:
    """Whether guidance by the empty prompt is `true_cfg_scale` here, and guidance is no input of the model."""
    asked = inspect.signature(type(pipeline).__call__).parameters
    embeds = dict(getattr(model, "config", {})).get("guidance_embeds")
    return "true_cfg_scale" in asked and type(model).__name__.startswith("Qwen") and not embeds


def _padded(inputs: Sequence[Inputs], model: nn.Module) -> list[Inputs]:
    """Texts of different lengths, where the model takes a mask, padded with zeros as their pipeline does.

    Pipelines leave the mask out where it is all ones.
    """
    lengths = {found[_TEXT].shape[1] for found in inputs if _TEXT in found}
    masked = any(_TEXT_MASK in found for found in inputs)
    if _TEXT_MASK not in inspect.signature(model.forward).parameters or (
        len(lengths) < 2 and not masked
    ):
        return list(inputs)
    padded: list[Inputs] = []
    for found in inputs:
        text = found[_TEXT]
        mask = found.get(_TEXT_MASK, torch.ones(text.shape[:2], dtype=torch.long))
        more = max(lengths) - text.shape[1]
        fresh = {_TEXT: F.pad(text, (0, 0, 0, more)), _TEXT_MASK: F.pad(mask, (0, more))}
        padded.append({**found, **fresh})
    return padded


class _Captured(Exception):
    """Raised by the hook once the denoiser's arguments are known."""


def _portions(
    pipeline: Any, model: nn.Module, prompts: Sequence[str], steps: int, guidance: float | None
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], tuple[int, ...]]:
    """(inputs of each prompt, those of its empty prompt if there is one, shape of a latent).

    Raises:
        ValueError: the denoiser is called with something else than one or two latents a prompt.
    """
    found = _first_call(pipeline, model, list(prompts), steps, guidance)
    latent = next(found.pop(key) for key in _LATENTS if key in found)
    shape = tuple(latent.shape[1:])
    parts = [_portion(found, i, len(latent)) for i in range(len(latent))]
    if len(latent) == 2 * len(prompts):  # diffusers puts the empty prompts first
        return parts[len(prompts) :], parts[: len(prompts)], shape
    if len(latent) == len(prompts):
        return parts, [], shape
    raise ValueError(
        f"{type(pipeline).__name__} calls its denoiser with {len(latent)} latents for {len(prompts)} "
        "prompts; expected one or two a prompt, so switch extra guidance (PAG ...) off"
    )


def _first_call(
    pipeline: Any, model: nn.Module, prompts: list[str], steps: int, guidance: float | None
) -> dict[str, Any]:
    """What a pipeline hands its denoiser in the first step, without the time."""
    found: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _Captured

    asked: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if guidance is not None:
        asked["guidance_scale"] = guidance
    bar = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Captured):
            pipeline(prompts, generator=torch.Generator().manual_seed(0), **asked)
    finally:
        handle.remove()
        pipeline._progress_bar_config = bar if bar is not None else {}
    if not any(key in found for key in _LATENTS):
        raise ValueError(
            f"{type(pipeline).__name__} did not call its {type(model).__name__} with a latent; hwprune knows "
            "pipelines that hand it over as hidden_states or sample"
        )
    unused = ("timestep", "return_dict")
    return {
        key: _detached(value)
        for key, value in found.items()
        if key not in unused and value is not None
    }


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    return value


def _portion(value: Any, index: int, of: int, key: str = "") -> Any:
    """The part of one image, as a batch of one."""
    if isinstance(value, Mapping):
        return {name: _portion(item, index, of, name) for name, item in value.items()}
    batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == of
    if key not in _ONCE and (batched or (isinstance(value, list) and len(value) == of)):
        return value[index : index + 1]
    return value
