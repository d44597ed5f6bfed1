"""Arguments and options that several commands share, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A timm name, a folder, or digits (built in)", show_default=False
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Images: a folder of class folders, a .tar of them, hfds/NAME, wds/FOLDER, or digits",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=".safetensors or .pth; without it, timm's own", show_default=False
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Class names, one a line, in the order of the model's outputs",
        show_default=False,
    ),
]
Json = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write the result as JSON; - is stdout", show_default=False),
]


def text_of(path: Path | None) -> str | None:
    """What a path says."""
    return None if path is None else str(path)
