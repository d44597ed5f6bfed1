"""The model card of a saved folder: what was pruned from what, how, and what that was measured on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hwprune.spec import BUILDER

_PLACE = re.compile(r"(?<![\w.~])(?:~|[A-Za-z]:)?/(?:[^\s'\"/=,]+/)+([^\s'\"/=,]*)")
_PLAIN = re.compile(r"[A-Za-z0-9._/ -]{1,100}")  # safe unquoted in the card's YAML head


def model_card(spec: Mapping[str, Any], cfg: Mapping[str, Any], architecture: str) -> str:
    """Markdown with a YAML head, as model hubs read it.

    Args:
        spec: of the model, checked.
        cfg: timm's pretrained_cfg as it is written; its `license` is carried over when known.
        architecture: the name in config.json: our builder's, or the base's own.
    """
    base, report = spec["base"], spec["report"]
    tag = cfg.get("tag")  # which weights timm had; not there when the classifier is another one
    name = f"{base['architecture']}.{tag}" if tag else base["architecture"]
    shape = spec["shape"] or spec.get("zeroed", {})
    lines = [*_head(cfg, name, architecture), "", f"# {name}, pruned with hwprune", ""]
    if not shape:
        lines[-2] = f"# {name}"
        lines += [f"The dense `{name}` of timm; nothing was removed from it.", ""]
    else:
        kinds = ", ".join(spec["kinds"]) or "not recorded"
        lines += [f"Made from timm's `{name}` by removing units of kinds: {kinds}.", ""]
        if "zeroed" in spec:
            lines += [
                "This is the dense form: the shapes of the original, zeros where something was "
                "removed. It computes what the pruned model computes, at the speed of the dense one.",
                "",
            ]
        lines += results(report) + _layers(shape)
    lines += _opening(architecture)
    return "\n".join(lines).rstrip() + "\n"


def _head(cfg: Mapping[str, Any], name: str, architecture: str) -> list[str]:
    head = ["---", "tags:", "- image-classification", "- timm", "- hwprune", "- pruning"]
    head.append(f"library_name: {'hwprune' if architecture == BUILDER else 'timm'}")
    licence = cfg.get("license")
    if isinstance(licence, str) and _PLAIN.fullmatch(licence):
        head.append(f"license: {licence}")
    if cfg.get("tag") and _PLAIN.fullmatch(name):
        head.append(f"base_model: timm/{name}")
    return [*head, "---"]


def results(report: Mapping[str, Any]) -> list[str]:
    """Every figure the report has at its top, one level deep; what it does not say is not claimed.

    Absolute paths of the command are cut to their last part: a card is published, the machine is not.
    """
    rows: list[tuple[str, str]] = []
    for key, value in report.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}: {k}", _text(v, k)) for k, v in value.items() if _is_plain(v)]
        elif _is_plain(value):
            rows.append((key, _text(value, key)))
    if not rows:
        return ["What it was pruned to, and measured on, is not recorded.", ""]
    table = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    return [
        "## What was asked, and what came of it",
        "",
        "As recorded while pruning (`report.json` has all of it); null is what was not measured.",
        "",
        "| | |",
        "|---|---|",
        *table,
        "",
    ]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _text(value: object, key: str) -> str:
    if value is None:
        return "null"
    if key == "command":
        return _PLACE.sub(r"\1", str(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _layers(shape: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, entry in shape.items():
        sizes = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "type")
        rows.append(f"| {_cell(name)} | {_cell(str(entry['type']))} | {_cell(sizes)} |")
    return ["## What is left", "", "| layer | now | sizes |", "|---|---|---|", *rows, ""]


def _opening(architecture: str) -> list[str]:
    needs = ["import hwprune"] if architecture == BUILDER else []
    return [
        "## Open it",
        "",
        "```python",
        *needs,
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "```",
        "",
        "or `hwprune.load(FOLDER)`.",
    ]
