"""transformers' vision encoders as folders: `config.json` with an entry of ours, and safetensors.

The entry (`hwprune.pruned_config`) stands where transformers looks for a quantisation. Tensors of a pruned
model lie in `pruned.safetensors`: transformers without hwprune finds no weights and stops, where it would
fill missing layers with random numbers and only warn. Opening trusts nothing, as in `hwprune.checkpoint`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwprune import families, shards
from hwprune.atomic import replace_folder
from hwprune.densify import dense_state
from hwprune.pruned_config import KEY, METHOD, PrunedConfig, pruned_entry
from hwprune.realise import reshape_
from hwprune.shards import Stored
from hwprune.spec import VERSION, CheckpointError, jsonable
from hwprune.transformers_base import (
    PREPROCESSOR,
    build,
    check_config,
    class_of,
    describe,
    preprocessor,
    written_config,
)
from hwprune.verify import check_structure, check_tensors, check_tiles, check_types, difference

STEM = "pruned"
_GIGABYTE = 10**9
_FILES = {"config.json", "report.json", "report.html", "README.md", PREPROCESSOR}
_FILES |= {f"{s}.safetensors{e}" for s in (STEM, "model") for e in ("", ".index.json")}


def save_transformers(
    model: nn.Module,
    folder: Path,
    *,
    dense: bool,
    force: bool,
    card: str | None = None,
    max_shard_bytes: int = 5 * _GIGABYTE,
) -> None:
    """Write a vision encoder of transformers; see `hwprune.save`, which calls this.

    Args:
        model: pruned or not; unchanged.
        folder: opens with `hwprune.load(folder)` and, after `import hwprune`, with its class's own
            `from_pretrained(folder)`.
        dense: in the original shapes, zeros where something was removed: opens without hwprune.
        force: replace a folder written by hwprune before.
        card: text of README.md; None = one made from the spec.
        max_shard_bytes: tensor bytes of one file at most.

    Raises:
        ValueError: it is of a class we do not open again, or holds NaN or Inf.
        CheckpointError: what was written does not open as the same model.
    """
    spec = {"shape": {}, "kinds": [], "report": {}, **getattr(model, "hwprune_spec", {})}
    shape, kinds = spec["shape"], spec["kinds"]
    describe(model)
    config, whole = written_config(model), not shape or dense
    tensors = shards.portable(model.state_dict())
    broken = next((name for name, tensor in tensors.items() if not shards.finite(tensor)), None)
    if broken is not None:
        raise ValueError(f"{broken} holds NaN or Inf; a broken model is not saved")
    report = jsonable(spec["report"], "report")
    text = card if card is not None else _card(type(model).__name__, shape, kinds, whole)

    def write(fresh: Path) -> None:
        if whole:
            # By transformers itself, in the names its files have had from the first.
            _dense_form(model, config, shape).save_pretrained(fresh, max_shard_size=max_shard_bytes)
        else:
            entry = {"quant_method": METHOD, "version": VERSION, "shape": shape, "kinds": kinds}
            entry = jsonable({**entry, "weights": shards.digest(tensors)}, KEY)
            shards.write(tensors, fresh, {METHOD: _header(entry)}, max_shard_bytes, STEM)
            single = (fresh / f"{STEM}.safetensors").exists()
            entry["file"] = f"{STEM}.safetensors" + ("" if single else ".index.json")
            _write_json(fresh / "config.json", {**config, KEY: entry})
        prepared = preprocessor(model)
        if prepared is not None:
            shutil.copyfile(prepared, fresh / PREPROCESSOR)
        _write_json(fresh / "report.json", report)
        (fresh / "README.md").write_text(text, encoding="utf-8")
        try:
            again = load_transformers(fresh)
        except CheckpointError as error:
            said = str(error).replace(str(fresh), str(folder))
            raise CheckpointError(f"what was written does not open again: {said}") from error
        if not (shape and dense):
            check_tensors(again, tensors)
            check_structure(again, model)

    replace_folder(folder, write, force=force, is_ours=_is_ours)


def _dense_form(model: nn.Module, config: Mapping[str, Any], shape: Mapping[str, Any]) -> Any:
    """The model, or its dense architecture with the same function."""
    if not shape:
        return model
    with torch.random.fork_rng(devices=[]):
        dense = build(type(model), config, Path("config.json"))
    layers, _ = families.of(dense).find_layers(dense)
    state = dense_state(model, dense, layers, dict(shape))
    weight = next(t for t in state.values() if t.is_floating_point())
    dense.to(device=weight.device, dtype=weight.dtype).load_state_dict(state)
    return dense


def load_transformers(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Open a vision encoder's folder, written by `hwprune.save` or by `save_pretrained`.

    Returns:
        The model in eval mode, with `hwprune_spec` where it is pruned.

    Raises:
        CheckpointError: as `hwprune.load`.
    """
    file = folder / "config.json"
    config = shards.read_json(file)
    cls, entry = class_of(config, file), pruned_entry(config)
    if entry is None:
        model = _load_dense(cls, folder)
    else:
        model = _load_pruned(cls, config, entry, folder)
    model.to(device)
    return (model if dtype is None else model.to(dtype)).eval()


def _load_dense(cls: Any, folder: Path) -> nn.Module:
    """By transformers itself, and nothing left at random."""
    try:
        model, told = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype="auto",
        )
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: transformers cannot open it: {said}") from error
    if told["missing_keys"]:
        first = sorted(told["missing_keys"])[0]
        raise CheckpointError(
            f"{folder}: {first} is missing from the file, and would be random; save it as the class it is"
        )
    found: nn.Module = model
    return found


def _load_pruned(
    cls: Any, config: Mapping[str, Any], entry: PrunedConfig, folder: Path
) -> nn.Module:
    file = folder / "config.json"
    named = shards.INDEX if (folder / shards.INDEX).exists() else shards.SINGLE
    if (
        folder / named
    ).exists():  # after `save_pretrained` of a pruned model: in transformers' own names
        return _noted(_load_dense(cls, folder), entry, folder)
    model, stored = empty_pruned(cls, config, entry, folder)
    tensors = shards.read_tensors(stored)
    check_types(model, tensors)
    model.load_state_dict(tensors, strict=True, assign=True)
    check_tiles(model)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:  # computed and not stored, as position numbers are: from a model really built
        with torch.random.fork_rng(devices=[]):
            built = build(cls, config, file)
        for name in left:
            parent, _, key = name.rpartition(".")
            value = built.get_buffer(name)
            model.get_submodule(parent).register_buffer(key, value, persistent=False)
    return _noted(model, entry, folder)


def empty_pruned(
    cls: Any, config: Mapping[str, Any], entry: PrunedConfig, folder: Path
) -> tuple[nn.Module, dict[str, Stored]]:
    """The model a folder describes, on the meta device, and where its tensors lie, which fit it.

    Raises:
        CheckpointError: the structure cannot be built, or does not fit the tensors.
    """
    stored, headers = shards.read_headers(folder, STEM)
    check_agreement(entry, headers, folder)
    check_config(config, len(stored) + 64 * (1 + len(entry["shape"])), folder / "config.json")
    with torch.device("meta"):
        model = build(cls, config, folder / "config.json")
    size = sum(path.stat().st_size for path in {found.file for found in stored.values()})
    dense_bytes = sum(p.nbytes for p in model.parameters())
    if dense_bytes > 64 * size + _GIGABYTE:
        raise CheckpointError(
            f"{folder}: describes a dense model of {dense_bytes / _GIGABYTE:.3g} GB for "
            f"{size / _GIGABYTE:.3g} GB of tensors; refused"
        )
    shape_(model, entry["shape"], str(folder))
    check_stored(model, stored, folder)
    return model, stored


def empty_models(folder: Path) -> tuple[dict[str, Any], nn.Module, nn.Module, int]:
    """What a folder holds without its weights: spec, the model in it, its dense one, bytes of its tensors.

    Raises:
        CheckpointError: as `load_transformers`, as far as it shows without the tensors.
    """
    file = folder / "config.json"
    config = shards.read_json(file)
    cls, entry = class_of(config, file), pruned_entry(config)
    own = entry is not None and not any(
        (folder / n).exists() for n in (shards.SINGLE, shards.INDEX)
    )
    stored, headers = shards.read_headers(folder, STEM if own else "model")
    check_config(config, len(stored) + 64 * (1 + len(entry["shape"] if entry else ())), file)
    with torch.device("meta"):
        dense = build(cls, config, file)
        held = dense if entry is None else build(cls, config, file)
    if entry is not None:
        shape_(held, entry["shape"], str(folder))
        if own:
            check_agreement(entry, headers, folder)
            check_stored(held, stored, folder)
    size = sum(path.stat().st_size for path in {found.file for found in stored.values()})
    for model in (dense, _noted(held, entry or PrunedConfig(shape={}, kinds=[]), folder)):
        named: Any = model.config
        named.name_or_path = str(folder)
    return vars(held)["hwprune_spec"], held, dense, size


def shape_(model: nn.Module, shape: Mapping[str, Any], where: str) -> None:
    """Give a dense model the shape of an entry; weights are left unset.

    Raises:
        CheckpointError: it does not fit the model, naming the layer.
    """
    try:
        layers, _ = families.of(model).find_layers(model)
        reshape_(model, layers, dict(shape))
    except (ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def check_stored(model: nn.Module, stored: Mapping[str, Stored], folder: Path) -> None:
    """Compare names and shapes of a shaped model with what files hold.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: found.shape for name, found in stored.items()}
    if expected != given:
        raise CheckpointError(f"{folder}: {difference(expected, given)}; save the model again")


def check_agreement(entry: PrunedConfig, headers: list[dict[str, str]], folder: Path) -> None:
    """Refuse a config and tensor files that were not written together.

    Raises:
        CheckpointError: they were swapped or edited.
    """
    if any(metadata.get(METHOD) != _header(entry) for metadata in headers):
        raise CheckpointError(
            f"{folder}: config.json and the tensor files describe different models; they were swapped or "
            "edited: save the model again"
        )


def _noted(model: nn.Module, entry: PrunedConfig, folder: Path) -> nn.Module:
    """The model with what it is written on it, for `save` and for its own `save_pretrained`."""
    file = folder / "report.json"
    kinds = entry.get("kinds")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"{folder}: expected kinds as a list of names, got {kinds!r}")
    vars(model)["hwprune_spec"] = {
        "version": VERSION,
        "base": describe(model),
        "shape": entry["shape"],
        "kinds": kinds,
        "report": shards.read_json(file) if file.exists() else {},
    }
    config: Any = model.config
    config.name_or_path = str(folder)
    note_entry(model, entry)
    return model


def note_entry(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Write into a model's config what shape it has, so that its own `save_pretrained` tells.

    Args:
        model: realised.
        entry: as in a file, or a spec of `hwprune.prune`.
    """
    config: Any = model.config
    told = {"quant_method": METHOD, "version": VERSION, "shape": dict(entry["shape"])}
    config.quantization_config = PrunedConfig({**told, "kinds": list(entry["kinds"])})


def _header(entry: Mapping[str, Any]) -> str:
    return json.dumps({k: entry.get(k) for k in ("version", "shape", "weights")}, sort_keys=True)


def _is_ours(name: str) -> bool:
    return name in _FILES or bool(shards.SHARD.fullmatch(name))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _card(name: str, shape: Mapping[str, Any], kinds: list[str], whole: bool) -> str:
    """Markdown with a YAML head, as model hubs read it."""
    head = ["---", "library_name: transformers", "tags:", "- hwprune", "- pruning", "---", ""]
    lines = [f"# {name}{', pruned with hwprune' if shape else ''}", ""]
    if shape:
        cut = f"{len(shape)} layers lost units of kinds: {', '.join(kinds)}."
        lines += [cut + (" Here they are zeros in the original shapes." if whole else ""), ""]
    lines += ["```python"]
    lines += [] if whole else ["import hwprune  # teaches transformers the pruned shape"]
    lines += [f"from transformers import {name}", "", f'model = {name}.from_pretrained("FOLDER")']
    return "\n".join([*head, *lines, "```"]) + "\n"
