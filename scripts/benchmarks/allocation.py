"""How long the knapsack takes on DeiT-S and DeiT-B, and how far the quick solver is from the exact one.

Random weights and noise for images: what counts is the shape of the problem. Latency budgets of 0.8, 0.65 and
0.5 at batch 8 fp32 on a device profile; each is solved by HiGHS and by the Lagrangian on the same options.
Seconds are CPU time of one thread. Rows go to profiles/rows/allocation.jsonl.
"""

import argparse
import time
from collections import Counter

import timm
import torch
from parts import rows
from torch import nn

from hwprune import families
from hwprune.allocate import Budget, Choices, Plan, offer
from hwprune.analysis import Analysis, analyse
from hwprune.contract import contract
from hwprune.cost import Structure

NAME = "allocation"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
MODELS = {"deit-s": "deit_small_patch16_224", "deit-b": "deit_base_patch16_224"}
BUDGETS = (0.8, 0.65, 0.5)
BATCH = 8


def dense_model(name: str, seed: int) -> nn.Module:
    """Random weights; the classifier is larger than timm starts it, or nothing would matter to the output."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(MODELS[name], pretrained=False).eval()
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def solved(table: Choices, budget: Budget, *, fast: bool) -> tuple[Plan, float]:
    """A plan, and the CPU seconds it took."""
    start = time.process_time()
    plan = table.plan(budget, fast=fast)
    return plan, time.process_time() - start


def structures(plan: Plan, analysis: Analysis) -> dict[str, int]:
    """How many layers are left in which way."""
    units = {unit.name: unit for unit in analysis.units}
    cut: dict[str, set[str]] = {}
    for name, kept in plan.keep.items():
        if kept < units[name].count:
            cut.setdefault(units[name].layer.name, set()).add(units[name].kind)
    found = []
    for name, structure in plan.structure.items():
        kinds = cut.get(name, set())
        what = "tiles dropped" if "block" in kinds else "units dropped" if kinds else "all kept"
        found.append(what if "block" in kinds else f"{what}, {_runs(structure)}")
    return dict(Counter(found))


def _runs(structure: Structure) -> str:
    return "run as tiles" if structure.tiles else "run dense"


def main() -> None:
    """Calibrate once a model, solve every budget twice, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--device", help="profile; default: this machine's own")
    parser.add_argument("--calibration", type=int, default=16, help="images of noise")
    parser.add_argument("--whole-units", action="store_true", help="offer no tiles")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models.split(","):
        model = dense_model(name, options.seed)
        batches = list(torch.randn(options.calibration, 3, 224, 224).split(BATCH))
        layers, _ = families.of(model).find_layers(model)
        terms = contract(model, Budget(latency=0.5), options.device, batches[0], layers)
        assert terms is not None
        tiles = () if options.whole_units else terms.tiles
        analysis = analyse(model, batches, tiles=tiles, seed=options.seed)
        start = time.process_time()
        table = offer(
            model, analysis.curves, analysis.cost, gain=analysis.gain, pricer=terms.pricer
        )
        built_s = time.process_time() - start
        for share in BUDGETS:
            exact, exact_s = solved(table, Budget(latency=share), fast=False)
            first, first_s = solved(table, Budget(latency=share), fast=True)
            _, again_s = solved(table, Budget(latency=share * 0.999), fast=True)
            assert exact.latency_s is not None and exact.dense_latency_s is not None
            row = {
                **rows.provenance(),
                "model": name,
                "profile": terms.pricer.network.costs.profile.name if terms.pricer else None,
                "calibration": options.calibration,
                "tiles": [list(tile) for tile in tiles],
                "options": sum(len(found) for _, found in table.groups),
                "seconds": {**analysis.seconds, "options": built_s},
                "budget": share,
                "predicted_latency_ratio": exact.latency_s / exact.dense_latency_s,
                "macs_ratio": exact.macs_ratio,
                "distortion": exact.distortion,
                "highs_s": exact_s,
                "lagrangian_first_s": first_s,
                "lagrangian_s": again_s,
                "gap_rel": first.distortion / exact.distortion - 1 if exact.distortion else 0.0,
                "left": structures(exact, analysis),
            }
            rows.append(ROWS, row)
            print(
                f"{name} {share:.2f}: distortion {exact.distortion:.4g}, {row['options']} options built in "
                f"{built_s:.1f} s, HiGHS {exact_s:.2f} s, Lagrangian {again_s * 1e3:.0f} ms, gap "
                f"{row['gap_rel']:.1e}; {row['left']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
