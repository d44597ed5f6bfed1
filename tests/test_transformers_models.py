"""Vision encoders of transformers: pruned, and opened again by transformers itself and by ours, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwprune
from hwprune.export import export
from hwprune.families import hf_vit
from hwprune.images import input_size
from hwprune.layers import AttentionSizes
from hwprune.statistics import is_classifier, model_output
from hwprune.transformers_attention import ConstantPair, SlimPairAttention
from hwprune.transformers_checkpoint import empty_models

transformers = pytest.importorskip("transformers")

EXAMPLES = hf_vit.examples()
each_example = pytest.mark.parametrize("example", sorted(EXAMPLES))


def pruned(example: str, folder: Path, **changes: Any) -> tuple[nn.Module, Tensor]:
    """An example at 0.7 of its MACs, saved in the folder."""
    model, x = EXAMPLES[example]()
    hwprune.prune(model, [x, x.flip(0)], hwprune.Budget(macs=0.7), round_to=4, **changes)
    hwprune.save(model, folder)
    return model, x


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, nn.Module, Tensor]]:
    made: dict[str, tuple[Path, nn.Module, Tensor]] = {}

    def of(example: str) -> tuple[Path, nn.Module, Tensor]:
        if example not in made:
            folder = tmp_path_factory.mktemp("saved") / example
            made[example] = (folder, *pruned(example, folder))
        return made[example]

    return of


Saved = Callable[[str], tuple[Path, nn.Module, Tensor]]


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    """Every output of the two, bit for bit."""
    with torch.no_grad():
        first, second = a(x), b(x)
    assert list(first) == list(second)
    return all(torch.equal(first[key], second[key]) for key in first)


@each_example
def test_from_pretrained_opens_a_pruned_folder_bit_for_bit(saved: Saved, example: str) -> None:
    folder, model, x = saved(example)
    again = type(model).from_pretrained(folder)
    assert any(isinstance(m, SlimPairAttention | ConstantPair) for m in again.modules())
    assert same(again, model, x) and not again.training
    assert not again.is_quantized and not hasattr(again, "hf_quantizer")


@each_example
def test_what_transformers_saves_of_a_pruned_model_opens_again(
    saved: Saved, example: str, tmp_path: Path
) -> None:
    folder, model, x = saved(example)
    type(model).from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert same(type(model).from_pretrained(tmp_path / "again"), model, x)
    opened = hwprune.load(tmp_path / "again")
    assert same(opened, model, x)
    assert vars(opened)["hwprune_spec"]["shape"] == vars(model)["hwprune_spec"]["shape"]


def test_a_model_fresh_from_pruning_is_told_by_its_own_save_pretrained(tmp_path: Path) -> None:
    model, x = pruned("vit", tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same(type(model).from_pretrained(tmp_path / "theirs"), model, x)


@each_example
def test_the_dense_form_opens_without_hwprune_and_computes_the_same(
    saved: Saved, example: str, tmp_path: Path
) -> None:
    _, model, x = saved(example)
    hwprune.save(model, tmp_path / "dense", format="dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    again = type(model).from_pretrained(tmp_path / "dense")
    assert {type(m).__module__.split(".")[0] for m in again.modules()} <= {"transformers", "torch"}
    with torch.no_grad():
        torch.testing.assert_close(
            model_output(again, x), model_output(model, x), rtol=1e-4, atol=1e-4
        )


def test_transformers_without_hwprune_stops_and_says_what_the_folder_is(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, _ = saved("vit")
    for known in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.delitem(getattr(transformers.quantizers.auto, known), "hwprune")
    said: list[str] = []
    monkeypatch.setattr(transformers.quantizers.auto.logger, "warning", said.append)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        type(model).from_pretrained(folder)
    assert "Unknown quantization type, got hwprune" in said[0]


def test_an_encoder_opens_the_folder_of_its_classifier(saved: Saved) -> None:
    folder, model, x = saved("vit")
    encoder = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(x).last_hidden_state, model.get_submodule("vit")(x).last_hidden_state
        )


def test_the_auto_classes_open_it_too(saved: Saved) -> None:
    folder, model, x = saved("vit")
    assert same(transformers.AutoModelForImageClassification.from_pretrained(folder), model, x)


def test_a_dense_model_is_saved_and_opened_as_transformers_does(tmp_path: Path) -> None:
    model, x = EXAMPLES["dinov2"]()
    hwprune.save(model, tmp_path / "dense")
    assert same(hwprune.load(tmp_path / "dense"), model, x)
    assert not hasattr(hwprune.load(tmp_path / "dense"), "hwprune_spec")


def test_a_classifier_opened_as_another_class_would_be_random_and_is_refused(
    tmp_path: Path,
) -> None:
    model, _ = EXAMPLES["vit"]()
    hwprune.save(model, tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["ViTModel"]}
    file.write_text(json.dumps(config))
    with pytest.raises(
        hwprune.CheckpointError, match=r"pooler\.dense\.\w+ is missing from the file, and would"
    ):
        hwprune.load(tmp_path / "dense")


def test_models_of_transformers_may_hold_tiles(tmp_path: Path) -> None:
    model, x = pruned("clip", tmp_path / "tiles", kinds=["block"], block=(16, 12))
    assert any(isinstance(m, hwprune.BlockSparseLinear) for m in model.modules())
    assert same(type(model).from_pretrained(tmp_path / "tiles"), model, x)
    assert same(hwprune.load(tmp_path / "tiles"), model, x)


def test_shards_open_by_both(tmp_path: Path) -> None:
    model, x = pruned("vit", tmp_path / "one")
    hwprune.save(model, tmp_path / "many", max_shard_bytes=40_000)
    assert len(list((tmp_path / "many").glob("pruned-*.safetensors"))) > 1
    assert same(type(model).from_pretrained(tmp_path / "many"), model, x)
    assert same(hwprune.load(tmp_path / "many"), model, x)


def test_half_precision_comes_back_as_saved(tmp_path: Path) -> None:
    model, x = pruned("siglip", tmp_path / "full")
    model.to(torch.bfloat16)
    hwprune.save(model, tmp_path / "half")
    for again in (type(model).from_pretrained(tmp_path / "half"), hwprune.load(tmp_path / "half")):
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert same(again, model, x.to(torch.bfloat16))


def test_another_type_may_be_asked_for(saved: Saved) -> None:
    folder, model, _ = saved("clip")
    again = type(model).from_pretrained(folder, dtype=torch.float16)
    assert {p.dtype for p in again.parameters()} == {torch.float16}
    assert {p.dtype for p in hwprune.load(folder, dtype=torch.float64).parameters()} == {
        torch.float64
    }


def test_a_pruned_encoder_can_be_trained_further(saved: Saved) -> None:
    folder, model, x = saved("vit")
    again = type(model).from_pretrained(folder).train()
    loss = again(x, labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert all(p.grad is not None for p in again.parameters())


def edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose config.json was changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]
    return found


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another class": (
        lambda c: c.update(architectures=["GPT2Model"]),
        "architectures is 'GPT2Model'",
    ),
    "version": (lambda c: _entry(c).update(version=9), "version 9 of the hwprune entry is unknown"),
    "more layers": (
        lambda c: c.update(num_hidden_layers=10**6),
        "num_hidden_layers=1000000 for a file",
    ),
    "size": (lambda c: c.update(image_size=10**9), "image_size is out of range"),
    "width": (lambda c: c.update(hidden_size=96), r"expected \(.*save the model again"),
    "huge": (
        lambda c: c.update(hidden_size=9 * 10**5, num_attention_heads=3),
        "refused|expected|memory",
    ),
    "shape": (lambda c: _entry(c)["shape"].popitem(), "describe different models"),
    "weights": (lambda c: _entry(c).update(weights="0"), "describe different models"),
    "kinds": (lambda c: _entry(c).update(kinds=[1]), "expected kinds as a list of names"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_folder_is_refused_with_the_reason(
    saved: Saved, tmp_path: Path, what: str
) -> None:
    change, words = BROKEN[what]
    folder = edited(saved("vit")[0], tmp_path / "broken", change)
    with pytest.raises(hwprune.CheckpointError, match=words):
        hwprune.load(folder)
    with pytest.raises(hwprune.CheckpointError, match=words):
        empty_models(folder)  # what `hwprune inspect` reads


@pytest.mark.parametrize("what", ["version", "shape", "weights", "file"])
def test_from_pretrained_refuses_it_too(saved: Saved, tmp_path: Path, what: str) -> None:
    file = (lambda c: _entry(c).update(file="../x.safetensors"), "unknown file of weights")
    change, words = file if what == "file" else BROKEN[what]
    folder = edited(saved("vit")[0], tmp_path / "broken", change)
    with pytest.raises(ValueError, match=words):
        transformers.ViTForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_classifier_with_the_config_of_two_towers_is_read_tower_by_tower(
    kind: str, tmp_path: Path
) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    vision = {**hf_vit._SIZES, "intermediate_size": 96}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
    model, x = hf_vit._filled(getattr(transformers, f"{kind}ForImageClassification"), config)
    hwprune.prune(model, [x], hwprune.Budget(macs=0.7), round_to=4)
    hwprune.save(model, tmp_path / "saved")
    assert same(type(model).from_pretrained(tmp_path / "saved"), model, x)
    assert input_size(model) == (3, 32, 32)
    folder = edited(
        tmp_path / "saved",
        tmp_path / "broken",
        lambda c: c["vision_config"].update(num_hidden_layers=10**6),
    )
    with pytest.raises(hwprune.CheckpointError, match="num_hidden_layers=1000000 for a file of"):
        hwprune.load(folder)


def test_weights_of_another_model_of_the_same_shape_are_refused(
    saved: Saved, tmp_path: Path
) -> None:
    folder, model, _ = saved("vit")
    with torch.no_grad():
        next(model.parameters()).add_(1)
        hwprune.save(model, tmp_path / "other")
        next(model.parameters()).sub_(1)
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(
        tmp_path / "other" / "pruned.safetensors", tmp_path / "mixed" / "pruned.safetensors"
    )
    with pytest.raises(hwprune.CheckpointError, match="describe different models"):
        hwprune.load(tmp_path / "mixed")


def test_a_class_hwprune_does_not_know_is_refused_before_the_work() -> None:
    model = transformers.BeitModel(transformers.BeitConfig(**hf_vit._SIZES, intermediate_size=96))
    with pytest.raises(ValueError, match="BeitModel of transformers is none hwprune opens again"):
        hwprune.prune(model, [torch.randn(1, 3, 32, 32)], hwprune.Budget(macs=0.7))


def test_asking_a_pruned_attention_for_its_weights_is_refused(saved: Saved) -> None:
    _, model, x = saved("vit")
    with pytest.raises(ValueError, match="no attention weights to give"):
        model(x, output_attentions=True)


@pytest.mark.parametrize("masked", [False, True])
def test_slim_pair_attention_is_transformers_with_the_same_weights(masked: bool) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**hf_vit._SIZES, attn_implementation="sdpa")
    dense: Any = transformers.models.vit.modeling_vit.ViTAttention(config).double()
    sizes = AttentionSizes(48, 3, 16, 16, dense.scaling, 48, qkv_bias=True, proj_bias=True)
    slim = SlimPairAttention.like(dense, sizes).double()
    parts = [dense.q_proj, dense.k_proj, dense.v_proj]
    slim.qkv.load_state_dict(
        {key: torch.cat([getattr(p, key) for p in parts]) for key in ("weight", "bias")}
    )
    slim.proj.load_state_dict(dense.o_proj.state_dict())
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    mask = torch.randn(2, 1, 5, 5, dtype=torch.float64) if masked else None
    torch.testing.assert_close(slim(x, mask)[0], dense(x, mask)[0], rtol=0, atol=1e-12)


def test_what_is_a_classifier_and_what_is_compared() -> None:
    for example, (fields, logits) in {
        "vit": ("logits", True),
        "clip": ("image_embeds", False),
        "dinov2": ("pooler_output", False),
    }.items():
        model, x = EXAMPLES[example]()
        with torch.no_grad():
            assert torch.equal(model_output(model, x), model(x)[fields])
        assert is_classifier(model) is logits
    bare = transformers.ViTModel(transformers.ViTConfig(**hf_vit._SIZES), add_pooling_layer=False)
    with torch.no_grad():
        assert model_output(bare.eval(), torch.zeros(2, 3, 32, 32)).shape == (2, 17 * 48)


def test_a_pruned_encoder_exports_the_tensor_that_counts(saved: Saved, tmp_path: Path) -> None:
    folder, model, x = saved("clip")
    export(hwprune.load(folder), tmp_path / "clip.pt2", to="torch-export")
    found = torch.export.load(tmp_path / "clip.pt2").module()(x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x).image_embeds, rtol=1e-4, atol=1e-5)
