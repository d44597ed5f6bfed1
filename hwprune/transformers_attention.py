"""Attention in widths of its own as transformers calls it: a pair of output and attention weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hwprune.layers import AttentionSizes, ConstantBranch, SlimAttention

_NO_WEIGHTS = (
    "a pruned attention runs scaled_dot_product_attention, which has no attention weights to give; leave "
    "output_attentions out"
)


# Only transformers decides what its blocks hand on (output_attentions, masks of backends), hence **given.
class ConstantPair(ConstantBranch):
    """What is left of an attention of transformers without heads: its output bias, and no weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, None]:
        """Return the bias for every token [B, T, D]; the input gives only the shape."""
        if given.get("output_attentions"):
            raise ValueError(_NO_WEIGHTS)
        return super().forward(hidden_states), None


class SlimPairAttention(SlimAttention):
    """`SlimAttention` that is called, and answers, as ViTAttention, CLIPAttention and their like."""

    empty = ConstantPair

    @classmethod
    def like(cls, old: nn.Module, sizes: AttentionSizes) -> SlimPairAttention:
        """One of these sizes, with random weights and the dropout of transformers' dense `old`."""
        rates = (getattr(old, name, None) for name in ("attention_dropout", "dropout"))
        return cls(
            sizes.dim,
            sizes.heads,
            sizes.qk_width,
            sizes.v_width,
            scale=sizes.scale,
            dim_out=sizes.dim_out,
            qkv_bias=sizes.qkv_bias,
            proj_bias=sizes.proj_bias,
            attn_drop=next((float(rate) for rate in rates if isinstance(rate, int | float)), 0.0),
        )

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, None]:
        """Attend. hidden_states: [B, T, dim] -> ([B, T, dim_out], None)."""
        if given.get("output_attentions"):
            raise ValueError(_NO_WEIGHTS)
        return super().forward(hidden_states, attn_mask=attention_mask), None
