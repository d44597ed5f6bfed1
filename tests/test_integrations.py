"""timm's own create_model opens our folders; the hook that arranges it is light and leaves no trace."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune import shards
from hwprune.checkpoint import describe_base, load, save
from hwprune.families import timm_vit
from hwprune.integrations import lazy
from hwprune.integrations.timm_registry import register
from hwprune.realise import realise_
from hwprune.spec import CheckpointError
from hwprune.units import full_mask

timm = pytest.importorskip("timm")

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
VIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()
    register()  # again, without a warning of timm's


def pruned(arch: str = VIT, kinds: tuple[str, ...] | None = None, classes: int = 10) -> nn.Module:
    """A model with a third of its units removed, as `prune` leaves it."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(arch, **TINY, num_classes=classes).eval()
    for name in ("head", "head_dist"):
        if hasattr(model, name):
            nn.init.normal_(model.get_submodule(name).weight, std=0.5)
    units = timm_vit.find_units(model, kinds, block=(16, 16))
    mask = full_mask(units)
    for grid in mask.values():
        grid.view(-1)[::3] = False
    base = describe_base(model)
    shape = realise_(model, units, mask)
    spec = {
        "version": 1,
        "base": base,
        "shape": shape,
        "kinds": ["head"],
        "report": {"seconds": 1.5},
    }
    vars(model)["hwprune_spec"] = spec
    return model


def create(folder: Path, pretrained: bool = True, **args: Any) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **args)
    return model.eval()


def outputs(model: nn.Module, size: int = 32, channels: int = 3) -> Tensor:
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("arch", [VIT, DISTILLED])
@pytest.mark.parametrize("kinds", [None, ("block",)])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_timm_opens_a_pruned_folder_bit_for_bit(
    tmp_path: Path, arch: str, kinds: tuple[str, ...] | None, max_shard_bytes: int
) -> None:
    model = pruned(arch, kinds)
    save(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    again = create(tmp_path / "model")
    assert torch.equal(outputs(again), outputs(model))
    assert vars(again)["hwprune_spec"] == vars(model)["hwprune_spec"]
    wanted = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    for opened in (again, load(tmp_path / "model")):
        found = timm.data.resolve_model_data_config(opened)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == wanted


def test_without_weights_the_structure_is_right(tmp_path: Path) -> None:
    model = pruned()
    save(model, tmp_path / "model")
    empty = create(tmp_path / "model", pretrained=False)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in empty.state_dict().items()} == shapes
    assert not torch.equal(outputs(empty), outputs(model))
    with torch.no_grad():
        empty.load_state_dict(model.state_dict())
    save(empty, tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again")), outputs(model))


@pytest.mark.parametrize(("arch", "heads"), [(VIT, ("head",)), (DISTILLED, ("head", "head_dist"))])
def test_another_number_of_classes_makes_a_new_classifier_only(
    tmp_path: Path, arch: str, heads: tuple[str, ...]
) -> None:
    model = pruned(arch)
    save(model, tmp_path / "model")
    other = create(tmp_path / "model", num_classes=5)
    assert outputs(other).shape == (2, 5)
    kept = {k for k in model.state_dict() if not k.startswith(tuple(f"{h}." for h in heads))}
    assert all(torch.equal(other.state_dict()[k], model.state_dict()[k]) for k in kept)
    assert vars(other)["hwprune_spec"]["base"]["num_classes"] == 5
    save(other, tmp_path / "five")
    assert torch.equal(outputs(create(tmp_path / "five")), outputs(other))
    assert outputs(create(tmp_path / "model", num_classes=0)).shape == (2, 48)


def test_other_input_channels_and_image_sizes_are_adapted_as_timm_does(tmp_path: Path) -> None:
    model = pruned()
    save(model, tmp_path / "model")
    save(model, tmp_path / "dense", format="dense")
    for args, shape in (({"in_chans": 1}, (32, 1)), ({"img_size": 64}, (64, 3))):
        ours, stock = create(tmp_path / "model", **args), create(tmp_path / "dense", **args)
        for key in ("patch_embed.proj.weight", "pos_embed"):
            assert torch.equal(ours.get_parameter(key), stock.get_parameter(key))
        torch.testing.assert_close(outputs(ours, *shape), outputs(stock, *shape))
        save(ours, tmp_path / "other", force=True)
        assert torch.equal(outputs(load(tmp_path / "other"), *shape), outputs(ours, *shape))
    same = create(tmp_path / "model", img_size=32)
    assert torch.equal(outputs(same), outputs(model))


def test_training_arguments_reach_the_model(tmp_path: Path) -> None:
    save(pruned(), tmp_path / "model")
    model = create(tmp_path / "model", drop_path_rate=0.2)
    rates = [getattr(m, "drop_prob", 0.0) for m in model.modules()]
    assert max(rates) == pytest.approx(0.2)
    save(model, tmp_path / "again")  # what only training uses is no part of the file
    assert torch.equal(outputs(load(tmp_path / "again")), outputs(model))


def test_what_a_pruned_model_does_not_offer_is_refused(tmp_path: Path) -> None:
    save(pruned(), tmp_path / "model")
    with pytest.raises(ValueError, match="features_only is not offered"):
        create(tmp_path / "model", features_only=True)
    with pytest.raises(ValueError, match="no architecture of its own"):
        timm.create_model("hwprune_vit")
    with pytest.raises(CheckpointError, match="changes the architecture"):
        create(tmp_path / "model", reg_tokens=2, num_classes=5)
    with pytest.raises(CheckpointError, match="another base or shape"):
        create(tmp_path / "model", base="vit_small_patch16_224")
    args = {"base": VIT, "shape": vars(pruned())["hwprune_spec"]["shape"]}
    with pytest.raises(ValueError, match="come with their folder"):
        timm.create_model("hwprune_vit", pretrained=True, **args, **TINY)
    built = timm.create_model("hwprune_vit", **args, **TINY, num_classes=10)
    assert outputs(built.eval()).shape == (2, 10)


def test_a_hostile_folder_is_refused_by_timm_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    save(pruned(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    good = json.loads(config.read_text())
    for changes, said in (
        ({"base": "hf-hub:evil/model"}, "plain name"),
        ({"base": "../secret"}, "plain name"),
        ({"shape": {"blocks.0.mlp": {"type": "mlp", "neurons": -1}}}, "neurons"),
        ({"embed_dim": 1 << 20}, "do not agree"),
        ({"checkpoint_path": "evil.pth"}, "do not agree"),
    ):
        config.write_text(json.dumps(good | {"model_args": good["model_args"] | changes}))
        with pytest.raises(CheckpointError, match=said):
            create(tmp_path / "model")
    config.write_text(json.dumps(good))
    create(tmp_path / "model")
    (tmp_path / "model" / shards.SINGLE).rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never opened"):
        create(tmp_path / "model")


@pytest.mark.parametrize("loader", [load, create])
def test_timm_s_own_export_of_an_opened_model_opens_again(tmp_path: Path, loader: Any) -> None:
    pytest.importorskip("huggingface_hub")
    model = pruned()
    save(model, tmp_path / "model")
    opened = loader(tmp_path / "model")
    timm.models.save_for_hf(opened, tmp_path / "export", safe_serialization=True)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architecture"] == "hwprune_vit"
    assert config["model_args"]["shape"] == vars(model)["hwprune_spec"]["shape"]
    for again in (create(tmp_path / "export"), load(tmp_path / "export")):
        assert torch.equal(outputs(again), outputs(model))
    config["model_args"]["base"] = "local-dir:elsewhere"
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    for opens in (create, load):
        with pytest.raises(CheckpointError, match="plain name"):
            opens(tmp_path / "export")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_hub_repository_is_fetched_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_bytes: int
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model, remote, cache = pruned(), tmp_path / "remote", tmp_path / "cache"
    save(model, remote, max_shard_bytes=max_shard_bytes)
    (remote / "pytorch_model.bin").write_bytes(b"a pickle")
    cache.mkdir()
    asked: list[tuple[str, Any]] = []

    def download(repository: str, file: str, *, revision: Any, cache_dir: Any) -> str:
        asked.append((repository, revision))
        if not (remote / file).exists():
            raise hub.errors.LocalEntryNotFoundError(f"no {file}")
        return str(shutil.copy(remote / file, cache / file))

    monkeypatch.setattr(hub, "hf_hub_download", download)
    cfg = json.loads((remote / "config.json").read_text())
    source = {"source": "hf-hub", "hf_hub_id": "someone/pruned@v1"}
    again = timm.create_model(
        cfg["architecture"],
        pretrained=True,
        pretrained_cfg=cfg["pretrained_cfg"] | source,
        **cfg["model_args"],
    )
    assert torch.equal(outputs(again.eval()), outputs(model))
    assert set(asked) == {("someone/pruned", "v1")}
    assert not (cache / "pytorch_model.bin").exists()


# The hook, on a stand-in for timm


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A package `standin` with `standin.models`, watched in place of timm, and what registered."""
    package = tmp_path / "standin"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from .models import answer\n")
    (package / "models" / "__init__.py").write_text("answer = 42\n")
    (tmp_path / "afterwards.py").write_text("")
    calls: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))
    hook = ("standin.models", lambda: calls.append("registered"))
    monkeypatch.setattr(lazy, "_HOOKS", (hook,))
    others = [finder for finder in sys.meta_path if not lazy._is_ours(finder)]
    monkeypatch.setattr(sys, "meta_path", others)
    yield package, calls
    for name in [n for n in sys.modules if n.split(".")[0] in ("standin", "afterwards")]:
        del sys.modules[name]


def waiting() -> int:
    return sum(map(lazy._is_ours, sys.meta_path))


def test_the_hook_waits_and_registers_once(stand_in: tuple[Path, list[str]]) -> None:
    _, calls = stand_in
    for _ in range(3):
        lazy.install()
    assert (waiting(), calls) == (1, [])
    import standin

    assert standin.answer == 42
    assert (waiting(), calls) == (0, ["registered"])
    loader = sys.modules["standin.models"].__loader__
    assert loader is sys.modules["standin.models"].__spec__.loader
    assert type(loader).__module__ != lazy.__name__


def test_the_hook_registers_at_once_where_timm_is_there(stand_in: tuple[Path, list[str]]) -> None:
    _, calls = stand_in
    importlib.import_module("standin")
    lazy.install()
    assert (waiting(), calls) == (0, ["registered"])


def test_an_import_that_fails_can_be_tried_again(stand_in: tuple[Path, list[str]]) -> None:
    package, calls = stand_in
    lazy.install()
    source = package / "models" / "__init__.py"
    source.write_text("raise RuntimeError('broken today')\n")
    with pytest.raises(RuntimeError, match="broken today"):
        importlib.import_module("standin")
    assert (waiting(), calls) == (1, [])
    source.write_text("answer = 'mended'\n")
    importlib.invalidate_caches()
    assert importlib.import_module("standin").answer == "mended"
    assert (waiting(), calls) == (0, ["registered"])


def test_an_absent_package_stays_absent(stand_in: tuple[Path, list[str]]) -> None:
    package, calls = stand_in
    shutil.rmtree(package)
    importlib.invalidate_caches()
    lazy.install()
    with pytest.raises(ModuleNotFoundError, match="standin"):
        importlib.import_module("standin")
    assert (waiting(), calls) == (1, [])


def test_a_half_imported_package_is_waited_for(stand_in: tuple[Path, list[str]]) -> None:
    package, calls = stand_in
    text = f"from {lazy.__name__} import install\ninstall()\nanswer = 1\n"
    (package / "models" / "__init__.py").write_text(text)
    importlib.import_module("standin")
    assert calls == []
    importlib.import_module("afterwards")
    assert (waiting(), calls) == (0, ["registered"])


def test_looking_for_the_package_is_not_importing_it(stand_in: tuple[Path, list[str]]) -> None:
    package, calls = stand_in
    (package / "__init__.py").write_text("")
    lazy.install()
    spec = importlib.util.find_spec("standin.models")
    assert spec is not None and spec.loader is not None
    assert spec.loader.get_filename("standin.models") == spec.origin  # type: ignore[attr-defined]
    assert (waiting(), calls) == (1, [])


def test_threads_that_race_register_once(stand_in: tuple[Path, list[str]]) -> None:
    package, calls = stand_in
    slow = "import time\ntime.sleep(0.1)\nanswer = 42\n"
    (package / "models" / "__init__.py").write_text(slow)
    lazy.install()
    found: list[int] = []

    def work() -> None:
        found.append(importlib.import_module("standin").answer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [42] * 8
    assert (waiting(), calls) == (0, ["registered"])


def test_a_failing_registration_warns_and_lets_timm_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AttributeError("no register_model")

    monkeypatch.setattr("hwprune.integrations.timm_registry.register", broken)
    with pytest.warns(UserWarning, match="no register_model"):
        lazy.install()
