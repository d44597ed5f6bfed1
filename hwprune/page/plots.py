"""The pictures of a report: what is kept layer by layer, tiles as a mosaic, curves, fronts, learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwprune.page.svg import ACCENT, GONE, INK, KEPT, MUTED, drawing, inline

_WIDTH_IN = 3.8  # of a picture in a column of 22 rem: 9 pt text is then 11 to 12 pixels
_ROW_IN = 0.19  # inches a layer: 9 pt text with air
_LABEL = 22  # characters of a layer's name
_TILE_IN = 2.0  # longer side of a mosaic
SPREAD = (0.25, 0.8)  # of the colour map: legible on white and on black


def short(name: str, width: int = _LABEL) -> str:
    """A name that fits: its ends, with the middle left out."""
    if len(name) <= width:
        return name
    half = (width - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _plainly(value: float, _: int = 0) -> str:
    """A tick of a logarithmic axis: 0.001, 1e-06."""
    return f"{value:g}"


def bars(name: str, title: str, rows: Sequence[tuple[str, int, int]]) -> str:
    """Horizontal bars: kept of what was there, one a layer, first layer on top.

    Args:
        name: of the picture.
        title: what is counted.
        rows: (layer, kept, of).
    """
    height = 0.55 + _ROW_IN * len(rows)
    figure = drawing(_WIDTH_IN, height)
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [1.0] * len(rows), height=0.72, color=GONE)
    axes.barh(places, [kept / of if of else 0.0 for _, kept, of in rows], 0.72, color=KEPT)
    axes.set_yticks(places, [short(layer) for layer, _, _ in rows])
    for y, (_, kept, of) in zip(places, rows, strict=True):
        axes.text(1.02, y, f"{kept} / {of}", va="center", ha="left", color=MUTED, fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks([0, 0.5, 1], ["0", "half", "all"])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    kept, of = sum(r[1] for r in rows), sum(r[2] for r in rows)
    told = f"{kept} of {of} kept in {len(rows)} layers; the table beside it has each of them"
    return inline(figure, name, title, told)


def mosaic(name: str, title: str, grid: Sequence[Sequence[bool]]) -> str:
    """The tiles of one weight: filled = kept.

    Args:
        name: of the picture.
        title: of the weight.
        grid: [tile rows][tile columns], True = kept.
    """
    import numpy as np

    tiles = np.asarray(grid, dtype=bool)
    high, wide = tiles.shape
    side = _TILE_IN / max(high, wide)
    width, height = max(0.4, side * wide), max(0.2, side * high)
    pixels = np.zeros((high, wide, 4), dtype=np.uint8)
    pixels[tiles] = (66, 133, 214, 255)  # one blue that stands on white and on black
    whole = (max(width, 1.6), height + 0.25)
    figure = drawing(*whole, layout=None)
    axes = figure.add_axes((0.02, 0.02, width / whole[0] * 0.96, height / whole[1] * 0.96))
    axes.imshow(pixels, aspect="auto", interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_title(short(title), loc="left", fontsize=8)
    told = f"{int(tiles.sum())} of {tiles.size} tiles kept, {high} rows of {wide}"
    return inline(figure, name, title, told)


def curves(name: str, title: str, unit: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What removing a share of each layer's units was predicted to cost; a dot where it was cut.

    Args:
        name: of the picture.
        title: what is removed.
        unit: of the distortion.
        rows: of `hwprune.report_rows.curve_rows`, of one kind.
    """
    from matplotlib import colormaps

    figure = drawing(_WIDTH_IN, 2.8)
    axes = figure.subplots()
    tint = colormaps["viridis"]
    ends = max(1, len(rows) - 1)
    lowest = min((d for row in rows for d in row["distortion"] if d > 0), default=1e-12)
    for i, row in enumerate(rows):
        colour = tint(SPREAD[0] + (SPREAD[1] - SPREAD[0]) * i / ends)
        share = [k / row["of"] for k in row["removed"]]
        axes.plot(share, row["distortion"], color=colour, linewidth=1)
        cut = row["of"] - row["kept"]
        if cut and cut in row["removed"]:
            at = row["distortion"][row["removed"].index(cut)]
            axes.plot([cut / row["of"]], [max(at, lowest)], "o", color=colour, markersize=3.5)
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(_plainly)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share removed")
    axes.set_ylabel(f"predicted distortion, {unit}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y")
    axes.minorticks_off()
    told = f"{len(rows)} curves, each rising with the share removed; dots mark what was taken"
    return inline(figure, name, title, told)


def front(
    name: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """A Pareto front: what is lost, or kept, over what it costs; one line a method.

    Args:
        name: of the picture.
        x_label: of the cost.
        y_label: of the loss or the accuracy.
        lines: method -> points with x, y, label and here; ours first.
    """
    figure = drawing(6.4, 3.6)
    axes = figure.subplots()
    dashes = ("-", "--", ":", "-.")
    for i, (method, points) in enumerate(lines.items()):
        at = [p["x"] for p in points], [p["y"] for p in points]
        colour = MUTED if i else KEPT
        axes.plot(*at, dashes[i % 4], marker="o", color=colour, markersize=4, label=short(method))
        for point in points if not i else ():
            if point["here"]:
                axes.plot(
                    [point["x"]],
                    [point["y"]],
                    "o",
                    color=ACCENT,
                    markersize=8,
                    label="this folder",
                )
            axes.annotate(
                short(str(point["label"])),
                (point["x"], point["y"]),
                xytext=(5, -10),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
    everything = [p["y"] for points in lines.values() for p in points]
    if min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plainly)
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(0.12, 0.15)
    axes.grid()
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8)
    count = sum(map(len, lines.values()))
    told = f"{count} models of {len(lines)} methods; the table beside it has each of them"
    return inline(figure, name, f"{y_label} over {x_label}", told)


def learning(name: str, losses: Sequence[float]) -> str:
    """The loss over the updates of the gates."""
    figure = drawing(6.4, 2.4)
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=KEPT, linewidth=1)
    if min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plainly)
        axes.minorticks_off()
    axes.set_xlabel("update")
    axes.set_ylabel("loss")
    axes.grid(axis="y")
    axes.set_title("Learning of the gates", loc="left", fontsize=9)
    axes.tick_params(labelcolor=INK)
    told = f"{len(losses)} updates, from {losses[0]:.3g} to {losses[-1]:.3g}"
    return inline(figure, name, "Learning of the gates", told)
