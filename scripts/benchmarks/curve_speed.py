"""How long all distortion curves take, structured and block, for ViT-Tiny and DeiT-Base shapes.

Random weights and images: the time of the linear algebra does not depend on them. Seconds are of this
machine, whatever else it was doing; the row says which. Rows go to profiles/rows/curve-speed.jsonl.
"""

import argparse
import os
import time

import timm
import torch
from parts import rows

from hwprune.distortion import curves
from hwprune.families import timm_vit
from hwprune.statistics import calibrate

NAME = "curve-speed"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
MODELS = {"ViT-Tiny": "vit_tiny_patch16_224", "DeiT-Base": "deit_base_patch16_224"}


def main() -> None:
    """Measure, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    for title in options.models.split(","):
        torch.manual_seed(0)
        model = timm.create_model(MODELS[title], pretrained=False).eval()
        torch.nn.init.normal_(model.head.weight, std=0.1)
        images = [torch.randn(options.images, 3, 224, 224)]
        for kinds in (("head", "qk", "vo", "neuron"), ("block",)):
            units = timm_vit.find_units(model, kinds)
            start = time.perf_counter()
            statistics = calibrate(model, units, images)
            between = time.perf_counter()
            curves(model, units, statistics)
            end = time.perf_counter()
            row = {
                **rows.provenance(),
                "model": title,
                "kinds": list(kinds),
                "curves_s": end - between,
                "calibration_s_per_image": (between - start) / options.images,
                "statistics_bytes": statistics.peak_bytes,
                "threads": torch.get_num_threads(),
                "load_average": os.getloadavg()[0],
            }
            rows.append(ROWS, row)
            print(
                f"{title:10s} {'+'.join(kinds):20s} curves {row['curves_s']:8.1f} s, statistics "
                f"{row['statistics_bytes'] / 1e6:.0f} MB, load {row['load_average']:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
