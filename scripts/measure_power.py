"""Power, energy and time of a model, or of any command, in one line, with a live view and a picture at the end.

python scripts/measure_power.py deit_small_patch16_224 --batch 64 --dtype bf16 --png power.png
python scripts/measure_power.py FOLDER              # saved by hwprune, or a diffusers pipeline: its denoiser
python scripts/measure_power.py --sensor nvml:0 --csv power.csv -- python train.py --epochs 1

Without a sensor the time is still told, with the reason why no energy is.
"""

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hwprune.exits import BAD_INPUT, plainly, say
from hwprune.meter.energy import measure_energy
from hwprune.meter.energy_window import FLAGS
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.idle import idle_power
from hwprune.meter.open import open_source
from hwprune.meter.source import GAIN_UNCERTAINTY_REL
from hwprune.meter.watch import Watched, live, plot, write_csv
from hwprune.meter.window import energy_of, time_per_call
from hwprune.terminal import STDOUT, check_json, show, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Dtype(StrEnum):
    """Of weights and inputs."""

    fp32, fp16, bf16 = "fp32", "fp16", "bf16"


def open_sensor(names: list[str], stack: contextlib.ExitStack) -> Watched | Unavailable:
    """The first sensor there is, watched and closed with the stack; or all the reasons."""
    reasons = []
    for name in names:
        found = open_source(name)
        if not isinstance(found, Unavailable):
            stack.callback(found.close)
            return Watched(found)
        reasons.append(f"{name}: {found.reason}")
    return Unavailable("; ".join(reasons))


def measure_command(words: list[str], sensor: Watched | Unavailable, quiet: bool) -> dict[str, Any]:
    """Run a command once and measure all of it."""
    with (
        live(" ".join(words), sensor, per_second=4, quiet=quiet),
        measure_energy("", source=sensor) as e,
    ):
        code = subprocess.run(words, check=False).returncode
    return {"command": words, "exit_code": code, **dataclasses.asdict(e)}


def measure_model(
    workload: Any,
    sensor: Watched | Unavailable,
    seconds: float,
    idle: Estimate | Unavailable,
    quiet: bool,
) -> dict[str, Any]:
    """Repeat a model's forward in steady state, over a window of at least so many seconds."""
    run_chunk, drain = workload.repeated()
    idle_w = idle.value if isinstance(idle, Estimate) else None
    found: dict[str, Any] = {
        "reason": "",
        "energy_j": None,
        "energy_per_image_j": None,
        "flags": [],
    }
    with live(workload.name, sensor, quiet=quiet):
        window = energy_of(sensor, run_chunk, min_window_s=seconds, idle_w=idle_w, drain=drain)
        if isinstance(window, Unavailable):
            found |= {
                "reason": window.reason,
                "latency_s": time_per_call(run_chunk, drain, seconds),
            }
        else:
            found |= {
                **window.to_dict(),
                "latency_s": window.time_per_iteration_s,
                "energy_per_image_j": window.energy_per_iteration_j / workload.images,
            }
    return found | {"notes": list(workload.notes)}


def check(target: str | None, command: list[str], seconds: float, files: list[Path | None]) -> None:
    """Refuse bad input before the long work."""
    if (target is None) == (not command):
        raise ValueError("expected either a MODEL or -- COMMAND; --help shows both")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds: expected a positive number, got {seconds:g}")
    for file in filter(None, files):
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(
                f"{file} cannot be written: it is a folder, or its folder is not there"
            )
        if file.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("a picture needs matplotlib: pip install 'hwprune[plot]'")


def report(
    found: dict[str, Any], sensor: Watched | Unavailable, csv: Path | None, png: Path | None
) -> None:
    """Files and the table."""
    samples = [] if isinstance(sensor, Unavailable) else sensor.samples
    title = str(found.get("model") or " ".join(found.get("command", [])))
    after = []
    if found["reason"]:
        after.append(f"no energy: {found['reason']}")
    if samples and csv is not None:
        write_csv(samples, csv)
    if samples and png is not None and not isinstance(sensor, Unavailable):
        plot(samples, png, f"{title} on {sensor.caps.device}", sensor.caps.cap_w)
    if not samples and (csv or png):
        after.append("no curve: nothing was read from a sensor")
    rows = [
        [name, f"{value * scale:.4g} {unit}"]
        for name, key, scale, unit in (
            ("time", "duration_s", 1, "s"),
            ("latency of a call", "latency_s", 1e3, "ms"),
            ("average power", "average_power_w", 1, "W"),
            ("energy", "energy_j", 1, "J"),
            ("energy an image", "energy_per_image_j", 1, "J"),
            ("idle power", "idle_power_w", 1, "W"),
            ("of the energy, above idle", "dynamic_energy_j", 1, "J"),
            ("SM clock", "clock_sm_mhz", 1, "MHz"),
            ("temperature", "temperature_c", 1, "°C"),
            ("held by the power cap", "capped_fraction", 100, "%"),
        )
        if (value := found.get(key)) is not None
    ]
    if found["energy_j"] is not None:
        after.append(
            f"energy known to ±{100 * found['uncertainty_rel']:.2g} % as the sensor counts; an uncalibrated "
            f"sensor is off by about {100 * GAIN_UNCERTAINTY_REL:g} %, alike for all that is measured on it"
        )
    after += [f"note: {note}" for note in found.get("notes", [])]
    after += [f"{flag}: {FLAGS[flag]}" for flag in found["flags"]]
    show(title, ("", ""), rows, *after)


@app.command()
def main(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="a timm name, or a folder of hwprune, timm or diffusers"
        ),
    ] = None,
    sensor: Annotated[
        str | None, typer.Option(help="nvml:0, cuda:0, GPU-<uuid>, rocm:0 or rapl")
    ] = None,
    device: Annotated[str | None, typer.Option(help="to run a model on: cuda:0 or cpu")] = None,
    batch: Annotated[int, typer.Option(help="images a call")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.fp32,
    seconds: Annotated[float, typer.Option(help="shortest window, for a model")] = 10.0,
    idle: Annotated[float, typer.Option(help="seconds to measure idle power first; 0: not")] = 0.0,
    weights: Annotated[Path | None, typer.Option(help="file of weights, for a timm name")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="ask no hub")] = False,
    latent: Annotated[int | None, typer.Option(help="side of a denoiser's latent")] = None,
    json: Annotated[str | None, typer.Option(help="file for the result; - is stdout")] = None,
    csv: Annotated[Path | None, typer.Option(help="file for the curve")] = None,
    png: Annotated[Path | None, typer.Option(help="file for its picture")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no live view")] = False,
) -> None:
    """Power, energy and time of MODEL in steady state, or of a whole COMMAND after --."""
    command: list[str] = context.obj
    with plainly(), contextlib.ExitStack() as stack:
        check(target, command, seconds, [csv, png])
        check_json(json)
        if command:
            source = open_sensor([sensor] if sensor else ["nvml:0", "rocm:0", "rapl"], stack)
            found = measure_command(command, source, quiet)
        else:
            from hwprune.workload import open_workload, torch_device  # brings torch

            place = torch_device(device)
            source = open_sensor([sensor or str(place)], stack)
            idle_w = idle_power(source, idle) if idle else Unavailable("not asked for")
            workload = open_workload(
                str(target),
                batch=batch,
                device=place,
                dtype=dtype.value,
                weights=weights,
                random_weights=random_weights,
                latent_side=latent,
            )
            found = measure_model(workload, source, seconds, idle_w, quiet)
            found |= {"model": target, "batch": batch, "dtype": dtype.value, "device": str(place)}
        if json is not None:
            write_json(json, found)
        if json != STDOUT:
            report(found, source, csv, png)
    if found.get("exit_code"):
        raise typer.Exit(found["exit_code"])


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    try:
        sys.exit(app(args=words[:cut], obj=words[cut + 1 :], standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises on words it does not know
            raise
        say(f"{' '.join(error.format_message().split())} (see --help)")
        sys.exit(BAD_INPUT)
