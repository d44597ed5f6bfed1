"""Opening DATA: folders, tars, data sets by prefix; what is read is what timm would read."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

timm = pytest.importorskip("timm", reason="images go through timm's transforms")
PIL_Image = pytest.importorskip("PIL.Image", reason="comes with timm's torchvision")

from hwprune.data import calibration_batches, evaluate, open_dataset  # noqa: E402
from hwprune.images import Images  # noqa: E402

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A random ViT for 32x32 RGB images and three classes."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=1,
        num_heads=3,
        num_classes=3,
    ).eval()


def picture(seed: int) -> PIL_Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return PIL_Image.fromarray(pixels)


def fill(folder: Path, each: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """`each` pictures in every class folder."""
    for row, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for column in range(each):
            picture(row * each + column).save(folder / name / f"{column}.png")
    return folder


def pack(folder: Path, tar: Path, mode: str = "w") -> Path:
    with tarfile.open(tar, mode) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.add(path, arcname=str(path.relative_to(folder)))
    return tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "pictures")


# --- opening -----------------------------------------------------------------------------------


def timms_own(root: Path, size: tuple[int, int, int]) -> Dataset:
    found = timm.data.create_dataset("", root=str(root))
    config = timm.data.resolve_data_config(
        {"input_size": size},
        pretrained_cfg=timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict(),
    )
    found.transform = timm.data.create_transform(**config, is_training=False)
    return found


def assert_same_items(ours: Dataset, theirs: Dataset) -> None:
    assert len(ours) == len(theirs) > 0
    for index in range(len(ours)):
        (image, label), (expected, number) = ours[index], theirs[index]
        assert torch.equal(image, expected) and label == number and type(label) is int


def test_a_folder_gives_what_timm_gives(folder: Path, model: nn.Module):
    ours = open_dataset(str(folder), model)
    assert ours[0][0].shape == (3, 32, 32) and ours[0][0].dtype == torch.float32
    assert_same_items(ours, timms_own(folder, (3, 32, 32)))


def test_a_tar_gives_what_timm_gives(folder: Path, tmp_path: Path, model: nn.Module):
    tar = pack(folder, tmp_path / "pictures.tar")
    assert_same_items(open_dataset(str(tar), model), timms_own(tar, (3, 32, 32)))


def test_a_tar_of_tars_gives_what_timm_gives(folder: Path, tmp_path: Path, model: nn.Module):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in CLASSES:
        pack(folder / name, inner / f"{name}.tar")
    tar = pack(inner, tmp_path / "outer.tar")
    assert_same_items(open_dataset(str(tar), model), timms_own(tar, (3, 32, 32)))


def test_a_model_of_one_channel_gets_grey_images(folder: Path):
    grey = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, embed_dim=12, depth=1
    )
    image, _ = open_dataset(str(folder), grey)[0]
    pixels = np.asarray(picture(0).convert("L"))
    assert image.shape == (1, 16, 16)
    assert image.mean() == pytest.approx(float(pixels.mean()) / 255 * 2 - 1, abs=0.1)


def test_a_model_without_timms_config_is_refused(folder: Path):
    with pytest.raises(ValueError, match=r"expected a timm model.*got a Linear; give calibration"):
        open_dataset(str(folder), nn.Linear(2, 2))


def test_the_class_map_numbers_the_classes(folder: Path, tmp_path: Path, model: nn.Module):
    names = tmp_path / "names.txt"
    names.write_text("cat\nant\n\nbee\n\n")
    dataset = open_dataset(str(folder), model, class_map=str(names))
    assert [dataset[i][1] for i in (0, 4, 8)] == [1, 3, 0]
    tar = pack(folder, tmp_path / "pictures.tar")
    from_tar = open_dataset(str(tar), model, class_map=str(names))
    assert [from_tar[i][1] for i in (0, 4, 8)] == [1, 3, 0]


def test_folders_of_imagenet_are_numbered_by_its_names(tmp_path: Path):
    large = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1)
    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    chosen = (wnids[3], wnids[77], wnids[999])
    dataset = open_dataset(str(fill(tmp_path / "subset", each=1, classes=chosen)), large)
    assert [dataset[i][1] for i in range(3)] == [3, 77, 999]


def test_real_imagenet_needs_no_class_map(shared_data: Path):
    large = timm.create_model("vit_tiny_patch16_224", depth=1)
    tar = str(shared_data / "imagenet_val_dev650.tar")
    plain = open_dataset(tar, large)
    mapped = open_dataset(tar, large, class_map=str(shared_data / "imagenet_classes.txt"))
    assert len(plain) == 650 and plain[0][0].shape == (3, 224, 224)
    some = range(0, 650, 40)
    assert [plain[i][1] for i in some] == [mapped[i][1] for i in some]


def test_images_in_no_folder_have_no_label(tmp_path: Path, model: nn.Module):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    dataset = open_dataset(str(tmp_path), model)
    assert [dataset[i][1] for i in range(3)] == [-1, -1, -1]
    assert calibration_batches(dataset, images=3, batch=2)[0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"image 0 has no class label.*can calibrate but not eval"):
        evaluate(model, dataset, batch=2)


def test_a_stray_image_does_not_shift_the_classes(folder: Path, model: nn.Module):
    picture(99).save(folder / "stray.png")
    dataset = open_dataset(str(folder), model)
    labels = sorted(dataset[i][1] for i in range(len(dataset)))
    assert labels == [-1] + [0] * 4 + [1] * 4 + [2] * 4


def test_a_split_is_a_folder_of_that_name(tmp_path: Path, model: nn.Module):
    fill(tmp_path / "train", each=3)
    with pytest.raises(ValueError, match="has a folder `train` but none for validation; name the"):
        open_dataset(str(tmp_path), model)
    assert len(open_dataset(str(tmp_path), model, split="train")) == 9
    fill(tmp_path / "val", each=2)
    assert len(open_dataset(str(tmp_path), model)) == 6
    with pytest.raises(ValueError, match="no folder for the split 'test'; leave the split out"):
        open_dataset(str(tmp_path), model, split="test")


def test_a_missing_path_is_named(tmp_path: Path, model: nn.Module):
    for data in (str(tmp_path / "nothing"), f"wds/{tmp_path}/nothing"):
        with pytest.raises(FileNotFoundError, match=r"no such folder.*nothing; expected a folder"):
            open_dataset(data, model)


def test_data_without_images_is_refused(tmp_path: Path, model: nn.Module):
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    (tmp_path / "empty" / "ant" / "notes.md").write_text("no image")
    tar = pack(tmp_path / "empty", tmp_path / "empty.tar")
    for data in (tmp_path / "empty", tar):
        with pytest.raises(ValueError, match=r"holds no images .*; expected a folder of class"):
            open_dataset(str(data), model)


def test_files_that_are_no_tar_are_refused(folder: Path, tmp_path: Path, model: nn.Module):
    (tmp_path / "zip.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"zip\.zip is a file but not a \.tar; expected"):
        open_dataset(str(tmp_path / "zip.zip"), model)
    (tmp_path / "fake.tar").write_bytes(b"not a tar at all" * 64)
    packed = pack(folder, tmp_path / "packed.tar", mode="w:gz")
    for tar in (tmp_path / "fake.tar", packed):
        with pytest.raises(ValueError, match=r"is not a tar: .*; expected an uncompressed tar"):
            open_dataset(str(tar), model)
    with pytest.raises(ValueError, match="a tar has no splits, got split='val'"):
        open_dataset(str(pack(folder, tmp_path / "good.tar")), model, split="val")


def test_a_tar_cut_short_is_refused(folder: Path, tmp_path: Path, model: nn.Module):
    tar = pack(folder, tmp_path / "pictures.tar")
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"cut short at its member|is not a tar: unexpected end"):
        open_dataset(str(tar), model)


def test_a_class_map_must_be_text_and_name_every_folder_once(
    folder: Path, tmp_path: Path, model: nn.Module
):
    names = tmp_path / "names.txt"

    def refused(match: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match):
            open_dataset(str(folder), model, class_map=str(names))

    refused("no such class map: .*; expected a text file", FileNotFoundError)
    names.write_text("ant\nbee\n")
    refused("no line for 1 of 3 folders, the first is 'cat'; expected one line a class")
    names.write_text("ant\nbee\ncat\nant\n")
    refused("names 'ant' on lines 1 and 4; expected each class once")
    names.write_text("\n")
    refused("names no class")
    names.write_bytes(pickle.dumps({"ant": 0, "bee": 1, "cat": 2}))
    refused("is not text; expected a class map")


@pytest.mark.parametrize("each", [4, 30], ids=["read here", "read by threads"])
def test_a_corrupt_image_is_named_and_never_replaced(tmp_path: Path, model: nn.Module, each: int):
    root = fill(tmp_path / "pictures", each=each)
    (root / "bee" / "1.png").write_bytes((root / "bee" / "1.png").read_bytes()[:200])
    dataset = open_dataset(str(root), model)
    bad = each + 1
    assert dataset[bad - 1][1] == dataset[bad + 1][1] == 1
    for read in (
        lambda: dataset[bad],
        lambda: evaluate(model, dataset, batch=4),
        lambda: calibration_batches(dataset, images=3 * each, batch=4),
    ):
        with pytest.raises(
            ValueError, match=rf"^image {bad} \(.*1\.png\) cannot be decoded: .*rep"
        ):
            read()


def test_threads_keep_the_order(tmp_path: Path, model: nn.Module):
    dataset = open_dataset(str(fill(tmp_path / "pictures", each=30)), model)
    (batch,) = calibration_batches(dataset, images=90, batch=100)
    assert torch.equal(batch, torch.stack([dataset[i][0] for i in range(90)]))


# --- data sets by prefix -----------------------------------------------------------------------


def test_a_hub_data_set_opens_at_the_first_split_it_has(model: nn.Module, monkeypatch, folder):
    asked: list[str] = []

    class Reader:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int):
            return (folder / "ant" / f"{index}.png").open("rb"), [7, None][index]

    def create(name: str, split: str, **options: object) -> SimpleNamespace:
        asked.append(split)
        if split != "test":
            raise RuntimeError(f"no split {split}")
        return SimpleNamespace(reader=Reader())

    monkeypatch.setattr(timm.data, "create_dataset", create)
    dataset = open_dataset("hfds/someone/something", model)
    assert asked == ["validation", "val", "test"]
    assert [dataset[i][1] for i in range(2)] == [7, -1]
    with pytest.raises(
        ValueError, match="at split 'dev': RuntimeError: no split dev; name another"
    ):
        open_dataset("hfds/someone/something", model, split="dev")


def test_real_hugging_face_data_opens(folder: Path, model: nn.Module, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "hub"
    (root / "test").parent.mkdir()
    folder.rename(root / "test")
    dataset = open_dataset(f"hfds/{root}", model)
    assert_same_items(dataset, timms_own(root / "test", (3, 32, 32)))


def test_real_shards_open(folder: Path, model: nn.Module, tmp_path: Path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    shards = tmp_path / "shards"
    shards.mkdir()
    for row, name in enumerate(CLASSES):
        flat = tmp_path / name
        flat.mkdir()
        for path in (folder / name).iterdir():
            path.rename(flat / f"{name}{path.name}")
            (flat / f"{name}{path.stem}.cls").write_text(str(row))
        pack(flat, shards / f"part-{row}.tar")
    dataset = open_dataset(f"wds/{shards}", model)
    items = list(dataset)
    assert len(items) == len(dataset) == 12
    assert [label for _, label in items] == [0] * 4 + [1] * 4 + [2] * 4
    assert evaluate(model, dataset, batch=5).images == 12
    (batch,) = calibration_batches(dataset, images=12, batch=12)
    assert torch.equal(batch, torch.stack([image for image, _ in items]))


def test_class_folders_must_be_as_many_as_outputs(tmp_path: Path, model: nn.Module):
    two = open_dataset(str(fill(tmp_path / "two", classes=CLASSES[:2])), model)
    with pytest.raises(ValueError, match=r"2 class folders, the model 3 outputs.* class map"):
        evaluate(model, two, batch=4)
    names = tmp_path / "names.txt"
    names.write_text("cat\nant\nbee\n")
    mapped = open_dataset(str(tmp_path / "two"), model, class_map=str(names))
    assert evaluate(model, mapped, batch=4).images == 8


def test_an_index_out_of_range_is_refused(folder: Path, model: nn.Module):
    dataset = open_dataset(str(folder), model)
    assert isinstance(dataset, Images)
    for index in (-1, 12):
        with pytest.raises(IndexError, match=rf"expected an image index in 0\.\.11, got {index}"):
            dataset[index]
