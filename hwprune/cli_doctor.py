"""The command `hwprune doctor`: what of this machine works, what follows, and what to do next."""

from __future__ import annotations

from typing import Annotated

import typer

from hwprune.cli_words import Json
from hwprune.exits import plainly
from hwprune.terminal import STDOUT, Steps, check_json, show, write_json


def doctor(
    compile_kernel: Annotated[
        bool, typer.Option("--compile", help="Compile the CPU kernel now, and try it")
    ] = False,
    json: Json = None,
) -> None:
    """Say what of this machine works for hwprune, what follows from it, and what to do about the rest."""
    with plainly(), Steps() as steps:
        check_json(json)
        steps("look around", 0, 1)

        from hwprune.doctor import examine

        found = examine(compile_kernel=compile_kernel)
        if json is not None:
            write_json(json, {"findings": [finding.to_dict() for finding in found]})
    if json != STDOUT:
        rows = [[f.part, f.state, f"{f.found}: {f.follows}"] for f in found]
        after = [f"{f.part}: {f.next}" for f in found if f.next and f.state != "works"]
        show("this machine", ("", "", "what is there: what follows"), rows, *after, left=True)
