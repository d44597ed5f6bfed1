"""Figures measured in a run, in a file beside its state: a run that was killed goes on with the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Remembered:
    """JSON-able figures by name.

    Args:
        file: where they are kept; None = nowhere. One that is no JSON object is started anew.
    """

    def __init__(self, file: Path | None) -> None:
        """Read what is there."""
        self._file, self._figures = file, dict[str, Any]()
        try:
            found = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict):
            self._figures = found

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of that name; measured, and kept, where it is not known."""
        if name not in self._figures:
            self._figures[name] = measure()
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                fresh = self._file.with_suffix(".partial")
                fresh.write_text(json.dumps(self._figures), encoding="utf-8")
                fresh.replace(self._file)
        return self._figures[name]
