"""The README's Python blocks run, in order, with a small model and made images in place of a hub's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"
SMALL = (
    '"deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, '
    "num_classes=2"
)


def blocks() -> list[str]:
    """The Python blocks of the README."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_the_readme_prunes_saves_and_loads_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "calibration_images" / label
        folder.mkdir(parents=True)
        for i in range(128):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    first, second, third, fourth = blocks()
    hub = 'timm.create_model("deit_tiny_patch16_224", pretrained=True)'
    assert hub in first
    small = f"timm.create_model({SMALL})"
    classifier = "torch.nn.init.normal_(model.head.weight, std=0.5)"
    names: dict[str, object] = {"torch": torch}
    exec(first.replace(hub, f"{small}; {classifier}"), names)
    pruned = names["model"]
    exec(second, names)
    loaded = names["model"]
    assert isinstance(pruned, torch.nn.Module) and isinstance(loaded, torch.nn.Module)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(pruned.eval()(x), loaded.eval()(x))
    assert sum(p.numel() for p in loaded.parameters()) == names["report"].params  # type: ignore[attr-defined]
    assert hub in third and "224, 224" in third
    fast = "hwprune.measure(model, images, against={'dense': dense}, rounds=2, seconds_per_arm=0.5)"
    third = third.replace(hub, small).replace("224, 224", "32, 32")
    third = third.replace('hwprune.measure(model, images, against={"dense": dense})', fast)
    assert fast in third
    exec(third, names)
    energy = names["energy"]
    assert (energy.energy_j is None) == bool(energy.reason)  # type: ignore[attr-defined]
    exec(fourth, names)
    assert names["y"].shape == (8, 197, 3072)  # type: ignore[attr-defined]


def test_the_readme_opens_with_the_two_commands() -> None:
    head = README.read_text().split("##")[0]
    assert head.index("scripts/demo") < head.index("scripts/test")
