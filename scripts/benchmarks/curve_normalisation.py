"""Which normalisation of a layer's reconstruction error predicts what the model's output loses.

One layer at a time, one kind at a time, ViT-Tiny is cut to 3/4, 1/2 and 1/4 of its units and repaired;
the KL to the dense model on images not used for calibration is the truth. Each normalisation prices the
same removals. A good one ranks them right (Spearman) and is off by the same factor everywhere (the
spread of log10(true / predicted)). Rows go to profiles/rows/curve-normalisation.jsonl.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from parts import imagenet, quality, rows
from scipy.stats import spearmanr
from torch import Tensor, nn

from hwprune.distortion import Curve, curves
from hwprune.families import timm_vit
from hwprune.obs import damped_inverse, eliminate_groups, sqrt_psd
from hwprune.repair import repair_
from hwprune.rotate import rotate_
from hwprune.statistics import Moments, Statistics, calibrate
from hwprune.units import Units, get_linear

NAME = "curve-normalisation"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
FRACTIONS = (0.75, 0.5, 0.25)
OURS = "kfac, gradient-weighted tokens (ours)"


def price(model: nn.Module, curve: Curve, moments: Moments, metric_OO: Tensor) -> Tensor:
    """½ tr(metric Δ H Δᵀ) along the curve's own order [U + 1], for heads, neurons and v channels."""
    root_OO, _ = sqrt_psd(metric_OO)
    weight_OI = root_OO @ get_linear(model, curve.units.layer.out).weight.detach().double()
    moment_II = moments.centred
    if curve.rotation is not None:
        heads, width = curve.rotation.first.shape[:2]
        turned = weight_OI.view(-1, heads, width)
        weight_OI = torch.einsum("ohd,hdc->ohc", turned, curve.rotation.second).flatten(1)
        turn_II = torch.block_diag(*curve.rotation.first)
        moment_II = turn_II @ moment_II @ turn_II.T
    index = curve.units.slices[-1].index
    assert index is not None
    order = curve.order
    return 0.5 * eliminate_groups(weight_OI, damped_inverse(moment_II), index, order)[1]


def projected(model: nn.Module, curve: Curve, kept: int, batches: Sequence[Tensor]) -> float:
    """½ E_n (Σ_j B[n, j])² over the removed channels, in the rotated basis; no re-fit is priced.

    A q/k channel's sum holds its q rows and its k rows, which but for the biases say the same thing twice.
    """
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        assert curve.rotation is not None
        rotate_(model, curve.units.layer, curve.units.kind, curve.rotation)
        sums_NU = calibrate(model, [curve.units], batches, sums=True).sums[curve.units.name]
    finally:
        model.load_state_dict(saved)
    gone = ~curve.kept(kept)
    return 0.5 * float((sums_NU[:, gone].sum(1) / 2).square().mean())


def predictions(
    model: nn.Module,
    curve: Curve,
    gradient: Statistics,
    uniform: Statistics,
    kept: int,
    batches: Sequence[Tensor],
) -> dict[str, float]:
    """Normalisation -> predicted distortion of keeping `kept` units."""
    removed = curve.units.count - kept
    found = {OURS: float(curve.distortion[removed])}
    if curve.units.kind == "qk":
        found["block-projected Gauss-Newton"] = projected(model, curve, kept, batches)
        return found
    plain = uniform.linear[curve.units.layer.out]
    identity = torch.eye(len(plain.metric), dtype=torch.float64)
    own = float(price(model, curve, plain, identity)[removed])
    weight = get_linear(model, curve.units.layer.out).weight.detach().double()
    energy = 0.5 * float(((weight @ plain.centred) * weight).sum())
    gain = float(plain.metric.diagonal().mean())
    found["own output error"] = own
    found["own output error, relative"] = own / energy
    found["own output error x gradient energy"] = own * gain
    found["kfac, all tokens alike"] = float(price(model, curve, plain, plain.metric)[removed])
    return found


def truth(
    model: nn.Module,
    unit: Units,
    curve: Curve,
    kept: int,
    statistics: Statistics,
    batches: Sequence[Tensor],
    check: list[Tensor],
    reference: Tensor,
) -> float:
    """KL to the dense model on `check` with one group of units cut and repaired; weights restored."""
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        if curve.rotation is not None:
            rotate_(model, unit.layer, unit.kind, curve.rotation)
        mask = {unit.name: curve.kept(kept)}
        repair_(model, [unit], mask, statistics, batches, timm_vit.stages(model))
        with torch.inference_mode():
            out = quality.logits(model, check)
        log_p, log_q = reference.log_softmax(1), out.log_softmax(1)
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    finally:
        model.load_state_dict(saved)


def main() -> None:
    """Measure, append rows, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--check", type=int, default=64)
    parser.add_argument("--every", type=int, default=2, help="blocks between measured blocks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reason = imagenet.missing()
    if reason:
        sys.exit(f"{NAME}: skipped, {reason}")
    task = imagenet.load(options.calibration + options.check, options.seed)
    images = torch.cat(task.calibration)
    batches = list(images[: options.calibration].split(16))
    check = list(images[options.calibration :].split(16))
    model, start = task.model, time.perf_counter()
    units = timm_vit.find_units(model, ("head", "qk", "vo", "neuron"))
    gradient = calibrate(model, units, batches, seed=options.seed)
    uniform = calibrate(model, units, batches, weighting="uniform", seed=options.seed)
    found = curves(model, units, gradient)
    with torch.inference_mode():
        reference = quality.logits(model, check)
    points: list[tuple[str, dict[str, float], float]] = []
    for unit in units:
        if unit.layer.stage % options.every or unit.kind == "head":
            continue
        curve = found[unit.name]
        for fraction in FRACTIONS:
            kept = round(unit.count * fraction)
            predicted = predictions(model, curve, gradient, uniform, kept, batches)
            true = truth(model, unit, curve, kept, gradient, batches, check, reference)
            points.append((unit.kind, predicted, max(true, 1e-9)))
            print(
                f"{unit.name} keeps {kept}: true {true:.5f}, ours {predicted[OURS]:.5f}", flush=True
            )
    for name in dict.fromkeys(n for _, p, _ in points for n in p):
        for kinds in (("vo", "neuron"), ("qk",), ("vo",), ("neuron",)):
            pairs = [(p[name], t) for k, p, t in points if k in kinds and name in p]
            if not pairs:
                continue
            predicted, true = np.array(pairs).T
            log_ratio = np.log10(true / np.maximum(predicted, 1e-12))
            row = {
                **rows.provenance(),
                "normalisation": name,
                "kinds": list(kinds),
                "points": len(pairs),
                "spearman": float(spearmanr(predicted, true).statistic),
                "log10_spread": float(log_ratio.std()),
                "median_true_over_predicted": float(10 ** np.median(log_ratio)),
                "calibration_images": options.calibration,
                "check_images": options.check,
                "seed": options.seed,
                "seconds": time.perf_counter() - start,
            }
            rows.append(ROWS, row)
            print(
                f"{name:42s} {'+'.join(kinds):10s} spearman {row['spearman']:.3f}  spread "
                f"{row['log10_spread']:.2f}  true/predicted {row['median_true_over_predicted']:.3g}"
            )


if __name__ == "__main__":
    main()
