"""Opens what the user calls MODEL: a timm name, a folder, or the word `digits`.

Weights come from the folder, from a file of the user's, or from the hub, in that order of choice; they
fit the model exactly or are refused by the name of the first tensor that does not.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from hwprune.checkpoint import library_of, load
from hwprune.digits import digits_model
from hwprune.image_preparation import assumed
from hwprune.spec import CheckpointError
from hwprune.statistics import check_finite

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Where training scripts put the state dict; an average of the weights is what their papers report.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
_NAME_ONLY = "expected a timm name, a folder or the word digits"


@dataclass(frozen=True, eq=False)
class Opened:
    """A model ready for use.

    Attributes:
        model: float32, in eval mode, on the CPU.
        spec: what hwprune wrote of it when it was saved; None for a model of timm or the user.
        note: what the user should know, or "".
        denoiser: whether it takes latents, not images.
    """

    model: nn.Module
    spec: Mapping[str, Any] | None = None
    note: str = ""
    denoiser: bool = False


def open_model(
    name: str,
    weights: Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Opened:
    """Opens a model in float32 with its trained weights.

    Args:
        name: a timm name ("deit_tiny_patch16_224", with or without a tag), a folder written by
            hwprune, timm or transformers, or "digits".
        weights: a .safetensors file, or a .pth of tensors alone; for timm names and timm folders.
        progress: called with (done, total) while the digits model trains, the first time.

    Raises:
        ValueError: unknown name, weights that do not fit or hold NaN, weights that cannot be had.
        FileNotFoundError: no such folder or file.
        CheckpointError: a folder of hwprune's that is damaged.
        ModuleNotFoundError: the model's library is not installed.
    """
    folder = Path(name).expanduser()
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"no such weights file: {weights}")
    if name == "digits":
        if weights is not None:
            raise ValueError(
                "digits is the built-in model with weights of its own; leave --weights out"
            )
        return _finite(Opened(digits_model(progress=progress)))
    config = folder / "config.json"
    if config.is_file() and (_is_ours(config) or library_of(folder) == "transformers"):
        if weights is not None:
            raise ValueError(f"{name} holds its own weights; leave --weights out")
        model = load(folder, dtype=torch.float32)
        return _finite(Opened(model, vars(model).get("hwprune_spec"), assumed(model)))
    if folder.exists() or name.startswith((".", "/", "~")) or name.endswith("/"):
        if not config.is_file():
            what = "has no config.json" if folder.is_dir() else "is no folder"
            raise FileNotFoundError(
                f"{name} {what}; {_NAME_ONLY}. A file of weights goes with a name: NAME --weights FILE"
            )
        name = f"local-dir:{folder}"
    return _finite(_timm_model(name, weights))


def _is_ours(config: Path) -> bool:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config}: expected JSON: {error}") from error
    return isinstance(found, dict) and "hwprune" in found


def _finite(opened: Opened) -> Opened:
    check_finite(opened.model)
    return opened


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "timm models need timm, which is not installed: pip install 'hwprune[timm]'"
        ) from error
    return timm


def _timm_model(name: str, weights: Path | None) -> Opened:
    timm = _timm()
    if ":" not in name:
        _check_name(name)
    if weights is None:
        return Opened(_with_own_weights(name))
    state = read_state(weights)
    model = timm.create_model(name, pretrained=False).eval()
    note = ""
    classes = _classes(model, state)
    if classes is not None and classes != model.num_classes:
        note = f"{weights.name} has a classifier of {classes} outputs (the model's usual: {model.num_classes})"
        model = timm.create_model(name, pretrained=False, num_classes=classes).eval()
    _load_(model, state, weights, name)
    return Opened(model, None, note)


def _with_own_weights(name: str) -> nn.Module:
    """The model with the weights timm knows for it, from the hub's cache, the hub or a local folder."""
    try:
        with _one_try():
            model: nn.Module = _timm().create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client, the network or the file raises
        said = " ".join(str(error).split())[:300]
        if name.startswith("local-dir:"):
            raise ValueError(
                f"{name.partition(':')[2]} cannot be opened by timm: {said}"
            ) from error
        raise ValueError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}: {said}); give a "
            "file of them with --weights FILE, or try again with a connection to the hub"
        ) from error
    return model.eval().float()


@contextmanager
def _one_try() -> Iterator[None]:
    """Ask the hub's client to fail at once and silently where its host has no address.

    It would ask for a minute, and print each attempt, before it looks into its cache.
    """
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.CRITICAL)
    try:
        if not getproxies():  # behind a proxy only the proxy can tell
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _check_name(name: str) -> None:
    """Refuse a name timm does not know, with the names that come close."""
    timm = _timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = ["digits", *timm.list_models()]
        close = difflib.get_close_matches(architecture, known, 3, 0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; {_NAME_ONLY}"
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}{hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        close = difflib.get_close_matches(name, tags, 3, 0.3) or tags[:3]
        raise ValueError(
            f"timm has no weights {tag!r} of {architecture}; it has {', '.join(close) or 'none'}"
        )


def read_state(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, floating-point tensors as float32; no code in the file is run.

    Args:
        file: .safetensors, or a pickle of tensors (.pth, .pt, .bin), the state dict itself or under one
            of the usual keys, with or without the prefixes of DDP and torch.compile.

    Raises:
        ValueError: it is neither, or holds something else than tensors.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: Any = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no readable safetensors file: {error}") from error
    elif file.suffix in _PICKLES:
        found = _read_pickle(file)
    else:
        raise ValueError(f"{file}: expected weights as .safetensors or .pth, got {file.suffix!r}")
    if isinstance(found, dict):
        found = next((found[key] for key in _NESTED if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file}: expected a state dict, got {type(found).__name__}")
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{file}: expected a state dict of tensors, got {type(value).__name__} at {key!r}; save "
                "model.state_dict() alone"
            )
        name = key.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")
        state[name] = value.float() if value.is_floating_point() else value
    return state


def _read_pickle(file: Path) -> Any:
    try:
        # Namespace holds a training script's arguments, as in DeiT's own files; it is data alone.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle reader makes of bytes that are none is open-ended
        said = str(error).strip().splitlines()
        raise ValueError(
            f"{file} cannot be read as tensors alone, and nothing else in it is run "
            f"({(said or [type(error).__name__])[0][:160]}); save it again with "
            "torch.save(model.state_dict(), FILE) or as .safetensors"
        ) from error


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the file's classifier has, where only that number can differ."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    rows = set()
    for name in (names,) if isinstance(names, str) else names:
        weight = state.get(f"{name}.weight")
        expected = model.state_dict().get(f"{name}.weight")
        if weight is None or expected is None or weight.shape[1:] != expected.shape[1:]:
            return None
        rows.add(len(weight))
    return rows.pop() if len(rows) == 1 else None


def _load_(model: nn.Module, state: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Load strictly, or say what does not fit."""
    expected = model.state_dict()
    wrong = [
        f"{key} is {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    said = [_some(wrong, "of another shape")] if wrong else []
    said += [_some(missing, "missing from the file")] if missing else []
    said += [_some(extra, "in the file alone")] if extra else []
    if said:
        raise ValueError(
            f"{file} does not fit {name}: {'; '.join(said)}. Name the model the file was trained as"
        )
    model.load_state_dict(state)


def _some(found: list[str], what: str) -> str:
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    return f"{len(found)} {what}: {', '.join(found[:2])}{more}"
