"""diffusers' attention and feed-forward modules, as every family of denoisers uses them.

Says which rows and columns a head or neuron owns, and by name what cannot be removed exactly.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from hwprune.units import Columns, CoupledLayer, Rows

_ATTENTION = (
    "diffusers.models.attention_processor.Attention",
    "diffusers.models.transformers.transformer_flux.FluxAttention",
)
# Processors that take the number of heads, or of channels a head, from the attention module.
_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FluxAttnProcessor",
    "JointAttnProcessor2_0",
    "QwenDoubleStreamAttnProcessor2_0",
    "SanaAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
)
_NORMS_BEFORE_HEADS = ("SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0")
_GATED = ("GEGLU", "SwiGLU")
_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")


def class_path(module: object) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def attention(
    model: nn.Module, name: str, stage: int, outputs: tuple[str, ...] | None = None
) -> CoupledLayer | str:
    """The heads of an attention module.

    Args:
        model: the denoiser.
        name: of the attention.
        stage: index of its block.
        outputs: linears whose first columns read the heads, where they are outside the attention
            (FLUX's single blocks); None = the attention's own.

    Returns:
        The layer, or the reason it is left dense.
    """
    attn: Any = model.get_submodule(name)
    if class_path(attn) not in _ATTENTION:
        return f"{name}: attention of type {class_path(attn)} is not known to be cut exactly"
    processor = type(attn.processor).__name__
    if processor not in _PROCESSORS:
        return f"{name}: the attention processor {processor} is not known to be cut exactly"
    heads = int(attn.heads)
    projections = [p for p in ("to_q", "to_k", "to_v") if getattr(attn, p, None) is not None]
    projections += [
        p for p in ("add_q_proj", "add_k_proj", "add_v_proj") if getattr(attn, p, None) is not None
    ]
    widths = {p: getattr(attn, p).weight.shape[0] for p in projections}
    width = widths["to_q"]
    head_dim = width // heads
    reason = _odd(attn, processor, widths, head_dim)
    if reason is not None:
        return f"{name}: {reason}"
    joint = "add_q_proj" in widths
    attributes = [(f"{name}.heads", 1)]
    attributes += [
        (f"{name}.{a}", each)
        for a, each in (
            ("inner_dim", head_dim),
            ("inner_kv_dim", head_dim),
            ("sliceable_head_dim", 1),
        )
        if hasattr(attn, a)
    ]
    residue: Literal["empty", "joint", "bias"] = "joint" if joint else "bias"
    if outputs is not None:
        residue = "empty"
    else:
        outputs = (f"{name}.to_out.0",)
        if getattr(attn, "to_add_out", None) is not None:
            outputs = (*outputs, f"{name}.to_add_out")
    return CoupledLayer(
        name,
        stage,
        "head",
        heads,
        head_dim,
        tuple(Rows(f"{name}.{p}", 0, width) for p in projections),
        tuple(Columns(linear, 0, width) for linear in outputs),
        tuple(attributes),
        residue,
    )


def _odd(attn: Any, processor: str, widths: dict[str, int], head_dim: int) -> str | None:
    """Why heads of this attention cannot be removed exactly; None = they can."""
    if getattr(attn, "fused_projections", False):
        return "its projections are fused; call unfuse_qkv_projections() first"
    if len(set(widths.values())) > 1 or "to_k" not in widths:
        return "grouped-query attention shares k and v between heads"
    for norm_name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(attn, norm_name, None)
        if norm is None or isinstance(norm, nn.Identity):
            continue
        if processor in _NORMS_BEFORE_HEADS or _norm_width(norm) not in (None, head_dim):
            return (
                f"{norm_name} normalises over all heads at once, so removing one changes the others "
                "(masked and realised would differ)"
            )
    if (
        getattr(attn, "residual_connection", False)
        or getattr(attn, "spatial_norm", None) is not None
    ):
        return "it adds its own residual or spatial norm"
    if float(getattr(attn, "rescale_output_factor", 1.0)) != 1.0:
        return "it rescales its output"
    return None


def _norm_width(norm: nn.Module) -> int | None:
    """Channels a norm runs over; None = whatever it is given."""
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    if shape is None or isinstance(shape, int):
        return None  # an L2 norm over the last dimension, which is one head
    return int(shape[-1])


def feed_forward(model: nn.Module, name: str, stage: int) -> CoupledLayer | str:
    """The neurons of a `FeedForward`: (hidden, gate) pairs where it is gated.

    Returns:
        The layer, or the reason it is left dense.
    """
    module: Any = model.get_submodule(name)
    if class_path(module) != "diffusers.models.attention.FeedForward":
        return f"{name}: feed-forward of type {class_path(module)} is not known to be cut exactly"
    first, last = type(module.net[0]).__name__, module.net[2]
    if first not in (*_GATED, *_PLAIN) or not isinstance(last, nn.Linear):
        return f"{name}: the activation {first} is not known to be cut exactly"
    hidden = last.in_features
    halves = 2 if first in _GATED else 1
    inputs = tuple(Rows(f"{name}.net.0.proj", i * hidden, hidden) for i in range(halves))
    outputs = (Columns(f"{name}.net.2", 0, hidden),)
    return CoupledLayer(name, stage, "neuron", hidden, 1, inputs, outputs)


def module_names(model: nn.Module, kind: str) -> list[str]:
    """Names of the modules of one class, by its full name, in model order."""
    return [name for name, module in model.named_modules() if class_path(module) == kind]
