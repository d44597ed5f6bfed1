"""Adds what `hwprune eval` and `hwprune measure` found to a folder's report, so that its page shows it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwprune.page.build import REPORT, read_report
from hwprune.page.facts import items

_KEPT_OF_MEASURE = ("arms", "settings", "ratio", "warnings", "model", "against", "provenance")


def attach(folder: Path, files: Sequence[Path]) -> None:
    """Put the results of files into report.json, whole or not at all.

    Args:
        folder: with a report.
        files: written by `hwprune eval --json` or `hwprune measure --json`, of this model or its dense one.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not of those two commands, or is of another model.
    """
    report = read_report(folder)
    evaluations, measurements = items(report, "evaluations"), items(report, "measurements")
    for file in files:
        found = _read(file)
        if "top1" in found:
            result = _evaluation(found, report, folder, file)
            same = (result["of"], result.get("data"))
            evaluations = [e for e in evaluations if (e.get("of"), e.get("data")) != same]
            evaluations.append(result)
        elif isinstance(found.get("arms"), dict):
            if Path(str(found.get("model"))).resolve() != folder.resolve():
                raise ValueError(
                    f"{file}: measured {found.get('model')}, expected {folder} (hwprune measure {folder} "
                    "--against DENSE --json FILE)"
                )
            measurements = [{key: found[key] for key in _KEPT_OF_MEASURE if key in found}]
        else:
            raise ValueError(
                f"{file}: expected what `hwprune eval --json` or `hwprune measure --json` writes, got keys "
                f"{', '.join(map(str, list(found)[:5]))}"
            )
    report |= {"evaluations": evaluations, "measurements": measurements}
    fresh = folder / f".{REPORT}.{os.getpid()}.partial"
    try:
        fresh.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(folder / REPORT)
    finally:
        fresh.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"--with {file}: no such file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--with {file}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--with {file}: expected an object, got {type(found).__name__}")
    return found


def _evaluation(
    found: Mapping[str, Any], report: Mapping[str, Any], folder: Path, file: Path
) -> dict[str, Any]:
    """An accuracy, and whose it is: told by the parameters counted when it was evaluated."""
    sizes = {"pruned": report.get("params"), "dense": report.get("dense_params")}
    of = [name for name, params in sizes.items() if params == found.get("params")]
    here = Path(str(found.get("model"))).resolve() == folder.resolve()
    if here:  # also in the dense form, whose zeros count
        of = ["pruned"]
    if not of:
        raise ValueError(
            f"{file}: of a model of {found.get('params')} parameters, expected the pruned one "
            f"({sizes['pruned']}) or the dense one ({sizes['dense']})"
        )
    kept = {key: found.get(key) for key in ("top1", "top5", "images", "data", "model", "params")}
    return {"of": of[0], **kept}
