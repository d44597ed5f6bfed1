"""The model card of a pruned diffusion model, with the licence of the model it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwprune.card import results
from hwprune.pruned_config import KEY

# What a card's YAML head may carry over unquoted; anything else in a downloaded file is left behind.
_HEAD = re.compile(
    r"(license|license_name|license_link|pipeline_tag|base_model): *([A-Za-z0-9][A-Za-z0-9._/:+-]{0,150})"
)
_LICENCES = re.compile(r"(?i)(licen[cs]e|notice)[-\w]*(\.(md|txt))?")
_HUB = re.compile(r"models--([A-Za-z0-9._-]+)--([A-Za-z0-9._-]+)")
_LONGEST = 64 * 1024  # of a card that is read


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of a folder says of licence and task, and which model of the hub it is.

    Args:
        folder: of the dense model.

    Returns:
        license, license_name, license_link, pipeline_tag, base_model: those that are known.
    """
    found: dict[str, str] = {}
    card = folder / "README.md"
    if card.is_file():
        text = card.read_bytes()[:_LONGEST].decode("utf-8", errors="replace")
        head = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
        lines = (_HEAD.fullmatch(line.strip()) for line in head.splitlines())
        found = {match[1]: match[2] for match in lines if match}
    for part in folder.absolute().parts:
        if match := _HUB.fullmatch(part):
            found["base_model"] = f"{match[1]}/{match[2]}"
    return found


def licence_files(folder: Path) -> list[Path]:
    """The files of a licence, which go with the model."""
    return [p for p in folder.iterdir() if p.is_file() and _LICENCES.fullmatch(p.name)]


def denoiser_card(
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    head: Mapping[str, str] | None = None,
    form: str = "",
    name: str = "",
) -> str:
    """Markdown with a YAML head, as model hubs read it.

    Args:
        config: of the denoiser, with its class.
        report: of the run; {} for a model nobody pruned.
        head: of `licence_of` the dense model.
        form: "pipeline" or "parts" where the folder holds more than the denoiser.
        name: of the denoiser's folder in it.
    """
    kind = str(config["_class_name"])
    shape = dict(config.get(KEY) or {}).get("shape", {})
    lines = ["---", "library_name: diffusers", "tags:", "- diffusers", "- hwprune", "- pruning"]
    lines += [f"{key}: {value}" for key, value in (head or {}).items()]
    lines += ["---", "", f"# {kind}{', pruned with hwprune' if shape else ''}", ""]
    base = (head or {}).get("base_model")
    if shape:
        removed = sum(entry["type"] == "removed" for entry in shape.values())
        told = f"{len(shape) - removed} layers are narrower than in the dense model"
        told += f", {removed} blocks are gone." if removed else "."
        lines += [f"Made from {f'`{base}`' if base else 'a dense model'}: {told}", ""]
    if report:
        lines += results(report)
    if head is not None and "license" not in head:
        lines += [
            "The licence of the dense model holds for this one; its card does not name it.",
            "",
        ]
    return "\n".join([*lines, *_opening(kind, form, name)]).rstrip() + "\n"


def _opening(kind: str, form: str, name: str) -> list[str]:
    """How to open it, in Python."""
    if form == "pipeline":
        code = [
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("FOLDER")',
        ]
    else:
        place = "FOLDER" if not form else f"FOLDER/{name}"
        code = [f"from diffusers import {kind}", "", f'model = {kind}.from_pretrained("{place}")']
    first = "import hwprune  # teaches diffusers the pruned shape"
    return ["## Open it", "", "```python", first, *code, "```", "", "or `hwprune.load(FOLDER)`."]
