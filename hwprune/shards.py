"""Tensors in one safetensors file or in several: the spec in each header, read with care.

Layout as Hugging Face libraries use it: `model.safetensors`, or `model-00001-of-0000N.safetensors`
with `model.safetensors.index.json`; diffusers says `diffusion_pytorch_model` for `model`. Nothing else is
ever opened, pickle files least of all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hwprune.spec import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"(?:(?:diffusion_pytorch_)?model|pruned)-\d{5}-of-\d{5}\.safetensors")
DIFFUSERS_STEM = "diffusion_pytorch_model"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_JSON_LIMIT_BYTES = 64 << 20  # a spec of a thousand layers is 100 kB


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what its header says of it."""

    file: Path
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, too large, no JSON, or no object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise ValueError(f"larger than {_JSON_LIMIT_BYTES >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; expected a folder written by hwprune.save"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes: the name of one set of weights."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them: on the CPU, contiguous, each with memory of its own."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        value = tensor.detach().to("cpu").contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        ready[name] = value
    return ready


def write(
    tensors: Mapping[str, Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    max_shard_bytes: int | None,
    stem: str = "model",
) -> None:
    """Write tensors into a folder, in one file where they fit.

    Args:
        tensors: from `portable`.
        folder: an existing folder.
        metadata: goes into every header; text only.
        max_shard_bytes: tensor bytes of one file at most, where one tensor alone is not larger;
            None = one file whatever its size.
        stem: what file names start with.

    Raises:
        OSError: the disk is full or refuses.
        ValueError: the limit makes too many files.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_shard_bytes is not None and parts[-1] and size + tensor.nbytes > max_shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    header = {"format": "pt", **metadata}
    if len(parts) == 1:
        _write_file(parts[0], folder / f"{stem}.safetensors", header)
        return
    if len(parts) > 99999:
        raise ValueError(
            f"max_shard_bytes={max_shard_bytes} would make {len(parts)} files; raise it"
        )
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        _write_file(part, folder / file, header)
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    try:
        file.touch()
        mode = file.stat().st_mode  # safetensors leaves 0600: other users could not read it
        save_file(tensors, file, metadata=header)
        file.chmod(mode)
    except SafetensorError as error:  # how safetensors passes on what the disk says
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"{os.strerror(code)} ({file.name})") from error


def _files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and what the index says lies where (None for a single file)."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if (folder / single).exists():
        if (folder / index).exists():
            raise CheckpointError(f"{folder}: has both {single} and {index}; save the model again")
        return [folder / single], None
    if not (folder / index).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        pickle = f"; {others[0]} is a pickle, which is never opened" if others else ""
        raise CheckpointError(f"{folder}: no {single} and no {index}{pickle}; save the model again")
    where = _read_index(folder / index)
    return [folder / file for file in sorted(set(where.values()))], where


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, each a plain shard of the same folder."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path}: expected weight_map, tensor name to file name")
    for name, file in where.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise CheckpointError(
                f"{path}: {name!r} lies in {str(file)[:80]!r}; expected a name like "
                "model-00001-of-00002.safetensors in the same folder"
            )
    return where


def index_files(path: Path) -> list[str]:
    """The shards an index names, checked to be plain names.

    Raises:
        CheckpointError: the index is wrong.
    """
    return sorted(set(_read_index(path).values()))


def read_headers(
    folder: Path, stem: str = "model"
) -> tuple[dict[str, Stored], list[dict[str, str]]]:
    """Which tensors a folder holds, without reading them, and the metadata of each file.

    Raises:
        CheckpointError: a file is missing, cut short or no safetensors, or the index is wrong.
    """
    files, where = _files(folder, stem)
    found: dict[str, Stored] = {}
    headers: list[dict[str, str]] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                headers.append(dict(stored.metadata() or {}))
                for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in found or (where is not None and where.get(name) != file.name):
                        raise CheckpointError(f"{file}: holds {name!r} against the index")
                    found[name] = Stored(file, tuple(stored.get_slice(name).get_shape()))
        except (SafetensorError, OSError, OverflowError) as error:
            raise CheckpointError(
                f"{file}: no readable safetensors file ({error}); it may be cut short: copy it, or save "
                "the model, again"
            ) from error
    missing = sorted(set(where or ()) - set(found))
    if missing:
        raise CheckpointError(
            f"{folder / f'{stem}.safetensors.index.json'}: {missing[0]!r} is in no file; save the model again"
        )
    return found, headers


def read_tensors(found: Mapping[str, Stored]) -> dict[str, Tensor]:
    """All tensors, in memory of their own: a later change of the file does not reach them.

    Raises:
        CheckpointError: a file cannot be read, or a tensor holds NaN or Inf, naming it.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in found.values()}):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensors[name] = stored.get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise CheckpointError(
                f"{found[name].file}: {name} holds NaN or Inf; save a model that is finite"
            )
    return tensors


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # isfinite has no float8 form
    return bool(torch.isfinite(wide).all())
