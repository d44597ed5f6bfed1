"""Block-sparse linears on this CPU against F.linear, oneDNN with prepacked weights and torch.sparse.

Every product of a group (one shape, type and block: all densities and peers) is timed once a round, in
random order; speed-ups are paired by round, with 95 % intervals. `--end-to-end` times ViT-Base with all its
block linears at density 0.5 instead. Rows go to profiles/rows/kernels.jsonl.
"""

import argparse
import copy
from typing import Any

import torch
from parts import interleaved, kernel_table, rows
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.kernels.block_sparse import native, op
from hwprune.kernels.block_sparse.format import BlockSparseWeight
from hwprune.kernels.block_sparse_linear import block_sparse_linear
from hwprune.layers import BlockSparseLinear

NAME = "kernels"
ROWS = rows.ROOT / "profiles" / "rows" / f"{NAME}.jsonl"
# tokens, in, out: ViT-Base's two MLP linears at batch 8, and the GEGLU projection of SDXL's deep blocks
SHAPES = {"fc1": (1576, 768, 3072), "fc2": (1576, 3072, 768), "SDXL": (1576, 1280, 10240)}
DENSITIES = (1.0, 0.95, 0.85, 0.75, 0.5, 0.25, 0.1)
BLOCKS = ((32, 32), (64, 64))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def some_tiles(outputs: int, width: int, block: tuple[int, int], density: float) -> Tensor:
    """A random mask with the same number of tiles in every block-row."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(outputs // block[0], width // block[1], generator=generator)
    ranks = scores.argsort(1).argsort(1)
    return ranks < round(density * scores.shape[1])


def checked(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse to time what is wrong."""
    exact = F.linear(x.float(), weight.float(), bias.float())
    error = float((out.float() - exact).norm() / exact.norm())
    if error > 8 * torch.finfo(x.dtype).eps:
        raise SystemExit(f"expected the dense product, got a relative error of {error:.2g}")


def group(shape: str, dtype: str, block: tuple[int, int], rounds: int) -> dict[str, Any]:
    """One row: all densities of one shape, type and block."""
    tokens, width, outputs = SHAPES[shape]
    torch.manual_seed(0)
    x, bias = (torch.randn(*size).to(DTYPES[dtype]) for size in ((tokens, width), (outputs,)))
    weight = (torch.randn(outputs, width) / width**0.5).to(DTYPES[dtype])
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    calls = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "oneDNN prepacked": lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, bias, "none", [], ""
        ),
    }
    for density in DENSITIES if shape != "SDXL" else (0.5, 0.25):
        keep = some_tiles(outputs, width, block, density)
        tiles = BlockSparseWeight.from_dense(weight, keep, block)
        zeroed = tiles.to_dense()
        checked(block_sparse_linear(x, tiles, bias), x, zeroed, bias)
        calls[f"ours {density:g}"] = lambda tiles=tiles: block_sparse_linear(x, tiles, bias)
        if density in (0.5, 0.25):
            checked(op.linear_plain(x, tiles) + bias, x, zeroed, bias)
            calls[f"plain {density:g}"] = lambda t=tiles: op.linear_plain(x, t) + bias
    with torch.no_grad():
        times = interleaved.times_s(calls, rounds)
        if (
            dtype == "fp32" and shape != "SDXL"
        ):  # one to two seconds a call, so a few rounds of its own
            tiles = BlockSparseWeight.from_dense(
                weight, some_tiles(outputs, width, block, 0.5), block
            )
            bsr = tiles.to_dense().to_sparse_bsr(block)
            checked(F.linear(x, bsr, bias), x, tiles.to_dense(), bias)
            slow = {"F.linear": calls["F.linear"], "sparse": lambda: F.linear(x, bsr, bias)}
            sparse = interleaved.speedup(interleaved.times_s(slow, 6), "sparse", "F.linear")
        else:
            sparse = {"value": None, "reason": "not timed: float32 of the two ViT shapes only"}
    found = {
        **rows.provenance(),
        "shape": shape,
        "size": SHAPES[shape],
        "dtype": dtype,
        "clock": interleaved.clock().__name__,
        "block": block,
        "kernel": "native" if native.supports(DTYPES[dtype]) else f"plain: {native.why_not()}",
        "linear_gflops": 2 * tokens * width * outputs / min(times["F.linear"]) / 1e9,
        "speedup": {
            name: interleaved.speedup(times, name, "F.linear")
            for name in calls
            if name != "F.linear"
        },
        "over_prepacked": {
            name: interleaved.speedup(times, name, "oneDNN prepacked")
            for name in calls
            if name.startswith("ours")
        },
        "torch.sparse 0.5": sparse,
    }
    for over in ("speedup", "over_prepacked"):
        found[f"break_even_{over}"] = break_even(found[over])
    return found


def break_even(speedups: dict[str, Any]) -> float | None:
    """Density up to which ours is at least as fast, interpolated; 1.0 where it always is; None unknown."""
    points = sorted(
        (float(name.split()[1]), figure["value"])
        for name, figure in speedups.items()
        if name.startswith("ours")
    )
    if points[-1][0] < 1:
        return None
    below = [p for p in points if p[1] >= 1]
    above = [p for p in points if p[1] < 1]
    if not above:
        return 1.0
    if not below:
        return 0.0
    (d0, s0), (d1, s1) = below[-1], above[0]
    return d0 + (d1 - d0) * (s0 - 1) / (s0 - s1)


def end_to_end(dtype: str, block: tuple[int, int], batch: int, rounds: int) -> dict[str, Any]:
    """One row: ViT-Base, random weights, every linear of its blocks at density 0.5, against dense."""
    import timm

    torch.manual_seed(0)
    dense = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    masked, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            keep = some_tiles(module.out_features, module.in_features, block, 0.5)
            layer = BlockSparseLinear.from_dense(module, keep, block)
            sparse.set_submodule(name, layer)
            masked.get_submodule(name).weight.data.copy_(layer.to_dense())  # type: ignore[union-attr]
    x = torch.randn(batch, 3, 224, 224).to(DTYPES[dtype])
    models = [m.to(DTYPES[dtype]) for m in (dense, masked, sparse)]
    with torch.no_grad():
        expected, got = models[1](x), models[2](x)
        error = float((got - expected).norm() / expected.norm())
        if error > 64 * torch.finfo(DTYPES[dtype]).eps:
            raise SystemExit(
                f"expected the masked model's outputs, got a relative error of {error:.2g}"
            )
        names = ("dense", "masked", "block-sparse")
        calls = {n: lambda m=m: m(x) for n, m in zip(names, models, strict=True)}
        times = interleaved.times_s(calls, rounds)
    return {
        **rows.provenance(),
        "model": "vit_base_patch16_224, random weights",
        "density": 0.5,
        "block": block,
        "batch": batch,
        "dtype": dtype,
        "clock": interleaved.clock().__name__,
        "error_to_masked": error,
        "speedup": {n: interleaved.speedup(times, n, "dense") for n in names[1:]},
    }


def main() -> None:
    """Measure, append rows, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    parser.add_argument("--table", action="store_true", help="print the newest rows as a table")
    parser.add_argument("--write", action="store_true", help="with --table: put it into README.md")
    options = parser.parse_args()
    if options.table:
        text = kernel_table.cpu(ROWS)
        print(text)
        if options.write:
            rows.write_between(rows.ROOT / "README.md", NAME, text)
        return
    for dtype in options.dtypes.split(","):
        for block in BLOCKS:
            if options.end_to_end:
                made = [end_to_end(dtype, block, options.batch, options.rounds)]
            else:
                made = [group(s, dtype, block, options.rounds) for s in options.shapes.split(",")]
            for row in made:
                if not options.no_rows:
                    rows.append(ROWS, row)
                show(row)


def show(row: dict[str, Any]) -> None:
    """A few lines for a terminal."""
    what = row.get("shape") or f"ViT-Base batch {row['batch']}"
    print(
        f"{what} {row['dtype']} block {row['block'][0]}x{row['block'][1]}, over F.linear or dense:"
    )
    for name, figure in row["speedup"].items():
        print(f"  {name:18s} {figure['value']:.2f} [{figure['lo']:.2f}, {figure['hi']:.2f}]")
    if "torch.sparse 0.5" in row:
        print(f"  torch.sparse 0.5   {row['torch.sparse 0.5']['value']}")
        print(
            f"  break-even: {row['break_even_speedup']}, prepacked {row['break_even_over_prepacked']}"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
