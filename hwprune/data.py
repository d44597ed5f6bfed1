"""Opens what the user calls DATA, draws calibration images, and counts what a model gets right.

DATA is the word `digits`, a folder of class folders, a tar of them, or a data set that timm opens
by prefix: `hfds/NAME` (Hugging Face), `wds/FOLDER` (WebDataset), `hfids/NAME`, `tfds/NAME`. Images
go through the model's own timm transform; the digits have one of their own.

Shapes: N images, B images of a batch, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hwprune.digits import INPUT_SIZE, Digits, Progress, digits_dataset
from hwprune.images import Images, Item, input_size, open_images

_THREADS_FROM = 64  # images; below, starting threads costs more than it saves
_THREADS = min(4, os.cpu_count() or 1)
_IN_FLIGHT = 64  # decoded images that wait at most: 38 MB at 224 px


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model got right.

    Attributes:
        images: N.
        top1: share of images whose label has the highest logit.
        top5: share whose label is among the five highest; None below five classes.
        correct: bool [N], top-1 per image in the order of the data set, for paired comparisons.
        logits: float32 [N, K] on the CPU, where asked for.
    """

    images: int
    top1: float
    top5: float | None
    correct: Tensor
    logits: Tensor | None = None


def open_dataset(
    data: str, model: nn.Module, *, class_map: str | None = None, split: str | None = None
) -> Dataset[Item]:
    """Opens DATA for a model: (image float32 [C, H, W], label), by index; streams in order only.

    Class numbers of folders and tars come from the class map, else from ImageNet's names where the
    model has as many classes as an ImageNet and every folder is one of them, else from the sorted
    folder names. Images in no folder have the label -1: they calibrate, and cannot evaluate.

    Args:
        data: the user's DATA, see the top of this file. `./digits` is a folder of that name.
        model: a timm model; decides the transform. The digits have as many channels as it takes.
        class_map: text file, one class name a line in the order of the model's outputs.
        split: "train", "validation" ... Without one: the test split of the digits; a folder's `val`
            (`validation`, ...) where it has one; the first of validation, val, test of a data set.
            For `wds/` also shards and their count: "val-{0000..0009}.tar|50000".

    Raises:
        FileNotFoundError: no such folder, tar or class map.
        ValueError: no images, not a tar, a folder the class map lacks, a model without transform.
    """
    if data == "digits":
        return _open_digits(model, class_map, split)
    return open_images(data, model, class_map, split)


def calibration_batches(
    dataset: Dataset[Item], *, images: int, batch: int, seed: int = 0
) -> list[Tensor]:
    """A random subset of exactly `images` images, without their labels, in order of their index.

    Args:
        dataset: what `open_dataset` gives, or any sized data set of (image, label).
        images: how many, without replacement.
        batch: images a batch; the last may be smaller.
        seed: of the choice.

    Returns:
        Batches, float32 [B, C, H, W].

    Raises:
        ValueError: none asked for, fewer there, images of different shapes, NaN or Inf in one.
    """
    if images < 1 or batch < 1:
        raise ValueError(
            "expected at least one calibration image and a batch of at least one, got "
            f"images={images}, batch={batch}"
        )
    count = _count(dataset)
    if images > count:
        raise ValueError(
            f"expected {images} calibration images, got data with {count}; ask for at most {count} "
            "or give more data"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:images].sort().values.tolist()
    batches = []
    for indices, images_BCHW, _ in _batches(dataset, chosen, batch):
        broken_B = ~images_BCHW.isfinite().flatten(1).all(1)
        if broken_B.any():
            index = indices[int(broken_B.int().argmax())]
            raise ValueError(
                f"image {index} has NaN or Inf after the transform; expected finite values, remove "
                "the image or mend the transform"
            )
        batches.append(images_BCHW)
    return batches


def evaluate(
    model: nn.Module,
    dataset: Dataset[Item],
    *,
    batch: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    keep_logits: bool = False,
) -> Evaluation:
    """Top-1 and top-5 of a classifier on labelled images, in eval mode and without gradients.

    Args:
        model: a classifier on `device`, giving logits [B, K]; its modes are left as they were.
        dataset: what `open_dataset` gives, or any sized data set of (image, label).
        batch: images a batch.
        device: where the model is; batches are sent there, in the dtype of its weights.
        progress: called with (images done, N).
        keep_logits: return the logits too, 4 K N bytes.

    Raises:
        ValueError: no image, an image without label, labels or class folders that do not fit the
            model's outputs, logits that are NaN or Inf, a model elsewhere than on `device`.
    """
    count = _count(dataset)
    if count < 1 or batch < 1:
        raise ValueError(
            f"expected at least one image and a batch of at least one, got {count} images, "
            f"batch={batch}"
        )
    device = torch.device(device)
    dtype = _dtype_on(model, device)
    folder_classes = getattr(dataset, "folder_classes", None)
    correct, in_top5, kept = [], [], []
    done = 0
    with _evaluating(model):
        for indices, images_BCHW, labels_B in _batches(dataset, range(count), batch):
            out = model(images_BCHW.to(device, dtype))
            logits_BK = getattr(out, "logits", out)  # transformers answers with a named tuple
            logits_BK = _checked_logits(logits_BK, indices)
            _check_labels(labels_B, indices, logits_BK.shape[1], folder_classes)
            correct.append(logits_BK.argmax(1) == labels_B)
            if logits_BK.shape[1] >= 5:
                in_top5.append((logits_BK.topk(5).indices == labels_B[:, None]).any(1))
            if keep_logits:
                kept.append(logits_BK)
            done += len(indices)
            if progress is not None:
                progress(done, count)
    correct_N = torch.cat(correct)
    return Evaluation(
        images=count,
        top1=correct_N.double().mean().item(),
        top5=torch.cat(in_top5).double().mean().item() if in_top5 else None,
        correct=correct_N,
        logits=torch.cat(kept) if keep_logits else None,
    )


def _open_digits(model: nn.Module, class_map: str | None, split: str | None) -> Digits:
    if class_map is not None:
        raise ValueError("the digits carry their labels 0-9, got a class map; leave it out")
    channels, height, width = input_size(model)
    if (height, width) != INPUT_SIZE[1:]:
        raise ValueError(
            f"the digits are {INPUT_SIZE[1]}x{INPUT_SIZE[2]} pixels, the model takes "
            f"{height}x{width}; use the built-in model `digits`, or images of your own"
        )
    found = digits_dataset(cast(Any, "test" if split is None else split))
    return Digits(found.images_NCHW.expand(-1, channels, -1, -1), found.labels_N)


def _count(dataset: Dataset[Item]) -> int:
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"expected a data set that knows its length, got a {type(dataset).__name__} without "
            "`__len__`; wrap it in one that does"
        )
    return len(dataset)


def _batches(
    dataset: Dataset[Item], indices: Sequence[int], batch: int
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """(indices, images float32 [B, C, H, W], labels int64 [B]) in the order of `indices`."""
    items = _items(dataset, indices)
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        images: list[Tensor] = []
        labels: list[int] = []
        for index in part:
            item = next(items, None)
            if item is None:
                raise ValueError(
                    f"the data ended before image {index}: an image could not be decoded (see the "
                    "log above), or the count in its split or info file is too high"
                )
            image, label = item
            if images and image.shape != images[0].shape:
                raise ValueError(
                    f"image {index} is {list(image.shape)}, image {part[0]} is "
                    f"{list(images[0].shape)}; expected a transform that gives one shape"
                )
            images.append(image)
            labels.append(int(label))
        yield part, torch.stack(images), torch.tensor(labels)


def _items(dataset: Dataset[Item], indices: Sequence[int]) -> Iterator[Item]:
    """The items of ascending `indices`, in order, image files decoded ahead by threads.

    Threads and not worker processes: Pillow decodes outside Python's lock, an error arrives as it
    was raised, and neither shared memory nor an `if __name__` guard is needed.
    """
    if isinstance(dataset, IterableDataset):
        wanted = indices if isinstance(indices, range) else set(indices)
        last = indices[-1]
        for index, item in enumerate(dataset):
            if index in wanted:
                yield item
            if index == last:
                return
    elif isinstance(dataset, Images) and len(indices) > _THREADS_FROM:
        yield from _read_ahead(dataset, indices)
    else:
        for index in indices:
            yield dataset[index]


def _read_ahead(dataset: Images, indices: Iterable[int]) -> Iterator[Item]:
    pool = ThreadPoolExecutor(_THREADS)
    waiting: deque[Future[Item]] = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(dataset.__getitem__, index))
            if len(waiting) > _IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _dtype_on(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of the model's weights, which must be on the device."""
    for name, weight in model.named_parameters():
        same = weight.device.type == device.type
        if not same or device.index not in (None, weight.device.index):
            raise ValueError(
                f"{name} is on {weight.device}, expected {device}; move the model with "
                f'model.to("{device}") or give its device'
            )
    floating = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return next(floating, torch.float32)


def _checked_logits(logits_BK: object, indices: Sequence[int]) -> Tensor:
    """The logits, float32 on the CPU, refused where they are none."""
    if not isinstance(logits_BK, Tensor) or logits_BK.ndim != 2 or len(logits_BK) != len(indices):
        got = list(logits_BK.shape) if isinstance(logits_BK, Tensor) else type(logits_BK).__name__
        raise ValueError(
            f"expected logits of shape [{len(indices)}, classes] from the model, got {got}; "
            "evaluate needs an image classifier"
        )
    logits_BK = logits_BK.float().cpu()
    broken_B = ~logits_BK.isfinite().all(1)
    if broken_B.any():
        index = indices[int(broken_B.int().argmax())]
        raise ValueError(
            f"the model's logits for image {index} are NaN or Inf; expected finite logits, look "
            "for NaN in its weights or an overflow of its dtype"
        )
    return logits_BK


def _check_labels(
    labels_B: Tensor, indices: Sequence[int], classes: int, folder_classes: int | None
) -> None:
    if labels_B.min() < 0:
        index = indices[int(labels_B.argmin())]
        raise ValueError(
            f"image {index} has no class label; expected class folders, a class map or a data "
            "set with labels. Unlabelled images can calibrate but not evaluate"
        )
    if labels_B.max() >= classes:
        index = indices[int(labels_B.argmax())]
        raise ValueError(
            f"image {index} has the label {int(labels_B.max())}, the model has {classes} outputs; "
            "expected the classes the model was trained on, give a class map or other data"
        )
    if folder_classes is not None and folder_classes != classes:
        raise ValueError(
            f"the data has {folder_classes} class folders, the model {classes} outputs, so numbers "
            "counted from folder names would be wrong; give a class map: one folder name a line, "
            "in the order of the outputs"
        )
