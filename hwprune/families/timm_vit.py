"""timm's plain vision transformers: ViT, DeiT, DINOv2, DINOv3/EVA-style blocks, SigLIP towers.

Finds the attention and MLP layers of any timm model whose blocks call an `attn` and an `mlp` on a
residual stream, and says what can leave together. What cannot be cut exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hwprune.units import (
    KINDS,
    AttentionLayer,
    Kind,
    Layer,
    MlpLayer,
    Rows,
    Slice,
    Units,
    get_linear,
)

_STAGES = ("blocks",)  # where timm keeps the blocks of its columnar transformers
# By full name: BEiT, SAM and others call classes of their own, with position biases, "Attention" too.
_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.vision_transformer.Attention",  # its place before timm 1.0.17
)
_MLP = ("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU")


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random ViT with ragged sizes and an input, for tests: model, x [2, 3, 32, 32]."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=10,
    )
    # timm starts the classifier near zero: then no layer matters to the output and every curve is flat.
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval(), torch.randn(2, 3, 32, 32)


def stages(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in the order the model runs them.

    Raises:
        ValueError: the model is not built of such blocks.
    """
    for name in _STAGES:
        blocks = getattr(model, name, None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
            if all(hasattr(b, "attn") and hasattr(b, "mlp") for b in blocks):
                return list(blocks)
            raise ValueError(
                f"{name}.0 is a {type(blocks[0]).__name__}, expected a block with `attn` and `mlp` on one "
                "residual stream; parallel blocks are not supported yet"
            )
    raise ValueError(
        f"{type(model).__name__} has no `blocks` of attention and MLP: expected a timm vision "
        "transformer (vit_*, deit_*, dinov2, eva02); Swin and hybrids are not supported yet"
    )


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_identity(module: object) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _attention(model: nn.Module, name: str, stage: int) -> AttentionLayer | str:
    """The layer, or the reason it is left dense."""
    attn: Any = model.get_submodule(name)
    if _class(attn) not in _ATTENTION:
        return f"{name}: attention of type {_class(attn)} is not known to be cut exactly"
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
    if type(attn).__name__ == "AttentionRope":
        refused["qk"] = "rotary embeddings (RoPE) tie q and k channels in pairs"
    if type(getattr(model, "rope", None)).__name__ == "RotaryEmbeddingMixed":
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


def _mlp(model: nn.Module, name: str, stage: int) -> MlpLayer | str:
    """The layer, or the reason it is left dense."""
    mlp: Any = model.get_submodule(name)
    if _class(mlp) not in _MLP or not isinstance(mlp.fc2, nn.Linear):
        return f"{name}: MLP of type {_class(mlp)} is not known to be cut exactly"
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
    layers: list[Layer] = []
    left: list[str] = []
    for stage, block in enumerate(stages(model)):
        for found in (
            _attention(model, f"{names[id(block)]}.attn", stage),
            _mlp(model, f"{names[id(block)]}.mlp", stage),
        ):
            if isinstance(found, str):
                left.append(found)
                continue
            for rows in linears_of(found):
                get_linear(model, rows)
            layers.append(found)
    return layers, left


def linears_of(layer: Layer) -> list[str]:
    """Names of the distinct linears of a layer, inputs before output."""
    rows = (layer.q, layer.k, layer.v) if isinstance(layer, AttentionLayer) else layer.inputs
    return list(dict.fromkeys([r.linear for r in rows] + [layer.out]))


def _row_slices(model: nn.Module, rows: Rows, index: Tensor) -> list[Slice]:
    """Weight and bias slices for units that own `index` [U, E] of a run of rows."""
    index = index + rows.start
    slices = [Slice(f"{rows.linear}.weight", 0, index)]
    if get_linear(model, rows.linear).bias is not None:
        slices.append(Slice(f"{rows.linear}.bias", 0, index))
    return slices


def _merge(slices: list[Slice]) -> tuple[Slice, ...]:
    """One slice for each (parameter, dim): the three parts of a fused qkv become one index."""
    merged: dict[tuple[str, int | None], list[Tensor]] = {}
    for s in slices:
        assert s.index is not None
        merged.setdefault((s.param, s.dim), []).append(s.index)
    return tuple(Slice(p, d, torch.cat(parts, 1)) for (p, d), parts in merged.items())


def _structured(model: nn.Module, layer: Layer, kind: Kind) -> Units | None:
    """Units of one structured kind in one layer; None where the kind does not apply."""
    slices: list[Slice] = []
    if isinstance(layer, MlpLayer):
        if kind != "neuron":
            return None
        index = torch.arange(layer.hidden)[:, None]
        for rows in layer.inputs:
            slices += _row_slices(model, rows, index)
        slices.append(Slice(f"{layer.out}.weight", 1, index))
        return Units(f"{layer.name}:neuron", layer, kind, (layer.hidden,), _merge(slices))
    if kind not in ("head", "qk", "vo"):
        return None
    # Row of channel c of head h inside one of q, k, v: h * head_dim + c.
    grid_HD = torch.arange(layer.heads * layer.head_dim).view(layer.heads, layer.head_dim)
    index = grid_HD if kind == "head" else grid_HD.T.contiguous()
    parts = {"head": (layer.q, layer.k, layer.v), "qk": (layer.q, layer.k), "vo": (layer.v,)}[kind]
    for rows in parts:
        slices += _row_slices(model, rows, index)
    if kind != "qk":
        slices.append(Slice(f"{layer.out}.weight", 1, index))
    return Units(f"{layer.name}:{kind}", layer, kind, (index.shape[0],), _merge(slices))


def find_units(
    model: nn.Module, kinds: Sequence[str] | None = None, *, block: tuple[int, int] = (32, 32)
) -> list[Units]:
    """Everything of `kinds` that can be removed from `model`.

    Args:
        model: a dense timm vision transformer.
        kinds: any of block, head, neuron, qk, vo. None = every structured kind the model allows
            (head, neuron, qk, vo). A kind asked for by name must be possible everywhere.
        block: (rows, cols) of a tile, for the kind block; edges may be ragged.

    Returns:
        Units in model order. `qk` and `vo` channels are those of the rotated layer
        (`hwprune.rotate`); patch embedding and classifier are left dense.

    Raises:
        ValueError: unknown kind; a kind named explicitly that a layer refuses; a model without layers.
    """
    unknown = [k for k in kinds or () if k not in KINDS]
    if unknown or (kinds is not None and not kinds):
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {list(kinds or ())}")
    layers, left = find_layers(model)
    if not layers:
        raise ValueError("nothing to prune: every layer is left dense: " + "; ".join(left[:4]))
    units: list[Units] = []
    for layer in layers:
        for kind in kinds if kinds is not None else ("head", "qk", "vo", "neuron"):
            if kind in layer.refused:
                if kinds is not None:
                    raise ValueError(
                        f"{layer.name}: kind {kind!r} cannot be removed exactly: {layer.refused[kind]}; "
                        f"leave {kind!r} out of kinds"
                    )
                continue
            if kind == "block":
                units += [_tiles(model, layer, name, block) for name in linears_of(layer)]
            else:
                found = _structured(model, layer, cast(Kind, kind))
                units += [found] if found is not None else []
    if not units:
        reasons = left + [f"{x.name}: {why}" for x in layers for why in x.refused.values()]
        raise ValueError(
            f"no layer of {type(model).__name__} has units of the kinds "
            f"{', '.join(kinds or ('head', 'qk', 'vo', 'neuron'))}: {'; '.join(reasons[:4])}"
        )
    return units


def _tiles(model: nn.Module, layer: Layer, linear: str, block: tuple[int, int]) -> Units:
    weight = get_linear(model, linear).weight
    shape = (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    return Units(
        f"{linear}:block", layer, "block", shape, (Slice(f"{linear}.weight", None, None, block),)
    )
