"""The dense model's final latents, computed once: what a pruned model is trained towards and judged by.

Three sets with seeds of their own: `train`, `check` (which of several masks or re-fits is better) and
`held`, which nothing is chosen by and the report speaks of. With many conditions the held-out ones are
other conditions too. A folder keeps the latents, under a name made of all that decides them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hwprune.conditions import Conditions
from hwprune.gating import Gating
from hwprune.shards import digest, portable
from hwprune.solvers import Solver
from hwprune.trajectory import Denoise, Watch, sample

_HELD_FROM = 12  # conditions; with fewer, held-out images differ by their seeds alone
_HELD_EVERY = 4
_APART = {"train": 0, "check": 1, "held": 2}
Split = Literal["train", "check", "held"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images drawn together.

    Attributes:
        conditions: which condition each image is of.
        seeds: of each image's first latent; the first one also seeds the solver's own noise.
        start: [B, ...] the first latents, float32, on the CPU.
        target: [B, ...] the dense model's final latents, float32, on the CPU.
    """

    conditions: tuple[int, ...]
    seeds: tuple[int, ...]
    start: Tensor
    target: Tensor


class Sampler:
    """Draws batches with one model, solver and device.

    Args:
        model: the denoiser, on its device.
        conditions: what to draw.
        offload: keep the latents of the steps on the CPU.

    Raises:
        ValueError: the scheduler's steps cannot be replayed.
    """

    def __init__(self, model: nn.Module, conditions: Conditions, *, offload: bool = False) -> None:
        """Check the solver."""
        self.model, self.conditions, self.offload = model, conditions, offload
        self.solver = Solver(conditions.scheduler)
        self._digest = ""

    @property
    def digest(self) -> str:
        """Name of the weights as they are when it is first asked for; 10 GB take some ten seconds."""
        self._digest = self._digest or digest(portable(self.model.state_dict()))
        return self._digest

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def denoise(self, batch: Batch) -> Denoise:
        """The model with a batch's conditions filled in."""
        return self.conditions.denoiser(self.model, batch.conditions, self.device)

    def generator(self, batch: Batch) -> torch.Generator:
        """The source of the solver's own noise, the same each time."""
        return torch.Generator(self.device).manual_seed(batch.seeds[0])

    def final(
        self,
        batch: Batch,
        gating: Gating | None = None,
        flat: Tensor | None = None,
        *,
        each_step: bool = False,
        watch: Watch | None = None,
    ) -> Tensor:
        """The final latents, with a gradient where `flat` asks for one.

        Args:
            batch: what to draw.
            gating: the hooks, where gates shall be in force.
            flat: the gates: [N], or [B, N] with a row an image.
            each_step: `flat` is [T, N], a row a step.
            watch: see `hwprune.trajectory.sample`.
        """
        denoise, parameters = self.denoise(batch), []
        if gating is not None and flat is not None:
            flat = flat.to(self.device)
            denoise = gating.wrap(denoise, flat, self.solver.timesteps if each_step else None)
            parameters = [flat]
        return sample(
            denoise,
            self.solver,
            batch.start.to(self.device),
            parameters=parameters,
            generator=self.generator(batch),
            offload=self.offload,
            model=self.model,
            watch=watch,
        )

    def distance(
        self, batches: Sequence[Batch], gating: Gating | None = None, flat: Tensor | None = None
    ) -> Tensor:
        """Mean squared distance of each image's final latent to the dense model's: [images], float64."""
        found = []
        with torch.no_grad():
            for batch in batches:
                off = self.final(batch, gating, flat).double().cpu() - batch.target.double()
                found.append(off.flatten(1).square().mean(1))
        return torch.cat(found)


def spread(batches: Sequence[Batch]) -> float:
    """Mean squared distance of the dense latents from their mean: what is a large distance."""
    every = torch.cat([batch.target for batch in batches]).double()
    return float((every - every.mean(0)).square().mean())


def draw(
    sampler: Sampler, split: Split, images: int, *, batch: int, seed: int = 0
) -> tuple[Batch, ...]:
    """First latents and conditions of one set, targets not computed yet.

    Args:
        sampler: gives conditions, shape and scale.
        split: train, check or held: their seeds never meet.
        images: how many.
        batch: images at a time.
        seed: of the whole run.
    """
    conditions = sampler.conditions
    pool = list(range(len(conditions.names)))
    if len(pool) >= _HELD_FROM:
        pool = [i for i in pool if (i % _HELD_EVERY == _HELD_EVERY - 1) == (split == "held")]
    # Seeds are 3 n + k in blocks of 3e9 a run: no two sets and no two runs share a first latent.
    seeds = [3 * (seed * 1_000_000_000 + i) + _APART[split] for i in range(images)]
    found = []
    for first in range(0, images, batch):
        some = tuple(seeds[first : first + batch])
        start = (
            torch.stack([_noise(conditions.shape, s) for s in some]) * sampler.solver.start_scale
        )
        chosen = tuple(pool[(first + i) % len(pool)] for i in range(len(some)))
        found.append(Batch(chosen, some, start, torch.empty(0)))
    return tuple(found)


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """Drawn on the CPU, so that every device starts alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taught(
    sampler: Sampler,
    batches: Sequence[Batch],
    *,
    folder: Path | None = None,
    progress: Any = None,
) -> tuple[Batch, ...]:
    """The batches with the dense model's final latents, from the folder where they are there.

    Args:
        sampler: of the dense model.
        batches: from `draw`.
        folder: where to look and to keep; None = nowhere.
        progress: called with (done, total).

    Raises:
        FloatingPointError: the dense model gives NaN, with step and layer.
    """
    file = None
    if folder is not None:
        file = folder / f"teacher-{key_of(sampler, batches)[:24]}.safetensors"
        known = _read(file, len(batches))
        if known is not None:
            return tuple(replace(b, target=t) for b, t in zip(batches, known, strict=True))
    found = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            found.append(replace(batch, target=sampler.final(batch).float().cpu()))
            if progress is not None:
                progress(i + 1, len(batches))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".partial")
        save_file({f"target.{i}": b.target.contiguous() for i, b in enumerate(found)}, fresh)
        fresh.replace(file)
    return tuple(found)


def _read(file: Path, count: int) -> list[Tensor] | None:
    """The latents in a file; None where it is not there or was cut short."""
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError):
        return None
    if sorted(tensors) != sorted(f"target.{i}" for i in range(count)):
        return None
    return [tensors[f"target.{i}"] for i in range(count)]


def key_of(sampler: Sampler, batches: Sequence[Batch]) -> str:
    """A name made of everything that decides the latents."""
    conditions = sampler.conditions
    config = {k: str(v) for k, v in dict(conditions.scheduler.config).items()}
    said: dict[str, Any] = {
        "weights": sampler.digest,
        "class": type(sampler.model).__name__,
        "config": {k: str(v) for k, v in dict(getattr(sampler.model, "config", {})).items()},
        "scheduler": [sampler.solver.name, config, conditions.scheduler.timesteps.tolist()],
        "guidance": conditions.guidance,
        "shape": conditions.shape,
        "images": [[b.conditions, b.seeds] for b in batches],
        "inputs": [_said(part) for part in (*conditions.inputs, *(conditions.empty or ()))],
        "torch": str(torch.__version__),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _said(value: Any) -> Any:
    if isinstance(value, Tensor):
        return digest({"": value.detach().cpu().contiguous()})
    if hasattr(value, "items"):
        return {str(key): _said(item) for key, item in value.items()}
    return str(value)
