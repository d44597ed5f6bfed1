"""Images are prepared as the processor beside a transformers model says, and as transformers itself would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwprune.families import hf_vit
from hwprune.image_preparation import assumed, preparation
from hwprune.images import input_size

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

from PIL import Image  # noqa: E402 - comes with timm
from timm.data import create_transform  # noqa: E402


def model_with(folder: Path, said: dict[str, Any] | None) -> nn.Module:
    model, _ = hf_vit.examples()["vit"]()
    if said is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    config: Any = model.config
    config.name_or_path = str(folder)
    return model


def picture(height: int, width: int) -> Any:
    """Smooth, so that filters of two libraries agree but for rounding."""
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x + c) * np.cos(y - c) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))


PROCESSORS = {
    "ViT": ("ViTImageProcessor", {}),
    "ViT, sharp": ("ViTImageProcessor", {"size": {"height": 96, "width": 64}, "resample": 3}),
    "CLIP": ("CLIPImageProcessor", {}),
    "DINOv2": ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
    "SigLIP": ("SiglipImageProcessor", {}),
    "DeiT": ("DeiTImageProcessor", {}),
    "not normalised": ("ViTImageProcessor", {"do_normalize": False}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(300, 420), (500, 310)])
def test_a_picture_is_prepared_as_the_processor_does(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    kind, changes = PROCESSORS[name]
    processor = getattr(transformers, kind)(**changes)
    processor.save_pretrained(tmp_path)
    model = model_with(tmp_path, None)
    ours = create_transform(**preparation(model), is_training=False)(picture(*shape))
    theirs = processor(picture(*shape), return_tensors="pt")["pixel_values"][0]
    assert input_size(model) == tuple(ours.shape) == tuple(theirs.shape)
    assert float((ours - theirs).abs().mean()) < 0.02  # a step of a pixel is 1 / 255 / 0.25
    assert not assumed(model)


@pytest.mark.parametrize(
    ("example", "size", "mean"),
    [("vit", 32, 0.5), ("clip", 32, 0.48145466), ("siglip", 32, 0.5), ("dinov2", 32, 0.485)],
)
def test_without_a_processor_the_usual_is_taken_and_told(
    example: str, size: int, mean: float
) -> None:
    model, _ = hf_vit.examples()[example]()
    found = preparation(model)
    assert found["input_size"] == (3, size, size) and found["mean"][0] == mean
    assert "no preprocessor_config.json" in assumed(model)


WHOLE = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rescale_factor": 1.0}, "expected pixels divided by 255, got a rescale_factor of 1.0"),
        ({"do_rescale": False}, "expected pixels divided by 255"),
        ({"do_resize": False}, "expected do_resize"),
        (
            {"size": {"shortest_edge": 9}},
            "expected do_center_crop beside a size of the shortest edge",
        ),
        ({"size": {"longest_edge": 9}}, "'height'"),
        ({"resample": 77}, "77"),
        ({"image_mean": None}, "NoneType"),
    ],
)
def test_a_processor_that_does_something_else_is_refused_by_file(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = model_with(tmp_path, WHOLE | changes)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: ") as caught:
        preparation(model)
    assert words in str(caught.value)


@pytest.mark.parametrize("crops", [False, True])
def test_the_oldest_files_have_one_number_for_the_size(crops: bool, tmp_path: Path) -> None:
    found = preparation(model_with(tmp_path, WHOLE | {"size": 40, "do_center_crop": crops}))
    assert found["input_size"] == (3, 40, 40)
    assert found["crop_mode"] == ("center" if crops else "squash")


def test_a_model_of_neither_library_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a timm model, whose `pretrained_cfg` says"):
        preparation(nn.Linear(2, 2))
    assert torch.is_tensor(torch.zeros(1)) and not assumed(nn.Linear(2, 2))
