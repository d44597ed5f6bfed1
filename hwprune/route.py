"""Which implementation runs a block-sparse layer: dense, compacted or tiles, by a device's measurements.

The rule: a routed model is never slower than `F.linear` on its layers. Where the profile does not know a layer
on this device, or where its interval does not put tiles ahead, the layer becomes a dense one with zeros.
Nothing is tuned at run time; `measure=True` times this model's own layers here instead of asking a profile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.device import ProfileError, list_devices, read_profile
from hwprune.layers import BlockSparseLinear, CompactLinear
from hwprune.ops import NAMES, Op
from hwprune.predict import CostModel, UnknownOp
from hwprune.profiling import this_device

ROUNDS = 7  # of a measured choice; medians of interleaved calls


@dataclass(frozen=True)
class Choice:
    """What was decided for one layer.

    Attributes:
        layer: its name.
        impl: "block_sparse", "compact" or "dense".
        seconds: implementation -> seconds of a call, as far as known.
        reason: in words.
    """

    layer: str
    impl: str
    seconds: dict[str, float]
    reason: str


def profile_here(device: torch.device, mode: str = "eager") -> CostModel | None:
    """The shipped or own profile of this very device, or None."""
    key = this_device(device)
    for path in list_devices().values():
        try:
            profile = read_profile(path)
            if profile.key == key:
                return CostModel(profile, mode)
        except (ProfileError, ValueError):
            continue
    return None


def route_(
    model: nn.Module, *inputs: Tensor, costs: CostModel | None = None, measure: bool = False
) -> list[Choice]:
    """Replace block-sparse layers by what is fastest on this device, in place, for inputs of these sizes.

    A last step before inference, like compiling: the model computes the same, but a layer that became dense is
    no longer stored as tiles, so save first.

    Args:
        model: with `BlockSparseLinear`s.
        inputs: a batch as it will be run; the sizes decide.
        costs: of this device; by default its shipped or own profile.
        measure: time each layer here and now instead.

    Returns:
        One choice a block-sparse layer.
    """
    seen: dict[str, Tensor] = {}
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
        for name, module in sparse.items()
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    device = next(iter(seen.values())).device if seen else torch.device("cpu")
    if costs is None and not measure:
        costs = profile_here(device, "graph" if device.type == "cuda" else "eager")
    made = []
    for name, module in sparse.items():
        if name not in seen:
            made.append(Choice(name, "block_sparse", {}, "it did not run on these inputs"))
            continue
        choice, fresh = _choose(name, module, seen[name], costs, measure)
        made.append(choice)
        if fresh is not module:
            model.set_submodule(name, fresh.train(module.training))
    if any(choice.impl != "block_sparse" for choice in made):
        vars(model)["hwprune_routed"] = True
    return made


def _choose(
    name: str, module: BlockSparseLinear, x: Tensor, costs: CostModel | None, measure: bool
) -> tuple[Choice, nn.Module]:
    compact = CompactLinear.from_dense(module.to_dense(), module.bias)
    whole = compact.weight.shape == (module.out_features, module.in_features)
    candidates: dict[str, nn.Module] = {"dense": dense_layer(module), "block_sparse": module}
    if not whole and compact.weight.numel():
        candidates["compact"] = compact
    if measure:
        seconds = _timed(candidates, x)
        # A tie goes to dense: it must be ahead by more than the noise of these few rounds.
        best = min(seconds, key=lambda impl: seconds[impl] * (0.97 if impl == "dense" else 1.0))
        return Choice(name, best, seconds, "measured here"), candidates[best]
    if costs is None:
        reason = "no profile of this device: `hwprune profile` measures it, or route_(measure=True)"
        return Choice(name, "dense", {}, reason), candidates["dense"]
    try:
        low, high = _priced(module, compact, x, costs, "compact" in candidates)
    except UnknownOp as error:
        return Choice(name, "dense", {}, str(error)), candidates["dense"]
    # Ours must win even if the prediction errs against it: its upper end below dense's lower end.
    sure = {impl: high[impl] for impl in high if impl != "dense" and high[impl] < low["dense"]}
    best = min(sure, key=lambda impl: sure[impl]) if sure else "dense"
    reason = f"{costs.profile.name}" + ("" if sure else ": nothing is surely faster than dense")
    return Choice(name, best, {k: (low[k] + high[k]) / 2 for k in low}, reason), candidates[best]


def _priced(
    module: BlockSparseLinear, compact: CompactLinear, x: Tensor, costs: CostModel, both: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Lower and upper ends of the predicted seconds of each implementation."""
    m, n, k = x.numel() // x.shape[-1], module.out_features, module.in_features
    dtype, block = NAMES[x.dtype], (int(module.block[0]), int(module.block[1]))
    ops = {"dense": Op("linear", (m, n, k), dtype)}
    if len(module.values):
        ops["block_sparse"] = Op("linear", (m, n, k), dtype, "block_sparse", module.density, block)
    if both:
        ops["compact"] = Op("linear", (m, *compact.weight.shape), dtype)
    found = {impl: costs.predict(op) for impl, op in ops.items()}
    low, high = ({i: getattr(p, end) for i, p in found.items()} for end in ("lo_s", "hi_s"))
    if (
        both
    ):  # picking and placing columns: what moving the activations takes at the speed of the gather
        moved = costs.predict(Op("gelu", (m, n + k), dtype)).hi_s
        low["compact"], high["compact"] = low["compact"] + moved, high["compact"] + moved
    return low, high


def dense_layer(module: BlockSparseLinear) -> nn.Linear:
    """A stock linear with zeros where tiles were dropped."""
    linear = nn.Linear(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(module.to_dense().detach().clone())
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().clone())
    return linear


def _timed(candidates: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Median seconds of each, calls interleaved."""

    def once(layer: nn.Module) -> float:
        if x.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                layer(x)
            end.record()
            torch.cuda.synchronize(x.device)
            return float(start.elapsed_time(end)) / 1e4
        alone = torch.get_num_threads() == 1  # then its CPU time, which no neighbour adds to
        clock = time.thread_time if alone else time.perf_counter
        begin = clock()
        layer(x)
        return clock() - begin

    times: dict[str, list[float]] = {impl: [] for impl in candidates}
    with torch.no_grad():
        for layer in candidates.values():
            layer(x)
        for _ in range(ROUNDS):
            for impl, layer in candidates.items():
                times[impl].append(once(layer))
    return {impl: sorted(found)[len(found) // 2] for impl, found in times.items()}
