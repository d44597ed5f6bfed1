"""Torch-Pruning 1.6's best hand recipe for a timm ViT: narrower heads and narrower MLPs, nothing else.

What it needs by hand, and gets: the number of heads of every fused qkv; residual width, patch
embedding and classifier held back ("bottleneck"); gradients for its Taylor importance; widths in
multiples of 8; afterwards `num_heads`, `head_dim`, `attn_dim` and `scale` of every attention, and
queries rescaled, since timm takes the softmax scale from the new head width.

Tried on ViT-Tiny, top-1 kept of dense on the 650 test images at 0.80 / 0.70 / 0.55 of true MACs: Taylor
of mean(logits^2) with heads 56 wide 0.41 / 0.05 / 0.01, 48 wide 0.52 / 0.12 / 0.00, 40 wide 0.23 / 0.10 /
0.01, 32 wide - / 0.04 / 0.02; 48 wide with all MLPs ranked together 0.48 / 0.13 / 0.01; 48 wide by true
labels 0.42 / 0.08 / 0.01, by L2 norm 0.01 / 0.00 / 0.00. On half of those images at 0.80, none helped:
sampled labels, multivariable Taylor, other group reductions, four rounds with fresh gradients, global or
isomorphic ranking of everything, pruning the residual width too. RECIPES holds the leaders and, for
comparison, labels and L2.
"""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 8
ALLOWANCE = 1.01  # of the budget: the widest MLP that does not exceed it


@dataclass(frozen=True)
class Recipe:
    """One hand recipe.

    Attributes:
        importance: "logits", Taylor of mean(logits^2), label-free; "labels", Taylor of cross-entropy
            with the true labels; "magnitude", L2 norm.
        head_dim: channels kept in every head; the MLP takes what the budget leaves.
        shared: rank the neurons of all MLPs together instead of keeping as many in each.
    """

    importance: Literal["logits", "labels", "magnitude"]
    head_dim: int
    shared: bool = False

    def __str__(self) -> str:
        """A name for rows and tables."""
        how = "L2" if self.importance == "magnitude" else f"Taylor ({self.importance})"
        return f"{how}, head width {self.head_dim}" + (", MLPs ranked together" * self.shared)


RECIPES = (
    Recipe("logits", 48),
    Recipe("logits", 48, shared=True),
    Recipe("logits", 32),
    Recipe("labels", 48),
    Recipe("magnitude", 48),
)


def prune(
    dense: nn.Module, batches: list[Tensor], labels: list[Tensor], budget: float, recipe: Recipe
) -> nn.Module:
    """Apply a recipe so that the true MACs come to the budget, at most 1 % above.

    Args:
        dense: a timm ViT with fused qkv; unchanged.
        batches: calibration images.
        labels: of the same, used by importance "labels" only.
        budget: fraction of true MACs to keep.
        recipe: which one.

    Raises:
        ValueError: the budget leaves no MLP beside heads of that width, or more than the dense one.
    """
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    attentions = [block.attn for block in model.blocks]
    hidden = _mlp_width(model, budget * ALLOWANCE, recipe.head_dim)
    if recipe.importance == "magnitude":
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    else:
        _accumulate_gradients(model, batches, labels if recipe.importance == "labels" else None)
        importance = tp.importance.GroupTaylorImportance()
    fused = [attention.fused_attn for attention in attentions]
    for attention in attentions:
        attention.fused_attn = False  # it traces through matmul and softmax, not through SDPA
    narrow = 1 - hidden / model.blocks[0].mlp.fc1.out_features
    mlps = [block.mlp.fc1 for block in model.blocks]
    ratios = {attention.qkv: 1 - recipe.head_dim / attention.head_dim for attention in attentions}
    ratios |= {tuple(mlps): narrow} if recipe.shared else dict.fromkeys(mlps, narrow)
    held = [model.head, model.patch_embed.proj]
    held += [block.attn.proj for block in model.blocks] + [block.mlp.fc2 for block in model.blocks]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # class token and position embedding, both held
        pruner = tp.BasePruner(
            model,
            batches[0][:1],
            importance=importance,
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            global_pruning=recipe.shared,
            ignored_layers=held,
            num_heads={attention.qkv: attention.num_heads for attention in attentions},
            round_to=MULTIPLE,
        )
        pruner.step()
    for attention, was_fused in zip(attentions, fused, strict=True):
        _mend_attention(attention, pruner.num_heads[attention.qkv])
        attention.fused_attn = was_fused
    model.zero_grad()
    return model


def reach(model: nn.Module, head_dim: int) -> tuple[float, float]:
    """Least and most of the true MACs that a recipe of that head width can keep, for `prune`."""
    fixed, neuron, dense = _macs(model, head_dim)
    most = model.blocks[0].mlp.fc1.out_features
    # A share of the last digit on the safe side of the division.
    return (
        (fixed + MULTIPLE * neuron) / dense / ALLOWANCE * (1 + 1e-9),
        (fixed + most * neuron) / dense / ALLOWANCE * (1 + 1e-9),
    )


def _macs(model: nn.Module, head_dim: int) -> tuple[float, float, float]:
    """True MACs with heads of that width and no MLP, of one neuron in every block, and of the dense model."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    dim, depth, heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
    old_head, old_hidden = model.blocks[0].attn.head_dim, model.blocks[0].mlp.fc1.out_features
    channel = depth * heads * (4 * tokens * dim + 2 * tokens * tokens)
    neuron = depth * 2 * tokens * dim
    rest = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    rest += model.head.weight.numel()
    return rest + channel * head_dim, neuron, rest + channel * old_head + neuron * old_hidden


def _mlp_width(model: nn.Module, budget: float, head_dim: int) -> int:
    """The widest MLP, in eights, within the budget when every head has that width."""
    fixed, neuron, dense = _macs(model, head_dim)
    old_hidden = model.blocks[0].mlp.fc1.out_features
    hidden = int((budget * dense - fixed) / neuron) // MULTIPLE * MULTIPLE
    if not MULTIPLE <= hidden <= old_hidden:
        raise ValueError(f"head width {head_dim} would need MLPs {hidden} wide, of {old_hidden}")
    return hidden


def _accumulate_gradients(
    model: nn.Module, batches: list[Tensor], labels: list[Tensor] | None
) -> None:
    images = sum(len(batch) for batch in batches)
    for i, batch in enumerate(batches):
        logits = model(batch)
        if labels is None:
            loss = logits.square().mean(1).sum()
        else:
            loss = F.cross_entropy(logits, labels[i], reduction="sum")
        (loss / images).backward()


@torch.no_grad()
def _mend_attention(attention: nn.Module, heads: int) -> None:
    head_dim = attention.qkv.out_features // (3 * heads)
    queries = heads * head_dim
    keep_scale = math.sqrt(head_dim / attention.head_dim)
    attention.qkv.weight[:queries] *= keep_scale
    if attention.qkv.bias is not None:
        attention.qkv.bias[:queries] *= keep_scale
    attention.num_heads, attention.head_dim, attention.attn_dim = heads, head_dim, queries
    attention.scale = head_dim**-0.5
