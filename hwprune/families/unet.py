"""UNet2DConditionModel: Stable Diffusion 1.5, 2 and XL, their turbo, lightning and LCM students.

Heads of self- and cross-attention, (hidden, gate) pairs of the GEGLU feed-forwards, whole transformer
blocks. Convolutions, resnets and embeddings are left dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.basic_block import BLOCK, block_layers
from hwprune.families.diffusers_layers import module_names
from hwprune.units import AnyLayer

CLASSES = ("UNet2DConditionModel",)


def tiny() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random UNet of SDXL's make: model, latent [2, 4, 8, 8], its other inputs."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(12, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=20,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 10,
    )
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.rand(2, 6)}
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 20), "added_cond_kwargs": added}
    return model.eval(), torch.randn(2, 4, 8, 8), inputs


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers in order, and the reasons for those left dense."""
    layers: list[AnyLayer] = []
    left: list[str] = []
    for stage, name in enumerate(module_names(model, BLOCK)):
        found, reasons = block_layers(model, name, stage)
        layers += found
        left += reasons
    return layers, left
