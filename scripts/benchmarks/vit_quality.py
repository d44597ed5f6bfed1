"""What ViT-Tiny keeps of its top-1 at 0.80, 0.70 and 0.55 of its true MACs: ours and the baselines.

Real weights, 256 unlabelled ImageNet images to calibrate on, no training, judged on 650 others. Rows go
to profiles/rows/vit-quality.jsonl; `--table` makes a table of the newest ones, `--table --write` puts it
into README.md. Without the data beside the repository it says so and does nothing.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parts import imagenet, quality, rows, torch_pruning_recipe, whole_units
from parts.count import parameters, true_macs
from torch import Tensor, nn

from hwprune.allocate import Budget
from hwprune.layers import BlockSparseLinear
from hwprune.lpvit import lpvit_masks
from hwprune.pruning import Analysis, analyse
from hwprune.pruning import prune as hwprune_prune

NAME = "vit-quality"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
BUDGETS = (0.80, 0.70, 0.55)
BLOCK = (32, 32)

Prune = Callable[[nn.Module, list[Tensor], float], tuple[nn.Module, float]]


@dataclass(frozen=True)
class Method:
    """A way to prune: (dense model, batches, fraction of true MACs) -> (new model, seconds).

    Attributes:
        name: for `--methods`.
        title: for the table.
        prune: the function; the dense model is left unchanged.
        kinds: unit kinds it removes; for ours the row takes them from the pruned model.
        variant: which recipe, where there are several; the table shows the best at each budget.
    """

    name: str
    title: str
    prune: Prune
    kinds: tuple[str, ...]
    variant: str = ""


def timed(run: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """The result and the wall time."""
    start = time.perf_counter()
    model = run()
    return model, time.perf_counter() - start


@dataclass
class Ours:
    """hwprune.prune, one calibration and one set of curves for all budgets; seconds count both in full."""

    kinds: tuple[str, ...] | None
    seed: int
    analysis: list[Analysis] = field(default_factory=list)

    def __call__(
        self, dense: nn.Module, batches: list[Tensor], budget: float
    ) -> tuple[nn.Module, float]:
        """Prune a copy."""
        if not self.analysis:
            self.analysis.append(
                analyse(dense, batches, kinds=self.kinds, block=BLOCK, seed=self.seed)
            )
        model = copy.deepcopy(dense)
        report = hwprune_prune(
            model,
            batches,
            Budget(macs=budget),
            kinds=self.kinds,
            block=BLOCK,
            seed=self.seed,
            analysis=self.analysis[0],
        )
        return model, sum(report.seconds.values())


def lpvit(dense: nn.Module, batches: list[Tensor], budget: float) -> tuple[nn.Module, float]:
    """LPViT as stated in its paper, 32x32 blocks, no fine-tuning."""

    def run() -> nn.Module:
        masks = lpvit_masks(dense, batches, keep_ratio=budget, block=BLOCK, true_macs=True)
        model = copy.deepcopy(dense)
        for name, keep in masks.items():
            linear = model.get_submodule(name)
            model.set_submodule(name, BlockSparseLinear.from_dense(linear, keep, BLOCK))
        return model

    return timed(run)


def all_methods(seed: int, labels: list[Tensor]) -> list[Method]:
    """Every row of the table, in its order."""

    def whole(criterion: str, *, even: bool = False) -> Prune:
        return lambda dense, batches, budget: timed(
            lambda: whole_units.prune(
                dense, batches, budget, criterion=criterion, seed=seed, even=even
            )
        )

    def peer(recipe: torch_pruning_recipe.Recipe) -> Prune:
        return lambda dense, batches, budget: timed(
            lambda: torch_pruning_recipe.prune(dense, batches, labels, budget, recipe)
        )

    whole_kinds = ("head", "neuron")
    return [
        Method("ours", "**hwprune**", Ours(None, seed), ("default",)),
        Method(
            "ours-head-neuron",
            "hwprune, heads and neurons only",
            Ours(whole_kinds, seed),
            whole_kinds,
        ),
        Method("ours-block", "hwprune, 32x32 blocks only", Ours(("block",), seed), ("block",)),
        *(
            Method(
                "torch-pruning",
                "Torch-Pruning, best recipe",
                peer(recipe),
                ("head width", "neuron"),
                str(recipe),
            )
            for recipe in torch_pruning_recipe.RECIPES
        ),
        Method("lpvit", "LPViT (paper), 32x32 blocks", lpvit, ("block",)),
        *(
            Method(
                "magnitude",
                "magnitude, heads and neurons",
                whole("magnitude", even=even),
                whole_kinds,
                "the same share of every layer" if even else "all layers ranked together",
            )
            for even in (False, True)
        ),
        Method("random", "random, heads and neurons", whole("random"), whole_kinds),
    ]


def measure(
    methods: list[Method], task: imagenet.Task, budgets: list[float], seed: int
) -> Iterator[rows.Row]:
    """One row for each method, recipe and budget, as they come."""
    image = task.images[0][:1]
    dense_macs, dense_parameters = true_macs(task.model, image), parameters(task.model)
    dense_logits = quality.logits(task.model, task.images)
    facts = rows.provenance()
    for method in methods:
        for budget in budgets:
            try:
                model, seconds = method.prune(task.model, task.calibration, budget)
            except (ValueError, ImportError) as reason:
                print(f"left out: {method.name} {method.variant} at {budget}: {reason}", flush=True)
                continue
            yield {
                **facts,
                "method": method.name,
                "variant": method.variant,
                "kinds": getattr(model, "hwprune_spec", {}).get("kinds", method.kinds),
                "budget": budget,
                "macs_ratio": true_macs(model, image) / dense_macs,
                "params_ratio": parameters(model) / dense_parameters,
                **quality.compare(dense_logits, quality.logits(model, task.images), task.labels),
                "calibration_images": sum(len(batch) for batch in task.calibration),
                "seconds": seconds,
                "seed": seed,
            }


def table(found: list[rows.Row]) -> str:
    """Markdown of the newest rows that share seed and calibration size with the very newest."""
    last = found[-1]
    same = [row for row in found if all(row[k] == last[k] for k in ("seed", "calibration_images"))]
    cells: dict[tuple[str, float], rows.Row] = {}
    for row in rows.newest(same, ("method", "variant", "budget")):
        best = cells.get((row["method"], row["budget"]))
        if best is None or row["top1_ratio"] > best["top1_ratio"]:
            cells[row["method"], row["budget"]] = row
    titles = {method.name: method.title for method in all_methods(0, [])}
    lines = [
        "| top-1 kept, of dense | "
        + " | ".join(f"{b:.2f} of MACs" for b in BUDGETS)
        + " | seconds |",
        "|---|" + "---|" * (len(BUDGETS) + 1),
    ]
    for name, title in titles.items():
        shown = [cells.get((name, budget)) for budget in BUDGETS]
        if any(shown):
            texts = [_cell(row) for row in shown]
            seconds = max(row["seconds"] for row in shown if row)
            lines.append(f"| {title} | " + " | ".join(texts) + f" | {seconds:.0f} |")
    chosen = [
        f"{budget:.2f}: {cells['torch-pruning', budget]['variant']}"
        for budget in BUDGETS
        if ("torch-pruning", budget) in cells
    ]
    lines += [
        "",
        f"Real ImageNet ViT-Tiny/16, dense top-1 {last['top1_dense']:.1%} on the same "
        f"{last['test_images']} images; {last['calibration_images']} calibration images without labels, no "
        "training. A cell is pruned top-1 / dense top-1 ± one standard error, paired per image, @ the "
        "true MACs kept (attention products counted). Seconds: the slowest of the budgets, "
        f"{last['threads']} thread{'s' * (last['threads'] > 1)} of a shared {last['device']}.",
    ]
    if chosen:
        count = len(torch_pruning_recipe.RECIPES)
        lines.append(
            f"Torch-Pruning: the best of {count} recipes on these very test images, "
            "up to 1 % more MACs than the others, " + "; ".join(chosen) + "."
        )
    commits = sorted({row["commit"] for row in cells.values()})
    lines.append(
        f"Rows: profiles/rows/{ROWS.name}, commit {', '.join(commits)}, torch {last['torch']}, timm "
        f"{last['timm']}, {last['date'][:10]}. Again: `scripts/bench {NAME}`."
    )
    return "\n".join(lines)


def _cell(row: rows.Row | None) -> str:
    if row is None:
        return "not run"
    return f"{row['top1_ratio']:.3f} ± {row['top1_ratio_se']:.3f} @ {row['macs_ratio']:.3f}"


def main() -> int:
    """Run, or tabulate."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {NAME}", description=__doc__)
    parser.add_argument("--methods", help="comma-separated; all if left out")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--calibration", type=int, default=256, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=imagenet.FOLDER, help="folder")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file to add rows to, or to read")
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows")
    parser.add_argument("--write", action="store_true", help="with --table: put it into README.md")
    given = parser.parse_args()
    if given.table:
        text = table(rows.read(given.rows))
        print(text)
        if given.write:
            rows.write_between(rows.ROOT / "README.md", NAME, text)
        return 0
    names = list(dict.fromkeys(m.name for m in all_methods(0, [])))
    wanted = given.methods.split(",") if given.methods else names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"expected methods among {', '.join(names)}, got {', '.join(unknown)}")
    if reason := imagenet.missing(given.data):
        print(f"skipped: {reason}")
        return 0
    task = imagenet.load(given.calibration, given.seed, given.data)
    methods = [m for m in all_methods(given.seed, task.calibration_labels) if m.name in wanted]
    budgets = [float(text) for text in given.budgets.split(",")]
    for row in measure(methods, task, budgets, given.seed):
        rows.append(given.rows, row)
        print(
            f"{row['method']:<17}{row['budget']:.2f}  top-1 kept {_cell(row)}  KL {row['kl_to_dense']:.3f}  "
            f"{row['seconds']:.0f} s  {row['variant']}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
