"""Stable Diffusion 3 and 3.5, FLUX.1: image and text streams that meet in one joint attention.

A head of a joint attention is one unit over both streams. FLUX's single blocks read heads and neurons by
one fused projection, whose columns are [heads | neurons].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.diffusers_layers import attention, feed_forward
from hwprune.units import AnyLayer, Columns, CoupledLayer, ResidualBlock, Rows

CLASSES = ("SD3Transformer2DModel", "FluxTransformer2DModel")


def tiny() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random FLUX with two blocks of each kind: model, latent [2, 16, 8], its other inputs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "guidance": torch.full([2], 3.5),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.arange(48.0).view(16, 3) / 8,
    }
    return model.eval(), torch.randn(2, 16, 8), inputs


def tiny_sd3() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A tiny random SD3.5 (qk-norm, one dual attention): model, latent [2, 4, 8, 8], other inputs."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
    }
    return model.eval(), torch.randn(2, 4, 8, 8), inputs


def _double(model: nn.Module, name: str, stage: int) -> tuple[list[AnyLayer], list[str]]:
    """A block with two streams: SD3's JointTransformerBlock or FLUX's FluxTransformerBlock."""
    block: Any = model.get_submodule(name)
    layers: list[AnyLayer] = []
    left: list[str] = []
    outputs: list[str] = []
    for child, linears in (
        ("attn", ("to_out.0", "to_add_out")),
        ("attn2", ("to_out.0",)),
        ("ff", ("net.2",)),
        ("ff_context", ("net.2",)),
    ):
        module = getattr(block, child, None)
        if module is None:
            continue
        find = attention if child.startswith("attn") else feed_forward
        found = find(model, f"{name}.{child}", stage)
        if isinstance(found, str):
            left.append(found)
        else:
            layers.append(found)
        present = [x for x in linears if getattr(module, x.split(".")[0], None) is not None]
        outputs += [f"{name}.{child}.{x}" for x in present]
    return [*layers, ResidualBlock(name, stage, tuple(outputs))], left


def _single(model: nn.Module, name: str, stage: int) -> tuple[list[AnyLayer], list[str]]:
    """FLUX's FluxSingleTransformerBlock: one stream, heads and neurons side by side."""
    block: Any = model.get_submodule(name)
    out = f"{name}.proj_out"
    left: list[str] = []
    layers: list[AnyLayer] = []
    # Where tensor parallelism splits the fused projection's input: diffusers notes [heads, neurons].
    packed = hasattr(block.proj_out, "_tp_packed_row_blocks")
    heads = attention(model, f"{name}.attn", stage, outputs=(out,))
    if isinstance(heads, str):
        left.append(heads)
    else:
        split = ((f"{out}._tp_packed_row_blocks.0", heads.width),) if packed else ()
        layers.append(replace(heads, attributes=(*heads.attributes, *split)))
    wide, hidden = int(block.attn.to_q.out_features), int(block.proj_mlp.out_features)
    layers.append(
        CoupledLayer(
            f"{name}.proj_mlp",
            stage,
            "neuron",
            hidden,
            1,
            (Rows(f"{name}.proj_mlp", 0, hidden),),
            (Columns(out, wide, hidden),),
            (
                (f"{name}.mlp_hidden_dim", 1),
                *(((f"{out}._tp_packed_row_blocks.1", 1),) if packed else ()),
            ),
            "width",
        )
    )
    return [*layers, ResidualBlock(name, stage, (out,))], left


def find_layers(model: nn.Module) -> tuple[list[AnyLayer], list[str]]:
    """All layers in order, and the reasons for those left dense."""
    layers: list[AnyLayer] = []
    left: list[str] = []
    stage = 0
    for place, find in (("transformer_blocks", _double), ("single_transformer_blocks", _single)):
        for i in range(len(getattr(model, place, ()))):
            found, reasons = find(model, f"{place}.{i}", stage)
            layers += found
            left += reasons
            stage += 1
    return layers, left
