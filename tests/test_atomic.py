"""A kill, or a full disk, at every step of a save: the old folder or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import atomic, checkpoint, shards
from hwprune.checkpoint import load, save
from hwprune.spec import CheckpointError

timm = pytest.importorskip("timm")


def small(seed: int) -> nn.Module:
    """A tiny timm model; what is saved does not matter here."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=10
    )
    nn.init.normal_(model.get_parameter("head.weight"))
    return model.eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


STEPS: list[tuple[Any, str]] = [
    (atomic.Path, "mkdir"),
    (shards, "save_file"),
    (checkpoint, "_write_text"),
    (checkpoint, "load"),
    (checkpoint, "check_tensors"),
    (atomic, "_sync"),
    (atomic, "_exchange"),
    (atomic.os, "rename"),
    (atomic.shutil, "rmtree"),
]


class Killed(BaseException):
    """Stands for the process being gone."""


@contextmanager
def dying(at: int, after: bool, error: BaseException, forever: bool) -> Iterator[list[str]]:
    """Fails the at-th step of a save, before or after it is done, and every later one if forever."""
    patch = pytest.MonkeyPatch()
    done: list[str] = []

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            dead = len(done) > at and forever
            if dead or (len(done) == at and not after):
                raise error
            result = step(*args, **kwargs)
            if len(done) == at:
                raise error
            return result

        return run

    for owner, name in STEPS:
        patch.setattr(owner, name, wrap(name, getattr(owner, name)))
    try:
        yield done
    finally:
        patch.undo()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, after: bool, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    old, new = small(0), small(1)
    x = torch.randn(2, 3, 32, 32)
    truth = [outputs(old, x), outputs(new, x)]
    save(old, tmp_path / "start")
    seen, names = [], set()
    for at in range(1, 40):
        folder = tmp_path / f"{at}" / "model"
        shutil.copytree(tmp_path / "start", folder)
        with dying(at, after, Killed(), forever=True) as done:
            try:
                save(new, folder, force=True)
            except Killed:
                pass
            else:
                break
        names |= set(done)
        if not folder.exists():  # between two renames, where folders cannot be exchanged
            assert not exchange
            with pytest.raises(CheckpointError, match="rename"):
                load(folder)
            with pytest.raises(FileExistsError, match="force=True"):
                save(new, folder)  # puts the old one back before it looks
        found = outputs(load(folder), x)
        seen.append([torch.equal(found, t) for t in truth].index(True))
        save(new, folder, force=True)  # and the next save works
        assert torch.equal(outputs(load(folder), x), truth[1])
    else:
        pytest.fail("the save never ended")
    assert seen == sorted(seen) and 0 in seen and (1 in seen or not after)
    expected = {name for _, name in STEPS} - (
        {"rename"} if exchange and sys.platform == "linux" else set()
    )
    assert names == expected


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_at_any_step_leaves_everything_as_it_was(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "model"
    if exists:
        save(small(0), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if exists else {}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    model = small(1)
    for at in range(1, 10):  # two folders, the tensors, three texts, two checks, the sync
        with (
            dying(at, False, full, forever=False),
            pytest.raises(OSError, match="No space") as caught,
        ):
            save(model, folder, force=True)
        assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
        now = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}
        assert now == before
        assert [p.name for p in tmp_path.iterdir()] == (["model"] if exists else [])


def test_a_failed_move_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small(0), tmp_path / "model")
    before = (tmp_path / "model" / shards.SINGLE).read_bytes()
    rename, moved = os.rename, []

    def second_fails(a: Path, b: Path) -> None:
        moved.append(a)
        if len(moved) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(a, b)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(atomic.os, "rename", second_fails)
    with pytest.raises(OSError, match="the folder that was there is as it was"):
        save(small(1), tmp_path / "model", force=True)
    assert (tmp_path / "model" / shards.SINGLE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_safetensors_says_of_a_full_disk_is_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise shards.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(small(0), tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_what_old_kills_left_is_swept_away(tmp_path: Path) -> None:
    stale, young = tmp_path / ".model.1.partial", tmp_path / ".model.2.partial"
    stale.mkdir(), young.mkdir()
    os.utime(stale, (0, 0))
    save(small(0), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.2.partial", "model"]
