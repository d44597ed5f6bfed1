"""The command `hwprune prune`: a vision transformer, images without labels and a budget, to a saved folder."""

from __future__ import annotations

import os
import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hwprune.cli_report import add_page
from hwprune.cli_sweep import (
    FILES,
    POINT,
    Points,
    judge,
    remove_others,
    saver,
    show_front,
)
from hwprune.cli_words import ClassMap, Data, Json, Model, Weights, text_of
from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, show_report, write_json

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CALIBRATION = 256
DEFAULT_REFINE = 0  # hwprune.pruning's, which imports torch
_SAVED = re.compile(
    r"(config|preprocessor_config|report|(model|pruned)\.safetensors\.index)\.json|README\.md|report\.html|"
    r"(model|pruned)[-\w]*\.safetensors"
)


class Format(StrEnum):
    """What a saved folder holds."""

    pruned = "pruned"
    dense = "dense"


class Objective(StrEnum):
    """What a choice is made by."""

    second_order = "second-order"
    lpvit = "lpvit"


class Baseline(StrEnum):
    """What a sweep is compared with."""

    magnitude = "magnitude"
    lpvit = "lpvit"
    none = "none"


class RunMode(StrEnum):
    """How a model is run."""

    eager = "eager"
    graph = "graph"


class Dtype(StrEnum):
    """Of saved weights."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def prune(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to save", show_default=False)],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT=HOW MUCH",
            help="macs=0.7 (of dense), params=50M, memory=120MB (absolute); several hold at once",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="[METRIC=]FIRST:LAST:COUNT",
            help="Instead of one budget so many: 0.9:0.4:6 of MACs, or latency=0.9:0.4:6. Each in "
            "FOLDER/RATIO, their front as front.json and a picture",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    objective: Annotated[
        Objective,
        typer.Option(
            help="second-order: least distortion; lpvit: the tiles LPViT's paper keeps, for a budget of macs "
            "(as published with --no-repair)"
        ),
    ] = Objective.second_order,
    refine: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Other plans to cut, repair and run on calibration images, of which the truly best is kept "
            "(16 is a good number)",
        ),
    ] = DEFAULT_REFINE,
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
        Dtype,
        typer.Option(
            help="Of the saved weights, which latency, energy and memory are judged with; the pruning itself "
            "runs in fp32"
        ),
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
    mode: Annotated[
        RunMode | None,
        typer.Option(
            help="How it is run where latency or energy is limited; graph is a CUDA graph (default: as the "
            "profile was measured)",
            show_default=False,
        ),
    ] = None,
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
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(
            help="With --sweep: beside it in the picture; several (default: magnitude)",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --sweep: labelled images, other than those of --data, for top-1 of each point",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FOLDER if hwprune wrote it")
    ] = False,
    json: Json = None,
) -> None:
    """Prune MODEL to a budget and save it: no labels, no training."""
    with plainly() as ending, Steps() as steps:
        ending.kept = "nothing was written; the same command begins again"
        tile = _tile(block)
        chosen = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
        for option, value in (
            ("--batch", batch),
            ("--round-to", round_to),
            ("--timed-batch", timed_batch),
        ):
            if value < 1:
                raise ValueError(f"{option}: expected at least 1, got {value}")
        points = None if sweep is None else Points.parse(sweep, budget or (), device)
        if points is None and not budget:
            raise ValueError("Missing option '--budget', or '--sweep' (see hwprune prune --help)")
        for option, given in (("--baseline", baseline), ("--eval-data", eval_data)):
            if given and points is None:
                raise ValueError(
                    f"{option}: expected with --sweep; for one folder use hwprune eval"
                )
        _check_out(out, force, json, sweeps=points is not None)
        check_json(json)

        from hwprune.allocate import Budget

        limits = None if points is not None else Budget.parse(budget or ())
        steps("open the model", 0, 1)

        import torch

        from hwprune.checkpoint import save
        from hwprune.data import calibration_batches, open_dataset
        from hwprune.opening import open_model
        from hwprune.pruning import prune as prune_
        from hwprune.sweeping import sweep as sweep_

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
        types = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}

        def keep(pruned: nn.Module, folder: Path) -> None:
            steps("save", 0, 1)
            save(pruned.to(dtype=types[dtype]), folder, format=format.value, force=force)
            steps("save", 1, 1)

        if points is not None:
            front = sweep_(
                net,
                batches,
                points.budgets,
                metric=points.metric,
                device=device,
                kinds=chosen,
                objective=objective.value,
                refine=refine,
                repair=not no_repair,
                seed=seed,
                block=tile,
                round_to=round_to,
                timed_batch=timed_batch,
                timed_dtype=types[dtype],
                mode=None if mode is None else mode.value,
                energy_weight=energy_weight,
                baselines=[b.value for b in baseline or [Baseline.magnitude] if b != Baseline.none],
                each=saver(points, out, keep),
                evaluate=None
                if eval_data is None
                else judge(eval_data, text_of(class_map), net, steps),
                progress=steps,
            )
            remove_others(front, out)
            files = front.write(out)
            pages = [add_page(out / point["folder"]) for point in front.points if point["folder"]]
            found = {**front.to_dict(), "model": model, "out": str(out), "format": format.value}
        else:
            assert limits is not None
            report = prune_(
                net,
                batches,
                limits,
                device=device,
                kinds=chosen,
                objective=objective.value,
                refine=refine,
                repair=not no_repair,
                seed=seed,
                block=tile,
                round_to=round_to,
                timed_batch=timed_batch,
                timed_dtype=types[dtype],
                mode=None if mode is None else mode.value,
                energy_weight=energy_weight,
                progress=steps,
            )
            keep(net, out)
            page, why = add_page(out)
            found = {**report.to_dict(), "model": model, "out": str(out), "format": format.value}
            found["page"] = page
        if json is not None:
            write_json(json, found)
    if json == STDOUT:
        return
    if points is not None:
        notes = [opened.note] if opened.note else []
        show_front(front, out, files, [*notes, *dict.fromkeys(why for _, why in pages if why)])
    else:
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


def _check_out(out: Path, force: bool, json: str | None, *, sweeps: bool = False) -> None:
    """Refuse a folder that cannot be written, before the long work.

    Args:
        out: the folder.
        force: replace what hwprune wrote.
        json: where the JSON goes.
        sweeps: the folder holds a front and a folder a point, not a model.

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
    strange = _strange(out, sweeps) if force and out.is_dir() else []
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


def _strange(out: Path, sweeps: bool) -> list[str]:
    """What a folder holds that hwprune did not write there."""
    if not sweeps:
        return [p.name for p in out.iterdir() if not _SAVED.fullmatch(p.name)]
    points = [p for p in out.iterdir() if p.is_dir() and POINT.fullmatch(p.name)]
    found = [p.name for p in out.iterdir() if p not in points and p.name not in FILES]
    return found + [f"{p.name}/{name}" for p in points for name in _strange(p, False)]
