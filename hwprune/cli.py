"""The command line: `hwprune` and its commands, and how they end.

Exit codes: 0 done; 2 bad input, with one line on stderr; 3 a budget that cannot be kept; 130 Ctrl-C.
torch and timm are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hwprune.cli_diffusion import prune_diffusion
from hwprune.cli_doctor import doctor
from hwprune.cli_export import export
from hwprune.cli_measure import measure
from hwprune.cli_profile import devices, profile
from hwprune.cli_prune import prune
from hwprune.cli_report import report
from hwprune.cli_words import ClassMap, Data, Json, Model, Weights, text_of
from hwprune.exits import BAD_INPUT, INTERRUPTED, plainly, say
from hwprune.terminal import (
    STDOUT,
    Steps,
    check_json,
    figure,
    show,
    show_folder,
    write_json,
)

app = typer.Typer(
    name="hwprune",
    help="Prune vision transformers to a budget, and open the result with the loader you use.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
    no_color: Annotated[
        bool, typer.Option("--no-color", help="No colours, here or behind a command; as NO_COLOR=1")
    ] = False,
) -> None:
    if no_color:
        os.environ["NO_COLOR"] = "1"
    if version:
        from hwprune import __version__

        typer.echo(f"hwprune {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(prune)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    weights: Weights = None,
    class_map: ClassMap = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Images at a time")] = 64,
    json: Json = None,
) -> None:
    """Top-1 accuracy, MACs and parameters of MODEL or a pruned FOLDER on labelled images."""
    with plainly(), Steps() as steps:
        if batch < 1:
            raise ValueError(f"--batch: expected at least 1, got {batch}")
        check_json(json)
        steps("open the model", 0, 1)

        import torch

        from hwprune.cost import count_macs
        from hwprune.data import evaluate as evaluate_
        from hwprune.data import open_dataset
        from hwprune.images import input_size
        from hwprune.opening import open_model

        opened = open_model(model, weights, progress=steps.of("train the digits model"))
        net = opened.model
        images = open_dataset(data, net, class_map=text_of(class_map))
        steps("open the model", 1, 1)
        macs = count_macs(net, torch.zeros(1, *input_size(net)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = time.perf_counter()
        result = evaluate_(
            net.to(device), images, batch=batch, device=device, progress=steps.of("evaluate")
        )
        params = sum(p.numel() for p in net.parameters())
        seconds = time.perf_counter() - start
        found = {
            "model": model,
            "data": data,
            "top1": result.top1,
            "top5": result.top5,
            "images": result.images,
            "macs": macs,
            "params": params,
            "seconds": seconds,
        }
        if json is not None:
            write_json(json, found)
    if json != STDOUT:
        error = (result.top1 * (1 - result.top1) / result.images) ** 0.5
        rows = [["top-1", f"{100 * result.top1:.2f} ± {100 * error:.2f} %"]]
        rows += [["top-5", f"{100 * result.top5:.2f} %"]] if result.top5 is not None else []
        rows += [["images", str(result.images)], ["MACs of an image", figure(macs)]]
        rows += [["parameters", figure(params)], ["time", f"{seconds:.1f} s"]]
        show(f"{model} on {data}", ("", ""), rows, *([opened.note] if opened.note else []))


app.command()(prune_diffusion)
app.command()(measure)
app.command()(profile)
app.command()(devices)
app.command()(report)
app.command()(export)
app.command()(doctor)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written by hwprune")],
    json: Json = None,
) -> None:
    """What a pruned FOLDER holds, layer by layer, without reading its weights."""
    with plainly(), Steps() as steps:
        check_json(json)
        steps("read the folder", 0, 1)

        from hwprune.structure_of import describe_folder

        found = describe_folder(folder)
        if json is not None:
            write_json(json, found)
    if json != STDOUT:
        show_folder(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends by SystemExit.

    Args:
        argv: the words after `hwprune`; None = those of this process.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    if "--no-color" in words:  # of the program, wherever it stands
        words = ["--no-color", *(word for word in words if word != "--no-color")]
    try:
        code = app(args=words, prog_name="hwprune", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # `hwprune inspect FOLDER | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        # What typer raises on words it does not know; its class lies elsewhere in each release.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "hwprune"
        say(f"{' '.join(error.format_message().split())} (see {path} --help)")
        code = BAD_INPUT
    sys.exit(code or 0)
