"""Pictures of the dense and the pruned model side by side, from the same first latents, as one PNG."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwprune.conditions import Conditions
from hwprune.denoiser_checkpoint import load_pipeline
from hwprune.diffusion_folder import DiffusionFolder
from hwprune.gating import Gating
from hwprune.teacher import Batch, Sampler, draw

SHOWN = 8
_FAILURES = (RuntimeError, ValueError, TypeError, ArithmeticError, AttributeError)


class Sampled:
    """Pictures of the dense model, drawn at once, and of the pruned one, once it is saved.

    Args:
        opened: with the dense denoiser.
        conditions: what to draw.
        seed: of the run; the pictures are of held-out first latents.
        batch: images at a time.

    Attributes:
        note: why there are none, or "".
    """

    def __init__(
        self, opened: DiffusionFolder, conditions: Conditions, *, seed: int, batch: int
    ) -> None:
        """Draw the dense model's."""
        self.opened, self.whole, self.note = opened, opened.pipeline is not None, ""
        self.dense: Tensor | None = None
        self.vae: Any = None
        self.failed = False
        self.sampler = Sampler(opened.model, conditions)
        self.batches = draw(self.sampler, "held", SHOWN, batch=min(batch, SHOWN), seed=seed)
        labelled = "class_labels" in conditions.inputs[0]
        if importlib.util.find_spec("matplotlib") is None:
            self.note = "no pictures without matplotlib: pip install hwprune[plot]"
        elif self.whole and not labelled and not _takes_latents(opened.pipeline):
            self.note = f"no pictures: {type(opened.pipeline).__name__} takes no first latents"
        else:
            self.dense = self._drawn(self.sampler, opened.pipeline)
            vae = getattr(opened.pipeline, "vae", None)
            channels = getattr(getattr(vae, "config", None), "latent_channels", None)
            if len(conditions.shape) == 3 and conditions.shape[0] == channels:
                self.vae = vae  # 80 M parameters; the encoders go

    def __call__(self, folder: Path, file: Path) -> None:
        """Draw the pruned model's, from its folder where that is a pipeline, and write both."""
        if self.note:
            return
        sampler, pipeline = self.sampler, None
        if self.whole:
            weight = next(self.opened.model.parameters())
            pipeline = load_pipeline(folder, weight.device, weight.dtype)
            sampler = Sampler(getattr(pipeline, self.opened.name), self.sampler.conditions)
        conditions = self.sampler.conditions
        names = [conditions.names[i] for batch in self.batches for i in batch.conditions]
        pruned = self._drawn(sampler, pipeline)
        if self.dense is not None and pruned is not None:
            side_by_side(self.dense, pruned, names, file)

    @torch.no_grad()
    def preview(self, gating: Gating, keep: Tensor, file: Path) -> None:
        """Write what the model draws with a mask in force, beside the dense model's; while it learns.

        Where latents are packed (FLUX) only the pipeline can decode them, and it has been freed.
        """
        vae = self.vae
        if self.failed or self.note or self.dense is None or (self.whole and vae is None):
            return
        try:
            rows = []
            for batch in self.batches:
                final = self.sampler.final(batch, gating, keep.float())
                rows.append(_shown(final if vae is None else _decoded(vae, final)))
        except _FAILURES:
            self.failed = True  # not asked for again; hours of learning go on
            return
        names = [self.sampler.conditions.names[i] for b in self.batches for i in b.conditions]
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}")
        side_by_side(self.dense, torch.cat(rows), names, fresh)
        fresh.replace(file)

    def _drawn(self, sampler: Sampler, pipeline: Any) -> Tensor | None:
        """Pictures; where they fail, say so: hours of learning are not lost for want of a picture."""
        try:
            return torch.cat([drawn(sampler, batch, pipeline) for batch in self.batches])
        except _FAILURES as error:
            said = " ".join(str(error).split())[:160]
            self.note = f"no pictures: {type(error).__name__}: {said}"
            return None


def _takes_latents(pipeline: Any) -> bool:
    return "latents" in inspect.signature(type(pipeline).__call__).parameters


def drawn(sampler: Sampler, batch: Batch, pipeline: Any = None) -> Tensor:
    """What a model draws: [B, height, width, channels] in [0, 1], on the CPU.

    Args:
        sampler: of the model as it is now.
        batch: held-out first latents.
        pipeline: the whole, for models of latents: its VAE decodes; None = pixels in [-1, 1].
    """
    conditions = sampler.conditions
    words = [conditions.names[i] for i in batch.conditions]
    with torch.no_grad():
        if pipeline is not None and "class_labels" not in conditions.inputs[0]:
            return _through(pipeline, words, sampler, batch)
        final = sampler.final(batch)
        if pipeline is not None:
            final = _decoded(pipeline.vae, final)
    return _shown(final)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents, one image at a time: 1024 x 1024 takes some GB."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
    return torch.cat([vae.decode(one[None]).sample for one in scaled])


def _shown(pixels: Tensor) -> Tensor:
    """Pixels [B, C, height, width] in [-1, 1] as pictures."""
    return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def _through(pipeline: Any, prompts: list[str], sampler: Sampler, batch: Batch) -> Tensor:
    """By the pipeline itself: it knows how its latents are packed and decoded."""
    conditions = sampler.conditions
    asked: dict[str, Any] = {"num_inference_steps": len(conditions.scheduler.timesteps)}
    if conditions.empty is not None:
        asked["guidance_scale"] = conditions.guidance
    bar = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        latents = batch.start / sampler.solver.start_scale
        model = sampler.model
        latents = latents.to(sampler.device, next(model.parameters()).dtype)
        found = pipeline(prompts, latents=latents, output_type="pt", **asked).images
    finally:
        pipeline._progress_bar_config = bar if bar is not None else {}
    images: Tensor = found.float().cpu().movedim(1, -1)
    return images


def side_by_side(dense: Tensor, pruned: Tensor, names: Sequence[str], file: Path) -> None:
    """Write a PNG: one column an image, the dense model's above the pruned one's.

    Args:
        dense: [B, height, width, channels] in [0, 1].
        pruned: the same images by the pruned model.
        names: of the columns.
        file: to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(SHOWN, len(dense))
    figure = Figure(figsize=(1.6 * count, 3.6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        for row, images in enumerate((dense, pruned)):
            image = images[column].squeeze(-1) if images.shape[-1] == 1 else images[column]
            axis = axes[row][column]
            axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0][column].set_title(names[column][:18], fontsize=8)
    axes[0][0].set_ylabel("dense")
    axes[1][0].set_ylabel("pruned")
    figure.tight_layout()
    figure.savefig(file, format="png")
