"""Digits as DATA, drawing calibration images, counting what a model gets right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hwprune.data import calibration_batches, evaluate, open_dataset
from hwprune.images import ImageStream


class Numbered(Dataset[tuple[Tensor, int]]):
    """Item i is an image filled with i, label i % classes."""

    def __init__(self, count: int, classes: int = 10) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.count:
            raise IndexError(index)
        return torch.full((1, 2, 2), float(index)), index % self.classes


class Scripted(nn.Module):
    """Gives the logits written down for the image's number."""

    def __init__(self, logits_NK: Tensor) -> None:
        super().__init__()
        self.logits_NK = nn.Parameter(logits_NK)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_NK[x[:, 0, 0, 0].long()]


# --- digits ------------------------------------------------------------------------------------


def small(**options: int) -> nn.Module:
    timm = pytest.importorskip("timm", reason="digits open for a timm model")
    return timm.create_model(
        "deit_tiny_patch16_224", embed_dim=12, depth=1, patch_size=4, **options
    )


def test_digits_open_for_the_model_they_are_given():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    grey, colour = small(img_size=16, in_chans=1), small(img_size=16, in_chans=3)
    test, train = open_dataset("digits", grey), open_dataset("digits", grey, split="train")
    assert (len(test), len(train)) == (599, 1198)
    in_colour = open_dataset("digits", colour)
    assert test[5][0].shape == (1, 16, 16) and in_colour[5][0].shape == (3, 16, 16)
    assert torch.equal(in_colour[5][0][2], test[5][0][0]) and in_colour[5][1] == test[5][1]
    colour(calibration_batches(in_colour, images=2, batch=2)[0])


def test_digits_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match="digits are 16x16 pixels, the model takes 32x32; use"):
        open_dataset("digits", small(img_size=32))
    with pytest.raises(ValueError, match="labels 0-9, got a class map"):
        open_dataset("digits", small(img_size=16), class_map="names.txt")
    with pytest.raises(ValueError, match="'train' and 'test', got 'validation'"):
        open_dataset("digits", small(img_size=16), split="validation")


# --- calibration -------------------------------------------------------------------------------


def test_calibration_draws_exactly_that_many_in_order_without_replacement():
    batches = calibration_batches(Numbered(50), images=23, batch=10, seed=4)
    assert [len(batch) for batch in batches] == [10, 10, 3]
    drawn = torch.cat(batches)[:, 0, 0, 0].tolist()
    assert drawn == sorted(set(drawn)) and len(drawn) == 23


def test_the_seed_decides_the_calibration_images():
    def draw(seed: int) -> Tensor:
        return calibration_batches(Numbered(50), images=9, batch=9, seed=seed)[0]

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "batch", "match"),
    [
        (0, 4, "at least one calibration image .* got images=0"),
        (4, 0, "batch of at least one, got images=4, batch=0"),
        (11, 4, "expected 11 calibration images, got data with 10; ask for at most 10"),
    ],
)
def test_impossible_calibration_is_refused(images: int, batch: int, match: str):
    with pytest.raises(ValueError, match=match):
        calibration_batches(Numbered(10), images=images, batch=batch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_calibration_image_that_is_not_finite_is_named(bad: float):
    items = [(torch.zeros(1, 2, 2), 0) for _ in range(6)]
    items[4][0][0, 1, 0] = bad
    with pytest.raises(ValueError, match="image 4 has NaN or Inf after the transform"):
        calibration_batches(items, images=6, batch=4)


def test_images_of_different_shapes_are_named():
    items = [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 2), 0)]
    with pytest.raises(ValueError, match=r"image 1 is \[1, 3, 2\], image 0 is \[1, 2, 2\]"):
        calibration_batches(items, images=2, batch=2)


# --- evaluation --------------------------------------------------------------------------------


def test_top1_and_top5_are_counted_as_by_hand():
    logits = torch.randn(30, 7, generator=torch.Generator().manual_seed(3))
    calls: list[tuple[int, int]] = []
    found = evaluate(
        Scripted(logits),
        Numbered(30, classes=7),
        batch=8,
        progress=lambda done, total: calls.append((done, total)),
        keep_logits=True,
    )
    ranks = [sorted(row, reverse=True).index(row[i % 7]) for i, row in enumerate(logits.tolist())]
    assert found.images == 30
    assert found.correct.tolist() == [rank == 0 for rank in ranks]
    assert found.top1 == sum(rank == 0 for rank in ranks) / 30
    assert found.top5 == sum(rank < 5 for rank in ranks) / 30
    assert torch.equal(found.logits, logits)
    assert calls == [(8, 30), (16, 30), (24, 30), (30, 30)]


def test_there_is_no_top5_of_four_classes():
    found = evaluate(Scripted(torch.eye(4)), Numbered(4, classes=4), batch=3)
    assert found.top5 is None and found.top1 == 1 and found.logits is None


def test_evaluation_leaves_every_mode_as_it_was():
    model = nn.Sequential(nn.Dropout(0.9), Scripted(torch.eye(4)), nn.Dropout(0.9))
    model.train()
    model[0].eval()
    found = evaluate(model, Numbered(4, classes=4), batch=4)
    assert found.top1 == 1  # the last dropout was off
    assert [part.training for part in model] == [False, True, True] and model.training
    assert not found.correct.requires_grad


def test_evaluation_uses_the_dtype_of_the_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 10)).to(torch.float64)
    assert evaluate(model, Numbered(4), batch=2).images == 4


@pytest.mark.parametrize(
    ("logits", "dataset", "match"),
    [
        (torch.zeros(4, 3), Numbered(4), "image 3 has the label 3, the model has 3 outputs"),
        (torch.zeros(4), Numbered(4), r"expected logits of shape \[4, classes\].* got \[4\]"),
        (torch.full((4, 10), torch.nan), Numbered(4), "logits for image 0 are NaN or Inf"),
        (torch.zeros(4, 10), Numbered(0), "at least one image .* got 0 images"),
    ],
)
def test_an_evaluation_that_cannot_be_right_is_refused(
    logits: Tensor, dataset: Numbered, match: str
):
    with pytest.raises(ValueError, match=match):
        evaluate(Scripted(logits), dataset, batch=4)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"logits_NK is on cpu, expected meta; move the model"):
        evaluate(Scripted(torch.eye(4)), Numbered(4), batch=2, device="meta")


def test_a_stream_is_read_in_order_and_must_hold_what_it_says():
    pairs = [(torch.full((1, 2, 2), float(i)), i % 3) for i in range(9)]
    logits = nn.functional.one_hot(torch.arange(9) % 3, 3).float()
    stream = ImageStream(pairs, 9, transform=lambda image: image)
    assert evaluate(Scripted(logits), stream, batch=4).top1 == 1
    (batch,) = calibration_batches(stream, images=4, batch=4, seed=2)
    (same,) = calibration_batches(Numbered(9), images=4, batch=4, seed=2)
    assert torch.equal(batch, same)
    with pytest.raises(
        ValueError, match="the data ended before image 9: an image could not be dec"
    ):
        evaluate(Scripted(logits), ImageStream(pairs, 11, lambda image: image), batch=4)


def test_importing_data_imports_nothing_heavy():
    heavy = "timm", "torchvision", "PIL", "sklearn", "datasets"
    script = f"import hwprune.data, sys; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
