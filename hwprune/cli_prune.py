"""The command `hwprune prune`: a vision transformer, images without labels and a budget, to a saved folder."""

from __future__ import annotations

import os
import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hwprune.cli_report import add_page
from hwprune.cli_words import ClassMap, Data, Json, Model, Weights, text_of
from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, show_report, write_json

DEFAULT_CALIBRATION = 256
_SAVED = re.compile(
    r"(config|preprocessor_config|report|(model|pruned)\.safetensors\.index)\.json|README\.md|report\.html|"
    r"(model|pruned)[-\w]*\.safetensors"
)


class Format(StrEnum):
    """What a saved folder holds."""

    pruned = "pruned"
    dense = "dense"


class Dtype(StrEnum):
    """Of saved weights."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def prune(
    model: Model,
    data: Data,
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT=HOW MUCH",
            help="macs=0.7 (of dense), params=50M, memory=120MB (absolute); several hold at once",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to save", show_default=False)],
    weights: Weights = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Of block,head,neuron,qk,vo; without it, all but block, which joins where the device's "
            "profile says that tiles pay",
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        str,
        typer.Option(
            metavar="ROWSxCOLS",
            help="Tile of the kind block; auto: the sizes that pay on the device, side by side, or 32x32",
        ),
    ] = "auto",
    calibration: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Unlabelled images to calibrate on (default {DEFAULT_CALIBRATION}, or all)",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Images at a time")] = 32,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the saved weights; the pruning itself runs in fp32")
    ] = Dtype.fp32,
    round_to: Annotated[int, typer.Option(metavar="N", help="Keep neurons in multiples of N")] = 8,
    class_map: ClassMap = None,
    format: Annotated[
        Format, typer.Option(help="pruned: smaller layers; dense: zeros in the original shapes")
    ] = Format.pruned,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="For latency and energy: a name of `hwprune devices`, or a file (default: this machine's own)",
            show_default=False,
        ),
    ] = None,
    timed_batch: Annotated[
        int,
        typer.Option(metavar="N", help="Images of the batch whose latency or energy is limited"),
    ] = 8,
    energy_weight: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT",
            help="Minimise distortion + WEIGHT x a batch's joules, of the dense model's, under the budget",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the images and the probe")] = 0,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", help="Leave out the closed-form re-fit")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FOLDER if hwprune wrote it")
    ] = False,
    json: Json = None,
) -> None:
    """Prune MODEL to a budget and save it: no labels, no training."""
    with plainly(), Steps() as steps:
        tile = _tile(block)
        chosen = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
        for option, value in (
            ("--batch", batch),
            ("--round-to", round_to),
            ("--timed-batch", timed_batch),
        ):
            if value < 1:
                raise ValueError(f"{option}: expected at least 1, got {value}")
        _check_out(out, force, json)
        check_json(json)

        from hwprune.allocate import Budget

        limits = Budget.parse(budget)
        steps("open the model", 0, 1)

        import torch

        from hwprune.checkpoint import save
        from hwprune.data import calibration_batches, open_dataset
        from hwprune.opening import open_model
        from hwprune.pruning import prune as prune_

        opened = open_model(model, weights, progress=steps.of("train the digits model"))
        if opened.spec is not None:
            raise ValueError(
                f"{model} was written by hwprune, from {opened.spec['base']['architecture']}; prune that "
                "dense model with the budget you want, cuts do not add up"
            )
        steps("open the model", 1, 1)
        steps("read images", 0, 1)
        net = opened.model
        split = _calibration_split(data)
        images = open_dataset(data, net, class_map=text_of(class_map), split=split)
        there = len(images)  # type: ignore[arg-type]  # torch's Dataset has no length, ours has
        wanted = min(DEFAULT_CALIBRATION, there) if calibration is None else calibration
        batches = calibration_batches(images, images=wanted, batch=batch, seed=seed)
        steps("read images", 1, 1)
        net.to("cuda" if torch.cuda.is_available() else "cpu")
        report = prune_(
            net,
            batches,
            limits,
            device=device,
            kinds=chosen,
            repair=not no_repair,
            seed=seed,
            block=tile,
            round_to=round_to,
            timed_batch=timed_batch,
            energy_weight=energy_weight,
            progress=steps,
        )
        types = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}
        steps("save", 0, 1)
        save(net.to(dtype=types[dtype]), out, format=format.value, force=force)
        page, why = add_page(out)
        found = {**report.to_dict(), "model": model, "out": str(out), "format": format.value}
        found["page"] = page
        if json is not None:
            write_json(json, found)
    if json != STDOUT:
        # Never the images it was calibrated on: those flatter.
        words = ["hwprune", "eval", str(out), "--data", data if split else "TEST_IMAGES"]
        words += ["--class-map", str(class_map)] if class_map else []
        show_report(found, shlex.join(words), opened.note, why)


def _tile(text: str) -> tuple[int, int] | None:
    """Sides of a tile; None for auto."""
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ValueError(f"--block: expected ROWSxCOLS like 32x32, or auto, got {text!r}")
    return int(found[1]), int(found[2])


def _calibration_split(data: str) -> str | None:
    """Calibrate on training images where the data says which those are, never on those of a later eval."""
    return "train" if data == "digits" or (Path(data).expanduser() / "train").is_dir() else None


def _check_out(out: Path, force: bool, json: str | None) -> None:
    """Refuse a folder that cannot be written, before the long work.

    Raises:
        FileExistsError: it is there and force is false, or it is a file.
        PermissionError: its place cannot be written.
        ValueError: the JSON would lie in it.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(
            f"--out {out} exists already; choose another folder, or replace it with --force"
        )
    strange = (
        [p.name for p in out.iterdir() if not _SAVED.fullmatch(p.name)]
        if force and out.is_dir()
        else []
    )
    if strange:
        raise FileExistsError(
            f"--out {out} holds {strange[0]!r}, which hwprune did not write, so --force does not replace "
            "it; choose another folder"
        )
    if json not in (None, STDOUT) and out.resolve() in Path(str(json)).resolve().parents:
        raise ValueError(f"--json {json} lies in --out {out}, which holds the model alone; move it")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {above} is no folder that can be written")
