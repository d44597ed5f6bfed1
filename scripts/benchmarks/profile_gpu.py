"""Measures the profile of this GPU into profiles/, named after it, in about three minutes.

Dense and block-sparse linears, attention, activations and norms in bf16, in CUDA graphs, with the power of as
many of them as the time allows. A run that was stopped goes on. `--dry-run` walks the same road on a CPU: a
few small operations, a loop in the place of a graph, and a temporary folder in that of profiles/.
"""

import argparse
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from parts import rows

from hwprune.device import DeviceProfile, file_name, read_profile
from hwprune.meter.estimate import Unavailable
from hwprune.meter.modes import Runnable
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.profile_ops import profile_ops
from hwprune.profiling import Bench, make_bench, measure_device, this_device

NEEDS_GPU = True
GPU_ARGUMENTS = "--minutes 2"

MINUTES = 3.0
BATCHES = (64, 1)
SMALL = [
    *(Op("linear", (m, n, 64), "fp32") for m in (8, 32) for n in (32, 64, 96, 128)),
    *(Op.tiles((32, 64, 64), "fp32", (32, 32), kept) for kept in (1, 2, 3)),
    *(Op("attention", (1, h, 16, d, d), "fp32") for h in (1, 2) for d in (8, 16)),
    Op("gelu", (32, 64), "fp32"),
]


def loop(call: Callable[[], object], device: torch.device, count: int) -> Runnable:
    """In a dry run, in the place of a CUDA graph."""

    def replay() -> object:
        for _ in range(count):
            out = call()
        return out

    return Runnable(replay, count)


def measured(folder: Path, minutes: float, device: torch.device, dry: bool) -> Path:
    """Measure, write and read back; the file."""
    key = this_device(device)
    name = "dry-run" if dry else file_name(key)
    bench: Bench = make_bench(device)
    if dry:
        bench.capture, bench.source = loop, Unavailable("a dry run asks no sensor")
    last = ""

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        line = f"{step} {10 * done // total * 10} %"
        if line != last:
            print(line, flush=True)
        last = line

    profile: DeviceProfile = measure_device(
        SMALL if dry else profile_ops(BATCHES, ("bf16",)),
        device,
        name=name,
        minutes=minutes,
        partial=folder / f".{name}.partial.json",
        command=shlex.join(["scripts/bench", "profile-gpu", *sys.argv[1:]]),
        progress=progress,
        note=print,
        bench=bench,
    )
    path = folder / f"{name}.json"
    profile.save(path)
    return path


def show(path: Path) -> None:
    """What the profile holds and how well it predicts itself."""
    profile = read_profile(path)
    about = profile.provenance
    powers = [e.power_w for e in profile.entries if e.power_w is not None]
    print(f"{profile.key}: {len(profile.entries)} operations, {about['not_reached']} not reached")
    print(f"failed: {dict(Counter(f['reason'] for f in about['failed'])) or 'none'}")
    print(
        f"status: {dict(Counter(e.status for e in profile.entries))}, A/A {about['aa_ratio_latency']}"
    )
    reason = profile.sensor.get("reason", "")
    span = f"{min(powers):.0f} to {max(powers):.0f} W" if powers else reason
    print(f"power of {len(powers)}: {span}; idle {profile.sensor.get('idle_w')} W")
    for family, errors in CostModel(profile, "graph").held_out_errors().items():
        print(
            f"  {family}: {len(errors)} held out, median error {np.median(errors):.1%}, p90 "
            f"{np.quantile(errors, 0.9):.1%}"
        )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path, default=rows.ROOT / "profiles", help="folder")
    parser.add_argument("--dry-run", action="store_true", help="a few operations on a CPU")
    options = parser.parse_args()
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            show(measured(Path(folder), min(options.minutes, 1.0), torch.device("cpu"), dry=True))
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "expected a CUDA device, torch sees none; --dry-run tries the road on a CPU"
        )
    show(measured(options.out, options.minutes, torch.device("cuda:0"), dry=False))


if __name__ == "__main__":
    main()
