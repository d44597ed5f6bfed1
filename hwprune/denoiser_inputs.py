"""Random inputs for a diffusers denoiser, of the shapes its configuration asks for at its usual resolution.

Latents, text and pooled text are drawn from a normal distribution: zeros would run faster and cooler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Tokens of text as each model's own pipeline gives them.
_TEXT_TOKENS = {
    "UNet2DConditionModel": 77,
    "PixArtTransformer2DModel": 300,
    "SanaTransformer2DModel": 300,
    "SD3Transformer2DModel": 333,
    "FluxTransformer2DModel": 512,
    "QwenImageTransformer2DModel": 256,
}
_SEQUENCE_SIDE = 64  # packed latents of a 1024 x 1024 image: 64 x 64 tokens


def random_call(
    model: nn.Module, batch: int, *, side: int | None = None, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """Arguments of one call of a denoiser on the CPU, in float32.

    Args:
        model: with the `config` that diffusers gives it.
        batch: images.
        side: of the latent (or of its tokens, for models that take packed latents); None = the model's own.
        seed: of the draw.

    Returns:
        (latent, the other inputs by name, `timestep` and `return_dict` included).

    Raises:
        ValueError: a class that is not known here, or a configuration that does not tell a size.
    """
    name, config = type(model).__name__, dict(getattr(model, "config", {}))
    if name not in {*_TEXT_TOKENS, "UNet2DModel", "DiTTransformer2DModel"}:
        known = ", ".join(sorted({*_TEXT_TOKENS, "UNet2DModel", "DiTTransformer2DModel"}))
        raise ValueError(f"random inputs of a {name} are not known; known are {known}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {"timestep": torch.full((batch,), 500.0), "return_dict": False}
    if name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        tokens = side or _SEQUENCE_SIDE
        latent = draw(batch, tokens * tokens, int(config["in_channels"]))
        inputs["timestep"] /= 1000
        inputs |= _positions(name, config, batch, tokens)
    else:
        size = side or config.get("sample_size")
        if size is None:
            raise ValueError(
                f"{name}: its configuration has no sample_size; give the latent's side"
            )
        height, width = (size, size) if isinstance(size, int) else size
        latent = draw(batch, int(config["in_channels"]), height, width)
    if name in _TEXT_TOKENS:
        width = _text_width(name, config)
        inputs["encoder_hidden_states"] = draw(batch, _TEXT_TOKENS[name], width)
    if name in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        inputs["pooled_projections"] = draw(batch, int(config["pooled_projection_dim"]))
    if name == "DiTTransformer2DModel":
        inputs["timestep"] = inputs["timestep"].long()
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    elif name.startswith("UNet") and config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    if config.get("addition_embed_type") == "text_time":
        added = 6 * int(config["addition_time_embed_dim"])
        pooled = int(config["projection_class_embeddings_input_dim"]) - added
        ids = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).repeat(batch, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": draw(batch, pooled), "time_ids": ids}
    if name == "PixArtTransformer2DModel":
        added_kwargs: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if config.get("use_additional_conditions") or config.get("sample_size") == 128:
            added_kwargs = {
                "resolution": torch.full((batch, 2), 1024.0),
                "aspect_ratio": torch.ones(batch, 1),
            }
        inputs["added_cond_kwargs"] = added_kwargs
    return latent, inputs


def _text_width(name: str, config: Mapping[str, Any]) -> int:
    """Width of one text token."""
    key = {
        "UNet2DConditionModel": "cross_attention_dim",
        "PixArtTransformer2DModel": "caption_channels",
        "SanaTransformer2DModel": "caption_channels",
    }.get(name, "joint_attention_dim")
    width = config.get("encoder_hid_dim") or config[key] if key.startswith("cross") else config[key]
    if isinstance(width, list | tuple):
        if len(set(width)) > 1:
            raise ValueError(
                f"{name}: {key} {width} differs between blocks, which is not known here"
            )
        width = width[0]
    return int(width)


def _positions(name: str, config: Mapping[str, Any], batch: int, tokens: int) -> dict[str, Any]:
    """Where packed tokens lie in the image."""
    if name == "QwenImageTransformer2DModel":
        mask = torch.ones(batch, _TEXT_TOKENS[name], dtype=torch.long)
        return {"img_shapes": [[(1, tokens, tokens)]] * batch, "encoder_hidden_states_mask": mask}
    rows, columns = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    found: dict[str, Any] = {"img_ids": image, "txt_ids": torch.zeros(_TEXT_TOKENS[name], 3)}
    if config.get("guidance_embeds"):
        found["guidance"] = torch.full((batch,), 3.5)
    return found
