"""Diffusion models as the user has them on disk: a pipeline, a denoiser with its scheduler, a denoiser alone.

A pruned model goes to a folder of the same form: the parts that were not touched are copied, file by file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hwprune.atomic import replace_folder
from hwprune.conditions import component_of
from hwprune.denoiser_checkpoint import load_denoiser, load_pipeline, save_denoiser
from hwprune.diffusion_card import denoiser_card, licence_files, licence_of
from hwprune.families.denoiser import known_classes
from hwprune.spec import CheckpointError

_OURS = ("report.json", "report.html", "samples.png", "model_index.json", "README.md")
_NAMES = ("transformer", "unet")


@dataclass(eq=False)
class DiffusionFolder:
    """A diffusion model that was opened.

    Attributes:
        folder: where it lies.
        form: "pipeline" = everything; "parts" = denoiser and scheduler; "component" = the denoiser's own
            folder, the scheduler lying beside it.
        name: of the denoiser's folder: transformer or unet.
        model: the denoiser.
        scheduler: of diffusers.
        pipeline: the whole, for the form "pipeline"; None once freed.
    """

    folder: Path
    form: Literal["pipeline", "parts", "component"]
    name: str
    model: nn.Module
    scheduler: Any
    pipeline: Any = None

    @property
    def whole(self) -> Any:
        """What `hwprune.prune_diffusion` takes: the pipeline where there is one."""
        return self.model if self.pipeline is None else self.pipeline

    def opens(self, out: Path) -> str:
        """A line of Python that opens what was saved, once hwprune is imported."""
        if self.form == "pipeline":
            return f'import hwprune; pipeline = hwprune.load("{out}")'
        place = out if self.form == "component" else out / self.name
        return f'import hwprune; model = hwprune.load("{place}")'


def open_diffusion(name: str, *, dtype: torch.dtype | None = None) -> DiffusionFolder:
    """Open MODEL of `hwprune prune-diffusion`.

    Args:
        name: a folder, or the name of a pipeline on the hub.
        dtype: of the weights; None = as they are stored.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no denoiser we can cut, or no scheduler.
        CheckpointError: it is damaged.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _from_the_hub(name)
    if (folder / "model_index.json").is_file():
        pipeline = load_pipeline(folder, "cpu", dtype)
        part, model = component_of(pipeline)
        return DiffusionFolder(folder, "pipeline", part, model, pipeline.scheduler, pipeline)
    found = [part for part in _NAMES if (folder / part / "config.json").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both a transformer and a unet; keep the one to prune")
    if found:
        model = load_denoiser(folder / found[0], dtype=dtype)
        return DiffusionFolder(folder, "parts", found[0], model, _scheduler(folder / "scheduler"))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no diffusion model: expected model_index.json (a pipeline), or transformer/ or "
            "unet/ beside scheduler/, or the config.json of one"
        )
    _check_class(folder)
    model = load_denoiser(folder, dtype=dtype)
    scheduler = _scheduler(folder.resolve().parent / "scheduler")
    return DiffusionFolder(folder, "component", folder.name, model, scheduler)


def _check_class(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: expected JSON: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in known_classes():
        raise ValueError(
            f"{folder} holds a {name or 'model without a class of diffusers'}; expected one of "
            f"{', '.join(known_classes())}; vision transformers are pruned by hwprune prune"
        )


def _from_the_hub(name: str) -> Path:
    """The files of a pipeline on the hub, in its cache."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise FileNotFoundError(f"{name}: no such folder, and no name of a pipeline on the hub")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except (OSError, ValueError) as error:  # no connection, no such name, no safetensors
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is no folder, and could not be had from the hub: {said}"
        ) from error


def _scheduler(folder: Path) -> Any:
    """The scheduler of a folder.

    Raises:
        ValueError: there is none, or none of diffusers.
    """
    import diffusers

    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; the trajectory needs the scheduler the model was made for, in scheduler/ "
            "beside transformer/ or unet/"
        )
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: expected a JSON object: {error}") from error
    cls: Any = getattr(diffusers, str(name), None)
    if not str(name).endswith("Scheduler") or not hasattr(cls, "set_timesteps"):
        raise ValueError(f"{file}: _class_name is {name!r}, expected a scheduler of diffusers")
    return cls.from_pretrained(folder)


def check_target(out: Path, opened_folder: Path, *, force: bool) -> None:
    """Refuse a folder that cannot be written, before the long work.

    Raises:
        FileExistsError: it is there without `force`, is a file, or holds what is not ours.
        ValueError: it is the model itself, or within it.
    """
    here, source = out.resolve(), opened_folder.resolve()
    if here == source or source in here.parents or here in source.parents:
        raise ValueError(
            f"--out {out} and the model's own folder lie in each other; choose another"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; name a folder")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if held and not force:
        raise FileExistsError(
            f"--out {out} exists already; choose another folder, or replace it with --force"
        )
    if held and "report.json" not in held:
        raise FileExistsError(
            f"--out {out} holds {held[0]!r} and no report.json, so hwprune did not write it, and --force does "
            "not replace it; choose another folder"
        )


def _card(opened: DiffusionFolder, report: Mapping[str, Any]) -> str:
    """The model card, with the licence of what was pruned."""
    base = opened.folder.resolve().parent if opened.form == "component" else opened.folder
    config: Mapping[str, Any] = dict(getattr(opened.model, "config", {}))
    config = {**config, "_class_name": type(opened.model).__name__}
    told = report or vars(opened.model)["hwprune_spec"]["report"]
    how = "" if opened.form == "component" else opened.form
    return denoiser_card(config, told, head=licence_of(base), form=how, name=opened.name)


def save_diffusion(
    opened: DiffusionFolder,
    out: Path,
    *,
    force: bool = False,
    pictures: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Write the pruned model in the form it came in, whole or not at all.

    Args:
        opened: with the pruned denoiser.
        out: the new folder.
        force: replace one that hwprune wrote.
        pictures: called with the new folder and the PNG to write sample pictures to.

    Returns:
        Where the pictures are.

    Raises:
        FileExistsError, OSError, CheckpointError: as `hwprune.save`.
    """
    if opened.form == "component":
        save_denoiser(opened.model, out, force=force, card=_card(opened, {}))
        beside = out.with_name(f"{out.name}.samples.png")
        if pictures is not None:
            pictures(out, beside)
        return beside
    others = [
        path
        for path in opened.folder.iterdir()
        if path.name != opened.name and (path.is_dir() or path.name == "model_index.json")
    ]
    if opened.form == "parts":
        others = [path for path in others if path.name == "scheduler"]
    others += licence_files(opened.folder)
    report: Mapping[str, Any] = vars(opened.model)["hwprune_spec"]["report"]

    def write(fresh: Path) -> None:
        save_denoiser(opened.model, fresh / opened.name, force=False)
        for path in others:
            if path.is_dir():
                shutil.copytree(path, fresh / path.name)
            else:
                shutil.copyfile(path, fresh / path.name)
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        (fresh / "report.json").write_text(text, encoding="utf-8")
        (fresh / "README.md").write_text(_card(opened, report), encoding="utf-8")
        if pictures is not None:
            pictures(fresh, fresh / "samples.png")

    ours = {*_OURS, opened.name, *(path.name for path in others)}
    replace_folder(out, write, force=force, is_ours=ours.__contains__)
    return out / "samples.png"
