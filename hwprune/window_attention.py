"""Attention inside windows with a bias for each relative position, in widths of its own: Swin's, once cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.layers import AttentionSizes, ConstantBranch, SlimAttention, dropout_rate


class ConstantWindow(ConstantBranch):
    """What is left of window attention without heads: its output bias, for every token of every window."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the bias for every token: [..., D]; the input gives only the shape."""
        return super().forward(x)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Nothing in it depends on the windows; timm's `set_input_size` calls this."""


class SlimWindowAttention(SlimAttention):
    """Window attention whose head count, q/k width and v width are free.

    Takes the calls timm's `WindowAttention` of Swin takes, so it stands in its place. The state dict has
    `relative_position_bias_table` [(2 height - 1) * (2 width - 1), heads] beside that of `SlimAttention`.

    Args:
        dim: input width.
        heads: kept heads, H.
        qk_width: channels of q and k in each head.
        v_width: channels of v in each head.
        scale: softmax scale; the dense layer's, whatever the width.
        window_size: (height, width) of a window, N = height * width tokens.
        dim_out: output width.
        qkv_bias, proj_bias: whether the projections have biases.
        attn_drop, proj_drop: dropout rates, as in the dense layer (training only).
    """

    empty = ConstantWindow

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_width: int,
        v_width: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        dim_out: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        """Build the layer with torch's default initialisation and no position bias."""
        super().__init__(
            dim,
            heads,
            qk_width,
            v_width,
            scale=scale,
            dim_out=dim_out,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        height, width = window_size
        self.window_size = (height, width)
        positions = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        self.relative_position_index: Tensor
        self._index()

    @classmethod
    def like(cls, old: nn.Module, sizes: AttentionSizes) -> SlimWindowAttention:
        """One of these sizes, with random weights and all else as in timm's dense `old`."""
        dense: Any = old
        return cls(
            sizes.dim,
            sizes.heads,
            sizes.qk_width,
            sizes.v_width,
            scale=sizes.scale,
            window_size=dense.window_size,
            dim_out=sizes.dim_out,
            qkv_bias=sizes.qkv_bias,
            proj_bias=sizes.proj_bias,
            attn_drop=dropout_rate(dense.attn_drop),
            proj_drop=dropout_rate(dense.proj_drop),
        )

    def _index(self) -> None:
        """Note for each pair of tokens of a window [N, N] its row in the table."""
        height, width = self.window_size
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y_N, x_N = grid[0].flatten(), grid[1].flatten()
        row_NN = y_N[:, None] - y_N + height - 1
        index_NN = row_NN * (2 * width - 1) + x_N[:, None] - x_N + width - 1
        index_NN = index_NN.to(self.relative_position_bias_table.device)
        self.register_buffer("relative_position_index", index_NN, persistent=False)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the windows and resample the bias to them, as timm's own layer does."""
        from timm.layers import resize_rel_pos_bias_table

        old, (height, width) = self.window_size, window_size
        if old == (height, width):
            return
        table = self.relative_position_bias_table
        self.window_size = (height, width)
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(
                table,
                new_window_size=self.window_size,
                new_bias_shape=((2 * height - 1) * (2 * width - 1), self.num_heads),
                old_window_size=old,
            )
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self._index()

    def bias(self) -> Tensor:
        """[H, N, N] what each pair of positions adds to its score."""
        index_NN = self.relative_position_index
        return self.relative_position_bias_table[index_NN].permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend within windows.

        Args:
            x: [B * W, N, dim], the W windows of an image one after the other.
            mask: [W, N, N], added to the scores, or None.

        Returns:
            [B * W, N, dim_out].
        """
        bias_1HNN = self.bias()[None]
        if mask is not None:
            joint_WHNN = bias_1HNN + mask[:, None]
            # Shapes and not len(): torch.export would take the number of images for a constant.
            bias_1HNN = joint_WHNN.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        qkv = self.qkv(x)
        out = self.proj(self.attend(qkv, attn_mask=bias_1HNN.to(qkv.dtype)))
        return F.dropout(out, self.proj_drop_p, self.training)
