"""What a mask costs the model's output in truth: cut on a copy, repaired on some images, and run on others.

Plans must be judged as they end, after the whole repair. Re-fitting each linear by itself from the moments of
the calibration pass is ten times as fast, and misleads: a search by it brought its own figure from 0.41 to 0.31
and the KL of the finished model on 744 other images from 0.57 to 0.64 (ViT-Tiny, latency 0.5). The repair on 64
images puts plans in the order that the one on 256 does, at a quarter of the time: 0.84, 1.00 and 1.13 for plans
that end at 0.64, 0.75 and 0.87.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune import families
from hwprune.analysis import Analysis
from hwprune.cutting import turn_
from hwprune.realise import realise_, zero_
from hwprune.repair import repair_
from hwprune.statistics import is_classifier, model_output, output_distance
from hwprune.tiling import in_use
from hwprune.units import Mask, full_mask

FIT, JUDGE = 64, 192  # images that plans are repaired on, and run on
_HOPELESS = 2.0  # standard errors of the paired difference
_BATCHES = 8  # of the images repaired on, so that the repair can hold some of them out


@dataclass(frozen=True, eq=False)
class Trials:
    """Measures masks of one model.

    Attributes:
        model: dense; unchanged.
        analysis: of it.
        fit: images that a cut copy is repaired on; none = it is cut and left as it is.
        batches: others, that it is run on.
        reference: what the dense model says to each batch.
        classifier: whether the outputs are logits.
    """

    model: nn.Module
    analysis: Analysis
    fit: Sequence[Tensor]
    batches: Sequence[Tensor]
    reference: Sequence[Tensor]
    classifier: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        analysis: Analysis,
        batches: Sequence[Tensor],
        *,
        repair: bool = True,
        fit: int = FIT,
        judge: int = JUDGE,
    ) -> Trials:
        """Choose images and run the dense model once.

        Args:
            model: dense, in evaluation mode.
            analysis: of it.
            batches: images [B, 3, height, width], that it was calibrated on.
            repair: re-fit what is kept.
            fit: images to do that on.
            judge: images to run on.
        """
        on, others = shared_out(batches, fit, judge)
        with torch.inference_mode():
            reference = [model_output(model, b).clone() for b in others]
        return cls(model, analysis, on if repair else (), others, reference, is_classifier(model))

    @property
    def images(self) -> int:
        """How many a mask is tried on."""
        return sum(len(batch) for batch in self.batches)

    def distortion(self, mask: Mask, best_N: Tensor | None = None) -> Tensor:
        """Distortion of each image [N], float64 on the CPU, with the mask cut and repaired.

        Args:
            mask: what to keep; names left out are kept.
            best_N: of the best mask so far. One that falls behind it on the images run by more than chance
                is dropped there: the result is of those images.
        """
        trial = self._cut({**full_mask(self.analysis.units), **mask})
        found_N = torch.empty(0, dtype=torch.float64)
        with torch.inference_mode():
            for batch, reference in zip(self.batches, self.reference, strict=True):
                out = model_output(trial, batch)
                each = output_distance(out, reference, classifier=self.classifier).cpu()
                found_N = torch.cat([found_N, each])
                if best_N is not None and hopeless(found_N, best_N):
                    break
        return found_N

    def _cut(self, mask: Mask) -> nn.Module:
        """The model itself where nothing goes, or a smaller copy."""
        if all(bool(grid.all()) for grid in mask.values()):
            return self.model
        units, mask = in_use(self.analysis.units, mask)
        curves = {n: c for n, c in self.analysis.curves.items() if n in mask}
        trial = copy.deepcopy(self.model)
        turn_(trial, curves, mask)
        if self.fit:
            stages = families.of(trial).stages(trial)
            repair_(trial, units, mask, self.analysis.statistics, self.fit, stages)
        else:
            zero_(trial, units, mask)
        realise_(trial, units, mask)
        return trial


def shared_out(
    batches: Sequence[Tensor], fit: int, judge: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Images to repair on, in eight batches, and others to judge by, each evenly from all.

    Images often come class by class. Of fewer than both need, a third is repaired on; a single one is both.
    """
    every = torch.cat([b for b in batches if len(b)])
    first = min(fit, max(1, round(len(every) / 3)))
    order = torch.arange(len(every))
    is_first = (order * first) // len(every) != ((order - 1) * first) // len(every)
    on, others = every[is_first], every[~is_first]
    if not len(others):
        others = on
    others = others[:: max(1, -(-len(others) // judge))]
    size = max(len(batch) for batch in batches)
    return on.split(-(-len(on) // _BATCHES)), others.split(size)


def hopeless(found_N: Tensor, best_N: Tensor) -> bool:
    """Whether a plan is behind another, on the images it has run on, by more than chance."""
    if len(found_N) < 2:
        return False
    behind_N = found_N - best_N[: len(found_N)]
    return bool(behind_N.mean() > _HOPELESS * behind_N.std() / len(behind_N) ** 0.5)
