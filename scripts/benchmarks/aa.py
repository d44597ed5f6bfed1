"""Whether the meter sees a difference where there is none: one model against itself (A/A).

A ViT-Tiny with random weights, batch 8, fp32, twice in every round. The ratio must lie within 1 % of 1 and its
95 % interval must hold 1; else the exit code is 1. Rows go to profiles/rows/aa.jsonl.
"""

import argparse
import os

import timm
import torch
from parts import rows

import hwprune
from hwprune.meter.estimate import Estimate

NAME = "aa"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
WITHIN = 0.01


def main() -> int:
    """Measure, append a row, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=50.0, help="of each of the two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    model = timm.create_model(options.model, pretrained=False).eval().to(device)
    images = torch.randn(options.batch, 3, 224, 224).to(device)
    found = hwprune.measure(
        model, images, energy=device == "cuda", seconds_per_arm=options.seconds, seed=options.seed
    )
    print(found)
    ratio = found.aa.latency
    passed = isinstance(ratio, Estimate) and ratio.contains(1.0) and abs(ratio.value - 1) <= WITHIN
    rows.append(
        ROWS,
        {
            **rows.provenance(),
            "model": options.model,
            "batch": options.batch,
            "seed": options.seed,
            "latency_s": found.latency_s.to_dict(),
            "aa": found.aa.to_dict(),
            "passed": passed,
            "noise_rel": list(found.noise_rel),
            "discarded": len(found.discarded),
            "load_average": os.getloadavg()[0],
        },
    )
    print(f"A/A {'passed' if passed else 'FAILED'}: {ratio}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
