"""diffusers' BasicTransformerBlock, which Stable Diffusion's UNets, DiT and PixArt are built of."""

from __future__ import annotations

from typing import Any

from torch import nn

from hwprune.families.diffusers_layers import attention, feed_forward
from hwprune.units import AnyLayer, ResidualBlock

BLOCK = "diffusers.models.attention.BasicTransformerBlock"


def block_layers(model: nn.Module, name: str, stage: int) -> tuple[list[AnyLayer], list[str]]:
    """Heads of attn1 and attn2, neurons of ff, and the block as a whole.

    Args:
        model: the denoiser.
        name: of the block.
        stage: its index.

    Returns:
        The layers in the order they run, the block last, and reasons for those left dense.
    """
    block: Any = model.get_submodule(name)
    layers: list[AnyLayer] = []
    left: list[str] = []
    outputs: list[str] = []
    for child in ("attn1", "attn2"):
        if getattr(block, child, None) is not None:
            found = attention(model, f"{name}.{child}", stage)
            outputs.append(f"{name}.{child}.to_out.0")
            layers, left = _sorted_in(found, layers, left)
    layers, left = _sorted_in(feed_forward(model, f"{name}.ff", stage), layers, left)
    if hasattr(block, "fuser"):
        left.append(
            f"{name}: a gated block (GLIGEN) adds its own branch, so depth is left as it is"
        )
    else:
        layers.append(ResidualBlock(name, stage, (*outputs, f"{name}.ff.net.2")))
    return layers, left


def _sorted_in(
    found: AnyLayer | str, layers: list[AnyLayer], left: list[str]
) -> tuple[list[AnyLayer], list[str]]:
    if isinstance(found, str):
        return layers, [*left, found]
    return [*layers, found], left
