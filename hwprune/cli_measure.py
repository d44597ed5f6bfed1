"""The command `hwprune measure`: latency, memory, power and energy of a model, alone or against another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, show, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hwprune.opening import Opened

GPU_BATCH, CPU_BATCH = 64, 8
DENOISER_BATCH = 1  # an image; two are what guidance evaluates for one


class Mode(StrEnum):
    """How the model is run."""

    eager = "eager"
    compile = "compile"
    graph = "graph"


class Caches(StrEnum):
    """What the last-level cache holds when a call starts."""

    hot = "hot"
    cold = "cold"


class Dtype(StrEnum):
    """Of weights and inputs."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def measure(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder (of a diffusion model its denoiser), a timm name, or digits (built in)",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare with it, in interleaved rounds", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Images a call (default {GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU, {DENOISER_BATCH} of a "
            "denoiser)",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and inputs")] = Dtype.fp32,
    mode: Annotated[
        Mode, typer.Option(help="graph replays a CUDA graph and needs a GPU")
    ] = Mode.eager,
    l2: Annotated[Caches, typer.Option(help="cold: caches are flushed before each call")] = (
        Caches.hot
    ),
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most rounds (default: 8 to 32, as many as it takes to know ratios to 1 %)",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Of each model, for latency and for energy")
    ] = 60.0,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="cuda:0 or cpu; without it, a GPU if any", show_default=False
        ),
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy/--no-energy", help="Where there is a sensor")
    ] = True,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Real images, as for prune; without it, normally distributed ones",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split", help="Of a pruned MODEL: how much is structure, how much the zeros' doing"
        ),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of a timm MODEL", show_default=False),
    ] = None,
    against_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Weights of the other, where it is a timm name", show_default=False
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="For timm names, without asking the hub")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of order, inputs and random weights")] = 0,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the result as JSON; - is stdout", show_default=False
        ),
    ] = None,
) -> None:
    """Latency, memory, power and energy of MODEL, with 95 % intervals and an A/A check."""
    with plainly(), Steps(still=True) as steps:
        if batch is not None and batch < 1:
            raise ValueError(f"--batch: expected at least 1, got {batch}")
        if rounds is not None and rounds < 2:
            raise ValueError(
                f"--rounds: expected at least 2, got {rounds}: one round gives no interval"
            )
        if not 0 < seconds < float("inf"):
            raise ValueError(f"--seconds: expected a positive number, got {seconds:g}")
        if split and against is None:
            raise ValueError(
                "--split compares with the dense model; name it: --split --against NAME"
            )
        if against is None and against_weights is not None:
            raise ValueError("--against-weights goes with --against NAME")
        check_json(json)
        steps("open the models", 0, 1)

        import torch

        from hwprune.meter.compare import measure as measure_

        place = _device(device)
        notes = []
        torch.manual_seed(seed)
        opened = _open(model, weights, random_weights, steps)
        other = None if against is None else _open(against, against_weights, random_weights, steps)
        notes += [found.note for found in (opened, other) if found is not None and found.note]
        steps("open the models", 1, 1)
        net = opened.model.to(place)
        inputs: object
        if opened.denoiser or (other is not None and other.denoiser):
            _check_denoisers(opened, other, data, split)
            inputs = _latents(net, batch or DENOISER_BATCH, seed, place)
            notes.append("inputs: one evaluation of normally distributed latents and text")
        else:
            images = batch or (GPU_BATCH if place.type == "cuda" else CPU_BATCH)
            inputs = _inputs(net, data, images, seed).to(place)
            if data is None:
                notes.append("inputs: normally distributed; give real images with --data")
        arms, equivalent = _arms(net, other, place, split, seed)
        types = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}
        found = measure_(
            net,
            inputs,
            against=arms,
            energy=energy,
            mode=mode.value,
            dtype=types[dtype],
            rounds=rounds,
            l2=l2.value,
            equivalent=equivalent,
            seconds_per_arm=seconds,
            seed=seed,
            progress=steps,
        )
        if found.model.error:
            raise ValueError(f"{model} was not measured: {found.model.error}")
        told: dict[str, Any] = {"model": model, "against": against, "data": data}
        if json is not None:
            write_json(json, {**found.to_dict(), **told, "notes": notes})
    if json != STDOUT:
        from hwprune.meter import told as words

        title = model if against is None else f"{model} against {against}"
        after = [f"note: {note}" for note in notes]
        show(title, *words.table(found), *words.notes(found), *after)


def _device(name: str | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cuda:0 or cpu, got {name!r}") from error
    if found.type not in ("cuda", "cpu"):
        raise ValueError(f"--device: expected cuda:0 or cpu, got {name!r}")
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ValueError(f"--device {name}: torch sees {count} CUDA devices here")
        return torch.device("cuda", found.index or 0)
    return torch.device("cpu")


def _open(name: str, weights: Path | None, random: bool, steps: Steps) -> Opened:
    """A model with its weights; with random ones where that was asked for and it is a timm name."""
    from hwprune.denoiser_folder import denoiser_folder, open_denoiser
    from hwprune.opening import Opened, open_model
    from hwprune.pruned_config import pruned_entry

    folder = denoiser_folder(Path(name).expanduser())
    if folder is not None:
        if weights is not None:
            raise ValueError(f"{name} holds its own weights; leave --weights out")
        denoiser = open_denoiser(folder)
        return Opened(denoiser, pruned_entry(getattr(denoiser, "config", None)), denoiser=True)
    if not random or weights is not None or Path(name).expanduser().exists():
        return open_model(name, weights, progress=steps.of("train the digits model"))
    if name == "digits":
        from hwprune.digits import digits_model

        return Opened(digits_model(pretrained=False), None, f"{name}: random weights")
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "timm models need timm, which is not installed: pip install 'hwprune[timm]'"
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        return open_model(name)  # which says what comes close
    built: nn.Module = timm.create_model(name, pretrained=False)
    _draw_classifier_(built)
    return Opened(built.eval().float(), None, f"{name}: random weights")


def _draw_classifier_(model: nn.Module) -> None:
    """timm starts some classifiers at zero; such a model says the same of every image."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not bool(module.weight.any()):
            torch.nn.init.normal_(module.weight, std=0.02)


def _inputs(net: nn.Module, data: str | None, batch: int, seed: int) -> Tensor:
    """A batch of images on the CPU: real ones, or normally distributed."""
    import torch

    from hwprune.images import input_size

    if data is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *input_size(net), generator=generator)
    from hwprune.data import calibration_batches, open_dataset

    return calibration_batches(open_dataset(data, net), images=batch, batch=batch, seed=seed)[0]


def _latents(
    net: nn.Module,
    batch: int,
    seed: int,
    place: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """One evaluation's inputs by name, at the denoiser's usual resolution; in float32 unless told."""
    import inspect

    from hwprune.denoiser_inputs import random_call
    from hwprune.meter.inputs import map_tensors

    latent, others = random_call(net, batch, seed=seed)
    first = next(iter(inspect.signature(net.forward).parameters))

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(place, dtype if tensor.is_floating_point() else None)

    found: dict[str, Any] = map_tensors({first: latent, **others}, put)
    return found


def _check_denoisers(opened: Opened, other: Opened | None, data: str | None, split: bool) -> None:
    """Refuse what goes with vision transformers alone, and arms that cannot be given the same.

    Raises:
        ValueError: says what.
    """
    if data is not None:
        raise ValueError("--data gives images; a denoiser is measured on random latents and text")
    if split:
        raise ValueError("--split is of vision transformers; leave it out for a denoiser")
    names = [type(found.model).__name__ for found in (opened, other) if found is not None]
    if len(set(names)) > 1:
        raise ValueError(f"{names[0]} and {names[1]} do not take the same inputs")


def _arms(
    net: nn.Module, other: Opened | None, place: torch.device, split: bool, seed: int
) -> tuple[dict[str, nn.Module] | None, dict[str, str]]:
    """The other arms by name, and which must be equal."""
    if other is None:
        return None, {}
    dense = other.model.to(place)
    if not split:
        pruned = other.spec is not None and bool(other.spec.get("shape"))
        return {"other" if pruned else "dense": dense}, {}
    from hwprune.split import EQUIVALENT, split_arms

    return dict(split_arms(net, dense, seed=seed)), EQUIVALENT
