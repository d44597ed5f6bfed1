"""Write a folder whole or not at all: beside its place first, moved there when it is complete.

A kill or a full disk at any point leaves the old folder, or the new one, never a mixture.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

_STALE_S = 24 * 3600.0  # a hidden folder this old is what a killed save left


def replace_folder(
    folder: Path,
    write: Callable[[Path], None],
    *,
    force: bool,
    is_ours: Callable[[str], bool],
) -> None:
    """Let `write` fill a new folder, then put it in the place of `folder`.

    Args:
        folder: where the result shall be; its parents are made.
        write: fills the empty folder it is given and checks the result.
        force: replace a folder that is there already.
        is_ours: whether a file name is one that `write` makes; a folder with any other file in it
            is never replaced.

    Raises:
        FileExistsError: the folder is there without `force`, or it holds files that are not ours.
        OSError: the disk is full or refuses; the old folder is as it was.
    """
    folder = folder.resolve()
    recover(folder)
    _check_target(folder, force, is_ours)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        fresh.mkdir()
        write(fresh)
        _sync(fresh)
        _swap(fresh, folder)
    except OSError as error:
        said = error.strerror or str(error)
        kept = " the folder that was there is as it was;" if folder.exists() else ""
        raise OSError(
            error.errno,
            f"could not write {folder}: {said};{kept} free some space or choose another",
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_target(folder: Path, force: bool, is_ours: Callable[[str], bool]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder")
    names = sorted(p.name for p in folder.iterdir())
    if names and not force:
        raise FileExistsError(
            f"{folder} exists already; choose another folder, or pass force=True (--force) to replace "
            "it"
        )
    foreign = [name for name in names if not is_ours(name)]
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r}, which hwprune did not write, so it is not replaced; "
            "choose another folder or move that file away"
        )


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def recover(folder: Path) -> None:
    """Put back a folder a killed save had moved aside; only where folders cannot be exchanged."""
    if not folder.exists() and _backup(folder).is_dir():
        os.rename(_backup(folder), folder)  # noqa: PTH104 - one name for every move, see tests


def _sweep(folder: Path) -> None:
    """Remove what saves killed long ago left beside the folder."""
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure the disk has everything before the folder takes its name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(rename(here, os.fsencode(a), here, os.fsencode(b), exchange)) == 0


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(fresh, folder)  # noqa: PTH104
        return
    if _exchange(fresh, folder):  # now `fresh` is the old one, which the caller removes
        return
    previous = _backup(folder)
    if previous.exists():  # left by a kill after its successor was in place
        shutil.rmtree(previous)
    os.rename(folder, previous)  # noqa: PTH104
    try:
        os.rename(fresh, folder)  # noqa: PTH104
    except BaseException:
        os.rename(previous, folder)  # noqa: PTH104
        raise
    shutil.rmtree(previous, ignore_errors=True)
