"""The modules a realised model may hold besides stock `nn.Linear`s.

`SlimAttention` is self-attention whose q/k width, v width and head count are free; `BlockSparseLinear`
stores only the kept tiles of a weight; `CompactLinear` leaves out whole rows and columns; `ConstantBranch`
is what is left of a branch with nothing in it. All are plain `nn.Module`s with plain tensors in their
state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_linear import block_sparse_linear


class ConstantBranch(nn.Module):
    """A residual branch with every unit removed: it still contributes its output bias.

    Args:
        features: width of the output, D.
        bias: [D], or None for a branch without bias (contributes zeros).

    Example:
        >>> import torch
        >>> import hwprune
        >>> hwprune.ConstantBranch(4)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, features: int, bias: Tensor | None = None) -> None:
        """Make the branch; `bias` is copied."""
        super().__init__()
        value = torch.zeros(features) if bias is None else bias.detach().clone()
        self.bias = nn.Parameter(value)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the bias for every token: [..., D]; the input gives only the shape."""
        # A copy, not a view: under no_grad torch's FLOP counter stumbles over a view of a parameter.
        return self.bias.to(x.dtype).expand(*x.shape[:-1], -1).clone()


def _flash_on_cpu() -> bool:
    """Whether the CPU's flash kernel runs; exported programs, for any device, do not count on it."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace the question below
        return not torch.compiler.is_exporting()
    return bool(torch.backends.cuda.flash_sdp_enabled())


@dataclass(frozen=True)
class AttentionSizes:
    """What a cut attention is built by; see `SlimAttention` for the words."""

    dim: int
    heads: int
    qk_width: int
    v_width: int
    scale: float
    dim_out: int
    qkv_bias: bool
    proj_bias: bool


def dropout_rate(dropout: object) -> float:
    """The rate of a dropout, given as a module or as a number; 0 for anything else."""
    return float(getattr(dropout, "p", dropout if isinstance(dropout, float) else 0.0))


class SlimAttention(nn.Module):
    """Multi-head self-attention with its own q/k width and v width, over scaled_dot_product_attention.

    Takes the calls timm's `Attention` and `AttentionRope` take, so it stands in their place.

    Args:
        dim: input width.
        heads: kept heads, H.
        qk_width: channels of q and k in each head.
        v_width: channels of v in each head.
        scale: softmax scale; the dense layer's, whatever the width.
        dim_out: output width.
        qkv_bias, proj_bias: whether the projections have biases.
        attn_drop, proj_drop: dropout rates, as in the dense layer (training only).
        q_norm, k_norm: norms over a head's channels (qk-norm), or None.
        prefix_tokens: leading tokens that rotary embeddings leave alone.
        rotate_half: layout of the rotary embedding.

    Attributes:
        empty: class of what is left where every head is gone.

    Example:
        >>> import torch
        >>> import hwprune
        >>> slim = hwprune.SlimAttention(dim=64, heads=2, qk_width=8, v_width=16, scale=0.25, dim_out=64)
        >>> slim(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    empty: type[ConstantBranch] = ConstantBranch

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_width: int,
        v_width: int,
        *,
        scale: float,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        prefix_tokens: int = 0,
        rotate_half: bool = False,
    ) -> None:
        """Build the layer with torch's default initialisation."""
        super().__init__()
        if min(heads, qk_width, v_width) < 1:
            raise ValueError(
                f"SlimAttention needs at least one head and channel, got heads={heads}, "
                f"qk_width={qk_width}, v_width={v_width}; use ConstantBranch for an empty layer"
            )
        self.num_heads, self.qk_width, self.v_width, self.scale = heads, qk_width, v_width, scale
        self.head_dim = qk_width  # the name other code looks for
        # One fused projection, rows [q | k | v]: one GEMM instead of three small ones.
        self.qkv = nn.Linear(dim, heads * (2 * qk_width + v_width), bias=qkv_bias)
        self.q_norm = q_norm if q_norm is not None else nn.Identity()
        self.k_norm = k_norm if k_norm is not None else nn.Identity()
        self.proj = nn.Linear(heads * v_width, dim_out or dim, bias=proj_bias)
        self.attn_drop_p, self.proj_drop_p = attn_drop, proj_drop
        self.prefix_tokens, self.rotate_half = prefix_tokens, rotate_half

    @classmethod
    def like(cls, old: nn.Module, sizes: AttentionSizes) -> SlimAttention:
        """One of these sizes, with random weights and all else as in timm's dense `old`."""
        # A norm over a head's channels stands only where all of them do.
        whole = sizes.qk_width == getattr(old, "head_dim", 0)
        return cls(
            sizes.dim,
            sizes.heads,
            sizes.qk_width,
            sizes.v_width,
            scale=sizes.scale,
            dim_out=sizes.dim_out,
            qkv_bias=sizes.qkv_bias,
            proj_bias=sizes.proj_bias,
            attn_drop=dropout_rate(getattr(old, "attn_drop", 0.0)),
            proj_drop=dropout_rate(getattr(old, "proj_drop", 0.0)),
            q_norm=getattr(old, "q_norm", None) if whole else None,
            k_norm=getattr(old, "k_norm", None) if whole else None,
            prefix_tokens=int(getattr(old, "num_prefix_tokens", 0)),
            rotate_half=bool(getattr(old, "rotate_half", False)),
        )

    def extra_repr(self) -> str:
        """Widths, for print(model)."""
        return f"heads={self.num_heads}, qk_width={self.qk_width}, v_width={self.v_width}"

    def _rotary(self, t_BHTd: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        n = self.prefix_tokens
        if self.rotate_half:
            turned = apply_rot_embed_cat(t_BHTd[:, :, n:], rope, half=True)
        else:
            turned = apply_rot_embed_cat(t_BHTd[:, :, n:], rope)
        return torch.cat([t_BHTd[:, :, :n], turned], dim=2)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend. x: [B, T, dim] -> [B, T, dim_out]."""
        out = self.proj(self.attend(self.qkv(x), rope, attn_mask, is_causal))
        return F.dropout(out, self.proj_drop_p, self.training)

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """All between the two projections: [B, T, heads * (2 qk + v)] -> [B, T, heads * v]."""
        batch, tokens, _ = qkv.shape
        heads, qk, v_width = self.num_heads, self.qk_width, self.v_width
        q, k, v = qkv.split([heads * qk, heads * qk, heads * v_width], dim=-1)
        q = self.q_norm(q.view(batch, tokens, heads, qk).transpose(1, 2))
        k = self.k_norm(k.view(batch, tokens, heads, qk).transpose(1, 2))
        v = v.view(batch, tokens, heads, v_width).transpose(1, 2)
        if rope is not None:
            q, k = self._rotary(q, rope).type_as(v), self._rotary(k, rope).type_as(v)
        wide = -(-max(qk, v_width) // 4) * 4
        if min(qk, v_width) < wide and qkv.device.type == "cpu" and _flash_on_cpu():
            # The CPU's flash kernel wants q, k and v equally wide, and falls back to one that writes out
            # the attention matrix: at q/k 24, v 40 (ViT-Tiny, one thread) 5.9 ms against 2.3 ms padded. Odd
            # widths are slow too: 2 heads of 31 take 1.64 ms, of 32 1.33 ms with the padding.
            q, k, v = (F.pad(t, (0, wide - t.shape[-1])) for t in (q, k, v))
        dropout = self.attn_drop_p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )[..., :v_width]
        return out.transpose(1, 2).reshape(batch, tokens, heads * v_width)


class BlockSparseLinear(nn.Module):
    """y = x Wᵀ + b that stores, and multiplies by, only the kept tiles of W.

    Tiles are (rows, cols) of W's [out, in]; border tiles are zero-padded in storage and any size of W
    is allowed. State dict, plain tensors: `values` [kept, rows, cols], `idx` [kept + 1], `crow` and `order`
    int32 (see `kernels.block_sparse.format.BlockSparseWeight`), `bias`. Trainable: gradients exist for
    the stored tiles only, so what was pruned stays pruned.

    Args:
        in_features, out_features: of the dense weight.
        block: (rows, cols) of a tile.
        kept: number of stored tiles.
        bias: whether there is one.
    """

    def __init__(
        self, in_features: int, out_features: int, block: tuple[int, int], kept: int, *, bias: bool
    ) -> None:
        """Make an empty layer, zeros everywhere; `from_dense` fills one."""
        super().__init__()
        if min(block) < 1:
            raise ValueError(f"block: sides must be at least 1, got {block}")
        self.in_features, self.out_features, self.block = in_features, out_features, tuple(block)
        self.values = nn.Parameter(torch.zeros(kept, *block))
        self.idx: Tensor
        self.crow: Tensor
        self.order: Tensor
        rows = self.grid[0]
        self.register_buffer("idx", torch.zeros(kept + 1, dtype=torch.int32))
        self.register_buffer("crow", torch.zeros(rows + 1, dtype=torch.int32))
        self.register_buffer("order", torch.arange(rows, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # Tiles in each block-row where they all hold as many, which saves the kernels a load; 0 = not so.
        self.count = 0
        nn.Module.register_load_state_dict_post_hook(self, _after_loading)

    def note_count(self) -> None:
        """Look whether all block-rows hold as many tiles; call after changing `crow` by hand."""
        counts = self.crow.diff() if self.crow.device.type == "cpu" else self.crow[:0]
        same = len(counts) > 0 and bool((counts == counts[0]).all())
        self.count = int(counts[0]) if same else 0

    @property
    def grid(self) -> tuple[int, int]:
        """(tile rows, tile cols)."""
        rows, cols = self.block
        return -(-self.out_features // rows), -(-self.in_features // cols)

    @property
    def density(self) -> float:
        """Kept fraction of tiles."""
        return self.values.shape[0] / (self.grid[0] * self.grid[1])

    @property
    def tiles(self) -> BlockSparseWeight:
        """The stored weight, as the kernels take it; shares memory with this layer."""
        shape = (self.out_features, self.in_features)
        return BlockSparseWeight(self.values, self.idx, self.crow, self.order, shape)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, keep: Tensor, block: tuple[int, int] = (64, 64)
    ) -> BlockSparseLinear:
        """Keep the tiles of `linear` that `keep` marks.

        Args:
            linear: the dense layer; it is not changed.
            keep: bool [ceil(out / rows), ceil(in / cols)], True = keep.
            block: (rows, cols).

        Raises:
            ValueError: `keep` has another shape or dtype.

        Example:
            >>> import torch
            >>> import hwprune
            >>> keep = torch.tensor([[True, False], [False, True]])
            >>> linear = torch.nn.Linear(128, 128)
            >>> layer = hwprune.BlockSparseLinear.from_dense(linear, keep, block=(64, 64))
            >>> layer.density
            0.5
        """
        cut = BlockSparseWeight.from_dense(linear.weight.detach(), keep, block)
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, block, len(cut.values), bias=has_bias)
        layer.to(device=linear.weight.device, dtype=linear.weight.dtype)
        layer.values.data = cut.values
        layer.idx, layer.crow, layer.order = cut.idx, cut.crow, cut.order
        layer.note_count()
        if layer.bias is not None:
            assert linear.bias is not None
            layer.bias.data = linear.bias.detach().clone()
        return layer

    def to_dense(self) -> Tensor:
        """The weight with zeros where tiles were dropped: [out, in]."""
        return self.tiles.to_dense()

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"density={self.density:.3f}, bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if (
            torch.onnx.is_in_onnx_export()
        ):  # ONNX knows no such operator: the zeros are multiplied there
            return F.linear(x, self.to_dense(), self.bias)
        return block_sparse_linear(x, self.tiles, self.bias, count=self.count)


def _after_loading(layer: BlockSparseLinear, _: object) -> None:
    layer.note_count()


class CompactLinear(nn.Module):
    """y = x Wᵀ + b for a W with whole rows and columns of zeros: a dense product of what is left.

    Args:
        in_features, out_features: of the whole weight.
        rows: int64 [n], outputs that are more than their bias.
        cols: int64 [k], inputs that are read.
        bias: whether there is one.
    """

    def __init__(
        self, in_features: int, out_features: int, rows: Tensor, cols: Tensor, *, bias: bool
    ) -> None:
        """Make an empty layer; `from_dense` fills one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(len(rows), len(cols)))
        self.rows: Tensor
        self.cols: Tensor
        self.register_buffer("rows", rows.clone())
        self.register_buffer("cols", cols.clone())
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> CompactLinear:
        """Drop the rows and columns of `weight` [out, in] that are wholly zero."""
        weight = weight.detach()
        rows, cols = (weight != 0).any(1).nonzero()[:, 0], (weight != 0).any(0).nonzero()[:, 0]
        layer = cls(weight.shape[1], weight.shape[0], rows, cols, bias=bias is not None)
        layer.to(device=weight.device, dtype=weight.dtype)
        layer.weight.data = weight[rows][:, cols].contiguous()
        if layer.bias is not None:
            assert bias is not None
            layer.bias.data = bias.detach().clone()
        return layer

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        kept = tuple(self.weight.shape)
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={kept}"

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if not self.weight.numel():  # nothing is left but the bias
            whole = x.new_zeros(self.out_features) if self.bias is None else self.bias.to(x.dtype)
            return whole.expand(*x.shape[:-1], -1).clone()
        if self.weight.shape[1] < self.in_features:
            x = x.index_select(-1, self.cols)
        if self.weight.shape[0] == self.out_features:
            return F.linear(x, self.weight, self.bias)
        small = F.linear(x, self.weight)
        shape = (*x.shape[:-1], self.out_features)
        if self.bias is None:
            return small.new_zeros(shape).index_copy(-1, self.rows, small)
        whole = self.bias.to(small.dtype).expand(shape)
        return whole.index_add(-1, self.rows, small)
