"""Magnitude and random pruning of heads and neurons, no repair, to equal true MACs."""

import copy
import math

import torch
from parts.count import true_macs
from torch import Tensor, nn

from hwprune import criteria
from hwprune.families.timm_vit import find_units
from hwprune.realise import realise_
from hwprune.units import AttentionLayer, Units


def prune(
    dense: nn.Module,
    batches: list[Tensor],
    budget: float,
    *,
    criterion: str,
    seed: int,
    even: bool = False,
) -> nn.Module:
    """Remove the lowest heads and neurons of all layers together until the budget is met.

    Args:
        dense: a timm ViT; unchanged.
        batches: images; only their size is used.
        budget: fraction of true MACs to keep; reached, or undercut by less than a neuron.
        criterion: "magnitude", the root mean square of a unit's weights, so that a head and a
            neuron compare by weight and not by size; or "random".
        seed: of the random criterion.
        even: rank within each layer first, so that every layer loses the same share.
    """
    model = copy.deepcopy(dense)
    units = find_units(model, ("head", "neuron"))
    scores = {"magnitude": criteria.magnitude, "random": criteria.random}[criterion](
        model, units, batches, seed=seed
    )
    macs = {unit.name: _unit_macs(model, unit) for unit in units}
    ranking = []
    for unit in units:
        score = scores[unit.name]
        if even:
            score = (score.argsort().argsort() + 0.5) / unit.count
        elif criterion == "magnitude":
            score = score / math.sqrt(_unit_weights(model, unit))
        ranking += [(s, unit.name, i) for i, s in enumerate(score.tolist())]
    mask = {unit.name: torch.ones(unit.shape, dtype=torch.bool) for unit in units}
    excess, smallest = (1 - budget) * true_macs(model, batches[0][:1]), min(macs.values())
    for _, name, index in sorted(ranking):
        if excess > 0 and macs[name] < excess + smallest:
            mask[name][index] = False
            excess -= macs[name]
    realise_(model, units, mask)
    return model


def _unit_weights(model: nn.Module, unit: Units) -> float:
    """Weights a unit owns."""
    return sum(
        part.index.shape[1]
        * model.get_parameter(part.param).numel()
        / model.get_parameter(part.param).shape[part.dim]
        for part in unit.slices
    )


def _unit_macs(model: nn.Module, unit: Units) -> float:
    """MACs an image saves when one unit goes: its weights once a token, a head's two products."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    matrices = [p for p in unit.slices if model.get_parameter(p.param).dim() == 2]
    weights = sum(
        part.index.shape[1] * model.get_parameter(part.param).shape[1 - part.dim]
        for part in matrices
    )
    products = 0
    if isinstance(unit.layer, AttentionLayer):
        products = 2 * tokens * tokens * unit.layer.head_dim
    return tokens * weights + products
