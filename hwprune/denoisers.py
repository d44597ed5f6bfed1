"""Any diffusers denoiser as one function (latent, timestep) -> prediction, guidance included.

Classifier-free guidance is inside the function, so its gradient runs through both branches; guidance that
a model was distilled to take as an input (FLUX.1-dev) is one more input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What pipelines hand these models is the timestep divided by 1000, which they multiply again inside.
_PER_MILLE = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
_UNBATCHED = ("img_ids", "txt_ids")  # positions, the same for every image of a batch


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A model with everything but the latent and the timestep filled in.

    Attributes:
        model: UNet2DConditionModel, a diffusion transformer of diffusers, or any module called alike:
            model(latent, timestep=[B], **inputs, return_dict=False)[0].
        inputs: the model's other inputs by name (encoder_hidden_states, class_labels,
            added_cond_kwargs ...), batched as the latent. Text is encoded once, outside.
        unconditional: the same inputs for the empty prompt or class; None = no such guidance.
        guidance: w of eps_u + w (eps_c - eps_u); 1 = the conditional prediction alone.
        embedded_guidance: the input `guidance` of guidance-distilled models; None = not given.
        keep_norm: rescale the guided prediction to the norm of the conditional one, per token, as
            Qwen-Image's pipeline does.

    Raises:
        ValueError: guidance other than 1 without `unconditional`, or inputs that do not pair up.
    """

    model: nn.Module
    inputs: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, Any] | None = None
    guidance: float = 1.0
    embedded_guidance: float | None = None
    keep_norm: bool = False

    def __post_init__(self) -> None:
        """Check that guidance has what it needs."""
        if self.guided and self.unconditional is None:
            raise ValueError(
                f"guidance {self.guidance} mixes a conditional with an unconditional prediction, but "
                "unconditional is None; give the inputs of the empty prompt or class, or guidance=1"
            )
        if self.unconditional is not None and self.inputs.keys() != self.unconditional.keys():
            odd = sorted(self.inputs.keys() ^ self.unconditional.keys())
            raise ValueError(f"inputs and unconditional do not pair up: {', '.join(odd)}")

    @property
    def guided(self) -> bool:
        """Whether the model runs on both branches."""
        return self.guidance != 1.0

    def __call__(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Predict.

        Args:
            latent: [B, ...], after the scheduler's scaling; the model sees it in its own dtype.
            timestep: scalar, as in scheduler.timesteps.

        Returns:
            The guided prediction, shape and dtype of `latent`.
        """
        if not self.guided:
            return self._predict(latent, timestep, self.inputs)
        assert self.unconditional is not None
        both = _joined(self.unconditional, self.inputs)
        without, given = self._predict(torch.cat([latent, latent]), timestep, both).chunk(2)
        guided = without + self.guidance * (given - without)
        if self.keep_norm:
            guided = guided * (given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return guided

    def _predict(self, latent: Tensor, timestep: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        extra = {}
        if self.embedded_guidance is not None:
            scale = torch.tensor(self.embedded_guidance, dtype=torch.float32, device=latent.device)
            extra["guidance"] = scale.expand(len(latent))
        time = timestep.to(latent.device).expand(len(latent))
        given = latent.to(floating_dtype(self.model, latent.dtype))
        out: Tensor = self.model(
            given,
            timestep=model_time(self.model, time),
            **inputs,
            **extra,
            return_dict=False,
        )[0]
        if out.ndim == 4 and out.shape[1] == 2 * latent.shape[1]:
            out = out[
                :, : latent.shape[1]
            ]  # the rest is a learned variance, which solvers do not use
        if out.shape != latent.shape:
            raise ValueError(
                f"{type(self.model).__name__} predicts {tuple(out.shape)} for a latent of "
                f"{tuple(latent.shape)}; expected the same shape, or twice the channels"
            )
        return out.to(latent.dtype)


def model_time(model: nn.Module, timestep: Tensor) -> Tensor:
    """The timestep as this model's own pipeline hands it over."""
    name = type(model).__name__
    if name in _PER_MILLE:
        return timestep / 1000
    if name.startswith("Sana"):
        return timestep * float(getattr(getattr(model, "config", None), "timestep_scale", 1.0))
    return timestep


def floating_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The type of a model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def _joined(without: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _pair(key, without[key], given[key]) for key in given}


def _pair(key: str, without: Any, given: Any) -> Any:
    """The two halves of one input: batches one after the other, the rest once."""
    if isinstance(given, Mapping) and isinstance(without, Mapping):
        return _joined(without, given)
    if isinstance(given, Tensor) and isinstance(without, Tensor):
        if key in _UNBATCHED or given.ndim == 0:
            return given
        if given.shape[1:] != without.shape[1:]:
            raise ValueError(
                f"{key}: {tuple(without.shape)} unconditional, {tuple(given.shape)} conditional; pad the "
                "shorter text to the same number of tokens, as the pipeline does"
            )
        return torch.cat([without, given])
    if isinstance(given, list) and isinstance(without, list):
        return [*without, *given]
    if type(given) is type(without) and given == without:
        return given
    raise ValueError(f"{key}: expected two tensors or two equal values, got {without!r}, {given!r}")
