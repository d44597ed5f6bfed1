"""What ViT-Tiny keeps of its top-1 at a measured latency of 0.80, 0.65 and 0.50 of dense, on this machine.

Budgets of latency are solved on this machine's profile and proven by measuring; beside each stand hwprune under
a MACs budget with the same predicted latency, and LPViT and Torch-Pruning at that many MACs. All are timed
against the dense model, batch 8, fp32, in interleaved rounds. Rows go to profiles/rows/vit-contract.jsonl;
`--table` makes a table of the newest ones, `--table --write` puts it into README.md.
"""

import argparse
import copy
from typing import Any

import torch
from parts import imagenet, quality, rows, torch_pruning_recipe
from parts.count import true_macs
from torch import Tensor, nn
from vit_quality import lpvit

from hwprune import families
from hwprune.allocate import Budget, UnreachableBudget, offer
from hwprune.contract import Contract, contract, prove, timed_images
from hwprune.pruning import Analysis, analyse, prune

NAME = "vit-contract"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
BUDGETS = (0.80, 0.65, 0.50)
BATCH = 8
TITLES = {
    "tiles": "**hwprune**, budget of latency, tiles where the profile says they pay (default)",
    "latency": "hwprune, budget of latency, whole units in stock layers only",
    "refined": "hwprune, budget of latency, plans tried on images",
    "macs": "hwprune, budget of MACs predicted as slow",
    "torch-pruning": "Torch-Pruning, rounded to 8, as many MACs",
    "lpvit": "LPViT (paper), 32x32 blocks, as many MACs",
}


def macs_of_same_latency(
    dense: nn.Module, analysis: Analysis, terms: Contract, latency: float
) -> float:
    """The MACs budget whose plan is predicted to take `latency` of dense, by bisection."""
    choices = offer(dense, analysis.curves, analysis.cost, gain=analysis.gain, pricer=terms.pricer)
    low, high = 0.2, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        plan = choices.plan(Budget(macs=middle), fast=True)
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


def table(found: list[rows.Row]) -> str:
    """Markdown of the newest row of each method and budget."""
    newest = {(r["method"], r["budget"]): r for r in found if r["method"] in TITLES}
    budgets = sorted({budget for _, budget in newest}, reverse=True)
    lines = [
        "| top-1 kept @ latency measured, of dense | "
        + " | ".join(f"latency {b:.2f}" for b in budgets)
        + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method, title in TITLES.items():
        cells = [_cell(newest.get((method, budget))) for budget in budgets]
        if any(cell != "not run" for cell in cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    shown = list(newest.values())
    last = shown[-1]
    commits = ", ".join(sorted({row["commit"] for row in shown}))
    lines += [
        "",
        f"Real ImageNet ViT-Tiny/16, batch {last['batch']}, fp32, {last['threads']} thread of an "
        f"{last['device']}; calibrated on unlabelled images, no training, judged on {last['test_images']} "
        "others. A cell is pruned top-1 / dense top-1 ± one standard error, paired per image, @ the time of "
        "the pruned model by the dense one's with its 95 % interval, in interleaved rounds. The other methods "
        "were given the MACs that hwprune needs for that latency by prediction; what time they take is theirs.",
        f"Rows: profiles/rows/{ROWS.name}, commit {commits}, torch {last['torch']}, {last['date'][:10]}. "
        f"Again: `scripts/bench {NAME}`.",
    ]
    return "\n".join(lines)


def _cell(row: rows.Row | None) -> str:
    if row is None:
        return "not run"
    if "refused" in row:
        return "refused"
    seen = row["latency_ratio"]
    return (
        f"{row['top1_ratio']:.3f} ± {row['top1_ratio_se']:.3f} @ {seen['value']:.3f} "
        f"[{seen['lo']:.3f}, {seen['hi']:.3f}]"
    )


def main() -> None:
    """Prune, measure, append rows, print; or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--methods", default=",".join(TITLES))
    parser.add_argument("--refine", type=int, default=16, help="plans tried by the method refined")
    parser.add_argument(
        "--table", action="store_true", help="make a table of the rows, run nothing"
    )
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--device", help="profile; default: this machine's own")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.table:
        text = table(rows.read(ROWS))
        print(text)
        if options.write:
            rows.write_between(rows.ROOT / "README.md", NAME, text)
        return
    methods = options.methods.split(",")
    unknown = sorted(set(methods) - set(TITLES))
    if unknown:
        parser.error(f"expected methods among {', '.join(TITLES)}, got {', '.join(unknown)}")
    gone = imagenet.missing()
    if gone:
        print(f"skipped: {gone}")
        return
    task = imagenet.load(options.calibration, options.seed)
    dense, batches = task.model, task.calibration
    x = timed_images(batches, BATCH)
    layers, _ = families.of(dense).find_layers(dense)
    terms = contract(dense, Budget(latency=0.5), options.device, x, layers)
    assert terms is not None
    if terms.dense is None:
        raise SystemExit(f"vit-contract: {terms.notes[0]}")
    analysis = analyse(dense, batches, seed=options.seed)
    beside = (
        analyse(dense, batches, tiles=terms.tiles, seed=options.seed)
        if "tiles" in methods
        else None
    )
    before = quality.logits(dense, task.images)
    for latency in map(float, options.budgets.split(",")):
        macs = macs_of_same_latency(dense, analysis, terms, latency)
        for method in methods:
            row: dict[str, Any] = {
                **rows.provenance(),
                "method": method,
                "budget": latency,
                "profile": terms.pricer.network.costs.profile.name,
                "batch": BATCH,
                "asked_macs": macs if method in ("macs", "lpvit", "torch-pruning") else None,
            }
            try:
                model = copy.deepcopy(dense)
                if method in ("tiles", "latency", "refined", "macs"):
                    on_time = method != "macs"
                    report = prune(
                        model,
                        batches,
                        Budget(latency=latency) if on_time else Budget(macs=macs),
                        device=options.device if on_time else None,
                        refine=options.refine if method == "refined" else 0,
                        analysis=beside if method == "tiles" else analysis,
                        timed_batch=BATCH,
                    )
                    if on_time:
                        row["predicted"] = report.to_dict()["predicted"]["latency_ratio"]
                    if report.plans:
                        row["plans"] = [
                            {k: v for k, v in plan.items() if k != "factors"}
                            for plan in report.plans
                        ]
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
