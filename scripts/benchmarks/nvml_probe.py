"""What a GPU's power sensors answer, how often they refresh, and whether zeros draw less than data.

About five minutes on a GPU: NVML's answers call by call, refresh of counter and power, square waves in four
phases, idle before and after work, the same work twice, and one matrix product of random values, of zeros and
masked. The row goes to profiles/rows/nvml-probe.jsonl; without a GPU there is none, and the exit code is 0.
"""

import argparse
from pathlib import Path

import torch
from parts import rows

from hwprune.meter.estimate import Unavailable
from hwprune.meter.gemm_load import GemmLoad
from hwprune.meter.idle import idle_power
from hwprune.meter.nvml import NvmlSource
from hwprune.meter.nvml_answers import answers
from hwprune.meter.open import open_source
from hwprune.meter.probe import Board, run_probe

NEEDS_GPU = True
GPU_ARGUMENTS = "--quick"
ROWS = rows.ROOT / "profiles" / "rows" / "nvml-probe.jsonl"


def main() -> int:
    """Probe, append a row, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the time, for a first look"
    )
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device, so there is nothing to probe")
        return 0
    # By NVML's own index first, before CUDA makes a context: what a board draws when nobody uses it.
    cold = open_source("nvml:0") if torch.cuda.device_count() == 1 else Unavailable("several GPUs")
    deep = idle_power(cold, 5.0)
    if not isinstance(cold, Unavailable):
        cold.close()
    device = torch.device(options.device)
    source = open_source(device)
    if isinstance(source, Unavailable):
        print(f"no sensor: {source.reason}")
        rows.append(options.rows, {**rows.provenance(), "value": None, "reason": source.reason})
        return 0
    share = 0.25 if options.quick else 1.0
    board = Board(
        source,
        GemmLoad(device),
        refresh_s=20 * share,
        wave_s=max(1.0, 4 * share),
        window_s=max(1.0, 3 * share),
        idle_s=max(2.0, 10 * share),
    )
    try:
        found = run_probe(board, say=lambda part: print(f"... {part}", flush=True))
        if isinstance(source, NvmlSource):
            found["nvml"] = answers(source)
    finally:
        source.close()
    found["deep_idle_w"] = deep.to_dict()
    gpu = torch.cuda.get_device_name(device)
    rows.append(options.rows, {**rows.provenance(), "gpu": gpu, "quick": options.quick, **found})
    for part, told in found.items():
        text = str(told)
        print(f"{part}: {text if len(text) < 400 else text[:400] + ' ...'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
