"""What ViT-Tiny keeps of its top-1 at a measured latency of 0.80, 0.65 and 0.50 of dense, on this machine.

Budgets of latency are solved on this machine's profile and proven by measuring; beside each stand hwprune under
a MACs budget with the same predicted latency, and LPViT and Torch-Pruning at that many MACs. All are timed
against the dense model, batch 8, fp32, in interleaved rounds. Rows go to profiles/rows/vit-contract.jsonl.
"""

import argparse
import copy
from typing import Any

import torch
from parts import imagenet, quality, rows, torch_pruning_recipe
from parts.count import true_macs
from torch import Tensor, nn
from vit_quality import lpvit

from hwprune.allocate import Budget, UnreachableBudget, allocate
from hwprune.contract import Contract, contract, prove, timed_images
from hwprune.pruning import Analysis, analyse, prune

NAME = "vit-contract"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
BUDGETS = (0.80, 0.65, 0.50)
BATCH = 8


def macs_of_same_latency(
    dense: nn.Module, analysis: Analysis, terms: Contract, latency: float
) -> float:
    """The MACs budget whose plan is predicted to take `latency` of dense, by bisection."""
    low, high = 0.2, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        plan = allocate(
            dense,
            analysis.curves,
            analysis.cost,
            Budget(macs=middle),
            gain=analysis.gain,
            pricer=terms.pricer,
        )
        assert plan.latency_s is not None and plan.dense_latency_s is not None
        if plan.latency_s / plan.dense_latency_s > latency:
            high = middle
        else:
            low = middle
    return low


def figures(
    model: nn.Module, dense: nn.Module, x: Tensor, proof: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measured latency ratio and MACs of a pruned model."""
    proof = prove(model, dense, x) if proof is None else proof
    return {"latency_ratio": proof["latency"].to_dict(), "macs": true_macs(model, x[:1])}


def main() -> None:
    """Prune, measure, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--methods", default="latency,macs,torch-pruning,lpvit")
    parser.add_argument("--device", help="profile; default: this machine's own")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gone = imagenet.missing()
    if gone:
        print(f"skipped: {gone}")
        return
    task = imagenet.load(options.calibration, options.seed)
    dense, batches = task.model, task.calibration
    x = timed_images(batches, BATCH)
    terms = contract(dense, Budget(latency=0.5), options.device, x)
    assert terms is not None
    if terms.dense is None:
        raise SystemExit(f"vit-contract: {terms.notes[0]}")
    analysis = analyse(dense, batches, seed=options.seed)
    before = quality.logits(dense, task.images)
    methods = options.methods.split(",")
    for latency in map(float, options.budgets.split(",")):
        macs = macs_of_same_latency(dense, analysis, terms, latency)
        for method in methods:
            row: dict[str, Any] = {
                **rows.provenance(),
                "method": method,
                "budget": latency,
                "profile": terms.pricer.network.costs.profile.name,
                "batch": BATCH,
                "asked_macs": None if method == "latency" else macs,
            }
            try:
                model = copy.deepcopy(dense)
                if method in ("latency", "macs"):
                    asked = Budget(latency=latency) if method == "latency" else Budget(macs=macs)
                    device = options.device if method == "latency" else None
                    report = prune(
                        model, batches, asked, device=device, analysis=analysis, timed_batch=BATCH
                    )
                    if method == "latency":
                        row["predicted"] = report.to_dict()["predicted"]["latency_ratio"]
                    row["seconds"] = sum(report.seconds.values())
                elif method == "lpvit":
                    model, row["seconds"] = lpvit(dense, batches, macs)
                else:
                    recipe = torch_pruning_recipe.RECIPES[0]
                    row["recipe"] = str(recipe)
                    model = torch_pruning_recipe.prune(
                        dense, batches, task.calibration_labels, macs, recipe
                    )
            except UnreachableBudget as error:
                rows.append(ROWS, row | {"refused": str(error).splitlines()[0]})
                print(f"{method} {latency}: {error}", flush=True)
                continue
            row |= figures(model, terms.dense, x)
            row |= quality.compare(before, quality.logits(model, task.images), task.labels)
            rows.append(ROWS, row)
            ratio = row["latency_ratio"]
            print(
                f"{method:14s} {latency:.2f}: latency {ratio['value']:.3f} "
                f"[{ratio['lo']:.3f}, {ratio['hi']:.3f}], top-1 kept {row['top1_ratio']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
