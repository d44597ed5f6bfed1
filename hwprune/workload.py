"""A model by its name, with random inputs, as work to repeat: timm, a saved folder, a diffusers denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwprune.denoiser_folder import denoiser_folder, open_denoiser
from hwprune.denoiser_inputs import random_call
from hwprune.images import input_size
from hwprune.meter.arms import Arm
from hwprune.meter.energy_window import Chunk
from hwprune.meter.inputs import map_tensors
from hwprune.meter.modes import Runnable
from hwprune.meter.schedule import chunks
from hwprune.meter.timing import make_timer, warm_up
from hwprune.opening import open_model

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and its inputs on a device.

    Attributes:
        name: as the user calls it.
        call: one forward, under inference mode.
        images: a call.
        device: where it runs.
        notes: what a reader of its figures must know.
    """

    name: str
    call: Callable[[], object]
    images: int
    device: torch.device
    notes: tuple[str, ...]

    def repeated(self) -> tuple[Callable[[], Chunk], Callable[[], None]]:
        """The call warmed up, as (run_chunk, drain); a chunk is about 50 ms."""
        call_s, _ = warm_up(make_timer(self.device), self.call, lambda: 0)
        arm = Arm(self.name, self.call, runnable=Runnable(self.call), call_s=call_s)
        return chunks(arm, self.device)


def torch_device(name: str | None) -> torch.device:
    """The device of that name; None = the first GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    try:
        found = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device: expected cuda:0 or cpu, got {name!r}") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(f"--device: expected cuda:0 or cpu, got {name!r}")
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return torch.device("cuda", found.index or 0)


def open_workload(
    name: str,
    *,
    batch: int,
    device: torch.device,
    dtype: str = "fp32",
    weights: Path | None = None,
    random_weights: bool = False,
    latent_side: int | None = None,
    seed: int = 0,
) -> Workload:
    """Opens what is to be measured.

    Args:
        name: a timm name, `digits`, a folder written by hwprune or timm, a diffusers pipeline (its denoiser is
            taken) or a diffusers component.
        batch: images a call.
        device: to run on.
        dtype: of weights and inputs: fp32, fp16 or bf16.
        weights: file of weights, for timm names.
        random_weights: for timm names: ask no hub.
        latent_side: of the latent, for denoisers; None = the model's own.
        seed: of inputs and random weights.

    Raises:
        ValueError: unknown name, a class without known inputs, weights that do not fit.
        FileNotFoundError: no such folder or file.
        ModuleNotFoundError: timm or diffusers is not installed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {batch}")
    torch.manual_seed(seed)
    component = denoiser_folder(Path(name).expanduser())
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...]
    if component is not None:
        model = open_denoiser(component)
        latent, kwargs = random_call(model, batch, side=latent_side, seed=seed)
        args = (latent,)
        notes = (f"{type(model).__name__} with random inputs: normal latents and text",)
    else:
        model, notes = _open_images(name, weights, random_weights)
        generator = torch.Generator().manual_seed(seed)
        args, kwargs = (torch.randn(batch, *input_size(model), generator=generator),), {}
        notes += ("normally distributed inputs",)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, kind if tensor.is_floating_point() else tensor.dtype)

    kind = _DTYPES[dtype]
    model = model.to(device, kind).eval()
    args, kwargs = map_tensors((args, kwargs), place)

    @torch.inference_mode()
    def call() -> object:
        return model(*args, **kwargs)

    return Workload(name, call, batch, device, notes)


def _open_images(
    name: str, weights: Path | None, random_weights: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of images, and what to know of it."""
    if random_weights and name != "digits" and not Path(name).expanduser().exists():
        import timm

        if timm.is_model(name.partition(".")[0]):
            return timm.create_model(name, pretrained=False), ("random weights",)
    opened = open_model(name, weights)
    return opened.model, (opened.note,) if opened.note else ()
