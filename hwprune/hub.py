"""Puts a saved folder on a model hub, after opening it: what does not load is not published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hwprune.checkpoint import load
from hwprune.spec import CheckpointError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What a saved folder may hold. Anything else, a pickle above all, is somebody's own and stays here.
_WEIGHTS_OF_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a folder written by hwprune, with its card and report, as one commit.

    Args:
        folder: of `hwprune.save` or of the commands prune and prune-diffusion.
        repo_id: "name/model" on the hub; made if it is not there.
        private: make it private, where it is made now.
        token: of the hub; None = the one huggingface_hub knows of.

    Returns:
        The address of the commit, as the hub tells it.

    Raises:
        CheckpointError: the folder does not open again, or holds pickles; nothing is uploaded.
        ValueError: a repo_id of another form.
        ModuleNotFoundError: huggingface_hub is not installed.

    Example:
        >>> import hwprune
        >>> hwprune.push_to_hub("deit_tiny_070", "jane/deit-tiny-070")  # doctest: +SKIP
    """
    if not _REPO.fullmatch(repo_id):
        raise ValueError(f"repo_id: expected NAME/MODEL, got {repo_id!r}")
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected one written by hwprune")
    foreign = sorted(p for p in path.rglob("*") if p.suffix.lower() in _WEIGHTS_OF_OTHERS)
    if foreign:
        raise CheckpointError(
            f"{foreign[0]}: a pickle, which is never published; move it out of {path}"
        )
    load(_model_in(path))
    api = _api(token)
    api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    found: Any = api.upload_folder(
        folder_path=str(path),
        repo_id=repo_id,
        repo_type="model",
        commit_message="Upload a model pruned with hwprune",
        ignore_patterns=[".*", "**/.*"],
    )
    return str(getattr(found, "commit_url", found))


def _model_in(path: Path) -> Path:
    """What to open: the folder, or the denoiser in it where it holds only that and its scheduler."""
    if (path / "config.json").is_file() or (path / "model_index.json").is_file():
        return path
    return next(
        (path / n for n in ("transformer", "unet") if (path / n / "config.json").is_file()), path
    )


def _api(token: str | None) -> Any:
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "push_to_hub needs huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from error
    return HfApi(token=token)
