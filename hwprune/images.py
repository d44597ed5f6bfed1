"""Lists and reads the images of a folder, a tar or a data set timm opens, for a model's transform.

timm lists the files and names their classes; reading them is ours, because timm's own data set
replaces an image it cannot decode by the next one, and because readers side by side must not share
a tar's handle.

Shapes: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hwprune.image_preparation import preparation
from hwprune.transformers_base import is_transformers

Item: TypeAlias = tuple[Tensor, int]  # image float32 [C, H, W], label; -1 = no label
Transform: TypeAlias = Callable[[Any], Tensor]  # PIL image -> float32 [C, H, W]
Encoded: TypeAlias = tuple[io.BytesIO, int, str]  # an image file, its label, its name for errors

STREAMED = ("wds", "hfids", "tfds")  # prefixes of data that can only be read in order
_EXPECTED = (
    "expected a folder of class folders, a .tar of them, hfds/NAME, wds/FOLDER, hfids/NAME, "
    "tfds/NAME or the word digits"
)
_SPLITS = ("validation", "val", "test")  # tried in this order where none is asked for


class Images(Dataset[Item]):
    """Image files, decoded and transformed one by one, safe to read from several threads.

    Args:
        read: gives the encoded file of an index.
        count: N.
        transform: the model's.
        mode: PIL mode the model takes, "RGB" or "L".
        folder_classes: how many class folders the labels were counted from, in sorted order; None
            where labels are the model's own (class map, ImageNet's names, a data set's labels).
    """

    def __init__(
        self,
        read: Callable[[int], Encoded],
        count: int,
        transform: Transform,
        mode: str,
        folder_classes: int | None = None,
    ) -> None:
        self._read = read
        self._count = count
        self._transform = transform
        self._mode = mode
        self.folder_classes = folder_classes

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        from PIL import Image

        if not 0 <= index < self._count:
            raise IndexError(f"expected an image index in 0..{self._count - 1}, got {index}")
        file, label, name = self._read(index)
        try:
            with Image.open(file) as picture:
                converted = picture.convert(self._mode)
        # what Pillow raises on damaged files, from its decoders and its own parsers
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"image {index} ({name}) cannot be decoded: {error}; expected an intact image "
                "file, replace or remove it"
            ) from error
        return self._transform(converted), label


class ImageStream(IterableDataset[Item]):
    """Images that can only be read in order, transformed; the same order every time.

    Args:
        reader: timm's, giving (PIL image, label).
        count: N.
        transform: the model's.
    """

    def __init__(self, reader: Any, count: int, transform: Transform) -> None:
        self._reader = reader
        self._count = count
        self._transform = transform

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for picture, label in self._reader:
            yield self._transform(picture), _class_number(label)


@dataclass(frozen=True, slots=True)
class _File:
    """Where one encoded image lies: a run of bytes of a file."""

    path: Path
    start: int
    size: int | None  # None = to the end
    label: int
    name: str


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model takes.

    Raises:
        ValueError: as `hwprune.image_preparation.preparation`.
    """
    found: tuple[int, int, int] = preparation(model)["input_size"]
    return found


def open_images(
    data: str, model: nn.Module, class_map: str | None, split: str | None
) -> Images | ImageStream:
    """Opens image DATA; see `hwprune.data.open_dataset`."""
    transform, mode = _transform(model)
    names = None if class_map is None else _read_class_map(Path(class_map))
    prefix, slash, rest = data.partition("/")
    if slash and prefix in STREAMED:
        reader = _open_reader(data, rest if prefix == "wds" else None, names, split, mode)
        # timm knows the count from the data set's metadata, or not: then one pass counts it
        count = len(reader) or sum(1 for _ in reader)
        return ImageStream(reader, _some(count, data), transform)
    if slash and prefix == "hfds":
        reader = _open_reader(data, None, names, split, mode)
        return Images(partial(_read_hub, reader), _some(len(reader), data), transform, mode)
    files, folder_classes = _list_files(Path(data).expanduser(), names, split, model)
    return Images(partial(_read_file, files), len(files), transform, mode, folder_classes)


def _transform(model: nn.Module) -> tuple[Transform, str]:
    """The model's own transform, and the PIL mode of its channels."""
    from timm.data import create_transform

    config = preparation(model)
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, the model takes {channels}")
    for key in ("mean", "std"):  # of 3 channels where a model was built with another in_chans
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return create_transform(**config, is_training=False), "L" if channels == 1 else "RGB"


def _some(count: int, data: str) -> int:
    if count < 1:
        raise ValueError(f"{data} holds no images; {_EXPECTED}")
    return count


def _class_number(label: Any) -> int:
    """A data set's label as one class number; -1 where it has none, or several."""
    try:
        return int(label)
    except (TypeError, ValueError):
        return -1


# --- folders and tars --------------------------------------------------------------------------


def _list_files(
    root: Path, names: Mapping[str, int] | None, split: str | None, model: nn.Module
) -> tuple[list[_File], int | None]:
    """The images under a folder or in a tar with their labels, and `Images.folder_classes`."""
    if not root.exists():
        raise FileNotFoundError(f"no such folder or file: {root}; {_EXPECTED}")
    if root.is_file():
        if root.suffix != ".tar":
            raise ValueError(f"{root} is a file but not a .tar; {_EXPECTED}")
        if split is not None:
            raise ValueError(
                f"a tar has no splits, got split={split!r}; name the tar of that split"
            )
    from timm.data import create_dataset

    # the cache of a tar's contents that timm may keep beside it is a pickle
    options = {"cache_tarinfo": False} if root.is_file() else {}
    try:
        reader = create_dataset("", root=str(root), split=split or "validation", **options).reader
    except tarfile.TarError as error:
        raise ValueError(
            f"{root} is not a tar: {error}; expected an uncompressed tar of class folders"
        ) from error
    except (RuntimeError, ValueError) as error:  # how timm's two readers meet an empty list
        raise ValueError(f"{root} holds no images ({error}); {_EXPECTED}") from error
    if root.is_dir() and Path(reader.root) == root:
        if split is not None:
            raise ValueError(f"{root} has no folder for the split {split!r}; leave the split out")
        if (root / "train").is_dir():
            raise ValueError(
                f"{root} has a folder `train` but none for validation; name the split, or give the "
                "folder that holds the class folders"
            )
    if root.is_file():
        found, targets = reader.class_name_to_idx, [int(t) for t in reader.targets]
        labels, folder_classes = _labels(found, targets, names, model)
        size = root.stat().st_size
        files = [
            _in_tar(root, size, sample, label)
            for sample, label in zip(reader.samples, labels, strict=True)
        ]
    else:
        found, targets = reader.class_to_idx, [int(t) for _, t in reader.samples]
        labels, folder_classes = _labels(found, targets, names, model)
        files = [
            _File(Path(path), 0, None, label, path)
            for (path, _), label in zip(reader.samples, labels, strict=True)
        ]
    return files, folder_classes


def _in_tar(root: Path, tar_size: int, sample: Sequence[Any], label: int) -> _File:
    """A member's place, from timm's (member, _, the tar inside the tar that holds it or None)."""
    member, _, inner = sample
    start = int(member.offset_data) + (0 if inner is None else int(inner.offset_data))
    if start + member.size > tar_size:
        raise ValueError(
            f"{root} is cut short at its member {member.name}: expected at least "
            f"{start + member.size} bytes, got {tar_size}; fetch the tar again"
        )
    return _File(root, start, int(member.size), label, member.name)


def _labels(
    found: Mapping[str, int],
    targets: Sequence[int],
    names: Mapping[str, int] | None,
    model: nn.Module,
) -> tuple[list[int], int | None]:
    """The model's class number of every image, and `Images.folder_classes`.

    Args:
        found: folder name -> timm's number; "" = images in no folder.
        targets: timm's number of every image.
        names: class name -> class number, where the user gave them.
        model: decides whether ImageNet's names apply.
    """
    folder_of = {number: folder for folder, number in found.items()}
    folders = [folder_of[number] for number in sorted(folder_of) if folder_of[number]]
    names = names or _imagenet_names(set(folders), model)
    folder_classes = None
    if names is None:
        names = {folder: number for number, folder in enumerate(folders)}
        folder_classes = len(folders)
    strangers = [folder for folder in folders if folder not in names]
    if strangers:
        raise ValueError(
            f"the class map has no line for {len(strangers)} of {len(folders)} folders, the first "
            f"is {strangers[0]!r}; expected one line a class, with the folder's name alone"
        )
    return [names.get(folder_of[target], -1) for target in targets], folder_classes


def _imagenet_names(folders: set[str], model: nn.Module) -> dict[str, int] | None:
    """ImageNet's class numbers by wnid, where the model and all folders are of ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    of_transformers = {"num_classes": getattr(model, "num_labels", None)}
    subset = infer_imagenet_subset(of_transformers if is_transformers(model) else model)
    if subset is None or not folders:
        return None
    names = {name: number for number, name in enumerate(ImageNetInfo(subset).label_names())}
    return names if folders <= names.keys() else None


def _read_class_map(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no such class map: {path}; expected a text file with one class name a line"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text; expected a class map with one class name a line"
        ) from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines):
        name = line.strip()
        if name in names:
            raise ValueError(
                f"{path} names {name!r} on lines {names[name] + 1} and {number + 1}; expected each "
                "class once, in the order of the model's outputs"
            )
        if name:
            names[name] = number
    if not names:
        raise ValueError(f"{path} names no class; expected one class name a line")
    return names


def _read_file(files: Sequence[_File], index: int) -> Encoded:
    entry = files[index]
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        content = file.read() if entry.size is None else file.read(entry.size)
    return io.BytesIO(content), entry.label, entry.name


# --- data sets by prefix -----------------------------------------------------------------------


def _open_reader(
    data: str, root: str | None, names: Mapping[str, int] | None, split: str | None, mode: str
) -> Any:
    """The reader timm has for data by prefix, at the split asked for or the first there is."""
    from timm.data import create_dataset

    if root is not None and "://" not in root and not Path(root).is_dir():
        raise FileNotFoundError(f"no such folder: {root}; {_EXPECTED}")
    splits = (split,) if split else (_shards(Path(root)) if root else None) or _SPLITS
    first: Exception | None = None
    for candidate in splits:
        try:
            return create_dataset(
                data, root=root, split=candidate, class_map=names, input_img_mode=mode
            ).reader
        except Exception as error:  # whatever the library behind the prefix raises
            first = first or error
    raise ValueError(
        f"{data} cannot be opened at split {splits[0]!r}: {type(first).__name__}: {first}; name "
        "another split, or install the package it asks for"
    ) from first


def _shards(folder: Path) -> tuple[str] | None:
    """All shards of a WebDataset folder as one split, where no info file names its splits."""
    if any((folder / name).exists() for name in ("_info.json", "info.json")):
        return None
    shards = sorted(path.name for path in folder.glob("*.tar"))
    return ("::".join(shards),) if shards else None


def _read_hub(reader: Any, index: int) -> Encoded:
    try:
        file, label = reader[index]
    except KeyError as error:
        raise ValueError(
            f"image {index} has no field {error}; expected the fields `image` and `label`"
        ) from error
    with file:
        return io.BytesIO(file.read()), _class_number(label), "of the data set"
