"""What is left of a branch of a diffusion model with every unit removed: its output biases, no more.

A residual branch adds its output to the stream; a module that returned its input instead would add the
stream twice. All are plain `nn.Module`s that take the calls diffusers' own modules take.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConstantAttention(nn.Module):
    """An attention without heads: the bias of its output projection for every token.

    Args:
        features: width of the output; 0 = the caller projects what the heads would have given.
        bias: [features], or None for a projection without bias (zeros then).
        joint: whether the attention gives the text stream an output of its own.
        context_bias: [features of the text stream], or None.
        context_features: width of the text stream's output.
    """

    def __init__(
        self,
        features: int,
        bias: Tensor | None = None,
        *,
        joint: bool = False,
        context_bias: Tensor | None = None,
        context_features: int = 0,
    ) -> None:
        """Make the branch; biases are copied."""
        super().__init__()
        self.features, self.context_features, self.joint = features, context_features, joint
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None
        self.context_bias = (
            nn.Parameter(context_bias.detach().clone()) if context_bias is not None else None
        )

    def extra_repr(self) -> str:
        """Widths, for print(model)."""
        context = f", context_features={self.context_features}" if self.joint else ""
        return f"features={self.features}{context}"

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the bias for every token; inputs give only the shapes.

        Args:
            hidden_states: [B, T, width].
            encoder_hidden_states: [B, S, width], keys of a cross-attention or the text stream.

        Returns:
            [B, T, features]; for a joint attention (that, [B, S, context_features]).
        """
        out = _spread(hidden_states, self.features, self.bias)
        if not self.joint or encoder_hidden_states is None:
            return out
        return out, _spread(encoder_hidden_states, self.context_features, self.context_bias)


class ConstantMap(nn.Module):
    """A convolutional branch without channels: the bias of its last convolution for every pixel.

    Args:
        features: output channels.
        bias: [features], or None (zeros then).
    """

    def __init__(self, features: int, bias: Tensor | None = None) -> None:
        """Make the branch; the bias is copied."""
        super().__init__()
        self.features = features
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the bias for every pixel: [B, C, H, W] -> [B, features, H, W]."""
        return _spread(hidden_states.movedim(1, -1), self.features, self.bias).movedim(-1, 1)


def _spread(like: Tensor, features: int, bias: Tensor | None) -> Tensor:
    """[..., anything] -> [..., features], the bias everywhere, or zeros."""
    shape = (*like.shape[:-1], features)
    if bias is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return bias.to(like.dtype).expand(shape).clone()
