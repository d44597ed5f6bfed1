"""transformers' vision encoders: ViT, DeiT, DINOv2 (with registers too), the vision towers of CLIP and SigLIP.

All are columns of blocks with separate q, k and v projections. Position embeddings, poolers (SigLIP's by
attention too), projections and classifiers stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.timm_vit import full_name
from hwprune.families.vision_units import sorted_out, vision_units
from hwprune.transformers_attention import SlimPairAttention
from hwprune.units import AttentionLayer, Layer, MlpLayer, Rows, Units, get_linear

CLASSES = (
    *("ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification"),
    "DeiTForImageClassificationWithTeacher",
    *("Dinov2Model", "Dinov2ForImageClassification"),
    *("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    *("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    *("SiglipVisionModel", "SiglipForImageClassification"),
)
TAKES = f"transformers' {', '.join(CLASSES)}"
# By class: block, its attention, its MLP. Other models have classes that only look alike.
_BLOCKS = {
    "vit.modeling_vit.ViTLayer": ("attention", "mlp"),
    "deit.modeling_deit.DeiTLayer": ("attention", "mlp"),
    "dinov2.modeling_dinov2.Dinov2Layer": ("attention", "mlp"),
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": (
        "attention",
        "mlp",
    ),
    "clip.modeling_clip.CLIPEncoderLayer": ("self_attn", "mlp"),
    "siglip.modeling_siglip.SiglipEncoderLayer": ("self_attn", "mlp"),
}
_MODELS = "transformers.models."
_INPUTS = (("fc1",), ("gate_proj", "up_proj"))
_OUTPUTS = ("fc2", "down_proj")


def _vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_SIZES, intermediate_size=96, num_labels=10)
    return _filled(ViTForImageClassification, config)


def _dinov2() -> tuple[nn.Module, Tensor]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**_SIZES, use_swiglu_ffn=True, num_register_tokens=2)
    return _filled(Dinov2WithRegistersModel, config)


def _clip() -> tuple[nn.Module, Tensor]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_SIZES, intermediate_size=96, projection_dim=20)
    return _filled(CLIPVisionModelWithProjection, config)


def _siglip() -> tuple[nn.Module, Tensor]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return _filled(SiglipVisionModel, SiglipVisionConfig(**_SIZES, intermediate_size=96))


_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def _filled(kind: Any, config: Any) -> tuple[nn.Module, Tensor]:
    """The model with weights large enough for every part to matter, and an input [2, 3, 32, 32]."""
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    return model, torch.randn(2, 3, 32, 32)


def examples() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Tiny random models, each with an input, for tests."""
    return {"vit": _vit, "dinov2": _dinov2, "clip": _clip, "siglip": _siglip}


def takes(model: nn.Module) -> bool:
    """Whether it is one of `CLASSES`, or made from one."""
    return any(
        c.__name__ in CLASSES and c.__module__.startswith(_MODELS) for c in type(model).__mro__
    )


def _block_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Name of each block, in order -> the names of its attention and its MLP inside it."""
    return {
        name: _BLOCKS[full_name(module).removeprefix(_MODELS)]
        for name, module in model.named_modules()
        if full_name(module).removeprefix(_MODELS) in _BLOCKS
    }


def stages(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in the order the model runs them."""
    return [model.get_submodule(name) for name in _block_names(model)]


def _attention(model: nn.Module, name: str, stage: int) -> AttentionLayer | str:
    """The layer, or the reason it is left dense."""
    attn: Any = model.get_submodule(name)
    if not all(hasattr(attn, f"{p}_proj") for p in "qkv"):
        return f"{name}: attention of type {full_name(attn)} is not known to be cut exactly"
    out = f"{name}.{'o_proj' if hasattr(attn, 'o_proj') else 'out_proj'}"
    head_dim, width = int(attn.head_dim), get_linear(model, out).in_features
    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale
    q, k, v = (Rows(f"{name}.{p}_proj", 0, width) for p in "qkv")
    return AttentionLayer(
        name,
        stage,
        width // head_dim,
        head_dim,
        float(scale),
        q,
        k,
        v,
        out,
        slim=SlimPairAttention,
    )


def _mlp(model: nn.Module, name: str, stage: int) -> MlpLayer | str:
    """The layer, or the reason it is left dense."""
    mlp = model.get_submodule(name)
    for inputs, output in zip(_INPUTS, _OUTPUTS, strict=True):
        if all(hasattr(mlp, part) for part in (*inputs, output)):
            out = f"{name}.{output}"
            hidden = get_linear(model, out).in_features
            rows = tuple(Rows(f"{name}.{part}", 0, hidden) for part in inputs)
            return MlpLayer(name, stage, rows, out, hidden)
    return f"{name}: MLP of type {full_name(mlp)} is not known to be cut exactly"


def find_layers(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """All attention and MLP layers in order, and the reasons for those left dense.

    Raises:
        ValueError: a linear of a layer is no `nn.Linear`.
    """
    return sorted_out(
        model,
        (
            find(model, f"{block}.{part}", stage)
            for stage, (block, parts) in enumerate(_block_names(model).items())
            for find, part in zip((_attention, _mlp), parts, strict=True)
        ),
    )


def find_units(
    model: nn.Module, kinds: Sequence[str] | None = None, *, block: tuple[int, int] = (32, 32)
) -> list[Units]:
    """Everything of `kinds` that can be removed from `model`; see `vision_units`."""
    return vision_units(model, find_layers(model), kinds, block=block)
