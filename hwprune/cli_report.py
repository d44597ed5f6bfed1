"""The command `hwprune report`: the page of a pruned folder, with what eval and measure found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hwprune.cli_words import Json
from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, write_json


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Written by hwprune prune or prune-diffusion",
            show_default=False,
        ),
    ],
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE",
            help="What eval --json or measure --json wrote, of this model or its dense one; several",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser")] = False,
    json: Json = None,
) -> None:
    """Write FOLDER's page again, report.html: one file with every figure and picture, no network."""
    with plainly(), Steps() as steps:
        check_json(json)
        steps("write the page", 0, 1)

        from hwprune.page.attach import attach
        from hwprune.page.build import read_report, write_page

        if add:
            attach(folder, add)
        page = write_page(folder)
        if json is not None:
            write_json(json, {**read_report(folder), "page": str(page)})
    if json != STDOUT:
        typer.echo(f"report: {page}")
    if show:
        typer.launch(page.resolve().as_uri())


def add_page(folder: Path) -> tuple[str | None, str]:
    """The page of a folder that was just saved; a model is never lost for want of a page.

    Returns:
        Where the page is, or None; why it is not there, or "".
    """
    from hwprune.page.build import write_page

    try:
        return str(write_page(folder)), ""
    # Whatever drawing makes of figures nobody foresaw: the model is on disk, `hwprune report` says the rest.
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        return (
            None,
            f"no page: {type(error).__name__}: {said}; `hwprune report {folder}` tries again",
        )
