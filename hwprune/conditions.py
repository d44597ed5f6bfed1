"""What a denoiser is asked to draw: class labels, prompts, or nothing, with the solver it is drawn by.

Prompts are encoded by the user's own pipeline: it is run up to the first call of its denoiser, and what
it hands over there (embeddings, pooled text, sizes, positions, guidance, the scheduler with its timesteps)
is kept. So there is no list of pipelines here, and the encoders are not needed afterwards.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.denoisers import Denoiser
from hwprune.families.denoiser import known_classes
from hwprune.prompt_inputs import encoded

_ONCE = ("img_ids", "txt_ids")  # positions: the same for every image of a batch


@dataclass(frozen=True, eq=False)
class Conditions:
    """All a denoiser needs besides latent and time, for each thing it is asked to draw.

    Attributes:
        names: what is drawn: a label, a prompt.
        inputs: the model's other inputs for each name, batches of one.
        empty: the same for the empty class or prompt, for each name; None = no guidance by it.
        guidance: w of eps_u + w (eps_c - eps_u); 1 = none.
        scheduler: of diffusers, its timesteps set.
        shape: of one latent, as the model takes it: [C, H, W] or packed [tokens, C].
        keep_norm: whether the guided prediction keeps the norm of the conditional one (Qwen-Image).
    """

    names: tuple[str, ...]
    inputs: tuple[Mapping[str, Any], ...]
    empty: tuple[Mapping[str, Any], ...] | None
    guidance: float
    scheduler: Any
    shape: tuple[int, ...]
    keep_norm: bool = False

    def denoiser(
        self, model: nn.Module, indices: Sequence[int], device: torch.device, guided: bool = True
    ) -> Denoiser:
        """The model with the inputs of some conditions, one an image, filled in."""
        given = _batched([self.inputs[i] for i in indices], device)
        if self.empty is None or self.guidance == 1.0 or not guided:
            return Denoiser(model, given)
        return Denoiser(
            model,
            given,
            _batched([self.empty[i] for i in indices], device),
            self.guidance,
            keep_norm=self.keep_norm,
        )

    @property
    def evaluations(self) -> int:
        """Evaluations of the model an image takes: steps, twice with guidance."""
        twice = self.empty is not None and self.guidance != 1.0
        return len(self.scheduler.timesteps) * (2 if twice else 1)


def component_of(pipeline: Any) -> tuple[str, nn.Module]:
    """The denoiser of a pipeline and its name in it.

    Raises:
        ValueError: it has none we can cut, with what it has.
    """
    components: Mapping[str, Any] = pipeline.components
    for name in ("transformer", "unet"):
        if type(components.get(name)).__name__ in known_classes():
            return name, components[name]
    held = {k: type(v).__name__ for k, v in components.items() if isinstance(v, nn.Module)}
    raise ValueError(
        f"{type(pipeline).__name__} has no denoiser hwprune can cut: expected a transformer or unet of "
        f"class {', '.join(known_classes())}, got {held or 'no modules'}"
    )


def empty_class(model: nn.Module) -> int | None:
    """The label of classifier-free guidance's empty class, read off the model; None = it has none.

    diffusers' label tables have one row more than classes where labels were dropped in training.
    """
    found = set()
    for module in model.modules():
        table: Any = getattr(module, "embedding_table", None)
        classes: Any = getattr(module, "num_classes", None)
        labels = type(module).__name__ == "LabelEmbedding" and isinstance(table, nn.Embedding)
        if labels and table.num_embeddings == classes + 1:
            found.add(int(classes))
    return found.pop() if len(found) == 1 else None


def classes_of(model: nn.Module) -> int:
    """How many classes a model has; 0 = it takes no labels."""
    config = dict(getattr(model, "config", {}))
    if type(model).__name__ == "DiTTransformer2DModel":
        return int(config["num_embeds_ada_norm"])
    return int(config.get("num_class_embeds") or 0)


def label_conditions(
    model: nn.Module,
    scheduler: Any,
    labels: Sequence[int] | None,
    *,
    steps: int,
    guidance: float | None = None,
) -> Conditions:
    """Classes to draw by a class-conditional model.

    Args:
        model: the denoiser.
        scheduler: of diffusers; it is copied.
        labels: class numbers; None = the empty class alone.
        steps: of the solver.
        guidance: None = 1.

    Raises:
        ValueError: the model takes no labels, a label is out of range, or guidance is asked for and the
            model has no empty class.
    """
    classes, empty = classes_of(model), empty_class(model)
    if not classes:
        raise ValueError(
            f"{type(model).__name__} takes no class labels; give prompts, with the whole pipeline"
        )
    weight = 1.0 if guidance is None or labels is None else float(guidance)
    if empty is None and (labels is None or weight != 1.0):
        raise ValueError(
            f"{type(model).__name__} has no empty class (its label table has one row a class), so there is "
            "nothing to guide by; give labels and guidance 1"
        )
    chosen = [empty] if labels is None else [int(label) for label in labels]
    if not chosen:
        raise ValueError("labels: expected at least one class, got none")
    odd = [label for label in chosen if label is None or not 0 <= label <= (empty or classes - 1)]
    if odd:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {odd[0]}")

    def inputs(label: int | None) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([label])}

    return Conditions(
        tuple(str(label) for label in chosen),
        tuple(inputs(label) for label in chosen),
        tuple(inputs(empty) for _ in chosen) if weight != 1.0 else None,
        weight,
        timed(scheduler, steps),
        latent_shape(model),
    )


def latent_shape(model: nn.Module) -> tuple[int, ...]:
    """[C, H, W] of a model's latent, by its configuration.

    Raises:
        ValueError: the configuration has no size.
    """
    config = dict(getattr(model, "config", {}))
    size, channels = config.get("sample_size"), config.get("in_channels")
    if not size or not channels:
        raise ValueError(f"{type(model).__name__}: its configuration tells no latent size")
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def timed(scheduler: Any, steps: int) -> Any:
    """A copy of a scheduler with its timesteps set.

    Raises:
        ValueError: fewer than one step, or more than it knows, or it needs what only a pipeline knows.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    copied = copy.deepcopy(scheduler)
    try:
        copied.set_timesteps(steps)
    except (ValueError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(scheduler).__name__} cannot be set to {steps} steps: {said}; give the whole pipeline, or "
            "another number of steps"
        ) from error
    return copied


def conditions_of(
    model: Any,
    asked: Sequence[int] | Sequence[str] | None,
    *,
    steps: int,
    scheduler: Any = None,
    guidance: float | None = None,
    cache: Path | None = None,
) -> Conditions:
    """Conditions for what a user gives: labels, prompts, or None for neither.

    Args:
        model: a pipeline, or a denoiser alone.
        asked: class labels, or prompts.
        steps: of the solver.
        scheduler: None = the pipeline's.
        guidance: None = 1 for labels, the pipeline's own default for prompts.
        cache: folder that keeps encoded prompts, so that they are encoded once.

    Raises:
        ValueError: no scheduler, labels and prompts mixed, prompts without a pipeline; see
            `label_conditions` and `prompt_conditions`.
    """
    whole = hasattr(model, "components")
    denoiser = component_of(model)[1] if whole else model
    scheduler = scheduler or (model.scheduler if whole else None)
    if scheduler is None:
        raise ValueError("a denoiser alone does not say how it is sampled; give its scheduler")
    words = asked is not None and any(isinstance(item, str) for item in asked)
    if words or (asked is None and not classes_of(denoiser)):
        if not whole:
            raise ValueError(
                f"{type(denoiser).__name__} alone cannot read prompts; give the whole pipeline, or "
                "conditions made of embeddings (hwprune.conditions.Conditions)"
            )
        if words and not all(isinstance(item, str) for item in asked or ()):
            raise ValueError("conditions: expected labels or prompts, got both")
        prompts = None if asked is None else [str(item) for item in asked]
        return prompt_conditions(model, prompts, steps=steps, guidance=guidance, cache=cache)
    labels = None if asked is None else [int(item) for item in asked]
    return label_conditions(denoiser, scheduler, labels, steps=steps, guidance=guidance)


def prompt_conditions(
    pipeline: Any,
    prompts: Sequence[str] | None,
    *,
    steps: int,
    guidance: float | None = None,
    cache: Path | None = None,
) -> Conditions:
    """Prompts, encoded by a pipeline's own encoders.

    Args:
        pipeline: of diffusers, unchanged.
        prompts: at least one; None = the empty prompt alone, without guidance by it.
        steps: of the solver.
        guidance: the pipeline's guidance_scale; None = its own default.
        cache: folder that keeps encoded prompts.

    Raises:
        ValueError: no prompts, or the pipeline calls its denoiser in a way that is not known here.
    """
    alone = prompts is None
    prompts = [""] if prompts is None else prompts
    if not alone and not (prompts and all(prompt.strip() for prompt in prompts)):
        raise ValueError(
            f"prompts: expected at least one and none of them empty, got {len(prompts)}; write one a line"
        )
    _, model = component_of(pipeline)
    defaults = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in defaults:
        raise ValueError(f"{type(pipeline).__name__} takes no prompts; give labels")
    if guidance is None and "guidance_scale" in defaults:
        guidance = defaults["guidance_scale"].default
    found = encoded(pipeline, model, prompts, steps=steps, guidance=guidance, cache=cache)
    empty = () if alone else found.empty
    weight = found.weight if empty else 1.0
    return Conditions(
        tuple(prompts),
        found.inputs,
        empty or None,
        weight,
        copy.deepcopy(pipeline.scheduler),
        found.shape,
        found.keep_norm,
    )


def _batched(parts: Sequence[Any], device: torch.device, key: str = "") -> Any:
    """Batches of one as one batch, on a device."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _batched([part[name] for part in parts], device, name) for name in first}
    if isinstance(first, Tensor):
        if key in _ONCE or first.ndim == 0:
            return first.to(device)
        if any(part.shape != first.shape for part in parts):
            raise ValueError(
                f"{key}: {tuple(first.shape)} and other shapes cannot be one batch; use batch=1"
            )
        return torch.cat(list(parts)).to(device)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return first
