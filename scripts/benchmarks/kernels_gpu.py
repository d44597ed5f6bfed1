"""Block-sparse linears on a GPU against cuBLAS, torch.compile and the public block-sparse kernels.

Everything is timed inside CUDA graphs, in interleaved rounds, beside its roofline: bf16 shapes of ViT-S/B at
batch 64 and 1, SDXL and FLUX, densities 0.1 to 1. Each shape, block and density tries a few launches, and
the row says which won. `--dry-run` walks the whole road on a CPU, in Triton's interpreter, on small shapes.
Rows go to profiles/rows/kernels-gpu.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402 - after the interpreter is asked for
from parts import rows  # noqa: E402
from parts.peers import peers  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from hwprune.kernels.block_sparse import tiles  # noqa: E402
from hwprune.kernels.block_sparse.format import BlockSparseWeight, balanced  # noqa: E402
from hwprune.meter.rounds import of_ratio, orders  # noqa: E402

NEEDS_GPU = True
GPU_ARGUMENTS = "--seconds 150 --rounds 10"

NAME = "kernels-gpu"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
SHAPES = {  # tokens, in, out
    "ViT-B fc1 b64": (12608, 768, 3072),
    "ViT-B fc2 b64": (12608, 3072, 768),
    "ViT-B qkv b64": (12608, 768, 2304),
    "ViT-B fc1 b1": (197, 768, 3072),
    "ViT-S fc1 b64": (12608, 384, 1536),
    "ViT-S fc1 b1": (197, 384, 1536),
    "SDXL 640": (8192, 640, 5120),
    "SDXL 1280": (2048, 1280, 10240),
    "FLUX 3072": (4608, 3072, 12288),
}
BLOCKS = ((128, 64), (64, 64), (64, 32), (32, 32))
DENSITIES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# Dense bf16 FLOP/s and bytes/s of the datasheet, for the roofline; unknown devices get none.
PEAKS = {"NVIDIA H200": (989e12, 4.8e12), "NVIDIA H100 80GB HBM3": (989e12, 3.35e12)}
L2_BYTES = 16 * 2**20
Call = Callable[[], Any]


class Timer:
    """Seconds of one call: graphs and events on a GPU, the wall clock in a dry run."""

    def __init__(self) -> None:
        """Nothing captured yet."""
        self.graphs: dict[str, tuple[Callable[[], None], int]] = {}

    def ready(self, name: str, call: Call) -> float:
        """Warm up, capture enough repeats for about 2 ms, and return seconds a call roughly."""
        if DRY:
            start = time.perf_counter()
            call()
            self.graphs[name] = (call, 1)
            return time.perf_counter() - start
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        once = self.events(call, 5)
        repeats = max(1, min(200, round(2e-3 / once)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        self.graphs[name] = (graph.replay, repeats)
        return once

    def events(self, call: Call, repeats: int) -> float:
        """Seconds a call between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def once(self, name: str) -> float:
        """Seconds of one call, from one replay."""
        replay, repeats = self.graphs[name]
        if DRY:
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        return self.events(replay, 1) / repeats

    def rounds(self, names: list[str], count: int) -> dict[str, list[float]]:
        """Seconds a call of each name and round, interleaved."""
        found: dict[str, list[float]] = {name: [] for name in names}
        for order, _ in zip(orders(names, 0), range(count), strict=False):
            for name in order:
                found[name].append(self.once(name))
        return found


def figure(times: dict[str, list[float]], of: str, over: str) -> dict[str, Any]:
    """How many times faster `of` is than `over`."""
    return of_ratio(times[over], times[of], 0.02).to_dict()


def launches(tokens: int, weight: BlockSparseWeight, capability: tuple[int, int], sms: int) -> Any:
    """The launch that `tiles.choose` picks, and its neighbours."""
    first = tiles.choose(tokens, weight.grid[0], weight.block, 2, capability, sms)
    tried = [first]
    if not DRY:
        limit = tiles.shared_limit(capability)
        for side in (64, 128, 256):
            for warps in (4, 8):
                for stages in (3, 4, 6):
                    ring = stages * (side + weight.block[0]) * weight.block[1] * 2
                    other = replace(first, tokens=side, warps=warps, stages=stages)
                    if ring <= limit - 2048 and side < 2 * max(64, tokens) and other != first:
                        tried.append(other)
    return tried


def one(
    shape: str,
    block: tuple[int, int],
    timer: Timer,
    device: str,
    rounds_: int,
    compiled: Call | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> dict[str, Any]:
    """One row: a shape and a block, all densities, all peers."""
    from hwprune.kernels.block_sparse import gpu_forward

    tokens, width, outputs = x.shape[0], x.shape[1], weight.shape[0]
    properties = None if DRY else torch.cuda.get_device_properties(device)
    capability = (9, 0) if properties is None else (properties.major, properties.minor)
    sms = 132 if properties is None else properties.multi_processor_count
    names = ["dense"] + (["compiled"] if compiled is not None else [])
    timer.ready("dense", lambda: F.linear(x, weight, bias))
    if compiled is not None:
        timer.ready("compiled", compiled)
    found: dict[str, Any] = {"launch": {}, "densities": {}}
    for density in DENSITIES[2:3] if DRY else DENSITIES:
        generator = torch.Generator().manual_seed(0)
        grid = (-(-outputs // block[0]), -(-width // block[1]))
        keep = balanced(torch.rand(grid, generator=generator), density)
        packed = BlockSparseWeight.from_dense(weight, keep, block)
        count = int(keep[0].sum())
        exact = F.linear(x.double(), packed.to_dense().double(), bias.double())
        best: tuple[float, Any, Call] | None = None
        for config in launches(tokens, packed, capability, sms):

            def call(c: Any = config, p: BlockSparseWeight = packed, n: int = count) -> Tensor:
                return gpu_forward.launch(x, p, bias, None, "none", c, count=n)

            try:
                error = float((call().double() - exact).norm() / exact.norm())
                if error > 8 * torch.finfo(x.dtype).eps:
                    raise RuntimeError(f"wrong by {error:.2g}")
                seconds = timer.ready("try", call)
            except Exception as failure:  # a launch that the device refuses is not the answer
                found.setdefault("refused", []).append([asdict(config), str(failure)[:200]])
                continue
            if best is None or seconds < best[0]:
                best = (seconds, config, call)
        if best is None:
            found["densities"][f"{density:g}"] = {"value": None, "reason": "no launch ran"}
            continue
        timer.ready("ours", best[2])
        against: dict[str, str] = {}
        arms = [*names, "ours"]
        for peer, made in peers(x, packed, bias, DRY).items():
            if isinstance(made, str):
                against[peer] = made
                continue
            try:
                timer.ready(peer, made)
                arms.append(peer)
            except Exception as failure:
                against[peer] = f"does not run: {str(failure)[:200]}"
        times = timer.rounds(arms, rounds_)
        ours_s, dense_s = (statistics.median(times[n]) for n in ("ours", "dense"))
        flops = 2 * tokens * width * outputs * packed.density
        bytes_ = 2 * (tokens * width + tokens * outputs + packed.values.numel())
        peak = None if DRY else PEAKS.get(torch.cuda.get_device_name(device))
        found["launch"][f"{density:g}"] = asdict(best[1])
        found["densities"][f"{density:g}"] = {
            "seconds": ours_s,
            "dense_seconds": dense_s,
            "roofline_seconds": max(flops / peak[0], bytes_ / peak[1]) if peak else None,
            "efficiency": dense_s * packed.density / ours_s,
            "over_dense": figure(times, "ours", "dense"),
            "over": {n: figure(times, "ours", n) for n in arms if n not in ("ours", "dense")},
            "not_run": against,
        }
    return {
        "shape": shape,
        "size": [tokens, width, outputs],
        "block": block,
        "dtype": "bf16",
        **found,
    }


def l2_bandwidth(timer: Timer, device: str) -> float | None:
    """Bytes a second read from a buffer that fits in L2."""
    if DRY:
        return None
    buffer = torch.randn(L2_BYTES // 4, device=device)
    seconds = timer.ready("l2", lambda: buffer.sum())
    timer.ready("l2", lambda: buffer.sum())
    seconds = min(timer.once("l2") for _ in range(10))
    return L2_BYTES / seconds


def main() -> None:
    """Measure, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=240, help="start no further row after")
    parser.add_argument("--out", default=str(ROWS))
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        raise SystemExit("kernels-gpu: no CUDA device; --dry-run tries the road on a CPU")
    device = "cpu" if DRY else "cuda"
    timer, began = Timer(), time.perf_counter()
    about = rows.provenance()
    if not DRY:
        about |= rows.gpu()
    bandwidth = l2_bandwidth(timer, device)
    shapes = {"dry": (48, 96, 130)} if DRY else {s: SHAPES[s] for s in options.shapes.split(",")}
    dtype = torch.float16 if DRY else torch.bfloat16
    for shape, (tokens, width, outputs) in shapes.items():
        torch.manual_seed(0)
        x = torch.randn(tokens, width, device=device).to(dtype)
        weight = (torch.randn(outputs, width, device=device) / width**0.5).to(dtype)
        bias = torch.randn(outputs, device=device).to(dtype)
        compiled: Call | None = None
        if not DRY and "b1" not in shape:
            linear = torch.compile(F.linear, mode="max-autotune-no-cudagraphs")

            def compiled(f: Any = linear, a: Any = (x, weight, bias)) -> Tensor:  # type: ignore[no-redef]
                return f(*a)

        for block in BLOCKS[1:] if DRY else BLOCKS:
            if time.perf_counter() - began > options.seconds:
                print(f"{shape} {block}: not started, {options.seconds:g} s are over")
                continue
            row = about | {"l2_bytes_per_s": bandwidth}
            row |= one(shape, block, timer, device, options.rounds, compiled, x, weight, bias)
            if DRY:
                json.dumps(row)  # a row that cannot be written fails here, and none is kept
            else:
                rows.append(rows.Path(options.out), row)
            for density, told in row["densities"].items():
                if "over_dense" in told:
                    speed, power = told["over_dense"]["value"], told["efficiency"]
                    print(f"{shape} {block} {density}: {speed:.2f}x dense, efficiency {power:.2f}")
                else:
                    print(f"{shape} {block} {density}: {told['reason']}")


if __name__ == "__main__":
    main()
