"""How a command ends: exit codes, and one line on stderr for what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

BAD_INPUT, OUT_OF_REACH, INTERRUPTED = 2, 3, 130


def say(message: str) -> None:
    """One line to stderr, without colour or wrapping."""
    print(f"hwprune: {message}", file=sys.stderr)


@dataclass
class Ending:
    """What a command says when it is stopped by Ctrl-C.

    Attributes:
        kept: what is left of the work, and how to go on; the command sets it as it goes.
    """

    kept: str = ""


@contextmanager
def plainly() -> Iterator[Ending]:
    """Turn what a user can mend into one line and an exit code; anything else is a bug and shows as one."""
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt:
        say(f"interrupted; {ending.kept}" if ending.kept else "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # the reader of our output is gone: `main` ends quietly
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if type(error).__name__ == "UnreachableBudget":
            say(str(error))
            raise typer.Exit(OUT_OF_REACH) from error
        said = (
            str(error) if not isinstance(error, OSError) or error.errno is None else _system(error)
        )
        say(" ".join(said.split()) or type(error).__name__)
        raise typer.Exit(BAD_INPUT) from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        say("out of GPU memory; ask for a smaller --batch")
        raise typer.Exit(BAD_INPUT) from error


def _system(error: OSError) -> str:
    """What the system refused, without its number."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
