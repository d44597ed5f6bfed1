"""The command `hwprune prune-diffusion`: a pipeline or a denoiser, pruned by its final latents."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwprune.cli_report import add_page
from hwprune.exits import BAD_INPUT, OUT_OF_REACH, plainly, say
from hwprune.terminal import (
    STDOUT,
    Steps,
    check_json,
    figure,
    on_device_lines,
    show,
    show_next,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from hwprune.learning import Progress as Learned


class Method(StrEnum):
    """How units are chosen."""

    ours = "ours"
    top_k = "top-k"
    ecodiff = "ecodiff"
    per_step = "per-step"
    magnitude = "magnitude"
    random = "random"
    taylor = "taylor"
    obs = "obs"


class Dtype(StrEnum):
    """Of the weights."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def _learned(steps: Steps) -> Callable[[Learned], None]:
    """Reports updates of the gates, with loss, price and what is settled."""

    def told(at: Learned) -> None:
        note = f"loss {at.loss:.3g}  price {at.price:.3f}  settled {at.settled:.0%}"
        steps("learn the gates", at.step, at.steps, note)

    return told


def prune_diffusion(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pipeline's folder or hub name; a folder of transformer/ or unet/ and scheduler/; or the "
            "first of those alone",
            show_default=False,
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT=HOW MUCH",
            help="params=0.8 (of the dense denoiser), macs=0.7, latency=0.8, energy=0.8 (of an evaluation); "
            "several hold at once",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to save", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line", show_default=False),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="0-9", help="Classes, for class-conditional models", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Of the solver, while learning")] = 8,
    method: Annotated[Method, typer.Option(help="ours, or a baseline")] = Method.ours,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Of head,neuron,depth,modulation; without it, head,neuron",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Without it, the pipeline's own for prompts, none for labels",
            show_default=False,
        ),
    ] = None,
    updates: Annotated[int, typer.Option(metavar="N", help="Of the gates, at most")] = 200,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="For the updates, at most", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(metavar="N", help="To learn from")] = 64,
    batch: Annotated[int, typer.Option(metavar="N", help="Images at a time")] = 4,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="cuda:0 or cpu; without it, a GPU if any", show_default=False
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Of the device latency and energy are meant on: a name of hwprune devices or a file; without "
            "it, this machine's",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; as stored without it", show_default=False)
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="The model's own, too: less memory, more time")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the latents of the steps on the CPU")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keeps teacher latents and state, to go on after a kill; without it, beside --out until "
            "it is done",
            show_default=False,
        ),
    ] = None,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", help="Leave out the closed-form re-fit")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything drawn")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FOLDER if hwprune wrote it")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the result as JSON; - is stdout", show_default=False
        ),
    ] = None,
) -> None:
    """Prune a diffusion model to a budget by what is lost of its final latents: no images needed."""
    with plainly() as ending, _diffusion_errors(), Steps() as bars:
        if prompts is not None and labels is not None:
            raise ValueError("--prompts and --labels: give one of them")
        asked = _prompts(prompts) if prompts is not None else _labels(labels)
        check_json(json)

        from hwprune.allocate import Budget
        from hwprune.diffusion_folder import check_target

        limits = Budget.parse(budget)
        check_target(out, Path(model).expanduser(), force=force)
        keep = work if work is not None else out.with_name(f".{out.name}.work")
        ending.kept = f"what was learned is kept in {keep}: the same command goes on from there"
        bars("open the model", 0, 1)

        import torch

        from hwprune.conditions import conditions_of
        from hwprune.diffusion import prune_diffusion as prune_
        from hwprune.diffusion_folder import open_diffusion, save_diffusion
        from hwprune.pictures import Sampled

        _quiet()
        types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        opened = open_diffusion(model, dtype=None if dtype is None else types[dtype.value])
        opened.whole.to(_place(device))
        bars("open the model", 1, 1)
        conditions = conditions_of(
            opened.whole,
            asked,
            steps=steps,
            scheduler=opened.scheduler,
            guidance=guidance,
            cache=keep,
        )
        pictures = Sampled(opened, conditions, seed=seed, batch=max(1, batch))
        opened.pipeline = (
            None  # encoders and VAE are freed; the pictures at the end open them again
        )
        if checkpointing:
            opened.model.enable_gradient_checkpointing()  # type: ignore[operator]
        report = prune_(
            opened.model,
            conditions,
            limits,
            steps=steps,
            profile=profile,
            method=method.value,
            kinds=None if kinds is None else [kind.strip() for kind in kinds.split(",")],
            repair=False if no_repair else None,
            updates=updates,
            minutes=minutes,
            images=images,
            batch=batch,
            seed=seed,
            folder=keep,
            offload=offload,
            progress=bars,
            watch=_learned(bars),
            preview=lambda gating, kept: pictures.preview(gating, kept, keep / "samples.png"),
        )
        bars("save", 0, 1)
        shown = save_diffusion(opened, out, force=force, pictures=pictures)
        if work is None:
            shutil.rmtree(keep, ignore_errors=True)
        found = {**report.to_dict(), "model": model, "out": str(out)}
        found["opens"] = opened.opens(out)
        found["samples"] = str(shown) if pictures.note == "" else None
        found["page"], why = add_page(out)
        if json is not None:
            write_json(json, found)
    if json != STDOUT:
        _show(found, pictures.note, why)
    if not report.settled:
        say(report.warnings[0])
        raise typer.Exit(OUT_OF_REACH)


def _place(device: str | None) -> torch.device:
    """Where to run.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"--device {device}: it cannot be used here ({said})") from error
    return found


def _quiet() -> None:
    """No bars and warnings of the libraries among our own lines; what goes wrong is an error here."""
    for package in ("diffusers", "transformers"):
        if importlib.util.find_spec(package) is not None:
            logs = importlib.import_module(f"{package}.utils.logging")
            logs.set_verbosity_error()
            logs.disable_progress_bar()


def _prompts(file: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines count for nothing.

    Raises:
        ValueError: it holds none, or is no text.
        FileNotFoundError: no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--prompts {file}: no such file")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file}: expected text in UTF-8, one prompt a line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts {file} is empty; write one prompt a line")
    return found


def _labels(text: str | None) -> list[int] | None:
    """Classes like 0-9 or 1,3,5-7; None = none were given."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"--labels: expected classes like 0-9 or 1,3,5-7, got {text!r}")
        found += range(first, last + 1)
    return found


@contextmanager
def _diffusion_errors() -> Iterator[None]:
    """What only trajectories bring: NaN, and a GPU whose memory one step fills."""
    try:
        yield
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        say(
            "out of GPU memory: --batch 1 and --checkpointing need least, --dtype bf16 halves it, --offload "
            "and fewer --steps save the latents; run again with the same --out (or --work) to go on"
        )
        raise typer.Exit(BAD_INPUT) from error


def _show(found: Mapping[str, Any], note: str, why: str) -> None:
    """Print what the run did; why there are no pictures, and why no page."""
    far, counts, seconds = found["distance"], found["images"], found["seconds_by_step"]
    took = ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())
    rows: Sequence[Sequence[str]] = [
        [
            name,
            figure(dense := found[f"dense_{key}"]),
            figure(found[key], dense),
            f"{found[key] / dense:.3f}",
        ]
        for name, key in (("MACs of an evaluation", "macs"), ("parameters", "params"))
    ]
    after = [
        f"distance of final latents to the dense model's: {far['held']:.4g} ± {far['held_se']:.2g} (mean "
        f"squared, {far['relative']:.1%} of their variance) on {counts['held']} held-out images; before "
        f"repair {far['unrepaired']:.4g}, after it {far['check']:.4g} on {counts['check']} others",
        *on_device_lines(found),
        f"method {found['method']}, {found['learning']['updates']} updates, {found['sampling']['steps']} "
        f"steps of {found['sampling']['solver']}, guidance {found['sampling']['guidance']:g}",
        f"time: {found['seconds']:.1f} s ({took})",
        *([f"pictures, dense above pruned: {found['samples']}"] if not note else [f"note: {note}"]),
        *([f"note: {why}"] if why else []),
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]
    show(f"{found['model']} -> {found['out']}", ("", "dense", "pruned", "kept"), rows, *after)
    show_next(found["opens"], found["page"])
