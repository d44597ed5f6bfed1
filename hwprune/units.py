"""What can be removed from a model, and what must leave together.

A *unit* is the smallest thing a plan can drop: an attention head, a hidden neuron of an MLP, one
channel of the rotated query/key or value space, a tile ("block") of one weight matrix, or a whole
transformer block ("depth"). Units of one kind in one layer share a grid; a mask is a bool tensor of that
grid's shape, True = keep.

Shapes: U units of a layer, E entries a unit owns along one dimension of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Kind = Literal["block", "head", "neuron", "qk", "vo", "depth", "modulation"]
KINDS: tuple[Kind, ...] = ("block", "head", "neuron", "qk", "vo")  # of vision transformers

Scores: TypeAlias = dict[str, Tensor]  # float, shape of the grid; higher = keep
Mask: TypeAlias = dict[str, Tensor]  # bool, shape of the grid; True = keep


@dataclass(frozen=True)
class Rows:
    """A run of output rows of one linear: the queries of a fused qkv, say.

    Attributes:
        linear: name of the `nn.Linear` in the model.
        start: first row.
        count: number of rows.
    """

    linear: str
    start: int
    count: int


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention: which linears hold its q, k, v and output, and what it allows.

    Attributes:
        name: module name of the attention.
        stage: index of the transformer block (stage) it sits in.
        heads: number of heads, H.
        head_dim: channels of a head, the same for q, k and v here.
        scale: softmax scale, kept whatever the width becomes.
        q, k, v: where the rows of the projections are.
        out: name of the output projection.
        refused: kind -> reason, for kinds this layer cannot be cut by exactly.
        tables: parameters outside of the linears whose last dimension is the heads: position biases.
        window: tokens a query attends among; None = all of the image.
        slim: class of what stands in its place once it is cut, a `SlimAttention`; None = that itself.
    """

    name: str
    stage: int
    heads: int
    head_dim: int
    scale: float
    q: Rows
    k: Rows
    v: Rows
    out: str
    refused: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    window: int | None = None
    slim: type[Any] | None = None


@dataclass(frozen=True)
class MlpLayer:
    """One MLP: its input linears (two halves for a gated one) and its output linear.

    Attributes:
        name: module name of the MLP.
        stage: index of the transformer block (stage) it sits in.
        inputs: rows that make hidden neuron j: row j of each entry (SwiGLU has two entries).
        out: name of the output linear; its column j belongs to neuron j.
        hidden: number of neurons.
        refused: kind -> reason.
    """

    name: str
    stage: int
    inputs: tuple[Rows, ...]
    out: str
    hidden: int
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """A run of input columns of one linear: what an output projection reads.

    Attributes:
        linear: name of the `nn.Linear` (or pointwise `nn.Conv2d`) in the model.
        start: first column.
        count: number of columns.
    """

    linear: str
    start: int
    count: int


@dataclass(frozen=True)
class CoupledLayer:
    """Heads or neurons spread over several linears: two streams of one attention, a fused output.

    Unit j owns entries j * width to (j + 1) * width of every run.

    Attributes:
        name: module that only its output biases are left of when every unit goes.
        stage: index of the transformer block it sits in.
        kind: what its units are.
        count: number of units.
        width: rows and columns of a unit in each run: the channels of a head, or 1.
        inputs: runs of rows that make the units; of linears, or of (depthwise) convolutions.
        outputs: runs of columns that read them.
        attributes: (dotted attribute, entries of it a unit makes up) to keep in step.
        residue: what stands in the module's place when nothing is left: "bias" = the output bias for
            every token, "joint" = that of both streams, "map" = zeros or the bias for every pixel,
            "width" = the module itself, with linears of width 0, "empty" = a tensor of width 0.
    """

    name: str
    stage: int
    kind: Literal["head", "neuron", "modulation"]
    count: int
    width: int
    inputs: tuple[Rows, ...]
    outputs: tuple[Columns, ...]
    attributes: tuple[tuple[str, int], ...] = ()
    residue: Literal["bias", "joint", "map", "width", "empty"] = "bias"


@dataclass(frozen=True)
class ResidualBlock:
    """A transformer block that does nothing once its output projections are zero.

    Attributes:
        name: its place in a `nn.ModuleList`.
        stage: its index among the blocks of the model.
        outputs: every linear whose result is added to the residual stream.
    """

    name: str
    stage: int
    outputs: tuple[str, ...]


Layer: TypeAlias = AttentionLayer | MlpLayer  # of vision transformers
AnyLayer: TypeAlias = Layer | CoupledLayer | ResidualBlock


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter a grid of units owns.

    Attributes:
        param: parameter name, e.g. "blocks.0.attn.qkv.weight".
        dim: the parameter dimension that units index; None for tiles.
        index: long [U, E], the entries along `dim` of each unit; None for tiles.
        tile: (rows, cols) of a tile; None unless the units are blocks. Border tiles are ragged.
    """

    param: str
    dim: int | None
    index: Tensor | None
    tile: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Units:
    """The prunable units of one kind in one layer.

    Attributes:
        name: key in masks and scores, "<layer>:<kind>" ("<linear>:block" for tiles).
        layer: the layer they belong to.
        kind: block, head, neuron, qk, vo, depth or modulation.
        shape: grid: (U,), or (tile rows, tile cols) for blocks.
        slices: what of which parameters each unit owns.
    """

    name: str
    layer: AnyLayer
    kind: Kind
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.shape)


def expand(grid: Tensor, part: Slice, shape: torch.Size) -> Tensor:
    """Spread a grid of units over the entries of a parameter; entries no unit owns get 1.

    Args:
        grid: [U] or [tile rows, tile cols], bool or float.
        part: the slice that says who owns what.
        shape: shape of the parameter.

    Returns:
        Tensor of `shape`, dtype of `grid` (a broadcast view where units index one dimension).
    """
    if part.tile is not None:
        rows, cols = part.tile
        full = grid.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        return full[: shape[0], : shape[1]]
    assert part.dim is not None and part.index is not None
    line = torch.ones(shape[part.dim], dtype=grid.dtype, device=grid.device)
    index = part.index.to(grid.device)
    line[index.reshape(-1)] = grid.repeat_interleave(index.shape[1])
    view = [1] * len(shape)
    view[part.dim] = -1
    return line.view(view).expand(shape)


def reduce(entries: Tensor, part: Slice) -> Tensor:
    """Sum per-entry values over each unit: the transpose of `expand` on owned entries.

    Args:
        entries: the parameter's shape.
        part: the slice.

    Returns:
        [U] or [tile rows, tile cols], dtype of `entries`.
    """
    if part.tile is not None:
        rows, cols = part.tile
        grid_rows, grid_cols = -(-entries.shape[0] // rows), -(-entries.shape[1] // cols)
        pad = (0, grid_cols * cols - entries.shape[1], 0, grid_rows * rows - entries.shape[0])
        full = nn.functional.pad(entries, pad)
        return full.view(grid_rows, rows, grid_cols, cols).sum((1, 3))
    assert part.dim is not None and part.index is not None
    line = entries.movedim(part.dim, 0).flatten(1).sum(1) if entries.dim() > 1 else entries
    return line[part.index.to(line.device)].sum(1)


def full_mask(units: Iterable[Units]) -> Mask:
    """The mask that keeps everything."""
    return {u.name: torch.ones(u.shape, dtype=torch.bool) for u in units}


def check_mask(units: Iterable[Units], mask: Mask) -> None:
    """Refuse a mask that does not fit the units.

    Raises:
        ValueError: unknown name, wrong shape or wrong dtype, naming the layer.
    """
    known = {u.name: u for u in units}
    for name, grid in mask.items():
        if name not in known:
            raise ValueError(
                f"mask has {name!r}, which is no unit of this model; known names look like "
                f"{next(iter(known), 'none: the model has no units')!r}"
            )
        if grid.dtype != torch.bool:
            raise ValueError(f"{name}: expected a bool mask, got {grid.dtype}; True means keep")
        if tuple(grid.shape) != known[name].shape:
            raise ValueError(
                f"{name}: expected a mask of shape {known[name].shape}, got {tuple(grid.shape)}"
            )


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The `nn.Linear` called `name`.

    Raises:
        ValueError: it is something else, e.g. a layer already pruned or quantised.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{name}: expected nn.Linear, got {type(module).__name__}; prune the dense model, before "
            "quantising or pruning it another way"
        )
    return module


def vision_layer(unit: Units) -> Layer:
    """The attention or MLP a unit of a vision transformer belongs to.

    Raises:
        ValueError: it is a unit of a diffusion model.
    """
    if isinstance(unit.layer, CoupledLayer | ResidualBlock):
        raise ValueError(
            f"{unit.name}: expected a unit of a vision transformer, got one of a diffusion model; its layers "
            "are those of hwprune.families.denoiser"
        )
    return unit.layer


def layers_of(units: Iterable[Units]) -> list[Layer]:
    """The distinct layers behind some units of a vision transformer, in model order."""
    seen: dict[str, Layer] = {}
    for u in units:
        layer = vision_layer(u)
        seen.setdefault(layer.name, layer)
    return sorted(
        seen.values(), key=lambda layer: (layer.stage, not isinstance(layer, AttentionLayer))
    )
