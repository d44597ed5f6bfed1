"""Contracts of DeiT-B and DeiT-S on this GPU: latency 0.6 and energy 0.6, bf16, batch 64, as CUDA graphs.

On the profile that profile-gpu wrote just before, with random weights and noise for images: whether a contract
is kept is a matter of shapes. No accuracy is told, but the distortion of three ways: whatever the profile says
pays, whole units alone, tiles alone. At equal latency that is how block-sparse stands against structured. Rows
go to profiles/rows/vit-contract-gpu.jsonl. `--dry-run` walks the same road on a CPU: a tiny model, a profile of
its own operations measured on the spot, and no row.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from allocation import dense_model
from parts import rows
from torch import Tensor, nn

from hwprune import families
from hwprune.allocate import Budget, UnreachableBudget
from hwprune.analysis import Analysis, analyse
from hwprune.contract import contract
from hwprune.model_ops import model_ops
from hwprune.profiling import measure_device
from hwprune.pruning import prune, tiles_of

NEEDS_GPU = True
GPU_ARGUMENTS = "--minutes 2.5"

NAME = "vit-contract-gpu"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
BUDGET, BATCH, IMAGES = 0.6, 64, 64
WITHIN = {"latency": 0.03, "energy": 0.05}  # what a contract is to be kept within
FORMS: dict[str, tuple[str, ...] | None] = {
    "default": None,
    "whole units": ("head", "neuron", "qk", "vo"),
    "tiles": ("block",),
}
# The most wanted first: the time may not be enough for all.
CELLS = (
    ("deit-b", "latency", "default"),
    ("deit-b", "energy", "default"),
    ("deit-s", "latency", "default"),
    ("deit-s", "energy", "default"),
    ("deit-b", "latency", "whole units"),
    ("deit-b", "latency", "tiles"),
    ("deit-s", "latency", "whole units"),
    ("deit-s", "latency", "tiles"),
)


@dataclass(frozen=True)
class Setting:
    """Where and how contracts are made.

    Attributes:
        place: of the models.
        dtype: they are run in; pruned in float32.
        batch: images of the timed batch.
        profile: file; None = this device's own.
        block: tile size where tiles are offered alone and the profile says none pays.
    """

    place: torch.device
    dtype: torch.dtype
    batch: int
    profile: str | None = None
    block: tuple[int, int] = (64, 64)


def one(
    dense: nn.Module,
    x: Tensor,
    metric: str,
    form: str,
    setting: Setting,
    known: dict[str, Analysis],
) -> dict[str, Any]:
    """A contract: what was promised, what was measured, what it cost; or why it was refused."""
    budget = Budget(**{metric: BUDGET})
    began = time.perf_counter()
    try:
        if form not in known:
            layers, _ = families.of(dense).find_layers(dense)
            terms = contract(dense, budget, setting.profile, x, layers, dtype=setting.dtype)
            kinds = FORMS[form]
            tiles = tiles_of(terms, kinds, None)
            known[form] = analyse(dense, [x], kinds=kinds, block=setting.block, tiles=tiles)
        report = prune(
            copy.deepcopy(dense),
            [x],
            budget,
            device=setting.profile,
            kinds=FORMS[form],
            timed_batch=setting.batch,
            timed_dtype=setting.dtype,
            analysis=known[form],
        )
    except (UnreachableBudget, ValueError) as error:
        return {"refused": str(error).splitlines()[0], "seconds": time.perf_counter() - began}
    told = report.to_dict()
    figure = told["measured"][f"{metric}_ratio"]
    return {
        "mode": told["measured"].get("settings", {}).get("mode"),
        "predicted": {k: told["predicted"][f"{k}_ratio"] for k in WITHIN},
        "measured": {k: told["measured"][f"{k}_ratio"] for k in WITHIN},
        "why_not_measured": told["measured"].get("reason"),
        "off_rel": None if figure is None else figure["value"] / BUDGET - 1,
        "kept": None if figure is None else figure["lo"] <= BUDGET,
        "within": None if figure is None else abs(figure["value"] / BUDGET - 1) <= WITHIN[metric],
        "macs_ratio": report.macs_ratio,
        "distortion": told["distortion"],
        "warnings": list(report.warnings),
        "steps_s": told["seconds"],
        "seconds": time.perf_counter() - began,
    }


def tiny() -> nn.Module:
    """What a dry run prunes."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=5,
    ).eval()
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def dry_run() -> None:
    """The same road on this CPU, with nothing kept."""
    place = torch.device("cpu")
    torch.set_num_threads(1)
    model, x = tiny(), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dry.json"
        profile = measure_device(
            model_ops(model, x),
            place,
            name="dry",
            minutes=0.2,
            partial=Path(folder) / ".dry.partial.json",
        )
        profile.save(file)
        setting = Setting(place, torch.float32, 8, str(file), (16, 16))
        known: dict[str, Analysis] = {}
        for metric, form in (("latency", "whole units"), ("energy", "whole units")):
            show("tiny", metric, form, one(model, x, metric, form, setting, known))


def show(model: str, metric: str, form: str, row: dict[str, Any]) -> None:
    """A line; a row that could not be written fails here."""
    json.dumps(row)
    if "refused" in row:
        print(f"{model} {metric} {BUDGET} {form}: refused, {row['refused']}", flush=True)
        return
    seen = row["measured"][metric]
    text = (
        "not measured"
        if seen is None
        else f"{seen['value']:.3f} [{seen['lo']:.3f}, {seen['hi']:.3f}]"
    )
    print(
        f"{model} {metric} {BUDGET} {form}: {text}, predicted {row['predicted'][metric]['value']:.3f}, MACs "
        f"{row['macs_ratio']:.3f}, distortion {row['distortion']['measured']:.3g}, {row['seconds']:.0f} s",
        flush=True,
    )


def main() -> None:
    """Make contracts while there is time, append rows, print."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {NAME}", description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no further one after")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.dry_run:
        dry_run()
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"{NAME}: no CUDA device; --dry-run tries the road on a CPU")
    place = torch.device("cuda:0")
    setting = Setting(place, torch.bfloat16, BATCH)
    about = rows.provenance() | rows.gpu() | {"batch": BATCH}
    began = time.perf_counter()
    dense: dict[str, nn.Module] = {}
    known: dict[str, dict[str, Analysis]] = {}
    x = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(options.seed))
    for name, metric, form in CELLS:
        if time.perf_counter() - began > 60 * options.minutes:
            print(f"{name} {metric} {form}: not started, {options.minutes:g} minutes are over")
            continue
        if name not in dense:
            dense[name] = dense_model(name, options.seed).to(place)
        found = one(dense[name], x.to(place), metric, form, setting, known.setdefault(name, {}))
        row = about | {
            "model": name,
            "dtype": "bf16",
            "metric": metric,
            "budget": BUDGET,
            "form": form,
        }
        rows.append(ROWS, row | found)
        show(name, metric, form, found)


if __name__ == "__main__":
    main()
