"""The README's table of block-sparse kernels, from the newest rows; nothing in it is typed."""

from pathlib import Path
from typing import Any

from parts import rows

TITLES = {"fc1": "768 -> 3072", "fc2": "3072 -> 768", "SDXL": "1280 -> 10240"}


def newest(found: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last row of each combination of keys."""
    return {tuple(str(row.get(key)) for key in keys): row for row in found}


def cell(figure: dict[str, Any] | None) -> str:
    """A speed-up with its interval, or a dash."""
    if not figure or figure.get("value") is None:
        return "-"
    return f"{figure['value']:.2f} [{figure['lo']:.2f}, {figure['hi']:.2f}]"


def cpu(file: Path) -> str:
    """Markdown of the CPU rows."""
    read = rows.read(file)
    layers = newest([r for r in read if "shape" in r], "shape", "dtype", "block")
    lines = [
        "| linear, 1576 tokens | type, tiles | density 0.5 | 0.25 | 0.1 | over oneDNN prepacked, 0.5 "
        "| breaks even at | torch.sparse, 0.5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in layers.values():
        speed, block = row["speedup"], row["block"]
        even = row["break_even_speedup"]
        told = [cell(speed.get(f"ours {density}")) for density in ("0.5", "0.25", "0.1")]
        sparse = row["torch.sparse 0.5"].get("value")
        lines.append(
            f"| {TITLES[row['shape']]} | {row['dtype']} {block[0]}x{block[1]} | {' | '.join(told)} "
            f"| {cell(row['over_prepacked'].get('ours 0.5'))} "
            f"| {'-' if even is None else f'{even:.2f}'} | {'-' if sparse is None else f'{sparse:.2f}'} |"
        )
    whole = newest([r for r in read if "model" in r], "dtype", "block")
    ends = [
        f"{row['dtype']} {row['block'][0]}x{row['block'][1]} {cell(row['speedup']['block-sparse'])}"
        for row in whole.values()
    ]
    first = next(iter(layers.values()))
    about = (
        f"Times faster than `F.linear` of the same type, 95 % interval over interleaved rounds, "
        f"{first['threads']} thread(s) of a shared {first['device']} by "
        f"{'its CPU time' if first.get('clock') == 'thread_time' else 'wall time'}; plain torch, "
        f"{first['torch']}. `F.linear` in fp32 is MKL, which on this processor runs at half of oneDNN's "
        "speed: the column beside it is against oneDNN with weights packed beforehand."
    )
    return "\n".join(
        [
            *lines,
            "",
            about,
            f"ViT-Base, random weights, batch 8, every block linear at density 0.5, whole model: "
            f"{'; '.join(ends)}.",
            f"Rows: profiles/rows/{file.name}, commit {first['commit']}. Again: `scripts/bench kernels`.",
        ]
    )
