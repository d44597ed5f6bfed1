"""Tiny diffusion models with random weights: a DiT, and whole pipelines that read prompts letter by letter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hwprune.families import dit


def tiny_dit(seed: int = 0) -> nn.Module:
    """3 blocks, 3 heads of 8, 10 classes and an empty one, images 1 x 8 x 8; nothing in it is zero."""
    model, _, _ = dit.tiny()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.eval()


def flow() -> Any:
    """A one-step solver whose steps are z + (sigma' - sigma) v."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def _clip(name: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=12,
    )
    return getattr(transformers, name)(config).eval()


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=54, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def stable_diffusion(folder: Path) -> Any:
    """A pipeline with a one-letter tokenizer whose files go to a folder."""
    import diffusers
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *[f"{x}</w>" for x in letters], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 8
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=_clip("CLIPTextModel"),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path) -> Any:
    """Two text encoders, pooled text and sizes beside the prompt."""
    import diffusers

    base = stable_diffusion(folder)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=_clip("CLIPTextModel"),
        text_encoder_2=_clip("CLIPTextModelWithProjection"),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3(folder: Path) -> Any:
    """Three text encoders, flow matching."""
    import diffusers

    base = stable_diffusion(folder)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=base.vae,
        text_encoder=_clip("CLIPTextModelWithProjection"),
        tokenizer=base.tokenizer,
        text_encoder_2=_clip("CLIPTextModelWithProjection"),
        tokenizer_2=base.tokenizer,
        text_encoder_3=_t5(24),
        tokenizer_3=base.tokenizer,
    )


def flux(folder: Path) -> Any:
    """Packed latents, positions, embedded guidance, timesteps shifted by the image's size."""
    import diffusers

    base = stable_diffusion(folder)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=base.vae,
        text_encoder=_clip("CLIPTextModel"),
        tokenizer=base.tokenizer,
        text_encoder_2=_t5(12),
        tokenizer_2=base.tokenizer,
        transformer=transformer.eval(),
    )
    pipeline.default_sample_size = 8
    return pipeline


def pixart(folder: Path) -> Any:
    """Masks over the text, a learned variance the solver does not use."""
    import diffusers

    base = stable_diffusion(folder)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=32,
        cross_attention_dim=24,
        caption_channels=12,
    )
    # A side of 32 latents of 8 pixels each is 256, one of the sizes the pipeline knows.
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=base.tokenizer,
        text_encoder=_t5(12),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


class _Letters(nn.Module):
    """A text encoder of one embedding, called as Qwen2.5-VL is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(54, 12)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: Any, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[self.table(input_ids)])


def qwen(folder: Path) -> Any:
    """Text of its own length with a mask; guidance calls the model a second time and keeps the norm."""
    import diffusers

    from hwprune.families import qwen_image

    model, _, _ = qwen_image.tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.manual_seed(0)
    base = stable_diffusion(folder)
    base.tokenizer.model_max_length = 1000
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=_Letters(),
        tokenizer=base.tokenizer,
        transformer=model,
    )
    pipeline.default_sample_size = 8
    return pipeline
