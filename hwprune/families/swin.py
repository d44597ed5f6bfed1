"""timm's Swin transformers: heads with their columns of the position bias table, channels, neurons, tiles.

Blocks lie in stages of different width and token count, with a patch merging between, which stays dense.
The attention of Swin v2 takes q and k to unit length and makes its biases by an MLP; it stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.timm_vit import full_name, mlp_layer
from hwprune.families.vision_units import sorted_out, vision_units
from hwprune.units import AttentionLayer, Layer, Rows, Units, get_linear
from hwprune.window_attention import SlimWindowAttention

TAKES = "timm's Swin transformers (swin_*, swinv2_*, swin_s3_*)"
_MODELS = (
    "timm.models.swin_transformer.SwinTransformer",
    "timm.models.swin_transformer_v2.SwinTransformerV2",
)
_ATTENTION = "timm.models.swin_transformer.WindowAttention"
_ATTENTION_V2 = "timm.models.swin_transformer_v2.WindowAttention"


def _tiny(name: str) -> tuple[nn.Module, Tensor]:
    """Two stages of 14 x 14 and 7 x 7 tokens in windows of 4 x 4: they have to be padded."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        name,
        img_size=28,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 3),
        num_classes=10,
    )
    # As in `timm_vit.example`; so do the position biases, and v2's norms behind each branch start at zero.
    torch.nn.init.normal_(model.head.fc.weight, std=0.5)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias_table", "norm1.weight", "norm2.weight")):
            torch.nn.init.normal_(parameter)
    return model.eval(), torch.randn(2, 3, 28, 28)


def examples() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Tiny random models, each with an input, for tests."""
    return {
        "v1": lambda: _tiny("swin_tiny_patch4_window7_224"),
        "v2": lambda: _tiny("swinv2_tiny_window8_256"),
    }


def takes(model: nn.Module) -> bool:
    """Whether it is one of timm's Swin classes, or made from one."""
    return any(f"{c.__module__}.{c.__qualname__}" in _MODELS for c in type(model).__mro__)


def stages(model: nn.Module) -> list[nn.Module]:
    """Blocks and the patch mergings between them, in the order the model runs them."""
    found: list[nn.Module] = []
    for stage in _children(model, "layers"):
        merging = stage.get_submodule("downsample")
        found += [] if isinstance(merging, nn.Identity) else [merging]
        found += _children(stage, "blocks")
    return found


def _children(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name).children())


def _attention(model: nn.Module, name: str, stage: int) -> AttentionLayer | str:
    """The layer, or the reason it is left dense."""
    attn: Any = model.get_submodule(name)
    if full_name(attn) == _ATTENTION_V2:
        return (
            f"{name}: attention of Swin v2 takes q and k to unit length (cosine attention) and has its "
            "position biases from an MLP over all heads"
        )
    if full_name(attn) != _ATTENTION:
        return f"{name}: attention of type {full_name(attn)} is not known to be cut exactly"
    heads = int(attn.num_heads)
    width = get_linear(model, f"{name}.proj").in_features
    q, k, v = (Rows(f"{name}.qkv", i * width, width) for i in range(3))
    return AttentionLayer(
        name,
        stage,
        heads,
        width // heads,
        float(attn.scale),
        q,
        k,
        v,
        f"{name}.proj",
        tables=(f"{name}.relative_position_bias_table",),
        window=int(attn.window_area),
        slim=SlimWindowAttention,
    )


def find_layers(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """All attention and MLP layers in order, and the reasons for those left dense.

    Raises:
        ValueError: a linear of a layer is no `nn.Linear`.
    """
    names = {id(m): n for n, m in model.named_modules()}
    return sorted_out(
        model,
        (
            find(model, f"{names[id(block)]}.{part}", stage)
            for stage, block in enumerate(stages(model))
            if hasattr(block, "attn")  # the others merge patches
            for find, part in ((_attention, "attn"), (mlp_layer, "mlp"))
        ),
    )


def find_units(
    model: nn.Module, kinds: Sequence[str] | None = None, *, block: tuple[int, int] = (32, 32)
) -> list[Units]:
    """Everything of `kinds` that can be removed from `model`; see `vision_units`."""
    return vision_units(model, find_layers(model), kinds, block=block)
