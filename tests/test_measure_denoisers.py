"""`hwprune measure` of diffusion models, in whatever folder they lie, pruned against dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import hwprune
from hwprune.cli import main
from hwprune.denoiser_folder import denoiser_folder, open_denoiser
from hwprune.meter import arms

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install hwprune[diffusers]"
)

from fakes.tiny_diffusion import flow, stable_diffusion, tiny_dit  # noqa: E402

QUICK = ("--rounds", "2", "--no-energy", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short blocks, and no warm-up of half a second."""
    monkeypatch.setattr(arms, "calls_per_block", lambda *given: 5)
    monkeypatch.setattr(arms, "warm_up", lambda timer, call, count: (0.001, ()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline, parts and a component, dense and pruned."""
    top = tmp_path_factory.mktemp("measured")
    pipeline = stable_diffusion(top / "words")
    pipeline.save_pretrained(top / "sd")
    hwprune.save(tiny_dit(), top / "parts" / "transformer")
    flow().save_pretrained(top / "parts" / "scheduler")
    asked = {"steps": 1, "updates": 2, "images": 2, "batch": 2, "method": "random"}
    model = tiny_dit()
    hwprune.prune_diffusion(model, [1], hwprune.Budget(params=0.8), scheduler=flow(), **asked)
    hwprune.save(model, top / "small")
    hwprune.prune_diffusion(pipeline, ["a"], hwprune.Budget(params=0.97), **asked)
    hwprune.save(pipeline, top / "small-sd")
    return {path.name: path for path in top.iterdir()}


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["measure", *map(str, words), *QUICK])
    assert isinstance(ended.value.code, int)
    return (ended.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("small", "dense", "batch"), [("small", "parts", 1), ("small-sd", "sd", 2)]
)
def test_a_pruned_denoiser_is_measured_against_the_dense_one(
    capsys: pytest.CaptureFixture[str], folders: dict[str, Path], small: str, dense: str, batch: int
) -> None:
    words = ("--batch", 2) if batch == 2 else ()
    code, out, err = ran(capsys, folders[small], "--against", folders[dense], *words, "--json", "-")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["ratio"]["against"] == "dense" and found["ratio"]["latency"]["value"] > 0
    weights = {
        name: arm["peak_memory_bytes"]["weight_bytes"] for name, arm in found["arms"].items()
    }
    assert weights["model"] < weights["dense"]
    assert found["settings"]["batch"] == batch
    assert any("latents and text" in note for note in found["notes"])


def test_a_denoiser_alone_is_measured_in_another_type(
    capsys: pytest.CaptureFixture[str], folders: dict[str, Path]
) -> None:
    code, out, err = ran(capsys, folders["sd"] / "unet", "--dtype", "bf16")
    assert (code, err) == (0, "") and "batch 1, bfloat16" in out


def test_every_form_of_folder_has_one_denoiser(folders: dict[str, Path], tmp_path: Path) -> None:
    assert denoiser_folder(folders["sd"]) == folders["sd"] / "unet"
    assert denoiser_folder(folders["parts"]) == folders["parts"] / "transformer"
    assert denoiser_folder(folders["small"]) == folders["small"]
    assert denoiser_folder(tmp_path) is None and denoiser_folder(tmp_path / "none") is None
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a pipeline without transformer or unet"):
        denoiser_folder(tmp_path)
    for name in ("transformer", "unet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds both a transformer and a unet"):
        denoiser_folder(tmp_path)


def test_a_class_of_diffusers_that_is_not_pruned_opens_too(tmp_path: Path) -> None:
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    model.save_pretrained(tmp_path / "x")  # type: ignore[operator]
    opened = open_denoiser(tmp_path / "x")
    assert type(opened) is type(model) and not opened.training
    (tmp_path / "x" / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(ValueError, match="has no NoSuchModel"):
        open_denoiser(tmp_path / "x")


def test_what_is_of_images_alone_is_refused(
    capsys: pytest.CaptureFixture[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    dit, sd = folders["parts"], folders["sd"]
    for words, piece in (
        ((dit, "--data", "digits"), "--data gives images"),
        ((dit, "--against", dit, "--split"), "--split is of vision transformers"),
        ((dit, "--against", sd), "DiTTransformer2DModel and UNet2DConditionModel do not take"),
        ((dit, "--weights", tmp_path / "x.pth"), "holds its own weights"),
        ((dit, "--batch", 0), "--batch: expected at least 1"),
    ):
        code, out, err = ran(capsys, *words)
        assert (code, out) == (2, "") and err.count("\n") == 1 and piece in err, err
