"""The cost model against measurement: held-out operations, and whole pruned networks on this CPU.

Operations: errors of this machine's profile, each entry predicted without its site. Networks: ViT-Tiny and
DeiT-Small (timm, random weights), dense and at five plans each, timed in interleaved rounds with one thread;
predicted ratio to dense against the measured one. Only the dense model fits the residual. Rows go to
profiles/rows/cost-model.jsonl.
"""

import argparse
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import interleaved, rows
from scipy.stats import kendalltau
from torch import Tensor, nn

from hwprune.cost import count_macs
from hwprune.device import ProfileError, for_this_device, list_devices, load_device
from hwprune.families import timm_vit
from hwprune.network import NetworkModel, moved_bytes
from hwprune.operations import operations
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.profiling import settle_allocator, this_device
from hwprune.realise import realise_
from hwprune.units import Mask, Units

NAME = "cost-model"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
MODELS = {"ViT-Tiny": "vit_tiny_patch16_224", "DeiT-Small": "deit_small_patch16_224"}
# share of the dense MACs -> the kinds a random mask of it removes
PLANS: dict[str, tuple[float, tuple[str, ...]]] = {
    "neuron 0.9": (0.9, ("neuron",)),
    "head+neuron 0.8": (0.8, ("head", "neuron")),
    "qk+vo+neuron 0.7": (0.7, ("qk", "vo", "neuron")),
    "all 0.5": (0.5, ("head", "qk", "vo", "neuron")),
    "block 0.5": (0.5, ("block",)),
}
BLOCK = (64, 64)


def profile_of_this_machine(asked: str | None) -> CostModel:
    """The profile named, or the one measured on this machine with this many threads.

    Raises:
        SystemExit: there is none.
    """
    key = this_device(torch.device("cpu"))
    if asked is not None:
        return CostModel(load_device(asked, for_device=key))
    for path in reversed(list_devices().values()):
        try:
            profile = load_device(path)
        except ProfileError as error:
            warnings.warn(str(error), stacklevel=1)
            continue
        if profile.key == key:
            return CostModel(for_this_device(profile, key))
    raise SystemExit(
        f"expected a profile of {key} in profiles/ or HWPRUNE_PROFILES, got {sorted(list_devices())}; "
        "hwprune profile --device cpu --threads 1 measures one"
    )


def held_out(costs: CostModel) -> dict[str, Any]:
    """Median and p90 errors by family: of all sites, and of those inside the range of the others."""
    everywhere, inside = costs.held_out_errors(), costs.held_out_errors(inside=True)
    found = {}
    for family, errors in everywhere.items():
        kind, impl, block, dtype = family
        name = f"{kind} {impl} {block[0]}x{block[1]} {dtype}" if block[0] else f"{kind} {dtype}"
        within = inside.get(family, np.empty(0))
        found[name] = {
            "n": len(errors),
            "median": float(np.median(errors)),
            "p90": float(np.quantile(errors, 0.9)),
            "n_inside": len(within),
            "median_inside": float(np.median(within)) if len(within) else None,
            "p90_inside": float(np.quantile(within, 0.9)) if len(within) else None,
        }
    pooled = np.concatenate(list(everywhere.values()))
    found["all"] = {
        "n": len(pooled),
        "median": float(np.median(pooled)),
        "p90": float(np.quantile(pooled, 0.9)),
    }
    return found


def random_mask(units: list[Units], kept: float, seed: int) -> Mask:
    """Keep about this share of the units of each grid, no layer whole and none empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = {}
    for unit in units:
        # A plan is uneven: layers keep between half as many and half again of what is dropped.
        share = 1 - (1 - kept) * (0.5 + float(torch.rand(1, generator=generator)))
        count = max(1, min(unit.count - 1, round(share * unit.count)))
        ranks = torch.rand(unit.count, generator=generator).argsort().argsort()
        mask[unit.name] = (ranks < count).view(unit.shape)
    return mask


def pruned(dense: nn.Module, kinds: tuple[str, ...], macs: float, x: Tensor) -> nn.Module:
    """The dense model with random masks, realised, at about this share of its MACs."""
    units = timm_vit.find_units(dense, kinds, block=BLOCK)
    whole = count_macs(dense, x[:1])
    low, high = 0.02, 0.999
    found = None
    for _ in range(6):  # of the kept share: within a percent or two is close enough for a plan
        kept = (low + high) / 2
        found = copy.deepcopy(dense)
        realise_(found, units, random_mask(units, kept, seed=0))
        share = count_macs(found, x[:1]) / whole
        low, high = (kept, high) if share < macs else (low, kept)
    assert found is not None
    return found


def network(title: str, costs: CostModel, batch: int, rounds: int) -> dict[str, Any]:
    """One row: a model at all plans, predicted and measured."""
    import timm

    torch.manual_seed(0)
    dense = timm.create_model(MODELS[title], pretrained=False).eval()
    x = torch.randn(batch, 3, 224, 224)
    models = {"dense": dense}
    models |= {name: pruned(dense, kinds, macs, x) for name, (macs, kinds) in PLANS.items()}
    ops: dict[str, list[Op]] = {name: operations(model, x) for name, model in models.items()}
    settle_allocator()  # as the profile was measured
    with torch.no_grad():
        calls = {name: lambda m=model: m(x) for name, model in models.items()}
        times = interleaved.times_s(calls, rounds)
    model = NetworkModel.fitted(costs, [(ops["dense"], float(np.median(times["dense"])))])
    whole = model.predict(ops["dense"])
    macs = {name: count_macs(m, x[:1]) for name, m in models.items()}
    plans = {}
    for name in PLANS:
        found = model.predict(ops[name])
        faster = interleaved.speedup(times, name, "dense")
        measured = {
            "value": 1 / faster["value"],
            "lo": 1 / faster["hi"],
            "hi": 1 / faster["lo"],
            "n": faster["n"],
        }
        predicted = found.latency_s / whole.latency_s
        plans[name] = {
            "macs_ratio": macs[name] / macs["dense"],
            "predicted": {
                "value": predicted,
                "lo": found.lo_s / whole.latency_s,
                "hi": found.hi_s / whole.latency_s,
                "tier": found.tier,
            },
            "measured": measured,
            "error": predicted / measured["value"] - 1,
        }
    return {
        **rows.provenance(),
        "model": f"{title}, random weights",
        "profile": costs.profile.name,
        "profile_sha256": costs.profile.provenance["content_sha256"],
        "batch": batch,
        "dtype": "fp32",
        "clock": interleaved.clock().__name__,
        "rounds": rounds,
        "dense_s": float(np.median(times["dense"])),
        "residual_s": model.s_per_byte * sum(map(moved_bytes, ops["dense"])),
        "scale": model.scale,
        "plans": plans,
        "kendall_tau": tau(plans),
        "worst_error": max(abs(plan["error"]) for plan in plans.values()),
    }


def tau(plans: dict[str, Any]) -> float:
    """Kendall's tau of the predicted and measured order."""
    predicted = [plan["predicted"]["value"] for plan in plans.values()]
    measured = [plan["measured"]["value"] for plan in plans.values()]
    return float(kendalltau(predicted, measured).statistic)


def show_held_out(found: dict[str, Any]) -> None:
    """A table for a terminal."""
    print(f"{'held out by site':34s} {'n':>5s} {'median':>8s} {'p90':>8s}   inside the range")
    for name, told in found.items():
        within = ""
        if told.get("n_inside"):
            within = f"{told['n_inside']:5d} {told['median_inside']:8.1%} {told['p90_inside']:8.1%}"
        print(f"{name:34s} {told['n']:5d} {told['median']:8.1%} {told['p90']:8.1%}   {within}")
    print(flush=True)


def show_network(row: dict[str, Any]) -> None:
    """A few lines for a terminal."""
    residual = f"{row['residual_s'] / row['dense_s']:.1%} of it residual, scale {row['scale']:.3f}"
    print(f"{row['model']}, batch {row['batch']}: dense {row['dense_s']:.3f} s, {residual}")
    for name, plan in row["plans"].items():
        told, seen = plan["predicted"], plan["measured"]
        print(
            f"  {name:18s} MACs {plan['macs_ratio']:.3f}  predicted {told['value']:.3f} "
            f"[{told['lo']:.3f}, {told['hi']:.3f}]  measured {seen['value']:.3f} [{seen['lo']:.3f}, "
            f"{seen['hi']:.3f}]  error {plan['error']:+.1%}"
        )
    print(f"  worst {row['worst_error']:.1%}, Kendall's tau {row['kendall_tau']:.2f}\n", flush=True)


def main() -> None:
    """Measure, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--profile", help="name or file (default: this machine's)")
    parser.add_argument("--quick", action="store_true", help="ViT-Tiny, 5 rounds, no rows: a try")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file to append to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.models, options.rounds, options.no_rows = "ViT-Tiny", 5, True
    costs = profile_of_this_machine(options.profile)
    errors = held_out(costs)
    show_held_out(errors)
    made = [
        {
            **rows.provenance(),
            "model": "operations, held out by site",
            "profile": costs.profile.name,
            "profile_sha256": costs.profile.provenance["content_sha256"],
            "held_out": errors,
        }
    ]
    for title in options.models.split(","):
        made.append(network(title, costs, options.batch, options.rounds))
        show_network(made[-1])
    networks = made[1:]
    pooled = {f"{row['model']} {n}": plan for row in networks for n, plan in row["plans"].items()}
    print(
        f"{len(pooled)} plans: worst error {max(abs(p['error']) for p in pooled.values()):.1%}, Kendall's tau "
        f"{tau(pooled):.3f}"
    )
    for row in made if not options.no_rows else []:
        json.dumps(row, allow_nan=False)
        rows.append(options.rows, row)


if __name__ == "__main__":
    main()
