"""Which operation of a profile a module is, by its class: linear, attention, activation or layer norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hwprune.layers import BlockSparseLinear, SlimAttention
from hwprune.ops import NAMES, Op

# By class name, as timm and transformers have GELU classes of their own; the tanh form is costed as the other,
# CLIP's x * sigmoid(1.702 x) as SiLU.
_POINTWISE = {"GELU": "gelu", "GELUTanh": "gelu", "SiLU": "silu", "Swish": "silu"}
_POINTWISE |= {"GELUActivation": "gelu", "SiLUActivation": "silu", "QuickGELUActivation": "silu"}
# By full name: BEiT, SAM and others have an "Attention" with position biases, which is another operation.
_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.vision_transformer.Attention",  # its place before timm 1.0.17
    "timm.models.eva.EvaAttention",
)
# The same products by another way: Swin's windows with a bias, transformers by the backend of its config. What
# they take beyond the fused operation is in the residual, which is fitted to the dense model.
_NEARLY = (
    "timm.models.swin_transformer.WindowAttention",
    "transformers.models.vit.modeling_vit.ViTAttention",
    "transformers.models.deit.modeling_deit.DeiTAttention",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention",
    "transformers.models.clip.modeling_clip.CLIPAttention",
    "transformers.models.siglip.modeling_siglip.SiglipAttention",
)


def _embeds_patches(module: nn.Module) -> bool:
    """A convolution whose windows neither overlap nor leave gaps: a linear over patches."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    plain = set(module.dilation) == {1} and module.padding in ((0, 0), "valid")
    return plain and tuple(module.kernel_size) == tuple(module.stride)


def op_of(name: str, module: Any, given: Tensor, out: Any) -> Op | None:
    """The operation of a module that ran, or None.

    Args:
        name: of the module.
        module: which.
        given: its first input.
        out: its output.

    Raises:
        ValueError: a type that no profile measures.
    """
    if isinstance(module, BlockSparseLinear):
        if not len(module.values):
            return None
        n, k, block = module.out_features, module.in_features, module.block
        m = given.numel() // k
        return Op.tiles((m, n, k), _dtype(name, given), (block[0], block[1]), len(module.values))
    if isinstance(module, nn.Linear):
        k, n = module.in_features, module.out_features
        return Op("linear", (given.numel() // k, n, k), _dtype(name, given))
    if _embeds_patches(module):
        n, k = module.weight.shape[0], module.weight[0].numel()
        return Op("linear", (out.numel() // n, n, k), _dtype(name, given))
    if isinstance(module, SlimAttention) or is_attention(module):
        heads = getattr(module, "num_heads", None) or module.num_attention_heads
        d = getattr(module, "qk_width", None) or _head_dim(module, heads)
        e = getattr(module, "v_width", None) or _head_dim(module, heads)
        b, t = given.shape[0], given.shape[1]
        return Op("attention", (b, heads, t, d, e), _dtype(name, given))
    kind = pointwise(module)
    if kind is None:
        return None
    width = given.shape[-1]
    return Op(kind, (given.numel() // width, width), _dtype(name, given))


def _head_dim(module: Any, heads: int) -> int:
    found = getattr(module, "head_dim", None)
    return int(module.proj.in_features // heads if found is None else found)


def is_attention(module: Any) -> bool:
    """Attention over scaled_dot_product_attention or nearly that, each head with its own keys."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    fused = name in _ATTENTION and bool(getattr(module, "fused_attn", False))
    return (fused or name in _NEARLY) and getattr(module, "num_kv_groups", 1) == 1


def pointwise(module: object) -> str | None:
    """The kind of an activation or a layer norm; None for anything else."""
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    return _POINTWISE.get(type(module).__name__)


def activation(mlp: nn.Module) -> str | None:
    """The kind of an MLP's activation, by the names that timm and transformers give it."""
    names = ("act", "activation_fn", "act_fn")
    return pointwise(next((getattr(mlp, n) for n in names if hasattr(mlp, n)), None))


def _dtype(name: str, given: Tensor) -> str:
    if given.dtype not in NAMES:
        raise ValueError(
            f"{name}: expected {', '.join(sorted(NAMES.values()))}, got {given.dtype}, which no profile "
            "measures"
        )
    return NAMES[given.dtype]
