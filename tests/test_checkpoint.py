"""save() and load(): what is written opens again bit for bit, or says in one line why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hwprune import shards
from hwprune.checkpoint import describe_base, load, read_folder, save
from hwprune.families import timm_vit
from hwprune.layers import BlockSparseLinear, ConstantBranch, SlimAttention
from hwprune.realise import realise_
from hwprune.spec import CheckpointError
from hwprune.units import full_mask

timm = pytest.importorskip("timm")

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {**TINY, "patch_size": 8, "num_classes": 10}),
    "distilled": ("deit_tiny_distilled_patch16_224", {**TINY, "num_classes": 7}),
    "layerscale-registers-swiglu": ("vit_giant_patch14_reg4_dinov2", {**TINY, "img_size": 28}),
    "rope-unfused": ("vit_small_patch16_rope_224", {**TINY, "qkv_fused": False}),
    "eva-attention-left-dense": ("eva02_tiny_patch14_224", {**TINY, "img_size": 28}),
}
EMPTY = ("blocks.0.attn", "blocks.1.mlp")


def dense(name: str = "plain") -> nn.Module:
    """A tiny timm model whose every bias, norm and layer scale has something to lose."""
    torch.manual_seed(0)
    arch, args = MODELS[name]
    model: nn.Module = timm.create_model(arch, **args)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def pruned(
    name: str = "plain", kinds: tuple[str, ...] | None = None, empty: bool = False
) -> nn.Module:
    """A realised model with a random mask, as `prune` leaves it."""
    model = dense(name)
    units = timm_vit.find_units(model, kinds, block=(16, 32))
    generator = torch.Generator().manual_seed(1)
    mask = full_mask(units)
    for unit, grid in mask.items():
        keep = torch.rand(grid.shape, generator=generator) > 0.4
        keep.view(-1)[0] = True
        if empty and unit.split(":")[0] in EMPTY:
            keep[:] = False
        mask[unit] = keep
    base = describe_base(model)
    shape = realise_(model, units, mask)
    report = {
        "macs_ratio": 0.6,
        "calibration": {"images": 256},
        "measured": {"latency_ratio": None},
    }
    vars(model)["hwprune_spec"] = {
        "version": 1,
        "base": base,
        "shape": shape,
        "kinds": list(dict.fromkeys(u.kind for u in units)),
        "report": report,
    }
    return model


def images(model: nn.Module) -> Tensor:
    size = vars(model)["hwprune_spec"]["base"]["model_args"]["img_size"]
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved pruned model, with tiles in it or not by name."""
    save(pruned(), tmp_path / "model")
    return tmp_path / "model"


ROUND_TRIPS = [
    *[(name, None, False) for name in MODELS],
    *[(name, ("block",), False) for name in ("plain", "rope-unfused")],
    *[(name, None, True) for name in ("plain", "layerscale-registers-swiglu", "distilled")],
]


@pytest.mark.parametrize(("name", "kinds", "empty"), ROUND_TRIPS)
def test_a_saved_model_opens_bit_for_bit(
    tmp_path: Path, name: str, kinds: tuple[str, ...] | None, empty: bool
) -> None:
    model = pruned(name, kinds, empty)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    x = images(model)
    assert torch.equal(outputs(again, x), outputs(model, x))
    assert vars(again)["hwprune_spec"] == vars(model)["hwprune_spec"]
    assert list(again.state_dict()) == list(model.state_dict())
    assert not any(module.training for module in again.modules())
    assert all(p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("name", "kinds", "empty"), ROUND_TRIPS)
def test_the_dense_form_is_the_original_architecture_and_computes_the_same(
    tmp_path: Path, name: str, kinds: tuple[str, ...] | None, empty: bool
) -> None:
    model = pruned(name, kinds, empty).double()
    x = images(model).double()
    save(model, tmp_path / "dense", format="dense")
    again = load(tmp_path / "dense")
    reference = dense(name).state_dict()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in reference.items()
    }
    assert {type(m) for m in again.modules()} <= {type(m) for m in dense(name).modules()}
    expected = outputs(model, x)
    # float64 and sums of at most a few hundred terms, in another order: far below 1e-12 of the size.
    error = (outputs(again, x) - expected).norm() / expected.norm()
    assert error < 1e-12
    stock = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True)
    assert all(torch.equal(v, again.state_dict()[k].float()) for k, v in stock.state_dict().items())
    save(again, tmp_path / "twice")
    assert read_folder(tmp_path / "twice").spec == read_folder(tmp_path / "dense").spec


def test_masks_of_every_kind_make_the_layers_we_mean_to_test() -> None:
    kinds = {type(m) for m in [*pruned(empty=True).modules(), *pruned(kinds=("block",)).modules()]}
    assert {SlimAttention, ConstantBranch, BlockSparseLinear} <= kinds


def test_an_unpruned_model_saves_as_a_plain_timm_folder(tmp_path: Path) -> None:
    model = dense("distilled")
    save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == MODELS["distilled"][0]
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(stock, x), outputs(model, x))
    assert torch.equal(outputs(load(tmp_path / "model"), x), outputs(model, x))


FRESH = """
import sys
sys.modules["hwprune"] = None  # as where it is not installed
import timm, torch
folder = sys.argv[1]
x, expected, widened = torch.load(f"{folder}/truth.pt")
stock = timm.create_model(f"local-dir:{folder}/dense", pretrained=True).eval()
with torch.inference_mode():
    assert torch.equal(stock(x), widened)
del sys.modules["hwprune"]
for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
    del sys.modules[name]
from hwprune.integrations.lazy import install
from hwprune.checkpoint import load
install(), install()
assert "timm" not in sys.modules
import timm
assert timm.is_model("hwprune_vit")
assert not [f for f in sys.meta_path if getattr(f, "watched", "") == "timm.models"]
opened = load(f"{folder}/model"), timm.create_model(f"local-dir:{folder}/model", pretrained=True).eval()
with torch.inference_mode():
    assert all(torch.equal(model(x), expected) for model in opened)
print("equal")
"""


def test_a_fresh_process_computes_the_same_bits_and_timm_alone_opens_the_dense_form(
    tmp_path: Path, root: Path
) -> None:
    model = pruned(empty=True)
    x = images(model)
    save(model, tmp_path / "model")
    save(model, tmp_path / "dense", format="dense")
    truth = (x, outputs(model, x), outputs(load(tmp_path / "dense"), x))
    torch.save(truth, tmp_path / "truth.pt")
    env = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("kinds", [None, ("block",)])
def test_large_models_go_into_several_files(tmp_path: Path, kinds: tuple[str, ...] | None) -> None:
    model = pruned(kinds=kinds)
    save(model, tmp_path / "model", max_shard_bytes=20_000)
    names = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "model" / shards.INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    x = images(model)
    assert torch.equal(outputs(load(tmp_path / "model"), x), outputs(model, x))
    save(model, tmp_path / "dense", format="dense", max_shard_bytes=20_000)
    assert (tmp_path / "dense" / shards.SINGLE).exists()  # timm reads one file only


def test_types_are_kept_and_asked_for(tmp_path: Path) -> None:
    model = pruned("rope-unfused").bfloat16()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    x = images(model).bfloat16()
    assert torch.equal(outputs(again, x), outputs(model, x))  # rotary tables are rebuilt as cast
    assert {p.dtype for p in load(tmp_path / "model", dtype=torch.float32).parameters()} == {
        torch.float32
    }
    assert load(tmp_path / "model", device="meta").get_parameter("cls_token").is_meta


@pytest.mark.parametrize("name", ["plain", "rope-unfused"])
def test_loading_leaves_the_random_state_alone(tmp_path: Path, name: str) -> None:
    save(pruned(name), tmp_path / "model")
    before = torch.get_rng_state()
    load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_classifier_after_pruning_is_saved(tmp_path: Path) -> None:
    model = pruned()
    model.reset_classifier(4)  # type: ignore[operator]
    save(model, tmp_path / "model")
    found = read_folder(tmp_path / "model")
    assert found.spec["base"]["num_classes"] == found.cfg["num_classes"] == 4
    assert outputs(load(tmp_path / "model"), images(model)).shape == (2, 4)


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    model = pruned("rope-unfused")
    save(model, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "report.json",
    ]  # fmt: skip
    spec = vars(model)["hwprune_spec"]
    assert json.loads((tmp_path / "model" / "report.json").read_text()) == spec["report"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["hwprune"] == spec
    assert config["architecture"] == "hwprune_vit"
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    with safe_open(tmp_path / "model" / shards.SINGLE, framework="pt") as stored:
        inside = json.loads(stored.metadata()["hwprune"])
    assert inside == {k: spec[k] for k in ("version", "base", "shape", "kinds")}
    text = (tmp_path / "model" / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "vit_small_patch16_rope_224.naver_in1k",
        "kinds: head, vo, neuron",
        "| macs_ratio | 0.6 |",
        "| calibration: images | 256 |",
        "| measured: latency_ratio | null |",
        "import hwprune",
    ):
        assert part in text
    save(model, tmp_path / "other", card="# mine\n")
    assert (tmp_path / "other" / "README.md").read_text() == "# mine\n"
    save(pruned(), tmp_path / "own")  # 10 classes: not the weights the licence is of
    assert "license" not in (tmp_path / "own" / "README.md").read_text()


# What save refuses


def test_an_existing_folder_is_refused_without_force(folder: Path) -> None:
    before = (folder / shards.SINGLE).read_bytes()
    with pytest.raises(FileExistsError, match="force=True"):
        save(pruned(empty=True), folder)
    assert (folder / shards.SINGLE).read_bytes() == before
    save(pruned(empty=True), folder, force=True)
    assert (folder / shards.SINGLE).read_bytes() != before
    load(folder)


def test_force_never_replaces_files_of_others(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex.*not replaced"):
        save(pruned(), folder, force=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        save(pruned(), folder / "thesis.tex", force=True)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(pruned(), tmp_path / "model")
    load(tmp_path / "model")


def test_nan_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    model = pruned()
    with torch.no_grad():
        model.get_parameter("blocks.1.norm1.weight")[3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight holds NaN"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_that_a_file_cannot_describe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made by timm\.create_model"):
        save(
            timm.models.VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=3),
            tmp_path / "a",
        )
    arch, args = MODELS["plain"]
    with pytest.raises(ValueError, match="act_layer"):
        save(timm.create_model(arch, **args, act_layer=nn.ReLU), tmp_path / "a")
    model = pruned()
    del vars(model)["hwprune_spec"]
    with pytest.raises(ValueError, match="no hwprune_spec"):
        save(model, tmp_path / "a")
    model = pruned()
    vars(model)["hwprune_spec"]["report"]["model"] = nn.Identity()
    with pytest.raises(ValueError, match=r"hwprune_spec\.report\.model"):
        save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="'pruned' or 'dense'"):
        save(pruned(), tmp_path / "a", format="onnx")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_change_after_creation_is_found_before_the_folder_takes_its_name(tmp_path: Path) -> None:
    model = pruned()
    model.get_submodule("blocks.0.mlp").act = nn.ReLU()
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.act is ReLU.*GELU"):
        save(model, tmp_path / "model")
    model = pruned()
    slim = model.get_submodule("blocks.0.attn")
    assert isinstance(slim, SlimAttention)
    slim.scale *= 2  # the tensors alone would not show it
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn is .*scale"):
        save(model, tmp_path / "model")
    model = pruned("rope-unfused")
    model.get_buffer("rope.pos_embed").mul_(2)
    with pytest.raises(CheckpointError, match=r"rope\.pos_embed is not stored by timm"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    save(dense(), tmp_path / "m")
    config, weights = tmp_path / "m" / "config.json", tmp_path / "m" / shards.SINGLE
    assert weights.stat().st_mode == config.stat().st_mode
