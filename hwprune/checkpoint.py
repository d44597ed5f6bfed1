"""A pruned model as a folder that opens again: `save` and `load`.

`config.json` and `model.safetensors` as timm lays them out, with the spec in both, `report.json` and a
model card. A folder is written whole or not at all, and opened once before it takes its name.
Opening runs no code from a file and allocates no more than the file itself justifies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hwprune import families, shards
from hwprune.atomic import replace_folder
from hwprune.card import model_card
from hwprune.denoiser_checkpoint import (
    is_denoiser,
    is_pipeline,
    load_denoiser,
    load_pipeline,
    save_denoiser,
    save_pipeline,
)
from hwprune.densify import dense_state
from hwprune.layers import BlockSparseLinear, ConstantBranch, SlimAttention
from hwprune.realise import reshape_
from hwprune.shards import Stored
from hwprune.spec import (
    BUILDER,
    VERSION,
    architecture,
    check_spec,
    exported_spec,
    header,
    jsonable,
    model_args,
)
from hwprune.spec import CheckpointError as CheckpointError
from hwprune.timm_base import (
    create,
    create_empty,
    describe_base,
    pretrained_cfg_of,
    read_cfg,
    written_cfg,
)
from hwprune.transformers_base import is_transformers
from hwprune.transformers_checkpoint import load_transformers, save_transformers
from hwprune.verify import check_structure, check_tensors, check_tiles, check_types, difference

Format = Literal["pruned", "dense"]

_GIGABYTE = 10**9
_FILES = {"config.json", "report.json", "report.html", "README.md", shards.SINGLE, shards.INDEX}


@dataclass(frozen=True)
class Folder:
    """What a folder says before any tensor is read.

    Attributes:
        path: the folder.
        spec: checked.
        cfg: timm's pretrained_cfg, without anything that says where weights come from.
        stored: tensor name -> where it lies, and its shape.
    """

    path: Path
    spec: dict[str, Any]
    cfg: dict[str, Any]
    stored: dict[str, Stored]

    @property
    def stored_bytes(self) -> int:
        """Size of the tensor files."""
        return sum(file.stat().st_size for file in {s.file for s in self.stored.values()})


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Format = "pruned",
    force: bool = False,
    card: str | None = None,
    max_shard_bytes: int = 5 * _GIGABYTE,
) -> None:
    """Write a model as a folder that `load`, and timm, open again bit for bit.

    Args:
        model: pruned by `hwprune.prune`, or a dense model from `timm.create_model`; a vision encoder of
            transformers, a denoiser of diffusers, pruned or not; or a whole pipeline of diffusers. Unchanged.
        folder: opens with `load(folder)` and, after `import hwprune`, with
            `timm.create_model("local-dir:FOLDER", pretrained=True)`, or with its class's own
            `from_pretrained(folder)`.
        format: "pruned" keeps the small layers; "dense" has the original shapes with zeros where
            something was removed, and opens with timm where there is no hwprune.
        force: replace a folder written by hwprune before; it survives until the new one is complete.
        card: text of README.md; None = one made from the spec.
        max_shard_bytes: tensor bytes of one file at most; above it the tensors go into several
            files. Ignored where stock timm shall open the folder (dense form, or nothing pruned):
            it reads one file, of any size.

    Raises:
        FileExistsError: the folder is there (pass force=True), or holds files of others.
        OSError: the disk is full or refuses; an old folder is as it was.
        ValueError: the model cannot be described in a file, or holds NaN or Inf.
        CheckpointError: what was written does not open as the same model; nothing is left behind.

    Example:
        >>> import tempfile
        >>> import hwprune
        >>> from hwprune.digits import digits_model
        >>> folder = f"{tempfile.mkdtemp()}/model"
        >>> hwprune.save(digits_model(pretrained=False), folder)
        >>> type(hwprune.load(folder)).__name__
        'VisionTransformer'
    """
    if format not in ("pruned", "dense"):
        raise ValueError(f"format: expected 'pruned' or 'dense', got {format!r}")
    if is_denoiser(model) or is_pipeline(model):
        if format == "dense":
            raise ValueError(
                "format='dense' is for vision transformers; save a diffusion model as it is"
            )
        if is_pipeline(model):
            save_pipeline(model, Path(folder), force=force)
        else:
            save_denoiser(
                model, Path(folder), force=force, card=card, max_shard_bytes=max_shard_bytes
            )
        return
    if getattr(model, "hwprune_routed", False):
        raise ValueError("route_ made this model ready for one device; save before route_")
    if is_transformers(model):
        save_transformers(
            model,
            Path(folder),
            dense=format == "dense",
            force=force,
            card=card,
            max_shard_bytes=max_shard_bytes,
        )
        return
    spec = _spec_of(model)
    state: Mapping[str, Tensor] = model.state_dict()
    widened = format == "dense" and bool(spec["shape"])
    if widened:
        empty = create_empty(spec, written_cfg(model, spec))
        layers, _ = families.of(empty).find_layers(empty)
        state = dense_state(model, empty, layers, spec["shape"])
        spec = {**spec, "shape": {}, "zeroed": spec["shape"]}
    tensors = shards.portable(state)
    broken = next((name for name, tensor in tensors.items() if not shards.finite(tensor)), None)
    if broken is not None:
        raise ValueError(f"{broken} holds NaN or Inf; a broken model is not saved")
    cfg, weights = written_cfg(model, spec), shards.digest(tensors)
    config = {
        "architecture": architecture(spec),
        "num_classes": spec["base"]["num_classes"],
        "num_features": jsonable(getattr(model, "num_features", None), "num_features"),
        "model_args": model_args(spec),
        "pretrained_cfg": cfg,
        "hwprune": spec,
        "hwprune_weights": weights,
    }
    text = card if card is not None else model_card(spec, cfg, architecture(spec))
    metadata = {"hwprune": header(spec), "hwprune_weights": weights}
    limit = max_shard_bytes if spec["shape"] else None

    def write(fresh: Path) -> None:
        shards.write(tensors, fresh, metadata, limit)
        _write_text(fresh / "config.json", _json_text(config))
        _write_text(fresh / "report.json", _json_text(spec["report"]))
        _write_text(fresh / "README.md", text)
        try:
            again = load(fresh)
        except CheckpointError as error:
            said = str(error).replace(str(fresh), str(folder))
            raise CheckpointError(f"what was written does not open again: {said}") from error
        check_tensors(again, tensors)
        if not widened:
            check_structure(again, model)

    replace_folder(Path(folder), write, force=force, is_ours=_is_ours)


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Open a folder written by `save`, in either format, or by `save_pretrained` of diffusers or transformers.

    Args:
        folder: the folder; one with `model_index.json` is a pipeline.
        device: where the model shall be.
        dtype: of its floating-point tensors; None = as saved.

    Returns:
        The model in eval mode, with `hwprune_spec` unless transformers wrote it; a pipeline for a pipeline's
        folder.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, mixed from two models, of another
            version, or asks for something no model of ours has.

    Example:
        >>> hwprune.load("deit_tiny_070", device="cuda:0")  # doctest: +SKIP
    """
    if (Path(folder) / "model_index.json").is_file():
        pipeline: nn.Module = load_pipeline(Path(folder), device, dtype)
        return pipeline
    library = library_of(Path(folder))
    if library == "diffusers":
        return load_denoiser(Path(folder), device, dtype)
    if library == "transformers":
        return load_transformers(Path(folder), device, dtype)
    found = read_folder(folder)
    model = empty_model(found)
    fill_(model, found, shards.read_tensors(found.stored))
    adopt(model, found.spec)
    return model.to(device=device, dtype=dtype).eval()


def read_folder(folder: str | Path) -> Folder:
    """Read and check what a folder says of itself, without reading a tensor.

    Raises:
        CheckpointError: as `load`, as far as it shows without the tensors.
    """
    path = Path(folder)
    if not path.is_dir():
        aside = path.absolute().with_name(f".{path.name}.previous")
        hint = f"; a save was cut off: rename {aside} to it" if aside.is_dir() else ""
        raise CheckpointError(f"{path}: no such folder; expected one written by hwprune.save{hint}")
    config = shards.read_json(path / "config.json")
    library = library_of(path)
    if library != "timm":
        kind = config.get("_class_name") or config["architectures"]
        raise CheckpointError(f"{path}: a {str(kind)[:80]} of {library}; open it with hwprune.load")
    exported = "hwprune" not in config and config.get("architecture") == BUILDER
    if "hwprune" not in config and not exported:
        raise CheckpointError(
            f"{path / 'config.json'} has no 'hwprune' entry, so hwprune.save did not write it; a plain "
            "timm folder opens with timm.create_model('local-dir:...', pretrained=True)"
        )
    stored, headers = shards.read_headers(path)
    written = exported_spec(config) if exported else config["hwprune"]
    spec = check_spec(written, len(stored))
    if not exported:
        _check_agreement(path, config, spec, headers)
    return Folder(path, spec, read_cfg(config.get("pretrained_cfg"), spec), stored)


def empty_model(found: Folder) -> nn.Module:
    """The model a folder describes, on the meta device: its structure, checked against the tensors.

    Raises:
        CheckpointError: the structure cannot be built, or does not fit the tensors.
    """
    _check_tile_sizes(found)
    model = create_empty(found.spec, found.cfg)
    # Rotary tables, and timm's own loader, build the dense model for real: bound it by the file.
    dense_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if dense_bytes > 64 * found.stored_bytes + _GIGABYTE:
        raise CheckpointError(
            f"{found.path}: describes a dense model of {dense_bytes / _GIGABYTE:.3g} GB for "
            f"{found.stored_bytes / _GIGABYTE:.3g} GB of tensors; refused"
        )
    if found.spec["shape"]:
        try:
            layers, _ = families.of(model).find_layers(model)
            reshape_(model, layers, found.spec["shape"])
        except (ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{found.path}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: stored.shape for name, stored in found.stored.items()}
    if expected != given:
        raise CheckpointError(f"{found.path}: {difference(expected, given)}; save the model again")
    return model


def fill_(model: nn.Module, found: Folder, tensors: Mapping[str, Tensor]) -> None:
    """Put a folder's tensors into its `empty_model`, in the types they have.

    Raises:
        CheckpointError: a tensor has another type than the layer can take, or a tile lies outside.
    """
    check_types(model, tensors)
    model.load_state_dict(tensors, strict=True, assign=True)
    check_tiles(model)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not left:
        return
    # Buffers timm computes and does not store (rotary tables): take them from a model really built.
    with torch.random.fork_rng(devices=[]):
        built = create(found.spec, found.cfg)
    types = {t.dtype for t in tensors.values() if t.is_floating_point()}
    for name in left:
        value = built.get_buffer(name)
        if value.is_floating_point() and len(types) == 1:
            value = value.to(next(iter(types)))
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent).register_buffer(key, value, persistent=False)


def adopt(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Note on a model what it is, for `save` and for timm's own export."""
    vars(model)["hwprune_spec"] = dict(spec)
    vars(model)["_model_args"] = model_args(spec)
    cfg = {**pretrained_cfg_of(model), "architecture": architecture(spec)}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = cfg


def _spec_of(model: nn.Module) -> dict[str, Any]:
    noted = getattr(model, "hwprune_spec", None)
    if noted is None:
        ours = (BlockSparseLinear, ConstantBranch, SlimAttention)
        pruned = [name for name, module in model.named_modules() if isinstance(module, ours)]
        if pruned:
            raise ValueError(
                f"{pruned[0]} is pruned, but the model has no hwprune_spec to build it again from; "
                "prune with hwprune.prune, which sets it"
            )
        noted = {"version": VERSION, "shape": {}, "kinds": [], "report": {}}
    return check_spec(jsonable({**noted, "base": describe_base(model)}, "hwprune_spec"))


def _check_agreement(
    path: Path,
    config: Mapping[str, Any],
    spec: Mapping[str, Any],
    headers: list[dict[str, str]],
) -> None:
    """Refuse a config.json and tensor files that were not written together."""
    for metadata in headers:
        if metadata.get("hwprune") != header(spec):
            raise CheckpointError(
                f"{path}: config.json and the tensor files describe different models; they were "
                "swapped or edited: save the model again"
            )
        if metadata.get("hwprune_weights") != config.get("hwprune_weights"):
            raise CheckpointError(
                f"{path}: the tensor files are of another model than config.json, one of the same "
                "shape; save the model again"
            )
    written = (config.get("architecture"), config.get("model_args"))
    if written != (architecture(spec), model_args(spec)):
        raise CheckpointError(
            f"{path / 'config.json'}: architecture and model_args do not agree with the hwprune "
            "entry; it was edited: save the model again"
        )


def _check_tile_sizes(found: Folder) -> None:
    """Compare the tiles the spec would allocate with those in the file, before allocating them."""
    for name, entry in found.spec["shape"].items():
        if entry["type"] != "block":
            continue
        key, expected = f"{name}.values", (entry.get("kept"), *entry["block"])
        given = found.stored[key].shape if key in found.stored else None
        if given != expected:
            raise CheckpointError(
                f"{found.path}: {key}: the spec says {expected}, the file holds {given}; save the "
                "model again"
            )


def library_of(folder: Path) -> Literal["timm", "diffusers", "transformers"]:
    """Whose `config.json` lies in a folder; timm's where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / "config.json"
    config = shards.read_json(path) if path.is_file() else {}
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "architectures" in config and "model_type" in config else "timm"


def _is_ours(name: str) -> bool:
    return name in _FILES or bool(shards.SHARD.fullmatch(name))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
