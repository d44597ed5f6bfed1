"""The command `hwprune export`: a pruned folder as a file for ONNX Runtime or for torch without hwprune."""

from __future__ import annotations

import json as json_
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hwprune.cli_words import Json, Weights
from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, show, write_json


class Target(StrEnum):
    """What is written."""

    onnx = "onnx"
    torch_export = "torch-export"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Written by hwprune prune; a timm name works too",
            show_default=False,
        ),
    ],
    to: Annotated[Target, typer.Option(help="The format", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write (default: FOLDER.onnx or FOLDER.pt2, beside it)",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N", help="Images of a call, or dynamic: any number")
    ] = "dynamic",
    weights: Weights = None,
    json: Json = None,
) -> None:
    """Write a model as ONNX or as an exported program of torch, checked against the model itself."""
    with plainly(), Steps() as steps:
        check_json(json)
        size = int(batch) if batch.isdecimal() else None
        if size is None and batch != "dynamic":
            raise ValueError(f"--batch: expected a number or dynamic, got {batch!r}")
        _refuse_diffusion(Path(model).expanduser())
        steps("open the model", 0, 1)

        from hwprune.export import SUFFIX
        from hwprune.export import export as export_
        from hwprune.opening import open_model

        name = Path(model).expanduser()
        place = name if name.exists() else Path(name.name)
        target = out or place.resolve().with_name(f"{place.resolve().name}{SUFFIX[to.value]}")
        opened = open_model(model, weights, progress=steps.of("train the digits model"))
        steps("open the model", 1, 1)
        steps("export and check", 0, 1)
        found = export_(
            opened.model, target, to=to.value, batch="dynamic" if size is None else size
        )
        steps("export and check", 1, 1)
        told = {"model": model, **found.to_dict()}
        if json is not None:
            write_json(json, told)
    if json != STDOUT:
        rows = [
            ["size", f"{found.bytes / 1e6:.2f} MB"],
            ["input", f"batch {found.batch} of {' x '.join(map(str, found.input_shape))}, float32"],
            ["checked at batches", ", ".join(map(str, found.batches))],
            [
                "largest difference",
                f"{found.max_error:.2g}, of outputs up to {found.max_output:.3g}",
            ],
        ]
        show(f"{model} -> {found.file}", ("", ""), rows, *(f"note: {n}" for n in found.notes))


def _refuse_diffusion(folder: Path) -> None:
    """Denoisers take more inputs than an image, each class others.

    Raises:
        ValueError: the folder is of diffusers; says what to do.
    """
    config = folder / "config.json"
    try:
        ours = config.is_file() and "_class_name" in json_.loads(config.read_text("utf-8"))
    except (ValueError, OSError):
        ours = False
    if ours or (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        raise ValueError(
            f"{folder} holds a diffusion model, which export does not take: inputs differ from class to class. "
            'Open it with hwprune.load("...") and hand its transformer or unet to torch.export.export with the '
            "inputs your pipeline gives it; pruned layers are plain ones, so that works as for the dense model"
        )
