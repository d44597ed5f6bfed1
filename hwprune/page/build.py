"""Puts a report's tables and pictures into one page: report.html, beside report.json.

Whatever a report says is text to the template, which escapes it; only pictures drawn here are markup.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwprune.page import facts, fronts, words
from hwprune.page.facts import Table
from hwprune.page.svg import in_style
from hwprune.report_rows import tile_grid

PAGE, REPORT, FRONT = "report.html", "report.json", "front.json"
_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_PICTURE_BYTES = (
    1_000_000  # of a PNG in the page; above it becomes a JPEG, so that a page stays under 2 MB
)
_MOSAICS = 96  # pictures of tiles: 24 blocks of 4 weights; the table has them all
_NO_PLOTS = "no pictures without matplotlib: pip install 'hwprune[plot]'; the tables say the same"


@dataclass(frozen=True)
class Picture:
    """A picture and the table that says the same."""

    title: str
    svg: str
    table: Table | None = None


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what hwprune writes.
    """
    path = folder / REPORT
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one written by hwprune prune")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `hwprune prune` and `hwprune prune-diffusion` write it into each folder"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict) or not {"budget", "macs", "params"} <= set(found):
        raise ValueError(
            f"{path}: expected the report of a pruning run, with budget, macs and params; a dense model that "
            "was saved has none"
        )
    return found


def write_page(folder: Path) -> Path:
    """Write a folder's page from its report, whole or not at all.

    Args:
        folder: written by `hwprune prune` or `hwprune prune-diffusion`.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError, ValueError: as `read_report`.
        OSError: it cannot be written.
    """
    report = read_report(folder)
    stored = sum(path.stat().st_size for path in _weights(folder))
    fronts_file = next((p for p in (folder / FRONT, folder.parent / FRONT) if p.is_file()), None)
    if fronts_file is not None and not report.get("evaluations"):
        report["evaluations"] = fronts.judged(fronts_file, folder)
    try:
        text = render(
            report,
            title=f"{_subject(folder, report)}, pruned",
            source=REPORT,
            stored_bytes=stored or None,
            samples=_samples(folder),
            front=None if fronts_file is None else fronts.read(fronts_file, folder),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / REPORT}: a part of it is not as hwprune writes it ({type(error).__name__}: {error}); "
            "prune again, or restore the file"
        ) from error
    target = folder / PAGE
    fresh = folder / f".{PAGE}.{os.getpid()}.partial"
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return target


def render(
    report: Mapping[str, Any],
    *,
    title: str,
    source: str,
    stored_bytes: int | None = None,
    samples: str | None = None,
    front: fronts.Front | None = None,
) -> str:
    """The page as HTML.

    Args:
        report: `to_dict()` of a Report or a DiffusionReport.
        title: what was pruned.
        source: name of the file the report was read from.
        stored_bytes: of the tensor files.
        samples: pictures as a data URI.
        front: of the budgets solved together.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plots = importlib.util.find_spec("matplotlib") is not None
    with in_style() if plots else nullcontext():
        drawn = _drawn(report, front, plots)
    env = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    sections = [("asked", "asked"), ("figures", "before and after")]
    sections += [("pictures", "pictures")] if samples else []
    sections += [("front", "Pareto front")] if drawn["front"] else []
    sections += [("structure", "structure")]
    told = facts.distortion(report)
    if told or drawn["curves"] or drawn["learning"]:
        sections.append(("distortion", "what it was chosen by"))
    return env.get_template(_TEMPLATE.name).render(
        title=title,
        lead=_lead(report),
        version=_version(),
        source=source,
        warnings=[str(w) for w in report.get("warnings") or ()],
        cards=_cards(report),
        sections=[*sections, ("provenance", "provenance")],
        asked=facts.asked(report),
        before_after=facts.before_after(report, stored_bytes),
        distance=facts.distance(report),
        samples=samples,
        distortion=told,
        plans=facts.plans(report),
        command=facts.command(report),
        provenance=facts.provenance(report),
        **drawn,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("hwprune")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
        return ""


def _lead(report: Mapping[str, Any]) -> str:
    kinds = ", ".join(map(str, report.get("kinds") or ())) or "no units"
    limits = ", ".join(f"{k}={words.plain(v)}" for k, v in facts.part(report, "budget").items())
    method = report.get("method")
    needless = "no images were needed" if facts.is_diffusion(report) else "no labels were used"
    how = f" by the method {method}" if method else ""
    return f"Pruned to {limits}{how}, by removing units of kinds {kinds}; {needless}."


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures one looks for first."""
    found = []
    for key, name in (("macs", "MACs"), ("params", "parameters")):
        change = f"{words.count(report.get(f'dense_{key}'))} to {words.count(report.get(key))}"
        found.append((name, f"× {words.quantity(report.get(f'{key}_ratio'), '')}", change))
    for metric in ("latency", "energy", "memory"):
        for when in ("measured", "predicted"):
            figure = facts.part(report, when).get(f"{metric}_ratio")
            if isinstance(figure, Mapping) and words.number(figure.get("value")) is not None:
                found.append(
                    (f"{metric}, {when}", f"× {figure['value']:.3f}", words.estimate(figure))
                )
                break
    tops = {r.get("of"): words.number(r.get("top1")) for r in facts.items(report, "evaluations")}
    if tops.get("pruned") is not None:
        before = f"dense {words.percent(tops['dense'])}" if tops.get("dense") is not None else ""
        found.append(("top-1", words.percent(tops["pruned"]), before))
    far = facts.part(report, "distance")
    if far:
        found.append(
            ("distance to dense", words.percent(far.get("relative")), "of the latents' variance")
        )
    return found


def _drawn(report: Mapping[str, Any], front: fronts.Front | None, plots: bool) -> dict[str, Any]:
    """The pictures; without matplotlib the tables alone, and a line that says so."""
    structure, tables = [], []
    for i, (kind, rows) in enumerate(facts.kept_by_kind(report).items()):
        cells = [[layer, f"{kept} of {of}", words.ratio(kept, of)] for layer, kept, of in rows]
        table = Table(("layer", kind, "kept"), cells)
        if plots:
            from hwprune.page.plots import bars

            structure.append(Picture(kind, bars(f"kept-{i}", kind, rows), table))
        else:
            tables.append((kind, table))
    shown: dict[str, Any] = {
        "front": None,
        "structure": structure,
        "structure_tables": tables,
        "mosaics": [],
    }
    shown |= {"curves": [], "learning": None, "plots_missing": None if plots else _NO_PLOTS}
    tiles = facts.items(report, "tiles")
    cut = [[str(t["linear"]), f"{t['kept']} of {t['of']}", f"{t['tile']}"] for t in tiles]
    shown["tiles_table"] = Table(("weight", "tiles", "size of one"), cut) if cut else None
    if not plots:
        return shown
    thinned = [t for t in tiles if t["kept"] < t["of"]]
    shown["mosaics"] = [_mosaic(i, t) for i, t in enumerate(thinned[:_MOSAICS])]
    shown["curves"] = _curves(report)
    losses = facts.part(report, "learning").get("losses")
    if isinstance(losses, list) and len(losses) > 1:
        from hwprune.page.plots import learning

        shown["learning"] = Picture("learning", learning("learning", losses))
    if front is not None:
        shown["front"] = Picture("Pareto front", fronts.drawn(front), fronts.table(front))
    return shown


def _mosaic(i: int, tile: Mapping[str, Any]) -> Picture:
    from hwprune.page.plots import mosaic

    return Picture(str(tile["linear"]), mosaic(f"tiles-{i}", str(tile["linear"]), tile_grid(tile)))


def _curves(report: Mapping[str, Any]) -> list[Picture]:
    """One picture a kind of unit."""
    from hwprune.page.plots import curves

    unit = str(facts.part(report, "distortion").get("unit", ""))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in facts.items(report, "curves"):
        by_kind.setdefault(str(row["kind"]), []).append(row)
    found = []
    for i, (kind, rows) in enumerate(by_kind.items()):
        cells = []
        for row in rows:
            cut = row["of"] - row["kept"]
            at = row["distortion"][row["removed"].index(cut)] if cut in row["removed"] else None
            cells.append([str(row["units"]), f"{cut} of {row['of']}", words.quantity(at, "")])
        table = Table(("units", "removed", f"predicted, {unit}"), cells)
        title = f"removing units of kind {kind}"
        found.append(Picture(title, curves(f"curves-{i}", title, unit, rows), table))
    return found


def _subject(folder: Path, report: Mapping[str, Any]) -> str:
    """What the model is called: by its own config, or by its folder."""
    if isinstance(report.get("model"), str):
        return str(report["model"])
    readers: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("config.json", lambda c: c["hwprune"]["base"]["architecture"]),
        ("config.json", lambda c: c["_class_name"]),
        ("transformer/config.json", lambda c: c["_class_name"]),
        ("unet/config.json", lambda c: c["_class_name"]),
    )
    for name, told in readers:
        try:
            found = told(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found
    return folder.resolve().name


def _weights(folder: Path) -> list[Path]:
    """The tensor files: of the folder itself, or of the denoiser in a pipeline's folder."""
    places = [folder, folder / "transformer", folder / "unet"]
    found: list[Path] = next((f for p in places if (f := sorted(p.glob("*.safetensors")))), [])
    return found


def _samples(folder: Path) -> str | None:
    """Pictures as a data URI; None where there are none, or they are no PNG."""
    beside = folder.with_name(f"{folder.name}.samples.png")
    path = next((p for p in (folder / "samples.png", beside) if p.is_file()), None)
    data = b"" if path is None else path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        return None
    kind = "png"
    if len(data) > _PICTURE_BYTES and importlib.util.find_spec("PIL") is not None:
        from PIL import Image

        smaller = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(smaller, format="JPEG", quality=88)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
