"""What ViT-Tiny keeps of its top-1 at a measured latency of 0.80, 0.65 and 0.50 of dense, on this machine.

Budgets of latency are solved on this machine's profile and proven by measuring. Beside each stand hwprune under
a MACs budget, LPViT and Torch-Pruning, each given as many MACs as its model may have to take that time: they
are cut and timed until it does. The models of a budget are then timed against the dense one together, batch 8,
fp32, in interleaved rounds. Rows go to profiles/rows/vit-contract.jsonl; `--table` makes a table of the newest
ones, `--table --write` puts it into README.md.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from parts import imagenet, quality, rows, torch_pruning_recipe
from parts.count import true_macs
from parts.same_latency import Found, share_at
from torch import Tensor, nn
from vit_quality import lpvit

import hwprune
from hwprune import BlockSparseLinear, families
from hwprune.allocate import Budget, Choices, UnreachableBudget, offer
from hwprune.contract import Contract, contract, timed_images
from hwprune.plan import select
from hwprune.pruning import Analysis, analyse, prune
from hwprune.realise import realise_
from hwprune.units import full_mask

NAME = "vit-contract"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
BUDGETS = (0.80, 0.65, 0.50)
BATCH = 8
TILE = (32, 32)
SEARCHING_S = 6.0  # of timing an arm while a rival is brought to the time asked
OURS = "tiles"  # the default, with which the others are compared
TITLES = {
    "tiles": "**hwprune**, budget of latency (default: tiles where the profile says they pay)",
    "refined": "hwprune, budget of latency, plans tried on images",
    "latency": "hwprune, budget of latency, whole units in stock layers only",
    "macs": "hwprune, budget of MACs that takes as long",
    "macs-tiles": "hwprune, budget of MACs, then each layer in its fastest form, that takes as long",
    "torch-pruning": "Torch-Pruning, rounded to 8, best recipe that takes as long",
    "lpvit": "LPViT (paper), 32x32 blocks run by our kernel, that takes as long",
}
RECIPES = torch_pruning_recipe.RECIPES[:3]  # the leaders at every budget of vit-quality


def time_of(ratio: Any) -> Any:
    """The steadier figure, as contracts take it: CPU time of a single thread of a CPU."""
    return ratio.cpu_time if torch.get_num_threads() == 1 else ratio.latency


@dataclass(frozen=True)
class Made:
    """A pruned model and what its row says besides the figures."""

    model: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What all methods share.

    Attributes:
        task: model and images.
        x: the batch that is timed.
        device: profile's name, or None for this machine's own.
        whole, tiled: calibrations without and with tiles.
        refine: plans tried by the method refined.
    """

    task: imagenet.Task
    x: Tensor
    device: str | None
    terms: Contract
    whole: Analysis
    tiled: Analysis | None
    refine: int

    @property
    def choices(self) -> Choices:
        """All whole units with their predicted time."""
        return offer(
            self.task.model,
            self.whole.curves,
            self.whole.cost,
            gain=self.whole.gain,
            pricer=self.terms.pricer,
        )

    def ratio(self, model: nn.Module) -> float:
        """Measured time of a model, of dense, to a percent or so: enough to search by."""
        found = hwprune.measure(
            model, self.x, against=self.task.model, energy=False, seconds_per_arm=SEARCHING_S
        )
        return float(time_of(found.ratio("model", "dense")).value)

    def pruned(self, budget: Budget, analysis: Analysis | None, refine: int = 0) -> Made:
        """By hwprune, in full."""
        model, on_time = copy.deepcopy(self.task.model), "latency" in budget.given
        report = prune(
            model,
            self.task.calibration,
            budget,
            device=self.device if on_time else None,
            refine=refine,
            analysis=analysis,
            timed_batch=BATCH,
        )
        facts: dict[str, Any] = {"seconds": sum(report.seconds.values())}
        if on_time:
            facts["predicted"] = report.to_dict()["predicted"]["latency_ratio"]
            facts["proven"] = report.to_dict()["measured"]["latency_ratio"]
        if report.plans:
            facts["plans"] = [
                {k: v for k, v in plan.items() if k != "factors"} for plan in report.plans
            ]
        return Made(model, facts)


def as_tiles_where_faster(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in which each linear of the blocks runs as tiles, all kept, where that measures as faster."""
    fresh = copy.deepcopy(model)
    for name, module in list(fresh.named_modules()):
        if type(module) is nn.Linear and name.startswith("blocks."):
            grid = [-(-size // tile) for size, tile in zip(module.weight.shape, TILE, strict=True)]
            keep = torch.ones(grid, dtype=torch.bool)
            fresh.set_submodule(name, BlockSparseLinear.from_dense(module, keep, TILE))
    hwprune.route_(fresh, x, measure=True)
    return fresh


def by_macs(run: Run, latency: float, form: Callable[[nn.Module], nn.Module]) -> Made:
    """hwprune under the MACs budget whose model, in that form, takes that time."""
    choices = run.choices
    full = full_mask(run.whole.units)

    def measured(share: float) -> float:
        plan = choices.plan(Budget(macs=share), fast=True)
        mask = {**full, **select(run.whole.curves, plan)}
        cut = copy.deepcopy(run.task.model)
        if not all(bool(grid.all()) for grid in mask.values()):
            realise_(cut, run.whole.units, mask)
        ratio = run.ratio(form(cut))
        print(f"MACs {share:.3f}: {ratio:.3f} of the time", flush=True)
        return ratio

    found = share_at(latency, measured, least=0.1, most=1.0)
    made = run.pruned(Budget(macs=found.share), run.whole)
    return Made(form(made.model), made.facts | _matched(found))


def by_torch_pruning(run: Run, latency: float, recipe: torch_pruning_recipe.Recipe) -> Made:
    """Torch-Pruning with as many MACs as take that time; its widths are those of any importance."""
    shapes = replace(recipe, importance="magnitude", shared=False)
    dense, batches, labels = run.task.model, run.task.calibration, run.task.calibration_labels

    def measured(share: float) -> float:
        return run.ratio(torch_pruning_recipe.prune(dense, batches, labels, share, shapes))

    low, high = torch_pruning_recipe.reach(dense, recipe.head_dim)
    found = share_at(latency, measured, least=low, most=high)
    model = torch_pruning_recipe.prune(dense, batches, labels, found.share, recipe)
    return Made(model, {"recipe": str(recipe)} | _matched(found))


def by_lpvit(run: Run, latency: float) -> Made:
    """LPViT with as many MACs as take that time on our tiles."""

    def measured(share: float) -> float:
        return run.ratio(lpvit(run.task.model, run.task.calibration, share)[0])

    found = share_at(latency, measured, least=0.2, most=1.0)
    model, seconds = lpvit(run.task.model, run.task.calibration, found.share)
    return Made(model, {"seconds": seconds} | _matched(found))


def _matched(found: Found) -> dict[str, Any]:
    return {"asked_macs": found.share, "tries": found.tries, "at_most": found.at_most}


def makers(run: Run, latency: float) -> dict[str, tuple[Callable[[], Made], ...]]:
    """Method -> how it makes its models for a budget."""
    budget = Budget(latency=latency)
    return {
        "tiles": (lambda: run.pruned(budget, run.tiled),),
        "refined": (lambda: run.pruned(budget, run.tiled, run.refine),),
        "latency": (lambda: run.pruned(budget, run.whole),),
        "macs": (lambda: by_macs(run, latency, lambda model: model),),
        "macs-tiles": (
            lambda: by_macs(run, latency, lambda model: as_tiles_where_faster(model, run.x)),
        ),
        "torch-pruning": tuple(
            lambda recipe=recipe: by_torch_pruning(run, latency, recipe)  # type: ignore[misc]
            for recipe in RECIPES
        ),
        "lpvit": (lambda: by_lpvit(run, latency),),
    }


def one_budget(
    run: Run, latency: float, methods: list[str], facts: Mapping[str, Any]
) -> list[rows.Row]:
    """Make every model, time them together, judge them on the same images; one row each."""
    made: dict[str, tuple[str, Made]] = {}
    found: list[rows.Row] = []
    every = makers(run, latency)
    for method in methods:
        for i, make in enumerate(every[method]):
            try:
                made[f"{method}/{i}"] = method, make()
            except (UnreachableBudget, ValueError) as error:
                said = str(error).splitlines()[0]
                print(f"{method} {latency:.2f}: {said}", flush=True)
                found.append({**facts, "method": method, "budget": latency, "refused": said})
    task = run.task
    print(f"{latency:.2f}: timing {len(made)} models together", flush=True)
    together = hwprune.measure(
        task.model,
        run.x,
        against={arm: one.model for arm, (_, one) in made.items()},
        energy=False,
        seconds_per_arm=40.0,
    )
    before = quality.logits(task.model, task.images)
    after = {arm: quality.logits(one.model, task.images) for arm, (_, one) in made.items()}
    ours = next((after[arm] for arm, (method, _) in made.items() if method == OURS), None)
    for arm, (method, one) in made.items():
        ahead = None if ours is None else quality.difference(before, ours, after[arm], task.labels)
        found.append(
            {
                **facts,
                "method": method,
                "budget": latency,
                **one.facts,
                "latency_ratio": time_of(together.ratio(arm, "model")).to_dict(),
                "together": sorted({name for name, _ in made.values()}),
                "macs": true_macs(one.model, run.x[:1]),
                **quality.compare(before, after[arm], task.labels),
                "ahead": ahead,
            }
        )
    return found


def table(found: list[rows.Row]) -> str:
    """Markdown of the newest run of each budget; of several recipes the best."""
    runs = {row["budget"]: row["run"] for row in found if "run" in row}
    budgets = sorted(runs, reverse=True)
    cells: dict[tuple[str, float], rows.Row] = {}
    for row in found:
        if row.get("run") == runs.get(row["budget"]):
            key = row["method"], row["budget"]
            if row.get("top1_ratio", -1) > cells.get(key, {}).get("top1_ratio", -2):
                cells[key] = row
    lines = [
        "| top-1 kept @ latency measured, of dense | "
        + " | ".join(f"latency {b:.2f}" for b in budgets)
        + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method, title in TITLES.items():
        texts = [_cell(cells.get((method, budget))) for budget in budgets]
        if any(text != "not run" for text in texts):
            lines.append(f"| {title} | " + " | ".join(texts) + " |")
    last = found[-1]
    commits = ", ".join(sorted({row["commit"] for row in cells.values()}))
    lines += [
        "",
        f"Real ImageNet ViT-Tiny/16, batch {last['batch']}, fp32, {last['threads']} thread of an "
        f"{last['device']}; calibrated on unlabelled images, no training, judged on the same "
        f"{_images(cells)} others. A cell is pruned top-1 / dense top-1 ± one standard error, in brackets that "
        "less the first row's with the standard error paired per image, @ the time of the pruned model by "
        "the dense one's with its 95 % interval. All models of a column were timed in one run, in interleaved "
        "rounds. The rivals were given the most MACs with which their own model takes the time asked, found by "
        "timing; (all) = with nothing removed it is as fast as that.",
        f"Rows: profiles/rows/{ROWS.name}, commit {commits}, torch {last['torch']}, {last['date'][:10]}. "
        f"Again: `scripts/bench {NAME}`.",
    ]
    return "\n".join(lines)


def _images(cells: Mapping[Any, rows.Row]) -> int:
    return int(next(row["test_images"] for row in cells.values() if "test_images" in row))


def _cell(row: rows.Row | None) -> str:
    if row is None:
        return "not run"
    if "refused" in row:
        return "no model as fast"
    seen, ahead = row["latency_ratio"], row["ahead"]
    text = f"{row['top1_ratio']:.3f} ± {row['top1_ratio_se']:.3f}"
    if ahead is not None and row["method"] != OURS:
        text += f" ({ahead['value']:+.3f} ± {ahead['se']:.3f})"
    text += f" @ {seen['value']:.3f} [{seen['lo']:.3f}, {seen['hi']:.3f}]"
    return text + (" (all)" if row.get("at_most") else "")


def main() -> None:
    """Prune, measure, append rows, print; or tabulate."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {NAME}", description=__doc__)
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
    assert terms is not None and terms.pricer is not None
    if terms.dense is None:
        raise SystemExit(f"{NAME}: {terms.notes[0]}")
    whole = analyse(dense, batches, seed=options.seed)
    with_tiles = {"tiles", "refined"} & set(methods)
    tiled = analyse(dense, batches, tiles=terms.tiles, seed=options.seed) if with_tiles else None
    run = Run(task, x, options.device, terms, whole, tiled, options.refine)
    for latency in map(float, options.budgets.split(",")):
        facts = rows.provenance()
        facts |= {"run": facts["date"], "batch": BATCH, "seed": options.seed}
        facts |= {"profile": terms.pricer.network.costs.profile.name}
        for row in one_budget(run, latency, methods, facts):
            rows.append(ROWS, row)
            print(f"{row['method']:14s} {latency:.2f}: {_cell(row)}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
