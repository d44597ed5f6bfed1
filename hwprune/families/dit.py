"""DiTTransformer2DModel and PixArtTransformer2DModel: columns of BasicTransformerBlocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.basic_block import BLOCK, block_layers
from hwprune.families.diffusers_layers import module_names
from hwprune.units import AnyLayer, ResidualBlock

CLASSES = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def tiny() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random DiT: model, latent [2, 1, 8, 8], its other inputs."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model.eval(), torch.randn(2, 1, 8, 8), {"class_labels": torch.tensor([3, 7])}


def tiny_pixart() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random PixArt: model, latent [2, 4, 8, 8], its other inputs."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=24,
        caption_channels=12,
    )
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model.eval(), torch.randn(2, 4, 8, 8), inputs


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers in order, and the reasons for those left dense."""
    layers: list[AnyLayer] = []
    left: list[str] = []
    for stage, name in enumerate(module_names(model, BLOCK)):
        found, reasons = block_layers(model, name, stage)
        if stage == 0 and type(model).__name__ == "DiTTransformer2DModel":
            # The output layer is conditioned by transformer_blocks[0].norm1.emb.
            found = [layer for layer in found if not isinstance(layer, ResidualBlock)]
            left.append(f"{name}: it holds the embedding the output layer uses, so it stays")
        layers += found
        left += reasons
    return layers, left
