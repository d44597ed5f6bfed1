"""timm's plain vision transformers: ViT, DeiT, DINOv2, DINOv3/EVA-style blocks, SigLIP towers.

Finds the attention and MLP layers of any timm model whose blocks call an `attn` and an `mlp` on a
residual stream, and says what can leave together. What cannot be cut exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.families.vision_units import sorted_out, vision_units
from hwprune.units import AttentionLayer, Layer, MlpLayer, Rows, Units

TAKES = "timm's vision transformers with `blocks` (vit_*, deit*, dinov2, dinov3, eva, clip, siglip)"
# By full name: BEiT, SAM and others call classes of their own, with position biases, "Attention" too.
_EVA = "timm.models.eva.EvaAttention"  # of EVA and DINOv3
_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.vision_transformer.Attention",  # its place before timm 1.0.17
    _EVA,
)
_MLP = ("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU")


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random ViT with ragged sizes and an input, for tests: model, x [2, 3, 32, 32]."""
    return _tiny("vit_tiny_patch16_224", depth=3, num_classes=10)


def _tiny(name: str, *, depth: int = 2, num_classes: int = 0) -> tuple[nn.Module, Tensor]:
    """A timm architecture in small; features instead of logits without classes."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        name,
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=depth,
        num_heads=3,
        num_classes=num_classes,
    )
    # timm starts classifiers (two in distilled models), LayerScale and the queries of SigLIP near zero: then no
    # layer matters to the output and every curve is flat.
    near_zero = ("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2", "latent")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("head.weight", "head_dist.weight", *near_zero)):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval(), torch.randn(2, 3, 32, 32)


def examples() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Tiny random models, each with an input, for tests."""
    return {
        "vit": example,
        "deit distilled": lambda: _tiny("deit_tiny_distilled_patch16_224", num_classes=10),
        # Registers, LayerScale, and a SwiGLU whose two halves are one linear.
        "dinov2": lambda: _tiny("vit_giant_patch14_reg4_dinov2"),
        # Rotary embeddings, and a SwiGLU of two linears; as timm builds the small and the large ones.
        "dinov3": lambda: _tiny("vit_small_plus_patch16_dinov3"),
        "dinov3, large": lambda: _tiny("vit_7b_patch16_dinov3"),
        "eva02": lambda: _tiny("eva02_base_patch14_224", num_classes=10),
        "clip": lambda: _tiny("vit_base_patch16_clip_quickgelu_224", num_classes=10),
        # A head that pools by attention, with an MLP of its own.
        "siglip": lambda: _tiny("vit_base_patch16_siglip_224"),
    }


def takes(model: nn.Module) -> bool:
    """Whether the model has a column of `blocks`."""
    return isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList)


def stages(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in the order the model runs them.

    Raises:
        ValueError: the model is not built of such blocks.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise ValueError(f"{type(model).__name__} has no `blocks`: expected {TAKES}")
    for i, block in enumerate(blocks):
        if not (hasattr(block, "attn") and hasattr(block, "mlp")):
            raise ValueError(
                f"blocks.{i} is a {type(block).__name__}, expected a block with `attn` and `mlp` on one "
                "residual stream; parallel blocks are not supported yet"
            )
    return list(blocks)


def full_name(module: nn.Module) -> str:
    """Module and name of its class: BEiT and others have classes of the same name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_identity(module: object) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _attention(model: nn.Module, name: str, stage: int) -> AttentionLayer | str:
    """The layer, or the reason it is left dense."""
    attn: Any = model.get_submodule(name)
    if full_name(attn) not in _ATTENTION:
        return f"{name}: attention of type {full_name(attn)} is not known to be cut exactly"
    if getattr(attn, "q_bias", None) is not None:
        return f"{name}: attention of type {full_name(attn)} has biases of q and v outside of its linear"
    heads, head_dim = int(attn.num_heads), int(attn.head_dim)
    width = heads * head_dim
    if getattr(attn, "num_kv_groups", 1) != 1:
        return f"{name}: grouped-query attention shares k and v between heads"
    if attn.qkv is not None:
        q, k, v = (Rows(f"{name}.qkv", i * width, width) for i in range(3))
    else:
        q, k, v = (Rows(f"{name}.{p}_proj", 0, width) for p in "qkv")
    refused: dict[str, str] = {}
    if not (_is_identity(attn.q_norm) and _is_identity(attn.k_norm)):
        refused["qk"] = "qk-norm normalises q and k over the channels of a head"
    rope = getattr(model, "rope", None)
    if type(attn).__name__ == "AttentionRope" or (full_name(attn) == _EVA and rope is not None):
        refused["qk"] = "rotary embeddings (RoPE) tie q and k channels in pairs"
    if type(rope).__name__ == "RotaryEmbeddingMixed":
        refused["head"] = "mixed rotary embeddings are learned for each head, outside of it"
    if not _is_identity(getattr(attn, "norm", None)):
        reason = "a norm over the attention output mixes all its channels"
        refused |= {"head": reason, "vo": reason, "qk": refused.get("qk", reason)}
    if getattr(attn, "gate", None) is not None:
        reason = "the output gate acts on single channels of the attention output"
        refused |= {"head": reason, "vo": reason, "qk": refused.get("qk", reason)}
    return AttentionLayer(
        name, stage, heads, head_dim, float(attn.scale), q, k, v, f"{name}.proj", refused
    )


def mlp_layer(model: nn.Module, name: str, stage: int) -> MlpLayer | str:
    """An MLP of timm's as a layer, or the reason it is left dense."""
    mlp: Any = model.get_submodule(name)
    if full_name(mlp) not in _MLP or not isinstance(mlp.fc2, nn.Linear):
        return f"{name}: MLP of type {full_name(mlp)} is not known to be cut exactly"
    hidden = mlp.fc2.in_features
    inputs: tuple[Rows, ...]
    refused: dict[str, str] = {}
    if not _is_identity(getattr(mlp, "norm", None)):
        refused["neuron"] = "a norm over the hidden neurons mixes them all"
    if type(mlp).__name__ == "SwiGLU":
        inputs = (Rows(f"{name}.fc1_g", 0, hidden), Rows(f"{name}.fc1_x", 0, hidden))
    elif type(mlp).__name__ == "GluMlp":
        inputs = (Rows(f"{name}.fc1", 0, hidden), Rows(f"{name}.fc1", hidden, hidden))
    else:
        inputs = (Rows(f"{name}.fc1", 0, hidden),)
    return MlpLayer(name, stage, inputs, f"{name}.fc2", hidden, refused)


def find_layers(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """All attention and MLP layers in order, and the reasons for those left dense.

    Raises:
        ValueError: the model is no columnar transformer, or a linear of it is no `nn.Linear`.
    """
    names = {id(m): n for n, m in model.named_modules()}
    return sorted_out(
        model,
        (
            find(model, f"{names[id(block)]}.{part}", stage)
            for stage, block in enumerate(stages(model))
            for find, part in ((_attention, "attn"), (mlp_layer, "mlp"))
        ),
    )


def find_units(
    model: nn.Module, kinds: Sequence[str] | None = None, *, block: tuple[int, int] = (32, 32)
) -> list[Units]:
    """Everything of `kinds` that can be removed from `model`; see `vision_units`."""
    return vision_units(model, find_layers(model), kinds, block=block)
