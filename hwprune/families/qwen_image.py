"""QwenImageTransformer2DModel: joint attention over an image and a text stream, an MLP in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.diffusers_layers import attention, feed_forward
from hwprune.units import AnyLayer, ResidualBlock

CLASSES = ("QwenImageTransformer2DModel",)


def tiny() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random Qwen-Image: model, latent [2, 16, 16], its other inputs."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]],
    }
    return model.eval(), torch.randn(2, 16, 16), inputs


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers in order, and the reasons for those left dense."""
    layers: list[AnyLayer] = []
    left: list[str] = []
    blocks: Any = model.get_submodule("transformer_blocks")
    for stage in range(len(blocks)):
        name = f"transformer_blocks.{stage}"
        for child, find in (
            ("attn", attention),
            ("img_mlp", feed_forward),
            ("txt_mlp", feed_forward),
        ):
            found = find(model, f"{name}.{child}", stage)
            if isinstance(found, str):
                left.append(found)
            else:
                layers.append(found)
        outputs = ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2")
        layers.append(ResidualBlock(name, stage, tuple(f"{name}.{x}" for x in outputs)))
    return layers, left
