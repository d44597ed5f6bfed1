"""From a mask to a smaller model, in place: rotate, re-fit, realise, and check that nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hwprune import families
from hwprune.analysis import Analysis, StepProgress, timed
from hwprune.distortion import Curve
from hwprune.realise import Shape, realise_, zero_
from hwprune.repair import repair_
from hwprune.rotate import rotate_
from hwprune.statistics import is_classifier, model_output, output_distance
from hwprune.units import Mask, vision_layer


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on exit every module has its mode again, and after a failure the model its all."""
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if child:
                setattr(modules[parent], child, module)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        raise
    finally:
        for name, module in model.named_modules():
            while name not in modes:  # new inside a rebuilt layer
                name = name.rpartition(".")[0]
            module.training = modes[name]


def cut_(
    model: nn.Module,
    analysis: Analysis,
    mask: Mask,
    batches: Sequence[Tensor],
    repair: bool,
    seconds: dict[str, float],
    progress: StepProgress | None,
    *,
    tiles: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Shape, float]:
    """Rotate, re-fit and realise; returns the shape and the mean distortion on the batches.

    With `tiles` linears are stored as tiles although none of theirs is dropped (see `realise_`).
    """
    classifier = is_classifier(model)
    with torch.inference_mode():
        dense_out = [model_output(model, b).clone() for b in batches]
    with timed(seconds, "repair"):
        turn_(model, analysis.curves, mask)
        if repair:
            step = None if progress is None else (lambda d, t: progress("repair", d, t))
            repair_(
                model,
                analysis.units,
                mask,
                analysis.statistics,
                batches,
                families.of(model).stages(model),
                progress=step,
            )
        else:
            zero_(model, analysis.units, mask)
    with torch.inference_mode():
        before = model_output(model, batches[0]).clone()
    with timed(seconds, "realise"):
        shape = realise_(model, analysis.units, mask, tiles)
    with timed(seconds, "check"), torch.inference_mode():
        outs = [model_output(model, b) for b in batches]
        _check_same(before, outs[0])
        distance = torch.cat(
            [
                output_distance(out, ref, classifier=classifier)
                for out, ref in zip(outs, dense_out, strict=True)
            ]
        )
    return shape, float(distance.mean())


def turn_(model: nn.Module, curves: Mapping[str, Curve], mask: Mask) -> None:
    """Rotate every layer that loses q/k or v channels, in place; the model computes the same."""
    for name, curve in curves.items():
        if curve.rotation is not None and not bool(mask[name].all()):
            layer = vision_layer(curve.units)
            rotate_(model, layer, curve.units.kind, curve.rotation)


def _check_same(masked_out: Tensor, realised_out: Tensor) -> None:
    """The realised model must say what the masked one said: no head mixed, no scale changed."""
    if not bool(torch.isfinite(realised_out).all()):
        raise RuntimeError("the realised model gives NaN or Inf on calibration images")
    error = float((masked_out.double() - realised_out.double()).norm())
    size = float(masked_out.double().norm())
    tolerance = 1e-3 if realised_out.dtype == torch.float32 else 5e-2
    if error > tolerance * max(size, 1e-6):
        raise RuntimeError(
            f"the realised model differs from the masked one by {error / size:.2e} of its output "
            f"(allowed {tolerance:.0e}); please report this model"
        )
