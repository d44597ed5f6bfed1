"""Trajectories under gradient: exactness, memory and time; and what pruning keeps of a real diffusion model.

Parts: `exactness` (gradients against plain back-propagation in float64), `memory` (saved activations, RSS
and time against it), `quality` (Fashion-MNIST's diffusion transformer by every method at the same kept
parameters). Rows go to profiles/rows/diffusion.jsonl; a (method, budget) that is there with the same
settings is not run again. `--table` makes a table of the newest rows, `--table --write` puts it into README.md.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from parts import fashion, rows, trajectories
from parts.interleaved import speedup, times_s

import hwprune
from hwprune.families.denoiser import find_units
from hwprune.pictures import side_by_side

NAME = "diffusion"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
PARTS = ("exactness", "memory", "quality")
BUDGETS = (0.8, 0.65, 0.5)
GUIDANCE, DRAWN_STEPS = 1.5, 20
KINDS = ("head", "neuron")
# name -> (method, repair, kinds); None = what the method does by itself.
METHODS: dict[str, tuple[str, bool | None, tuple[str, ...]]] = {
    "ours": ("ours", None, KINDS),
    "ours, modulation too": ("ours", None, (*KINDS, "modulation")),
    "ours, no repair": ("ours", False, KINDS),
    "obs": ("obs", None, KINDS),
    "ecodiff": ("ecodiff", None, KINDS),
    "ecodiff + our repair": ("ecodiff", True, KINDS),
    "taylor": ("taylor", None, KINDS),
    "per-step": ("per-step", None, KINDS),
    "magnitude": ("magnitude", None, KINDS),
    "random": ("random", None, KINDS),
}


def exactness(given: argparse.Namespace) -> Iterator[rows.Row]:
    """Largest relative error of a gradient for every solver named, T = 4, with guidance."""
    for which in ("unet", "flux"):
        for name in trajectories.SOLVERS:
            error = trajectories.gradient_error(name, which, 4)
            print(f"{which:5} {name:18} gradient error {error:.1e}", flush=True)
            yield {"solver": name, "model": which, "steps": 4, "gradient_error": error}


def memory(given: argparse.Namespace) -> Iterator[rows.Row]:
    """Saved activations at T = 1 and T = 50, RSS of fresh processes, time against plain back-propagation."""
    one = trajectories.Work(1, checkpoint=True).saved_bytes()
    work = trajectories.Work(given.long, checkpoint=True)
    many = work.saved_bytes()
    # The latent and two past predictions of each step, float32: what DPM++ 2M needs.
    latents = 3 * given.long * work.start.nbytes
    grown = _rss_growth(given)
    calls = {
        "ours": trajectories.Work(given.time_steps, checkpoint=True),
        "plain": trajectories.Work(given.time_steps, checkpoint=False),
    }
    ratio = speedup(times_s(calls, given.rounds), "plain", "ours")
    row = {
        "saved_bytes_1": one,
        f"saved_bytes_{given.long}": many,
        "latent_bytes": latents,
        "saved_ratio": (many - latents) / one,
        "saved_bytes_plain": calls["plain"].saved_bytes(),
        "long": given.long,
        "time_steps": given.time_steps,
        "time_ratio": ratio,
        "rss_growth_bytes": grown,
    }
    print(
        f"saved activations: T = {given.long} holds {row['saved_ratio']:.3f} x those of T = 1, and the "
        f"latents; time {ratio['value']:.2f} x plain ({ratio['lo']:.2f} to {ratio['hi']:.2f}) at T = "
        f"{given.time_steps}; RSS grows by { ({k: round(v / 1e6) for k, v in grown.items()}) } MB",
        flush=True,
    )
    yield row


def _rss_growth(given: argparse.Namespace) -> dict[str, int]:
    """Peak RSS of one call above what the process had before it, each in a fresh process; on Linux."""
    found: dict[str, int] = {}
    if not Path("/proc/self/clear_refs").exists():
        return found
    for name, steps, checkpoint in (
        ("ours, T = 1", 1, True),
        (f"ours, T = {given.long}", given.long, True),
        (f"plain, T = {given.time_steps}", given.time_steps, False),
    ):
        code = f"import diffusion; print(diffusion.one_call({steps}, checkpoint={checkpoint}))"
        env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{rows.ROOT}"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        found[name] = int(done.stdout.strip().splitlines()[-1])
    return found


def one_call(steps: int, *, checkpoint: bool) -> int:
    """Bytes by which a gradient raises this process's resident memory at its peak; Linux only."""
    torch.set_num_threads(1)
    work = trajectories.Work(steps, checkpoint=checkpoint)
    with torch.no_grad():  # weights and library buffers are there before
        work.denoise(work.start, work.solver.timesteps[0])
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the imports'
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """A figure of this process's memory in bytes, from Linux."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(key)))


def quality(given: argparse.Namespace) -> Iterator[rows.Row]:
    """Every method at every budget, on fresh seeds and labels."""
    if reason := fashion.missing(given.data):
        print(f"skipped: {reason}")
        return
    model, _ = fashion.dense(given.data)
    data = fashion.real(given.data)
    judge, accuracy = fashion.trained_judge(data, given.work)
    truth = fashion.features(judge, data.test)
    reference = {
        steps: fashion.drawn(model, steps, GUIDANCE, count, given.data)
        for steps, count in ((given.steps, given.fresh), (DRAWN_STEPS, given.samples))
    }
    own = fashion.frechet(fashion.features(judge, reference[DRAWN_STEPS]), truth)
    print(
        f"judge right on {accuracy:.1%} of real test images; dense model's Fréchet distance {own:.2f}"
    )
    done = {_key(row) for row in rows.read(given.rows)} if given.rows.is_file() else set()
    for budget in given.budgets:
        for name in given.methods:
            settings = _settings(given, name, budget)
            if _key(settings) in done and not given.again:
                print(f"{name} at {budget}: there already", flush=True)
                continue
            pruned = copy.deepcopy(model)
            report = _pruned(pruned, name, budget, given)
            seconds = sum(report.seconds.values())  # with what a run before it was killed had taken
            images = {
                steps: fashion.drawn(pruned, steps, GUIDANCE, len(held), given.data)
                for steps, held in reference.items()
            }
            learned = fashion.paired(judge, reference[given.steps], images[given.steps])
            row = {
                **settings,
                "seconds": seconds,
                "params_ratio": report.params_ratio,
                "macs_ratio": report.macs_ratio,
                "learning": {k: v for k, v in report.learning.items() if k != "losses"},
                "held": dict(report.distance),
                **{f"{k}_at_{given.steps}": v for k, v in learned.items() if "latent_mse" in k},
                **fashion.paired(judge, reference[DRAWN_STEPS], images[DRAWN_STEPS]),
                "frechet": fashion.frechet(fashion.features(judge, images[DRAWN_STEPS]), truth),
                "frechet_dense": own,
                "judge_top1": accuracy,
                "warnings": list(report.warnings),
            }
            _picture(reference[DRAWN_STEPS], images[DRAWN_STEPS], name, budget, given.work)
            print(
                f"{name:22} {budget:.2f}  latents {learned['latent_mse']:.4f} at {given.steps} steps, "
                f"{row['latent_mse']:.4f} at {DRAWN_STEPS}; Fréchet {row['frechet']:.2f}; "
                f"SSIM {row['ssim']:.3f}; {seconds:.0f} s",
                flush=True,
            )
            yield row


def _settings(given: argparse.Namespace, name: str, budget: float) -> rows.Row:
    return {
        "part": "quality",
        "method": name,
        "budget": budget,
        "minutes": given.minutes,
        "images": given.images,
        "steps": given.steps,
        "drawn_steps": DRAWN_STEPS,
        "samples": given.samples,
        "fresh": given.fresh,
        "guidance": GUIDANCE,
        "seed": given.seed,
    }


def _key(row: rows.Row) -> str:
    names = _settings(argparse.Namespace(**dict.fromkeys(
        ("minutes", "images", "steps", "samples", "fresh", "seed"))), "", 0.0)  # fmt: skip
    return json.dumps({name: row.get(name) for name in names}, sort_keys=True)


def _pruned(model: torch.nn.Module, name: str, budget: float, given: argparse.Namespace) -> Any:
    """Prune in place; the budget is of what heads and neurons hold of the blocks."""
    method, repair, kinds = METHODS[name]
    _, scheduler = fashion.dense(given.data)
    total = sum(p.numel() for p in model.parameters())
    share = held_by_units(model) / total
    # The rest is for teacher, check and repair: 130 s with 128 images on one thread of a busy machine.
    return hwprune.prune_diffusion(
        model,
        range(10),
        hwprune.Budget(params=1 - (1 - budget) * share),
        steps=given.steps,
        scheduler=scheduler,
        guidance=GUIDANCE,
        method=method,
        repair=repair,
        kinds=kinds,
        updates=given.updates,
        minutes=0.85 * given.minutes,
        images=given.images,
        batch=8,
        seed=given.seed,
        folder=given.work / "runs",
    )


def held_by_units(model: torch.nn.Module) -> int:
    """Parameters that go when every head and every neuron goes."""
    found = 0
    for unit in find_units(model):
        for part in unit.slices:
            if part.index is None or part.dim is None:
                raise ValueError(f"{unit.name}: expected units of rows and columns")
            shape = model.get_parameter(part.param).shape
            found += part.index.numel() * (torch.Size(shape).numel() // shape[part.dim])
    return found


def _picture(
    dense: torch.Tensor, pruned: torch.Tensor, name: str, budget: float, work: Path
) -> None:
    def shown(images: torch.Tensor) -> torch.Tensor:
        return (images[:8].movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    file = work / f"{name.replace(' ', '-').replace(',', '')}-{budget:g}.png"
    side_by_side(shown(dense), shown(pruned), [""] * 8, file)


def table(found: list[rows.Row]) -> str:
    """Markdown of the newest rows."""
    last = [row for row in found if row["part"] == "quality"]
    lines = []
    for row in rows.newest([r for r in found if r["part"] == "memory"], ("part",)):
        ratio = row["time_ratio"]
        lines += [
            f"Saved activations at T = {row['long']}: {row['saved_ratio']:.3f} x those at T = 1, and the "
            f"latents; time {ratio['value']:.2f} x plain back-propagation ({ratio['lo']:.2f} to "
            f"{ratio['hi']:.2f}).",
            "",
        ]
    errors = [r["gradient_error"] for r in found if r["part"] == "exactness"]
    if errors:
        lines += [
            f"Gradients against plain back-propagation: off by at most {max(errors):.1e}.",
            "",
        ]
    if not last:
        return "\n".join(lines)
    same = [r for r in last if all(r[k] == last[-1][k] for k in ("minutes", "images", "seed"))]
    cells = {(r["method"], r["budget"]): r for r in same}
    learned = f"latent_mse_at_{last[-1]['steps']}"
    lines += [
        f"| latents off (mean squared) at {DRAWN_STEPS} steps, at {last[-1]['steps']} as learned, "
        "Fréchet distance | " + " | ".join(f"{b:.2f} of the blocks" for b in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name in METHODS:
        shown = [cells.get((name, budget)) for budget in BUDGETS]
        if any(shown):
            texts = [
                f"{_small(r['latent_mse'])} ± {_small(r['latent_mse_se'])}, {_small(r[learned])}, "
                f"{r['frechet']:.1f}"
                if r
                else "not run"
                for r in shown
            ]
            title = f"**{name}**" if name == "ours" else name
            lines.append(f"| {title} | " + " | ".join(texts) + " |")
    row = last[-1]
    lines += [
        "",
        f"Fashion-MNIST's diffusion transformer, {row['samples']} images of fresh seeds and labels drawn in "
        f"{row['drawn_steps']} steps (learned with {row['steps']}), guidance {row['guidance']}; at most "
        f"{row['minutes']:g} minutes a cell. The dense model's Fréchet distance to 10 000 real images is "
        f"{row['frechet_dense']:.1f}. Kept parameters are of what heads and neurons hold; where "
        "modulation goes too, the whole model has as many as in the other rows.",
        f"Rows: profiles/rows/{ROWS.name}, commit {row['commit']}, torch {row['torch']}. Again: "
        f"`scripts/bench {NAME}`.",
    ]
    return "\n".join(lines)


def _small(value: float) -> str:
    """Four places, or the first digits of what they would round away."""
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def main() -> int:
    """Run, or tabulate."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {NAME}", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--minutes", type=float, default=15.0, help="of each method and budget")
    parser.add_argument("--updates", type=int, default=2000, help="of gates, at most")
    parser.add_argument("--images", type=int, default=128, help="to learn from")
    parser.add_argument("--steps", type=int, default=8, help="of the solver, while learning")
    parser.add_argument("--fresh", type=int, default=256, help="images judged with those steps")
    parser.add_argument("--samples", type=int, default=1000, help="images judged with 20 steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", type=int, default=50, help="steps of the part memory")
    parser.add_argument("--time-steps", type=int, default=8, help="steps at which time is compared")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER, help="folder")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "hwprune-bench-diffusion"
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="file to add rows to, or to read")
    parser.add_argument("--again", action="store_true", help="run what is there already, too")
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows")
    parser.add_argument("--write", action="store_true", help="with --table: put it into README.md")
    given = parser.parse_args()
    if given.table:
        text = table(rows.read(given.rows))
        print(text)
        if given.write:
            rows.write_between(rows.ROOT / "README.md", NAME, text)
        return 0
    given.methods = given.methods.split(";")
    given.budgets = [float(text) for text in given.budgets.split(",")]
    unknown = sorted({*given.methods} - {*METHODS}) + sorted({*given.parts.split(",")} - {*PARTS})
    if unknown:
        parser.error(
            f"expected methods {'; '.join(METHODS)} and parts {', '.join(PARTS)}, got {unknown}"
        )
    given.work.mkdir(parents=True, exist_ok=True)
    facts = rows.provenance()
    run = {"exactness": exactness, "memory": memory, "quality": quality}
    for part in given.parts.split(","):
        for row in run[part](given):
            rows.append(given.rows, {**facts, "part": part, **row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
