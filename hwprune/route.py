"""Which implementation runs a block-sparse layer: dense, compacted or tiles, by a device's measurements.

The rule: a routed model is never slower than `F.linear` on its layers. Where the profile does not know a layer
on this device, or where its interval does not put tiles ahead, the layer becomes a dense one with zeros.
Nothing is tuned at run time; `measure=True` times this model's own layers here instead of asking a profile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.device import for_this_device, list_devices, read_profile
from hwprune.layers import BlockSparseLinear, CompactLinear
from hwprune.ops import NAMES, Op
from hwprune.predict import CostModel, Prediction, UnknownOp, total
from hwprune.profiling import this_device

ROUNDS = 7  # of a measured choice; medians of interleaved calls
_TIE = 0.97  # of the dense time: what tiles must be below


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
    """One's own or the shipped profile of this very device, or None; warns where torch is another."""
    key = this_device(device)
    for path in reversed(list_devices().values()):  # one's own are listed last
        try:
            profile = read_profile(path)
            if profile.key == key:
                return CostModel(for_this_device(profile, key), mode)
        except (ValueError, OSError):  # damaged, or of another mode
            continue
    return None


def route_(
    model: nn.Module,
    *inputs: Tensor,
    costs: CostModel | None = None,
    measure: bool = False,
    force: bool = False,
) -> list[Choice]:
    """Replace block-sparse layers by what is fastest on this device, in place, for inputs of these sizes.

    A last step before inference, like compiling: the model computes the same, but a layer that became dense is
    no longer stored as tiles, so save first; a routed model is refused by `save`.

    Args:
        model: with `BlockSparseLinear`s.
        inputs: a batch as it will be run; the sizes decide (of a layer that runs more than once, the
            largest).
        costs: of this device; by default its own or its shipped profile.
        measure: time each layer here and now instead.
        force: believe `costs` though they are another device's.

    Returns:
        One choice a block-sparse layer.

    Raises:
        ValueError: `model` is a BlockSparseLinear itself, which cannot be replaced in place.
        ProfileError: `costs` are another device's, and not `force`.

    Example:
        >>> import torch
        >>> import hwprune
        >>> keep = torch.rand(4, 4) < 0.5
        >>> layer = hwprune.BlockSparseLinear.from_dense(torch.nn.Linear(128, 128), keep, block=(32, 32))
        >>> model = torch.nn.Sequential(layer)
        >>> choices = hwprune.route_(model, torch.randn(8, 128), measure=True)
        >>> choices[0].impl in ("block_sparse", "compact", "dense")
        True
    """
    if isinstance(model, BlockSparseLinear):
        raise ValueError(
            "expected a model that holds BlockSparseLinears, got one itself, which cannot be replaced in "
            "place; put it into an nn.Sequential"
        )
    names: dict[BlockSparseLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockSparseLinear):
            names.setdefault(module, []).append(name)
    if not names:
        return []
    seen = _inputs_of(model, list(names), inputs)
    place = next(iter(seen.values())).device if seen else next(iter(names)).values.device
    if measure:
        costs = None
    elif costs is not None:
        costs = costs.for_device(this_device(place), force=force)
    else:
        costs = profile_here(place, "graph" if place.type == "cuda" else "eager")
    made = []
    for module, places in names.items():
        if module not in seen:
            reason = "it did not run on these inputs, or is not called with its input alone"
            made.append(Choice(places[0], "block_sparse", {}, reason))
            continue
        choice, fresh = _choose(places[0], module, seen[module], costs, measure)
        made.append(choice)
        if fresh is not module:
            fresh.train(module.training).requires_grad_(module.values.requires_grad)
            for name in places:
                model.set_submodule(name, fresh)
    if any(choice.impl != "block_sparse" for choice in made):
        vars(model)["hwprune_routed"] = True
    return made


def _inputs_of(
    model: nn.Module, modules: Sequence[BlockSparseLinear], inputs: Sequence[Tensor]
) -> dict[BlockSparseLinear, Tensor]:
    """What each layer is given in one forward in evaluation mode; layers that get no token are left out.

    So are those called by keyword: a stock layer's input has another name.
    """
    seen: dict[BlockSparseLinear, Tensor] = {}
    by_keyword: set[BlockSparseLinear] = set()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, BlockSparseLinear)
        if not args:
            by_keyword.add(module)
            return
        x = args[0]
        if x.numel() > (seen[module].numel() if module in seen else 0):
            seen[module] = x

    modes = [(module, module.training) for module in model.modules()]
    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {module: x for module, x in seen.items() if module not in by_keyword}


def _choose(
    name: str, module: BlockSparseLinear, x: Tensor, costs: CostModel | None, measure: bool
) -> tuple[Choice, nn.Module]:
    candidates: dict[str, nn.Module] = {"dense": dense_layer(module), "block_sparse": module}
    compact = CompactLinear.from_dense(module.to_dense(), module.bias)
    if compact.weight.shape != (module.out_features, module.in_features):
        candidates["compact"] = compact
    if measure:
        seconds = _timed(candidates, x)
        # A tie goes to dense: it must be ahead by more than the noise of these few rounds.
        best = min(seconds, key=lambda impl: seconds[impl] * (_TIE if impl == "dense" else 1.0))
        return Choice(name, best, seconds, "measured here"), candidates[best]
    if costs is None:
        reason = "no profile of this device: `hwprune profile` measures it, or route_(measure=True)"
        return Choice(name, "dense", {}, reason), candidates["dense"]
    if x.dtype not in NAMES:
        return Choice(name, "dense", {}, f"no profile measures {x.dtype}"), candidates["dense"]
    found = _priced(module, compact if "compact" in candidates else None, x, costs)
    seconds = {impl: priced.latency_s for impl, priced in found.items()}
    if "dense" not in found:
        reason = f"{costs.profile.name} says nothing about the dense layer"
        return Choice(name, "dense", seconds, reason), candidates["dense"]
    # Ours must win even if the prediction errs against it: its upper end below dense's lower end.
    sure = {i: p.hi_s for i, p in found.items() if i != "dense" and p.hi_s < found["dense"].lo_s}
    best = min(sure, key=lambda impl: sure[impl]) if sure else "dense"
    reason = f"{costs.profile.name}" + ("" if sure else ": nothing is surely faster than dense")
    return Choice(name, best, seconds, reason), candidates[best]


def _priced(
    module: BlockSparseLinear, compact: CompactLinear | None, x: Tensor, costs: CostModel
) -> dict[str, Prediction]:
    """The predicted cost of each implementation that the profile knows."""
    m, n, k = x.numel() // x.shape[-1], module.out_features, module.in_features
    dtype, block = NAMES[x.dtype], (int(module.block[0]), int(module.block[1]))
    parts: dict[str, list[Op]] = {"dense": [Op("linear", (m, n, k), dtype)]}
    if len(module.values):
        parts["block_sparse"] = [Op.tiles((m, n, k), dtype, block, len(module.values))]
    if compact is not None:
        # Picking the inputs and placing the outputs: as long as a pass over both, by the activation's time.
        parts["compact"] = [Op("gelu", (m, n + k), dtype)]
        if compact.weight.numel():
            parts["compact"].append(Op("linear", (m, *compact.weight.shape), dtype))
    found = {}
    for impl, ops in parts.items():
        with contextlib.suppress(UnknownOp):
            found[impl] = total(costs.predict(op) for op in ops)
    return found


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
