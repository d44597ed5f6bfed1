"""The commands `hwprune profile` and `hwprune devices`: measure this machine, and list what is measured."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwprune.exits import plainly, say
from hwprune.terminal import STDOUT, Steps, check_json, show, write_json

if TYPE_CHECKING:
    from hwprune.ops import Op


def profile(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the profile is written (default: DEVICE.json, here)",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="N", help="Of measuring")] = 20.0,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cuda:0 or cpu; without it, a GPU if any"),
    ] = None,
    batches: Annotated[
        str, typer.Option(metavar="N,N", help="Images of a forward of the ViT shapes")
    ] = "8,1",
    dtypes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of fp32, fp16, bf16 (default fp32,bf16; on a GPU bf16)",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of a CPU (default: torch's)", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="MODEL",
            help="Only what this model may come to have, a timm name or a folder (of a diffusion model its "
            "denoiser, whose batch guidance doubles): minutes become one or two",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not go on with a run that was stopped")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A summary as JSON; - is stdout", show_default=False),
    ] = None,
) -> None:
    """Measure this device: what layers of pruned models cost on it, into a profile.

    A run that is stopped goes on with the same command. Use the profile with --device FILE, or put it into a
    folder that HWPRUNE_PROFILES names.
    """
    with plainly() as ending, Steps(still=True) as steps:
        if not 0 < minutes < float("inf"):
            raise ValueError(f"--minutes: expected a positive number, got {minutes:g}")
        if threads is not None and threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        check_json(json)
        images = _numbers("--batches", batches)

        import torch

        from hwprune.cli_measure import _device
        from hwprune.device import file_name
        from hwprune.ops import DTYPES
        from hwprune.profile_ops import profile_ops
        from hwprune.profiling import measure_device, this_device

        place = _device(device)
        usual = "bf16" if place.type == "cuda" else "fp32,bf16"
        types = [part.strip() for part in (usual if dtypes is None else dtypes).split(",")]
        unknown = [t for t in types if t not in DTYPES]
        if unknown:
            raise ValueError(f"--dtypes: expected of {', '.join(DTYPES)}, got {unknown[0]!r}")
        if threads is not None:
            torch.set_num_threads(threads)
        name = file_name(this_device(place))
        target = out or Path(f"{name}.json")
        if target.suffix != ".json":
            raise ValueError(f"--out: expected a .json file, got {target}")
        folder = target.absolute().parent
        if not folder.is_dir() or target.is_dir():
            what = f"{target} is a folder" if target.is_dir() else f"{folder} does not exist"
            raise FileNotFoundError(f"--out: {what}; expected a file in a folder that exists")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"--out: no permission to write into {folder}")
        partial = target.with_name(f".{target.stem}.partial.json")
        ending.kept = f"what was measured is kept in {partial}: the same command goes on from there"
        if fresh:
            partial.unlink(missing_ok=True)
        ops = profile_ops(images, types) if model is None else _of(model, images, types, steps)
        found = measure_device(
            ops,
            place,
            name=target.stem,
            minutes=minutes,
            partial=partial,
            # A profile is passed on: where its owner's folders are is nobody's business.
            command=shlex.join(["hwprune", *(_nameless(word) for word in sys.argv[1:])]),
            progress=steps,
            note=say,
        )
        found.save(target)
        told = _summary(target)
        if json is not None:
            write_json(json, told)
    if json != STDOUT:
        _show({target.stem: told})


def _nameless(word: str) -> str:
    """An absolute path as its last part."""
    return Path(word).name if Path(word).is_absolute() else word


def _of(model: str, images: list[int], types: list[str], steps: Steps) -> list[Op]:
    """The operations of one model, whole and cut, for each batch and type."""
    import torch

    from hwprune.cli_measure import _latents, _open
    from hwprune.denoiser_reach import denoiser_ops
    from hwprune.images import input_size
    from hwprune.model_ops import model_ops
    from hwprune.ops import DTYPES

    opened = _open(model, None, True, steps)  # weights play no part in it
    net = opened.model
    found: dict[Op, None] = {}
    for dtype in types:
        net.to(DTYPES[dtype])
        for batch in images:
            if opened.denoiser:
                inputs = _latents(net, batch, 0, torch.device("cpu"), DTYPES[dtype])
                found.update(dict.fromkeys(denoiser_ops(net, functools.partial(net, **inputs))))
                continue
            x = torch.zeros(batch, *input_size(net), dtype=DTYPES[dtype])
            found.update(dict.fromkeys(model_ops(net, x)))
    return list(found)


def devices(
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="As JSON; - is stdout", show_default=False),
    ] = None,
) -> None:
    """List the device profiles: those that ship with hwprune, and those in HWPRUNE_PROFILES."""
    with plainly():
        check_json(json)
        from hwprune.device import list_devices

        found = {name: _summary(path) for name, path in list_devices().items()}
        if json is not None:
            write_json(json, {"devices": found})
    if json != STDOUT:
        if found:
            _show(found)
        else:
            typer.echo("no profiles; `hwprune profile` measures this machine")


def _summary(path: Path) -> dict[str, Any]:
    """What a list says of a profile; the reason where it is none."""
    from hwprune.device import ProfileError, read_profile

    try:
        found = read_profile(path)
    except (ProfileError, OSError) as error:
        return {"file": str(path), "error": str(error)}
    return {
        "file": str(path),
        "device": found.key,
        "entries": len(found.entries),
        "with_energy": sum(entry.energy_j is not None for entry in found.entries),
        "ambiguous": sum(entry.status != "ok" for entry in found.entries),
        "energy_reason": found.sensor.get("reason"),
        "torch": found.software.get("torch"),
        "finished": found.provenance.get("finished"),
    }


def _show(found: dict[str, dict[str, Any]]) -> None:
    header = ("profile", "device", "entries", "energy", "torch", "measured")
    rows, after = [], []
    for name, told in found.items():
        if "error" in told:
            after.append(f"{name}: {told['error']}")
            continue
        cells = (told[k] for k in ("device", "entries", "with_energy", "torch", "finished"))
        rows.append([name, *(str(cell)[:40] for cell in cells)])
        if told["energy_reason"]:
            after.append(f"{name}: no energy: {told['energy_reason']}")
    show("device profiles", header, rows, *after)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"{option}: expected numbers such as 8,1, got {text!r}")
    return found
