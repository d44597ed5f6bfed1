"""The page of a report: whole in one file, nothing unescaped, and every figure it shows is the report's."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import hwprune
from hwprune.digits import digits_model
from hwprune.page import build
from hwprune.page.attach import attach
from hwprune.page.build import read_report, render, write_page

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

HOSTILE = '<script>alert("1")</script>&amp; $\\frac{ </svg> {{ 7*7 }} \' onload="x'


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += f"{data} "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder, of channels, tiles and neurons."""
    torch.manual_seed(0)
    model = digits_model(pretrained=False)
    x = torch.randn(32, 1, 16, 16)
    kinds = ["head", "qk", "vo", "neuron"]
    out = tmp_path_factory.mktemp("page") / "pruned"
    report = hwprune.prune(model, [x], hwprune.Budget(macs=0.6), kinds=kinds)
    assert "hwprune_spec" in vars(model)
    hwprune.save(model, out)
    blocks = digits_model(pretrained=False)
    tiled = hwprune.prune(
        blocks, [x], hwprune.Budget(macs=0.6), kinds=["block"], block=(16, 16)
    ).to_dict()
    told = {**report.to_dict(), "tiles": tiled["tiles"]}
    (out / "report.json").write_text(json.dumps(told))
    return out


def whole(page: Page) -> None:
    """Well-formed, self-contained, and everything that is pointed at is there once."""
    assert not page.open
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), {i for i in ids if ids.count(i) > 1}
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attrs.items():
            value = value or ""
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("data:image/") or value[1:] in ids, (tag, value)
            if name == "aria-labelledby":
                assert set(value.split()) <= set(ids)
            if not value.startswith("data:"):
                assert "://" not in value and "//" not in value, (tag, name, value)
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target[1:] in ids, (tag, target)
    for image in page.of("img"):
        assert image["alt"]
    for svg in page.of("svg"):
        assert svg["role"] == "img" and svg["aria-labelledby"]


def test_a_page_is_whole_and_needs_no_network(folder: Path) -> None:
    path = write_page(folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    whole(page)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert len(text) < 2_000_000
    assert not list(folder.glob(".*partial"))
    # heads, q/k, v/o, neurons as bars; a mosaic for each weight that lost tiles; a curve a kind
    tiles = [t for t in read_report(folder)["tiles"] if t["kept"] < t["of"]]
    assert len(page.of("svg")) == 4 + len(tiles) + 4 and tiles


def test_a_page_says_what_the_report_says(folder: Path) -> None:
    report = read_report(folder)
    text = " ".join(Page(write_page(folder).read_text()).text.split())
    for row in report["layers"]:
        for kind, kept in row["kept"].items():
            assert f"{row['layer']} {kept} of {row['of'][kind]}" in text
    assert f"{report['macs_ratio']:.3f} of dense" in text
    assert f"{100 * report['macs_ratio']:.0f}" and report["environment"]["command"] in text
    for key, value in report["environment"].items():
        assert str(value) in text, key
    # Nothing was timed or judged in this run, and the page says so with the reason and the next step.
    assert text.count("not measured") > 10
    assert "budgets macs and params need no clock" in text and "hwprune eval" in text


def test_every_plan_that_was_tried_is_told(folder: Path) -> None:
    told = read_report(folder)
    assert "Plans that were tried" not in write_page(folder).read_text(encoding="utf-8")
    tried = [
        {"predicted": 0.01, "true": 0.052, "true_se": 0.004, "images": 64, "macs": 6e6, "won": False},
        {"predicted": 0.02, "true": 0.031, "true_se": 0.003, "images": 64, "macs": 5e6, "won": True},
    ]  # fmt: skip
    told["plans"], told["dense_macs"] = tried, 10e6
    whole_report = (folder / "report.json").read_text()
    try:
        (folder / "report.json").write_text(json.dumps(told))
        text = " ".join(Page(write_page(folder).read_text(encoding="utf-8")).text.split())
    finally:
        (folder / "report.json").write_text(whole_report)
        write_page(folder)
    assert "by the curves alone 0.01 0.052 ± 0.004 64 0.600" in text
    assert "1 0.02 0.031 ± 0.003 64 0.500 kept" in text


def test_a_diffusion_report_tells_of_latents_and_not_of_labels(folder: Path) -> None:
    report = {k: v for k, v in read_report(folder).items() if k not in ("distortion", "curves")}
    report |= {
        "method": "ours",
        "distance": {
            "held": 0.25,
            "held_se": 0.01,
            "relative": 0.125,
            "check": 0.2,
            "unrepaired": 0.3,
        },
        "images": {"train": 8, "check": 2, "held": 16, "conditions": 4},
        "learning": {"updates": 3, "settled": False, "losses": [0.1, 0.2, 0.3]},
        "layers": [{"layer": "a.attn", "kind": "head", "kept": 2, "of": 3}],
        "tiles": [],
    }
    page = Page(render(report, title="t", source="r", samples="data:image/png;base64,AAAA"))
    whole(page)
    text = " ".join(page.text.split())
    assert "held-out images (16) 0.25 ± 0.01 12.50 %" in text and "a.attn 2 of 3" in text
    assert "MACs of an evaluation" in text and "top-1" not in text and "no labels" not in text
    assert len(page.of("svg")) == 2 and len(page.of("img")) == 1


def test_nothing_of_a_report_is_markup(folder: Path) -> None:
    report = json.loads(json.dumps(read_report(folder)).replace("blocks.0.attn", "HERE"))

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{k}{HOSTILE}" if k == "torch" else k: poisoned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    grids = [t["grid"] for t in report["tiles"]]
    bad = poisoned(report)
    for tile, grid in zip(bad["tiles"], grids, strict=True):
        tile["grid"] = grid
    bad |= {"warnings": [HOSTILE], "evaluations": [{"of": "pruned", "top1": 0.5, "data": HOSTILE}]}
    bad["budget"] = {HOSTILE: HOSTILE, "macs": 0.5, "latency": HOSTILE}
    point = {"x": 0.5, "y": 0.5, "label": HOSTILE, "here": 1, "method": HOSTILE}
    points = (point, {**point, "x": 1, "method": "hwprune"})
    front = build.fronts.Front(HOSTILE, HOSTILE, points, ((HOSTILE, HOSTILE),))
    text = render(bad, title=HOSTILE, source=HOSTILE, front=front)
    page = Page(text)
    whole(page)
    assert "<script" not in text
    assert page.text.count(HOSTILE) > 20


def test_a_front_is_drawn_and_says_which_point_this_is(folder: Path, tmp_path: Path) -> None:
    points = [
        {
            "budget": {"macs": share},
            "folder": f"sweep/{name}",
            "method": "hwprune",
            "macs_ratio": share - 0.01,
            "distortion": {"measured": 0.1 / share, "predicted": 0.0},
            "top1": top1,
            "measured": {"latency_ratio": None},
        }
        for share, name, top1 in ((0.8, "other", None), (0.6, "pruned", None))
    ]
    gone = {"budget": {"macs": 0.1}, "refused": "out of reach", "distortion": None}
    told = {"metric": "macs", "unit": "nats", "points": [*points, gone], "baselines": []}
    told["dense"] = {"macs_ratio": 1.0, "top1": 0.9}
    copied = tmp_path / "pruned"
    shutil.copytree(folder, copied)
    bare = {**read_report(folder), "layers": [], "tiles": [], "curves": []}  # drawn elsewhere
    (copied / "report.json").write_text(json.dumps(bare))
    file = tmp_path / "front.json"
    file.write_text(json.dumps(told))
    text = " ".join(Page(write_page(copied).read_text()).text.split())
    assert "macs=0.8 hwprune 0.79 0.125" in text
    assert "macs=0.6 (this folder) hwprune 0.59 0.1667" in text
    assert "macs=0.1 was refused: out of reach" in text
    for point, top1 in zip(points, (0.85, 0.75), strict=True):
        point["top1"] = top1
    worse = {**points[0], "method": "magnitude", "top1": 0.5, "folder": None}
    file.write_text(json.dumps({**told, "baselines": [worse]}))
    page = Page(write_page(copied).read_text())
    whole(page)
    text = " ".join(page.text.split())
    assert "macs=0.6 (this folder) hwprune 0.59 75" in text and "dense hwprune 1 90" in text
    assert "macs=0.8 magnitude 0.79 50" in text
    assert "top-1 90.00 % 75.00 % -15.00 points" in text  # of this folder's own point
    for damaged in ("{", "[]", '{"points": [{"budget": 3}]}', '{"points": 3, "dense": []}'):
        file.write_text(damaged)
        assert "Pareto" not in Page(write_page(copied).read_text()).text


@pytest.mark.parametrize("odd", [None, "x", 3, [], {}, [3], {"a": None}])
def test_a_damaged_report_is_a_page_or_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: Any
) -> None:
    report = read_report(folder)
    report["tiles"], report["curves"] = report["tiles"][:1], report["curves"][:1]
    report["layers"] = report["layers"][:1]
    broken = tmp_path / "broken"
    broken.mkdir()
    drawn = {"layers", "tiles", "curves", "learning"}  # the others need no picture to be read
    found = importlib.util.find_spec
    for key in [*report, "learning"]:
        off = "" if key in drawn else "matplotlib"
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, off=off: None if n == off else found(n)
        )
        (broken / "report.json").write_text(json.dumps({**report, key: odd}))
        try:
            whole(Page(write_page(broken).read_text()))
        except ValueError as error:
            assert "report.json" in str(error)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_page(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="hwprune prune"):
        write_page(tmp_path)
    for text, said in (
        ("{", "expected JSON"),
        ("[]", "expected the report"),
        ("{}", "dense model"),
    ):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            write_page(tmp_path)


def test_without_matplotlib_the_tables_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else found(n)
    )
    page = Page(write_page(folder).read_text())
    whole(page)
    assert not page.of("svg") and "hwprune[plot]" in page.text
    assert "blocks.0.attn" in page.text and "blocks.3.mlp.fc2" in page.text


def evaluated(report: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What `hwprune eval --json` writes."""
    base = {"model": "m", "data": "digits", "top1": 0.9, "top5": 1.0, "images": 100}
    return {**base, "params": report["params"], **more}


def test_what_eval_and_measure_found_is_added(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "pruned"
    shutil.copytree(folder, copied)
    report = read_report(copied)
    files = [tmp_path / f"{i}.json" for i in range(3)]
    files[0].write_text(json.dumps(evaluated(report, top1=0.75)))
    files[1].write_text(json.dumps(evaluated(report, top1=0.875, params=report["dense_params"])))
    figure = {"value": 0.01, "lo": 0.009, "hi": 0.012, "n": 8}
    power = {"value": None, "reason": "no sensor here"}
    arm = {"latency_s": figure, "latency_p95_s": figure, "average_power_w": power}
    arms = {"model": arm, "dense": {**arm, "latency_s": {**figure, "value": 0.0125, "hi": 0.02}}}
    measured = {"arms": arms, "model": str(copied), "settings": {"batch": 8}}
    files[2].write_text(json.dumps(measured))
    attach(copied, files)
    attach(copied, [files[0]])  # again: replaced, not doubled
    assert len(read_report(copied)["evaluations"]) == 2
    text = " ".join(Page(write_page(copied).read_text()).text.split())
    assert "top-1 87.50 ± 3.31 % 75.00 ± 4.33 % -12.50 points" in text
    assert "10 ms [9 ms, 12 ms] 0.800" in text and "no sensor here" in text

    other = tmp_path / "other.json"
    other.write_text(json.dumps(evaluated(report, params=7)))
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({**measured, "model": str(folder)}))
    strange = tmp_path / "strange.json"
    strange.write_text('{"a": 1}')
    for file, said in ((other, "7 parameters"), (elsewhere, "expected"), (strange, "got keys a")):
        before = (copied / "report.json").read_bytes()
        with pytest.raises(ValueError, match=said):
            attach(copied, [file])
        assert (copied / "report.json").read_bytes() == before


def test_a_report_of_a_large_model_stays_small(folder: Path) -> None:
    report = copy.deepcopy(read_report(folder))
    torch.manual_seed(0)
    for key in ("layers", "curves"):
        report[key] = [row for row in report[key] for _ in range(12)]
    rows, columns = 128, 32  # ViT-Large's fc1 in tiles of 32
    width = columns // 4
    digits = torch.randint(16, (rows, width)).tolist()
    grid = ["".join(f"{d:x}" for d in line) for line in digits]
    one = {"linear": "l", "tile": [32, 32], "kept": 1, "of": rows * columns, "width": columns}
    report["tiles"] = [{**one, "grid": grid} for _ in range(24)]
    sizes = []
    for tiles in (report["tiles"][:12], report["tiles"]):
        text = render({**report, "tiles": tiles}, title="large", source="report.json")
        sizes.append(len(text))
    assert sizes[1] + 6 * (sizes[1] - sizes[0]) < 2_000_000  # 72 more weights: all that are drawn
