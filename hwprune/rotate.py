"""Exact changes of basis inside each attention head, after which pruning channels is truncating a tail.

Attention sees q and k only through qᵀk and v only through W_o v, so any invertible map of a head's q (with
its inverse on k), and of v (with its inverse on W_o), leaves the model as it was. The basis chosen makes
the channels independent and sorted by what they are worth to the model's output: an SVD whitened by the
data on one side and by the gradient on the other. Biases rotate along, the softmax scale stays.

Shapes: H heads, D channels of a head, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.obs import sqrt_psd
from hwprune.statistics import Moments
from hwprune.units import AttentionLayer, Layer, Rows, get_linear


@dataclass(frozen=True, eq=False)
class Rotation:
    """A pair of per-head maps that cancel: rows <- `first` @ rows, and `second` on the other side.

    Attributes:
        first: [H, D, D], applied to the rows of q (or v).
        second: [H, D, D], applied to the rows of k; for v to the columns of W_o as W_o second.
        tail: [H, D + 1] float64; tail[h, r] = distortion of keeping the first r channels of head h.
    """

    first: Tensor
    second: Tensor
    tail: Tensor


def _tail(singular_HD: Tensor) -> Tensor:
    energy = 0.5 * singular_HD.square()
    rest = energy.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([rest, torch.zeros_like(rest[:, :1])], -1)


def rotation_qk(queries: Moments) -> Rotation:
    """Basis of q and k from E[q qᵀ] and the Gauss-Newton metric at q.

    ∂L/∂q_i = scale Σ_j g_ij k_j already holds the keys, weighted and centred by the attention's own
    gradient, so its second moment is the key side of the whitened SVD.
    """
    root_HDD, inverse_HDD = sqrt_psd(queries.second)
    metric_HDD, _ = sqrt_psd(queries.metric)
    _, singular, vh = torch.linalg.svd(metric_HDD @ root_HDD)
    return Rotation(vh @ inverse_HDD, vh @ root_HDD, _tail(singular))


def rotation_vo(model: nn.Module, layer: AttentionLayer, out: Moments) -> Rotation:
    """Basis of v and W_o from the covariance of each head's output and the metric at the projection."""
    heads, width = layer.heads, layer.head_dim
    weight_OHD = get_linear(model, layer.out).weight.detach().double().view(-1, heads, width)
    covariance = out.centred.view(heads, width, heads, width)
    block_HDD = torch.stack([covariance[h, :, h, :] for h in range(heads)])
    root_HDD, inverse_HDD = sqrt_psd(block_HDD)
    metric_OO, _ = sqrt_psd(out.metric)
    scaled_HOD = torch.einsum("po,ohd->hpd", metric_OO, weight_OHD) @ root_HDD
    _, singular, vh = torch.linalg.svd(scaled_HOD, full_matrices=False)
    if singular.shape[-1] < width:  # fewer outputs than channels: complete the basis
        _, singular, vh = torch.linalg.svd(scaled_HOD.mT @ scaled_HOD)
        singular = singular.clamp_min(0).sqrt()
    first = vh @ inverse_HDD
    # Unit rows: a channel of almost no variance is not blown up, with its rounding noise, to unit variance.
    size = first.norm(dim=-1, keepdim=True)
    return Rotation(first / size, root_HDD @ vh.mT * size.mT, _tail(singular))


def balance(rotation: Rotation, model: nn.Module, layer: AttentionLayer, kind: str) -> Rotation:
    """Scale each channel so both sides have weights of equal norm: half precision keeps both."""
    first = _apply(_rows(model, layer.q if kind == "qk" else layer.v), rotation.first, layer)
    if kind == "qk":
        second = _apply(_rows(model, layer.k), rotation.second, layer).flatten(2)
    else:
        weight = get_linear(model, layer.out).weight.detach().double()
        columns = weight.view(weight.shape[0], layer.heads, layer.head_dim)
        second = torch.einsum("ohd,hdc->hco", columns, rotation.second)
    ratio = second.norm(dim=-1).clamp_min(1e-12) / first.flatten(2).norm(dim=-1).clamp_min(1e-12)
    gain = ratio.sqrt().unsqueeze(-1)  # [H, D, 1]
    other = rotation.second / gain if kind == "qk" else rotation.second / gain.mT
    return Rotation(rotation.first * gain, other, rotation.tail)


def _rows(model: nn.Module, rows: Rows) -> Tensor:
    weight = get_linear(model, rows.linear).weight.detach()
    return weight[rows.start : rows.start + rows.count].double()


def _apply(rows_NI: Tensor, map_HDD: Tensor, layer: AttentionLayer) -> Tensor:
    """[H, D, I] rows after a per-head map."""
    return map_HDD @ rows_NI.view(layer.heads, layer.head_dim, -1)


@torch.no_grad()
def _rotate_rows_(model: nn.Module, rows: Rows, map_HDD: Tensor, layer: AttentionLayer) -> None:
    linear = get_linear(model, rows.linear)
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            part = parameter[rows.start : rows.start + rows.count]
            turned = _apply(part.double().view(rows.count, -1), map_HDD.to(part.device), layer)
            part.copy_(turned.reshape(part.shape).to(part.dtype))


@torch.no_grad()
def rotate_(model: nn.Module, layer: Layer, kind: str, rotation: Rotation) -> None:
    """Change the basis of a layer in place; the model computes what it did, up to rounding.

    Args:
        model: holds the layer.
        layer: the attention.
        kind: "qk" or "vo".
        rotation: from `rotation_qk` or `rotation_vo`.
    """
    assert isinstance(layer, AttentionLayer)
    rotation = balance(rotation, model, layer, kind)
    if kind == "qk":
        _rotate_rows_(model, layer.q, rotation.first, layer)
        _rotate_rows_(model, layer.k, rotation.second, layer)
        return
    _rotate_rows_(model, layer.v, rotation.first, layer)
    weight = get_linear(model, layer.out).weight
    columns = weight.double().view(weight.shape[0], layer.heads, layer.head_dim)
    turned = torch.einsum("ohd,hdc->ohc", columns, rotation.second.to(weight.device))
    weight.copy_(turned.reshape(weight.shape).to(weight.dtype))
