"""SanaTransformer2DModel: linear self-attention, cross-attention, and a convolutional feed-forward.

A neuron of the feed-forward is a pair of channels (hidden and gate) of the 1x1 convolution in front, the
same pair of the 3x3 depthwise one, and one input channel of the 1x1 convolution behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.diffusers_layers import attention, class_path
from hwprune.units import AnyLayer, Columns, CoupledLayer, ResidualBlock, Rows

CLASSES = ("SanaTransformer2DModel",)


def tiny() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random Sana: model, latent [2, 4, 8, 8], its other inputs."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=10,
        sample_size=8,
    )
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 10), "encoder_attention_mask": mask}
    return model.eval(), torch.randn(2, 4, 8, 8), inputs


def _convolutional(model: nn.Module, name: str, stage: int) -> CoupledLayer | str:
    ff: Any = model.get_submodule(name)
    if not class_path(ff).endswith(".sana_transformer.GLUMBConv"):
        return f"{name}: feed-forward of type {class_path(ff)} is not known to be cut exactly"
    if ff.residual_connection or ff.norm is not None:
        return f"{name}: it adds its own residual or norm"
    hidden = int(ff.conv_point.in_channels)
    inputs = tuple(
        Rows(f"{name}.{conv}", half * hidden, hidden)
        for conv in ("conv_inverted", "conv_depth")
        for half in (0, 1)
    )
    outputs = (Columns(f"{name}.conv_point", 0, hidden),)
    return CoupledLayer(name, stage, "neuron", hidden, 1, inputs, outputs, (), "map")


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers in order, and the reasons for those left dense."""
    layers: list[AnyLayer] = []
    left: list[str] = []
    blocks: Any = model.get_submodule("transformer_blocks")
    for stage, block in enumerate(blocks):
        name = f"transformer_blocks.{stage}"
        outputs = []
        for child in ("attn1", "attn2", "ff"):
            if getattr(block, child, None) is None:
                continue
            find = _convolutional if child == "ff" else attention
            found = find(model, f"{name}.{child}", stage)
            if isinstance(found, str):
                left.append(found)
            else:
                layers.append(found)
            outputs.append(f"{name}.{child}.{'conv_point' if child == 'ff' else 'to_out.0'}")
        layers.append(ResidualBlock(name, stage, tuple(outputs)))
    return layers, left
