"""LPViT's block masks: the published method that our own block pruning is compared with.

Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024,
arXiv 2407.02068. Written from a description of the method; no code of the authors' repository
(Akimoto-Cris/LPViT, which has no licence) is used.

Each block is scored by first-order Taylor; each layer's output distortion is predicted for removing
its lowest blocks, at 101 levels; one slope common to all layers is searched for that meets the
compute budget. Weights are never re-fitted, as published. Two readings can be asked for:

"paper": the objective as stated. Gradients per image, mean of (g.d + d'Hd / 2)^2 over images with
    d = -(removed weights); power falls with pruning and counts tokens; slopes are weighted by each
    layer's FLOPs; the mask is the one analysed.
"repo": the public code. One averaged gradient; the incremental update with a wrong sign and a bare
    kappa; power that rises with pruning and counts input features; unweighted slopes; a classifier
    counted once for each class; a final mask ranked by L1 magnitude. Two of its habits are not
    copied: training mode (the same without dropout) and wrong image normalisation (the caller's).

Shapes: N images, J = R * C blocks of a weight [O, I], L layers, D = 101 levels of pruned fraction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwprune.cost import count_macs
from hwprune.lpvit_calibration import (
    Block,
    LayerSums,
    block_linears,
    calibrate,
    linear_macs,
    sum_blocks,
)

Fidelity = Literal["paper", "repo"]

LEVELS = 101  # pruned fractions 0, 0.01 ... 1
KAPPA = 1e-7  # damping of the empirical Fisher
ACTIVATION_TILE = 16  # rows of activations per hardware tile in the power term
SMOOTH = 0.5  # of a curve along its levels; published choices, by experiment: .1, .5, .9
STENCIL = 4  # half-width of the derivative, in levels; published choices: 2, 4, 10
STENCIL_POWER = 10  # the automatic weight of the power term always uses this one
TOLERANCE = 0.02  # of the FLOPs ratio, as published


@dataclass(frozen=True, eq=False)
class Scored:
    """What one calibration pass found, for masks at any number of budgets.

    Attributes:
        sums: of each layer, by name.
        block: (output rows, input columns).
        fidelity: "paper" or "repo".
        power: whether the published power term counts.
        true_total: true MACs of the dense model.
        linear_total: its FLOPs as the method counts them.
    """

    sums: dict[str, LayerSums]
    block: Block
    fidelity: Fidelity
    power: bool
    true_total: float
    linear_total: float

    def masks(
        self, keep_ratio: float, *, true_macs: bool = False, stored: bool = False
    ) -> dict[str, Tensor]:
        """The blocks to keep; arguments, result and errors as of `lpvit_masks`.

        Args:
            keep_ratio: compute to keep.
            true_macs: of the model's true MACs.
            stored: count ragged blocks whole, as `BlockSparseLinear` stores and multiplies them.
        """
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio: expected a number in (0, 1], got {keep_ratio}")
        sums, block, fidelity = self.sums, self.block, self.fidelity
        sizes = {n: sum_blocks(torch.ones_like(s.weight), block) for n, s in sums.items()}
        if keep_ratio == 1:
            return {n: torch.ones_like(size, dtype=torch.bool) for n, size in sizes.items()}
        total = self.true_total if true_macs else self.linear_total
        if stored:
            sizes = {n: torch.full_like(size, block[0] * block[1]) for n, size in sizes.items()}
        repo_count = fidelity == "repo" and not true_macs
        macs = {n: sizes[n] * (s.repo_tokens if repo_count else s.tokens) for n, s in sums.items()}
        scores = {n: block_scores(s.weight * s.gradient, block) for n, s in sums.items()}
        orders = {n: score.flatten().argsort(stable=True) for n, score in scores.items()}
        costs_LD = torch.stack([_cost_curve(macs[n].flatten()[orders[n]]) for n in sums])
        whole = {n: s.tokens * s.weight.numel() for n, s in sums.items()}
        fixed = total - (sum(whole.values()) if stored else costs_LD[:, 0].sum().item())
        last = _last_level(keep_ratio)
        reachable = (fixed + costs_LD[:, last].sum().item()) / total
        if keep_ratio < reachable:
            raise ValueError(
                f"keep_ratio: expected at least {reachable:.3f}, what is left once {last} % of the "
                f"blocks of {len(sums)} layers are gone, got {keep_ratio}; ask for more compute or "
                "name more layers"
            )
        curves = [distortion_curve(s, orders[n], block, fidelity) for n, s in sums.items()]
        slopes_LD, threshold, bounds = tangents(
            torch.stack(curves), costs_LD, sums, fidelity, self.power
        )
        tolerance = 0.0 if true_macs else TOLERANCE
        levels_L = slope_search(
            slopes_LD[:, : last + 1],
            costs_LD / total,
            fixed / total,
            keep_ratio,
            threshold,
            bounds,
            tolerance,
        )
        if fidelity == "repo":  # it masks by magnitude, whatever it has analysed
            scores = {n: block_scores(s.weight, block) for n, s in sums.items()}
        masks = {
            n: _lowest_removed(scores[n], level)
            for n, level in zip(sums, levels_L.tolist(), strict=True)
        }
        budget = keep_ratio * total - fixed
        if abs(_kept_macs(masks, macs) - budget) > tolerance * total:
            _top_up(masks, scores, macs, budget)
        return masks


def scored(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    block: Block = (32, 32),
    fidelity: Fidelity = "paper",
    power: bool = True,
    layers: Sequence[str] | None = None,
) -> Scored:
    """The calibration pass of LPViT; arguments and errors as of `lpvit_masks`."""
    if fidelity not in ("paper", "repo"):
        raise ValueError(f"fidelity: expected 'paper' or 'repo', got {fidelity!r}")
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block: expected two positive sizes (rows, columns), got {block}")
    sums = calibrate(model, batches, block_linears(model) if layers is None else layers, block)
    images = batches[0]
    linear_total = linear_macs(model, images, repo_count=fidelity == "repo")
    return Scored(sums, block, fidelity, power, count_macs(model, images[:1]), linear_total)


def lpvit_masks(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    keep_ratio: float,
    block: Block = (32, 32),
    fidelity: Fidelity = "paper",
    power: bool = True,
    layers: Sequence[str] | None = None,
    true_macs: bool = False,
) -> dict[str, Tensor]:
    """Choose the blocks of a vision transformer's weights that LPViT would keep.

    Args:
        model: a classifier, images [B, 3, H, W] -> logits [B, classes]; left unchanged.
        batches: calibration images of one size, no labels.
        keep_ratio: compute to keep, in (0, 1]: of the FLOPs of all linears and convolutions, as the
            method counts them (met within 0.02), or of the model's true MACs with `true_macs`
            (never above, below by less than a block).
        block: (output rows, input columns) of a block; ragged edges are allowed.
        fidelity: "paper" or "repo", see the top of this file.
        power: include the published power term.
        layers: names of `nn.Linear` or ungrouped `nn.Conv2d` modules to prune; every linear in
            `model.blocks` if None, so patch embedding and classifier stay dense.
        true_macs: count attention products too, and the classifier once.

    Where the search ends outside the tolerance, single blocks are dropped or restored by score. It
    can: the curves are not convex, so a small change of the slope can move a layer far. On ViT-Tiny
    at 0.90 of its true MACs "paper" ends at 0.815, at 0.80 at 0.803.

    Returns:
        {layer name: bool [ceil(O / rows), ceil(I / columns)]}, True = keep.

    Raises:
        ValueError: bad arguments, a ratio that cannot be reached (the reachable one is named), or
            non-finite weights or activations (the layer is named).
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio: expected a number in (0, 1], got {keep_ratio}")
    found = scored(model, batches, block=block, fidelity=fidelity, power=power, layers=layers)
    return found.masks(keep_ratio, true_macs=true_macs)


def block_scores(saliency: Tensor, block: Block) -> Tensor:
    """Mean |saliency| over the real entries of each block: [O, I] -> [R, C]."""
    return sum_blocks(saliency.abs(), block) / sum_blocks(torch.ones_like(saliency), block)


def distortion_curve(
    sums: LayerSums, order_J: Tensor, block: Block, fidelity: Fidelity = "paper"
) -> Tensor:
    """Predicted output distortion after removing the first blocks of an order, by level.

    With d = -(removed weights), g_n the gradient of image n and g their mean:
    "paper": mean over n of (g_n.d + Q / 2)^2 where Q = mean over n of (g_n.d)^2 + kappa |d|^2;
    "repo": mean over entries of (d * g)^2, plus (2 d + step).(g (g.step) + kappa) / 2 summed over
    levels, where (2 d - step).(g (g.step) + kappa step) / 2 would give d'(gg' + kappa)d / 2.

    Args:
        sums: of one layer.
        order_J: blocks, row by row numbered, in the order of removal.
        block: (output rows, input columns).
        fidelity: which of the two.

    Returns:
        float64 [D], smoothed along the levels.
    """

    def removed(values_J: Tensor) -> Tensor:
        return _partial_sums(values_J[..., order_J])

    weight, gradient = sums.weight, sums.gradient
    if fidelity == "paper":
        first_ND = -removed(sums.block_sums)
        norm_D = removed(sum_blocks(weight.square(), block).flatten())
        second_D = first_ND.square().mean(0) + KAPPA * norm_D
        return _smoothed((first_ND + second_D / 2).square().mean(0))
    squares_D = removed(sum_blocks((weight * gradient).square(), block).flatten())
    along_D = -removed(sum_blocks(weight * gradient, block).flatten())
    entries_D = -removed(sum_blocks(weight, block).flatten())
    along, entries = along_D.diff(), entries_D.diff()
    steps = (2 * along_D[1:] + along) * along + KAPPA * (2 * entries_D[1:] + entries)
    return _smoothed(squares_D / weight.numel() + F.pad(steps.cumsum(0) / 2, (1, 0)))


def derivative(curve_D: Tensor, half_width: int) -> Tensor:
    """Derivative of a curve by pruned fraction: [D] -> [D].

    Five-point stencil of spacing `half_width` levels; one-sided difference where it does not fit.
    """
    h, levels = half_width, len(curve_D)
    step = h / (LEVELS - 1)
    forward = (curve_D[h:] - curve_D[:-h]) / step
    slope_D = torch.cat([forward[: levels // 2], forward[levels // 2 - h :]])
    near = curve_D[3 * h : levels - h] - curve_D[h : levels - 3 * h]
    far = curve_D[4 * h :] - curve_D[: -4 * h]
    slope_D[2 * h : levels - 2 * h] = (8 * near - far) / (12 * step)
    return slope_D


def tangents(
    curves_LD: Tensor,
    costs_LD: Tensor,
    sums: dict[str, LayerSums],
    fidelity: Fidelity,
    power: bool,
) -> tuple[Tensor, Callable[[float], Tensor], tuple[float, float]]:
    """What each layer's level has to meet: the slope nearest to threshold(s), with one s for all.

    "paper": d distortion = s * FLOPs + beta * |d power|, s of either sign. Where all layers see
        the same tokens, power is proportional to FLOPs and the term changes nothing.
    "repo": d distortion + beta * d power = 2^s, with a power that grows as the layer is pruned.
    Beta makes the mean of the largest derivatives of distortion and of power equal.

    Args:
        curves_LD: distortion of each layer at each level.
        costs_LD: MACs of each layer at each level.
        sums: of the same layers in the same order.
        fidelity: which of the two.
        power: False sets beta to 0.

    Returns:
        Slopes [L, D]; threshold(s) [L], rising with s; the range of s to search.
    """
    slopes_LD = torch.stack([derivative(curve_D, STENCIL) for curve_D in curves_LD])
    steepest_L = torch.stack([derivative(curve_D, STENCIL_POWER).max() for curve_D in curves_LD])
    repo = fidelity == "repo"
    tiles = [
        s.repo_rows // ACTIVATION_TILE if repo else math.ceil(s.tokens / ACTIVATION_TILE)
        for s in sums.values()
    ]
    weights_L = torch.tensor([float(s.weight.numel()) for s in sums.values()], dtype=torch.float64)
    power_L = weights_L * torch.tensor(tiles)  # |d power|; the block size is absorbed in beta
    beta = (steepest_L.mean() / power_L.mean()).item() if power and power_L.any() else 0.0
    if repo:
        slopes_LD = slopes_LD + beta * power_L[:, None]
        return slopes_LD, lambda s: torch.full_like(power_L, 2.0**s), (-100.0, 100.0)
    flops_L = costs_LD[:, 0] / costs_LD[:, 0].mean()
    reach_LD = (slopes_LD - beta * power_L[:, None]) / flops_L[:, None]
    bounds = (reach_LD.min().item(), reach_LD.max().item())
    return slopes_LD, lambda s: s * flops_L + beta * power_L, bounds


def slope_search(
    slopes_LD: Tensor,
    costs_LD: Tensor,
    fixed: float,
    budget: float,
    threshold: Callable[[float], Tensor],
    bounds: tuple[float, float],
    tolerance: float,
) -> Tensor:
    """Bisect the one number s that puts the total cost at the budget.

    Args:
        slopes_LD: slope of each layer's curve at the levels it may take.
        costs_LD: cost of each layer at each level, falling along D.
        fixed: cost of everything else.
        budget: what fixed + costs should come to.
        threshold: s -> [L]; a layer takes the level whose slope is nearest to its threshold.
        bounds: lowest and highest s.
        tolerance: stop at the first |cost - budget| within it; 0 goes through all 60 halvings.

    Returns:
        int64 [L], the levels that came nearest to the budget.
    """
    low, high = bounds
    best_gap, best_L = math.inf, torch.zeros(len(slopes_LD), dtype=torch.int64)
    for _ in range(60):
        s = (low + high) / 2
        levels_L = (slopes_LD - threshold(s)[:, None]).abs().argmin(1)
        gap = fixed + costs_LD.gather(1, levels_L[:, None]).sum().item() - budget
        if abs(gap) < best_gap:
            best_gap, best_L = abs(gap), levels_L
        if abs(gap) <= tolerance:
            break
        low, high = (s, high) if gap > 0 else (low, s)
    return best_L


def _last_level(keep_ratio: float) -> int:
    """The highest level a layer may take: 5 % of its blocks stay, or half the budget's slack."""
    return math.floor((LEVELS - 1) * (1 - min(0.05, (1 - keep_ratio) / 2)) + 1e-9)


def _removed_counts(blocks: int) -> Tensor:
    """Blocks gone at each level: J - int((1 - fraction) * J), in integers so nothing rounds."""
    last = LEVELS - 1
    return torch.tensor([blocks - (last - d) * blocks // last for d in range(LEVELS)])


def _partial_sums(values_J: Tensor) -> Tensor:
    """Sum of the entries gone at each level, along the last dimension: [..., J] -> [..., D]."""
    return F.pad(values_J.cumsum(-1), (1, 0))[..., _removed_counts(values_J.shape[-1])]


def _cost_curve(macs_J: Tensor) -> Tensor:
    """MACs left at each level, from those of the blocks in the order of removal: [J] -> [D]."""
    return macs_J.sum() - _partial_sums(macs_J)


def _smoothed(curve_D: Tensor) -> Tensor:
    """De-biased exponential moving average along the levels."""
    last, smoothed = 0.0, []
    for d, value in enumerate(curve_D.tolist()):
        last = SMOOTH * last + (1 - SMOOTH) * value
        smoothed.append(last / (1 - SMOOTH ** (d + 1)))
    return curve_D.new_tensor(smoothed)


def _lowest_removed(scores: Tensor, level: int) -> Tensor:
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort(stable=True)[: int(_removed_counts(len(keep))[level])]] = False
    return keep.view(scores.shape)


def _kept_macs(masks: dict[str, Tensor], macs: dict[str, Tensor]) -> float:
    return sum(macs[n][keep].sum().item() for n, keep in masks.items())


def _top_up(
    masks: dict[str, Tensor], scores: dict[str, Tensor], macs: dict[str, Tensor], budget: float
) -> None:
    """Drop the lowest-scoring kept blocks, then restore the highest dropped ones that still fit."""
    kept = _kept_macs(masks, macs)
    entries = sorted(
        (score, n, j) for n in masks for j, score in enumerate(scores[n].flatten().tolist())
    )
    for _, name, j in entries:
        if kept > budget and masks[name].view(-1)[j]:
            masks[name].view(-1)[j] = False
            kept -= macs[name].flatten()[j].item()
    for _, name, j in reversed(entries):
        cost = macs[name].flatten()[j].item()
        if kept + cost <= budget and not masks[name].view(-1)[j]:
            masks[name].view(-1)[j] = True
            kept += cost
