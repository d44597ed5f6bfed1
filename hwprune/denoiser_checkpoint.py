"""Denoisers of diffusers as folders: `config.json` and safetensors as diffusers itself lays them out.

The config is the dense model's with one entry more (`hwprune.pruned_config`). A folder is written whole or
not at all and opened once before it takes its name. Opening trusts nothing: structure is built on the
meta device and compared with the tensors' headers first. Whole pipelines are diffusers' own folders.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwprune import shards
from hwprune.atomic import replace_folder
from hwprune.diffusion_card import denoiser_card
from hwprune.families.denoiser import find_layers, known_classes
from hwprune.pruned_config import KEY, METHOD, PrunedConfig, pruned_entry
from hwprune.realise import reshape_
from hwprune.shards import DIFFUSERS_STEM, Stored
from hwprune.spec import CheckpointError, jsonable
from hwprune.verify import check_structure, check_tensors

_GIGABYTE = 10**9
_LIMIT = 1 << 20  # of a number in a config: more channels or pixels than any model has
_FILES = {"config.json", "report.json", "report.html", "README.md"}
_FILES |= {f"{DIFFUSERS_STEM}.safetensors", f"{DIFFUSERS_STEM}.safetensors.index.json"}


def is_denoiser(model: object) -> bool:
    """Whether something is a model of diffusers; looks at names, so diffusers need not be there."""
    return _has_base(model, "ModelMixin")


def is_pipeline(model: object) -> bool:
    """Whether something is a pipeline of diffusers."""
    return _has_base(model, "DiffusionPipeline")


def _has_base(model: object, name: str) -> bool:
    mro = type(model).__mro__
    return any(c.__name__ == name and c.__module__.startswith("diffusers.") for c in mro)


def save_denoiser(
    model: nn.Module,
    folder: Path,
    *,
    force: bool,
    card: str | None = None,
    max_shard_bytes: int = 5 * _GIGABYTE,
) -> None:
    """Write a denoiser; see `hwprune.save`, which calls this.

    Raises:
        ValueError: it is no denoiser we can open again, or holds NaN or Inf.
        CheckpointError: what was written does not open as the same model.
    """
    config = _written_config(model)
    tensors = shards.portable(model.state_dict())
    broken = next((name for name, tensor in tensors.items() if not shards.finite(tensor)), None)
    if broken is not None:
        raise ValueError(f"{broken} holds NaN or Inf; a broken model is not saved")
    metadata = {}
    if KEY in config:
        config[KEY]["weights"] = shards.digest(tensors)
        metadata = {METHOD: _header(config[KEY])}
    report = dict(getattr(model, "hwprune_spec", {}).get("report", {}))
    text = card if card is not None else denoiser_card(config, report)

    def write(fresh: Path) -> None:
        shards.write(tensors, fresh, metadata, max_shard_bytes, DIFFUSERS_STEM)
        _write_json(fresh / "config.json", config)
        _write_json(fresh / "report.json", jsonable(report, "report"))
        (fresh / "README.md").write_text(text, encoding="utf-8")
        try:
            again = load_denoiser(fresh)
        except CheckpointError as error:
            said = str(error).replace(str(fresh), str(folder))
            raise CheckpointError(f"what was written does not open again: {said}") from error
        check_tensors(again, tensors)
        check_structure(again, model)

    replace_folder(folder, write, force=force, is_ours=_is_ours)


def load_denoiser(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Open a denoiser's folder, pruned or dense, written by `hwprune.save` or `save_pretrained`.

    Raises:
        CheckpointError: as `hwprune.load`.
    """
    found = read_denoiser(folder)
    config, entry, cls = found.config, found.entry, _class_of(found.config, folder)
    empty, tensors = found.empty, shards.read_tensors(found.stored)
    wrong = next(
        (
            name
            for name, tensor in empty.state_dict().items()
            if tensor.is_floating_point() != tensors[name].is_floating_point()
        ),
        None,
    )
    if wrong is not None:
        raise CheckpointError(f"{wrong}: expected fractions, got {tensors[wrong].dtype}")
    # Built for real, because models keep tables that are in no file; its weights are never written to.
    with torch.random.fork_rng(devices=[]), _without_initialisation():
        model = _shaped(cls, config, entry, folder)
    model.load_state_dict(tensors, strict=True, assign=True)
    if entry is not None:
        kept = {key: value for key, value in entry.items() if key != "weights"}
        _register(model, PrunedConfig(kept))
    report = shards.read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    vars(model)["hwprune_spec"] = {"report": report}
    model.to(device)
    return (model if dtype is None else model.to(dtype)).eval()


@dataclass(frozen=True, eq=False)
class DenoiserFolder:
    """What a denoiser's folder says before any tensor is read.

    Attributes:
        config: config.json.
        entry: what was pruned; None for a dense model.
        stored: tensor name -> where it lies, and its shape.
        empty: the model on the meta device, checked against the tensors.
    """

    config: Mapping[str, Any]
    entry: PrunedConfig | None
    stored: Mapping[str, Stored]
    empty: nn.Module

    @property
    def stored_bytes(self) -> int:
        """Size of the tensor files."""
        return sum(file.stat().st_size for file in {s.file for s in self.stored.values()})

    def dense(self) -> nn.Module:
        """The dense model on the meta device."""
        config = {key: value for key, value in self.config.items() if key != KEY}
        with torch.device("meta"):
            model: nn.Module = type(self.empty).from_config(config)  # type: ignore[attr-defined]
        return model


def read_denoiser(folder: Path) -> DenoiserFolder:
    """Read and check what a denoiser's folder says of itself, without reading a tensor.

    Raises:
        CheckpointError: as `hwprune.load`, as far as it shows without the tensors.
    """
    config = shards.read_json(folder / "config.json")
    entry = pruned_entry(config)
    stored, headers = shards.read_headers(folder, DIFFUSERS_STEM)
    _check_agreement(folder, entry, headers)
    cls = _class_of(config, folder)
    _check_config(config, entry, len(stored), folder)
    size = sum(file.stat().st_size for file in {found.file for found in stored.values()})
    with torch.device("meta"):
        empty = _shaped(cls, config, entry, folder, 64 * size + _GIGABYTE)
    _check_size(empty, stored, folder)
    return DenoiserFolder(config, entry, stored, empty)


def _written_config(model: nn.Module) -> dict[str, Any]:
    """The config as it goes to the file.

    Raises:
        ValueError: the model is of a class we do not open, or is quantised.
    """
    written: dict[str, Any] = json.loads(getattr(model, "to_json_string")())  # noqa: B009
    written.pop("_name_or_path", None)  # where the dense model lay on this machine
    if type(model).__name__ not in known_classes():
        raise ValueError(
            f"{type(model).__name__} is no denoiser hwprune opens again; save it by its own save_pretrained"
        )
    if written.get(KEY) is None:
        written.pop(KEY, None)
    elif pruned_entry(written) is None:
        raise ValueError(f"{type(model).__name__} is quantised; save it before quantising")
    return written


def _class_of(config: Mapping[str, Any], folder: Path) -> Any:
    """The class a config names, one of ours only."""
    import diffusers

    name = config.get("_class_name")
    if name not in known_classes():
        raise CheckpointError(
            f"{folder / 'config.json'}: _class_name is {str(name)[:80]!r}, expected one of "
            f"{', '.join(known_classes())}"
        )
    return getattr(diffusers, name)


def _check_config(
    config: Mapping[str, Any], entry: PrunedConfig | None, stored: int, folder: Path
) -> None:
    """Bound what building the dense model can cost, before it is built.

    Raises:
        CheckpointError: naming the argument.
    """
    limit = stored + 64 * (1 + len(entry["shape"] if entry is not None else ()))
    for key, value in config.items():
        if key.startswith("_") or key == KEY:
            continue
        numbers = list(_numbers(value, f"{folder / 'config.json'}: {key}", 0))
        if any(abs(number) > _LIMIT for number in numbers):
            raise CheckpointError(f"{folder / 'config.json'}: {key}={value} is out of range")
        loops = "layers" in key or (key.startswith("num_") and "embeds" not in key)
        if loops and any(number > limit for number in numbers):
            raise CheckpointError(
                f"{folder / 'config.json'}: {key}={value} for a file of {stored} tensors"
            )


def _numbers(value: Any, where: str, depth: int) -> Iterator[float]:
    """Every number in a config value.

    Raises:
        CheckpointError: it is nested deeper, or longer, than configs are.
    """
    if isinstance(value, list | dict):
        items = list(value.values()) if isinstance(value, dict) else value
        if len(items) > 256 or depth > 3:
            raise CheckpointError(f"{where}: expected a short flat list, got {len(items)} values")
        for item in items:
            yield from _numbers(item, where, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shaped(
    cls: Any,
    config: Mapping[str, Any],
    entry: PrunedConfig | None,
    folder: Path,
    limit_bytes: float = math.inf,
) -> nn.Module:
    """The model of a config in its pruned shape, on the default device.

    Raises:
        CheckpointError: diffusers cannot build it, its dense form is larger than the limit, or the shape
            does not fit.
    """
    try:
        model: nn.Module = cls.from_config({k: v for k, v in config.items() if k != KEY})
        dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if dense_bytes > limit_bytes:
            raise ValueError(
                f"a dense model of {dense_bytes / _GIGABYTE:.3g} GB for so small a file"
            )
        if entry is not None:
            layers, _ = find_layers(model)
            reshape_(model, layers, entry["shape"])
    except Exception as error:  # whatever a constructor makes of arguments that do not fit
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: {type(error).__name__}: {said}") from error
    return model


def _check_size(empty: nn.Module, stored: Mapping[str, Stored], folder: Path) -> None:
    """Compare names and shapes with the file's headers.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    given = {name: found.shape for name, found in stored.items()}
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing:
        said = f"{missing[0]} is missing from the file ({len(missing)} such)"
    elif extra:
        said = f"{extra[0]} is in the file, but the model has no place for it ({len(extra)} such)"
    else:
        names = [name for name in expected if expected[name] != given[name]]
        if not names:
            return
        said = f"{names[0]}: expected {expected[names[0]]}, got {given[names[0]]}"
        said += f" ({len(names)} such)"
    raise CheckpointError(f"{folder}: {said}; save the model again")


def _check_agreement(
    folder: Path, entry: PrunedConfig | None, headers: list[dict[str, str]]
) -> None:
    """Refuse a config and tensor files that were not written together.

    Files of diffusers' own `save_pretrained` say nothing of themselves; ours do.
    """
    for metadata in headers:
        said = metadata.get(METHOD)
        if said is not None and (entry is None or said != _header(entry)):
            raise CheckpointError(
                f"{folder}: config.json and the tensor files describe different models; they were "
                "swapped or edited: save the model again"
            )


def _header(entry: Mapping[str, Any]) -> str:
    return json.dumps(
        {key: entry.get(key) for key in ("version", "shape", "weights")}, sort_keys=True
    )


@contextlib.contextmanager
def _without_initialisation() -> Iterator[None]:
    """Build modules without drawing their initial weights, by diffusers' own means where it has them."""
    try:
        from diffusers.models.modeling_utils import no_init_weights
    except ImportError:  # an older diffusers: slower, and the same in the end
        yield
        return
    with no_init_weights():
        yield


def _register(model: nn.Module, entry: PrunedConfig) -> None:
    register: Any = getattr(model, "register_to_config")  # noqa: B009 - diffusers' method
    register(**{KEY: entry})


def _is_ours(name: str) -> bool:
    return name in _FILES or bool(shards.SHARD.fullmatch(name))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_pipeline(pipeline: Any, folder: Path, *, force: bool) -> None:
    """Write a whole pipeline, by its own `save_pretrained`, whole or not at all, and the report beside it.

    Raises:
        FileExistsError: as `hwprune.save`.
        CheckpointError: the pruned denoiser that was written does not open as the same model.
    """
    names = {"model_index.json", "README.md", "report.json", "report.html", "samples.png"}
    names |= {str(k) for k in pipeline.components}

    def write(fresh: Path) -> None:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        for name, part in pipeline.components.items():
            spec = vars(part).get("hwprune_spec") if isinstance(part, nn.Module) else None
            if spec:
                check_tensors(load_denoiser(fresh / name), shards.portable(part.state_dict()))
                _write_json(fresh / "report.json", jsonable(dict(spec["report"]), "report"))

    replace_folder(folder, write, force=force, is_ours=names.__contains__)


def load_pipeline(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    """Open a pipeline's folder with diffusers; pruned components open by our hook.

    Raises:
        CheckpointError: diffusers cannot open it, or a component is a pickle.
    """
    from diffusers import DiffusionPipeline

    index = shards.read_json(folder / "model_index.json")
    parts = [key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    for part in parts:
        files = list((folder / part).glob("*")) if (folder / part).is_dir() else []
        weights = [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if weights and not any(f.suffix == ".safetensors" for f in files):
            raise CheckpointError(f"{weights[0]}: a pickle, which is never opened; save it again")
    for part in {p for p in ("unet", "transformer") if (folder / p / "config.json").exists()}:
        if pruned_entry(shards.read_json(folder / part / "config.json")) is not None:
            load_denoiser(folder / part)  # our strict reader says what is wrong, if anything is
    options = {} if dtype is None else {"torch_dtype": dtype}
    try:
        found = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: diffusers cannot open the pipeline: {said}") from error
    return found.to(device)
