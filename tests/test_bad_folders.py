"""Folders that are broken, mixed up or hostile: one clear error, nothing run and nothing large made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hwprune import shards
from hwprune.checkpoint import describe_base, load, save
from hwprune.families import timm_vit
from hwprune.integrations.timm_registry import register
from hwprune.realise import realise_
from hwprune.spec import CheckpointError, architecture, header, model_args
from hwprune.units import full_mask

timm = pytest.importorskip("timm")


def pruned(kinds: tuple[str, ...] | None = None, step: int = 3) -> nn.Module:
    """A tiny model without every step-th unit, as `prune` leaves it."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=10
    ).eval()
    units = timm_vit.find_units(model, kinds, block=(16, 32))
    mask = full_mask(units)
    for grid in mask.values():
        grid.view(-1)[::step] = False
    base = describe_base(model)
    shape = realise_(model, units, mask)
    spec = {"version": 1, "base": base, "shape": shape, "kinds": ["head"], "report": {}}
    vars(model)["hwprune_spec"] = spec
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, to be broken."""
    save(pruned(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the spec everywhere it is written, as an attacker would who knows the format."""
    config = json.loads((folder / "config.json").read_text())
    spec = config["hwprune"]
    change(spec)
    try:
        config |= {"architecture": architecture(spec), "model_args": model_args(spec)}
        inside = header(spec)
    except (KeyError, TypeError):  # too broken to be consistent
        inside = "{}"
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / shards.SINGLE)
    metadata = {"format": "pt", "hwprune": inside, "hwprune_weights": config["hwprune_weights"]}
    save_file(tensors, folder / shards.SINGLE, metadata)


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors and keep the header."""
    with safe_open(folder / shards.SINGLE, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(folder / shards.SINGLE)
    change(tensors)
    save_file(tensors, folder / shards.SINGLE, metadata)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def base(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda spec: spec["base"].update(changes))


def arg(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda spec: spec["base"]["model_args"].update(changes))


def sizes(layer: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder, lambda spec: spec["shape"].setdefault(layer, {}).update(changes)
    )


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, lambda t: t.update({name: value(t[name])}))


NORM = "blocks.0.norm1.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda f: (f / shards.SINGLE).unlink(), r"no model\.safetensors"),
    "empty tensors": (lambda f: cut(f / shards.SINGLE, 0), "cut short"),
    "header cut": (lambda f: cut(f / shards.SINGLE, 100), "cut short"),
    "tensors cut": (lambda f: cut(f / shards.SINGLE, 30_000), "cut short"),
    "one byte short": (lambda f: cut(f / shards.SINGLE, (f / shards.SINGLE).stat().st_size - 1), "cut short"),
    "huge header": (lambda f: (f / shards.SINGLE).write_bytes(b"\xff" * 64), "cut short"),
    "no config": (lambda f: (f / "config.json").unlink(), "no such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "expected JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "expected JSON"),
    "config NaN": (lambda f: (f / "config.json").write_text('{"hwprune": NaN}'), "NaN is no JSON"),
    "config of timm": (lambda f: (f / "config.json").write_text("{}"), "no 'hwprune' entry"),
    "spec a list": (lambda f: (f / "config.json").write_text('{"hwprune": []}'), "expected an object"),
    "version": (lambda f: rewrite(f, lambda s: s.update(version=2)), "version 2 is unknown"),
    "version true": (lambda f: rewrite(f, lambda s: s.update(version=True)), "version True"),
    "no base": (lambda f: rewrite(f, lambda s: s.pop("base")), "base of library"),
    "no shape": (lambda f: rewrite(f, lambda s: s.pop("shape")), "shape as an object"),
    "kinds": (lambda f: rewrite(f, lambda s: s.update(kinds="head")), "kinds"),
    "library": (base(library="os"), "library 'timm'"),
    "hub": (base(architecture="hf-hub:evil/model"), "plain name"),
    "local": (base(architecture="local-dir:/tmp"), "plain name"),
    "path": (base(architecture="../../etc/passwd"), "plain name"),
    "ourselves": (base(architecture="hwprune_vit"), "plain name"),
    "unknown": (base(architecture="vit_of_tomorrow"), "has no architecture"),
    "another": (base(architecture="resnet18"), "cannot build it"),
    "classes": (base(num_classes=-1), "num_classes"),
    "many classes": (base(num_classes=10**12), "num_classes"),
    "other classes": (base(num_classes=11), r"head\.\w+: expected \(11"),
    "pickle arg": (arg(checkpoint_path="x.pth"), "may not hold checkpoint_path"),
    "overlay": (arg(pretrained_cfg_overlay="x"), "may not hold pretrained_cfg_overlay"),
    "nested arg": (arg(norm_layer={"a": 1}), "norm_layer"),
    "list of lists": (arg(img_size=[[1]]), "img_size"),
    "huge arg": (arg(embed_dim=10**15), "out of range"),
    "large arg": (arg(embed_dim=48 * 1024), "refused"),
    "large mlp": (arg(mlp_ratio=1e6), "refused"),
    "many blocks": (arg(depth=1 << 20), "for a file of"),
    "odd arg": (arg(colour="red"), "cannot build it"),
    "layer unknown": (sizes("blocks.9.mlp", type="mlp", neurons=8), "fits no layer"),
    "type unknown": (sizes("blocks.0.mlp", type="exec"), "fits no layer"),
    "type no text": (sizes("blocks.0.mlp", type=None), "type and sizes"),
    "sizes negative": (sizes("blocks.0.mlp", neurons=-8), "neurons"),
    "sizes huge": (sizes("blocks.0.attn", heads=10**18), "heads"),
    "sizes too many": (sizes("blocks.0.attn", heads=300), "heads between 1 and 3"),
    "sizes zero": (sizes("blocks.0.mlp", neurons=0), "neurons between 1"),
    "sizes text": (sizes("blocks.0.mlp", neurons="8"), "neurons"),
    "sizes other": (sizes("blocks.0.mlp", neurons=8), r"blocks\.0\.mlp\.fc1\.\w+: expected \(8"),
    "tile huge": (sizes("blocks.0.mlp.fc1", type="block", block=[1 << 19, 1 << 19], kept=1), "tiles of 1"),
    "tile wide": (sizes("blocks.0.mlp.fc1", type="block", block=[4096, 4096], kept=1), "the spec says"),
    "tile short": (sizes("blocks.0.mlp.fc1", type="block", block=[8], kept=1), "the spec says"),
    "tensor missing": (lambda f: retensor(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "tensor extra": (lambda f: retensor(f, lambda t: t.update(evil=torch.ones(1))), "evil is in the file"),
    "tensor other": (tensor(NORM, lambda t: t[:-1]), r"expected \(48,\), got \(47,\)"),
    "tensor whole": (tensor(NORM, lambda t: t.long()), "expected torch.float32 or like it"),
    "tensor NaN": (tensor(NORM, lambda t: t * float("nan")), f"{NORM} holds NaN"),
    "tensor Inf": (tensor(NORM, lambda t: t / 0), f"{NORM} holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_folder_is_one_clear_error(folder: Path, case: str) -> None:
    change, said = BROKEN[case]
    load(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)[:60]


@pytest.mark.parametrize(
    "case",
    ["empty tensors", "version", "hub", "path", "another", "other classes", "pickle arg", "large arg",
     "large mlp", "many blocks", "layer unknown", "sizes huge", "sizes other", "tile huge", "tile wide",
     "tensor missing", "tensor extra", "tensor whole", "tensor NaN"],
)  # fmt: skip
def test_timm_gives_the_same_error(folder: Path, case: str) -> None:
    change, said = BROKEN[case]
    change(folder)
    register()
    with pytest.raises(CheckpointError, match=said):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_folder_of_two_models_is_refused(tmp_path: Path) -> None:
    one, other, twin = pruned(), pruned(step=2), pruned()
    with torch.no_grad():
        twin.get_parameter("head.bias").add_(1)
    for name, model in (("one", one), ("other", other), ("twin", twin)):
        save(model, tmp_path / name)
    for name, said in (("other", "different models"), ("twin", "one of the same shape")):
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / name / "config.json")
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / name)
    edited = json.loads((tmp_path / "one" / "config.json").read_text())
    edited["model_args"]["num_classes"] = 5
    (tmp_path / "one" / "config.json").write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="do not agree"):
        load(tmp_path / "one")


@pytest.mark.parametrize("value", [-1, 99])
@pytest.mark.parametrize("index", ["idx", "crow", "order"])
def test_tiles_outside_their_weight_are_refused(tmp_path: Path, index: str, value: int) -> None:
    save(pruned(kinds=("block",)), tmp_path / "model")
    name = f"blocks.0.mlp.fc1.{index}"
    retensor(tmp_path / "model", lambda t: t[name].view(-1)[-1:].fill_(value))
    register()
    for opens in (load, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)):
        with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1: its tiles"):
            opens(tmp_path / "model")


def test_tiles_twice_in_one_place_are_refused(tmp_path: Path) -> None:
    save(pruned(kinds=("block",)), tmp_path / "model")

    def double(tensors: dict[str, Tensor]) -> None:
        name = "blocks.0.mlp.fc1"
        row = int((tensors[f"{name}.crow"].diff() > 1).nonzero()[0])  # one with two tiles
        first = int(tensors[f"{name}.crow"][row])
        tensors[f"{name}.idx"][first + 1] = tensors[f"{name}.idx"][first]

    retensor(tmp_path / "model", double)
    with pytest.raises(CheckpointError, match="rising block-columns within each block-row"):
        load(tmp_path / "model")


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_leads_nowhere_else(tmp_path: Path, target: object) -> None:
    folder = tmp_path / "model"
    save(pruned(), folder, max_shard_bytes=20_000)
    index = json.loads((folder / shards.INDEX).read_text())
    shutil.copy(folder / index["weight_map"][NORM], tmp_path / "secret.safetensors")
    index["weight_map"][NORM] = target
    (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a name like"):
        load(folder)


def test_a_missing_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(pruned(), folder, max_shard_bytes=20_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    kept = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="against the index"):
        load(folder)
    second.write_bytes(kept)
    load(folder)
    first.unlink()
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        load(folder)


def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)
    (folder / shards.SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        load(folder)


def test_no_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nowhere")
