"""The built-in digits: data, the small DeiT, its cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
timm = pytest.importorskip("timm", reason="the digits model is built by timm")

from hwprune import digits  # noqa: E402
from hwprune.digits import digits_dataset, digits_model  # noqa: E402


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a training of 4 steps."""
    train = digits_dataset("train")
    few = digits.Digits(train.images_NCHW[:64], train.labels_N[:64])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "digits_dataset", lambda split: few)
    monkeypatch.setattr(digits, "RECIPE", replace(digits.RECIPE, epochs=2))
    return tmp_path


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train, test = digits_dataset("train"), digits_dataset("test")
    assert len(train) == 1198 and len(test) == 599
    # labels in their original order are train, train, test, train, train, test ...
    merged = torch.empty(1797, dtype=torch.long)
    held_out = torch.arange(1797) % 3 == 2
    merged[held_out], merged[~held_out] = test.labels_N, train.labels_N
    assert merged.tolist() == load_digits().target.tolist()


def test_an_item_is_an_image_in_minus_one_to_one_and_a_label():
    image, label = digits_dataset("test")[0]
    assert image.shape == digits.INPUT_SIZE and image.dtype == torch.float32
    assert image.min() == -1 and image.max() <= 1
    assert isinstance(label, int) and label == 2  # the third digit of the set is a two


def test_every_class_is_held_out():
    assert torch.bincount(digits_dataset("test").labels_N).min() > 40


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'train' and 'test', got 'validation'"):
        digits_dataset("validation")  # type: ignore[arg-type]


def test_the_stock_builder_recreates_the_model():
    model = digits_model(seed=3, pretrained=False)
    assert model.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    twin = timm.create_model(model.pretrained_cfg["architecture"], **model._model_args)
    twin.load_state_dict(model.state_dict())
    x = torch.stack([digits_dataset("test")[i][0] for i in range(4)])
    assert torch.equal(twin.eval()(x), model(x))


def test_the_metadata_is_that_of_the_digits_not_of_imagenet():
    cfg = digits_model(pretrained=False).pretrained_cfg
    assert tuple(cfg["input_size"]) == digits.INPUT_SIZE
    assert cfg["num_classes"] == 10 and not cfg.get("url") and not cfg.get("hf_hub_id")
    assert cfg["tag"] == "digits" and "license" not in cfg


def test_there_is_something_of_every_kind_to_prune():
    model = digits_model(pretrained=False)
    block = model.blocks[0]
    assert len(model.blocks) >= 4 and block.attn.num_heads >= 3
    assert block.attn.head_dim in (32, 64)
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert all(width % 32 == 0 for width in linear.weight.shape)


def test_the_seed_decides_and_the_callers_random_state_is_untouched():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again = digits_model(seed=1, pretrained=False), digits_model(seed=1, pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(first, again)
    assert not same_weights(first, digits_model(seed=2, pretrained=False))


def test_training_is_repeatable_and_leaves_threads_and_random_state(cache: Path, monkeypatch):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    with torch.no_grad():  # the caller's mode must not stop the training
        first = digits_model(seed=5, progress=lambda done, total: calls.append((done, total)))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert calls[0] == (1, 4) and calls[-1] == (4, 4) and not first.training

    assert not same_weights(first, digits_model(seed=5, pretrained=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "another"))
    assert same_weights(first, digits_model(seed=5))


def test_the_second_call_reads_the_cache(cache: Path):
    first = digits_model()
    (kept,) = (cache / "hwprune").iterdir()  # one file, no temporary left over
    assert kept.name.startswith("digits_seed0_") and kept.suffix == ".safetensors"

    def must_not_train(done: int, total: int) -> None:
        raise AssertionError("trained although the cache holds the weights")

    assert same_weights(first, digits_model(progress=must_not_train))


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "not safetensors"])
def test_a_damaged_cache_is_trained_anew(cache: Path, damage: str):
    first = digits_model()
    (kept,) = (cache / "hwprune").iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "bit flipped":
        content[-100] ^= 1
    else:
        content = bytearray(b"\x80\x04not a tensor file")
    kept.write_bytes(content)

    calls: list[int] = []
    assert same_weights(first, digits_model(progress=lambda done, total: calls.append(done)))
    assert len(calls) == 4
    assert same_weights(first, digits_model(progress=None))
    assert bytes(content) != kept.read_bytes()


def test_a_change_of_recipe_or_seed_is_another_file(cache: Path, monkeypatch):
    paths = {digits._cache_path(0), digits._cache_path(1)}
    monkeypatch.setattr(digits, "RECIPE", replace(digits.RECIPE, shift=2))
    paths.add(digits._cache_path(0))
    assert len(paths) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(cache: Path):
    (cache / "hwprune").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept in .*Set XDG_CACHE_HOME"):
        model = digits_model()
    assert not model.training


@pytest.mark.slow
def test_the_trained_model_reads_held_out_digits(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = digits_model()
    test = digits_dataset("test")
    with torch.no_grad():
        right = model(test.images_NCHW).argmax(1) == test.labels_N
    assert right.float().mean() >= 0.96
