"""Every code block of the README runs, in order, with small models and made images in place of a hub's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hwprune
from hwprune.cli import main

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fakes import tiny_diffusion  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
HUB, HUB_SDXL = "deit_tiny_patch16_224", "stabilityai/stable-diffusion-xl-base-1.0"
MADE = 'timm.create_model("deit_tiny_patch16_224", pretrained=True)'
# What is the size of a hub's model or of a day's work in the README, and small here.
PYTHON = {
    MADE: 'timm.create_model("local-dir:dense_deit", pretrained=True)',
    f'"{HUB_SDXL}"': '"dense_sdxl"',
    'pipe = pipe.to("cuda")': "pipe = pipe.to('cpu')",
    "torch.bfloat16": "torch.float32",
    "steps=8, folder": "steps=2, images=4, batch=2, updates=8, folder",
    "224, 224": "32, 32",
    'against={"dense": dense})': 'against={"dense": dense}, rounds=2, seconds_per_arm=0.5)',
}
COMMAND = {HUB: "dense_deit", HUB_SDXL: "dense_sdxl"}
QUICK = {
    "prune-diffusion": "--steps 2 --images 4 --batch 2 --updates 8 --device cpu",
    "profile": "--minutes 0.2 --batches 8 --dtypes fp32 --device cpu",
    "measure": "--rounds 2 --seconds 0.5 --no-energy --device cpu",
    "prune": "--calibration 32",
}
# Run by everyone who runs the tests: CI runs both from nothing.
ELSEWHERE = ("scripts/demo", "scripts/test")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def commands(text: str) -> list[list[str]]:
    """The words of each line of a shell block, without comments."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything the README speaks of: images, models, prompts."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name in ("calibration_images", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(128 if name != "val" else 8):
                pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model(HUB, num_classes=2, **sizes)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    timm.models.save_for_hf(model, tmp_path / "dense_deit", model_args=sizes)
    tiny_diffusion.sdxl(tmp_path / "tokens").save_pretrained(tmp_path / "dense_sdxl")
    tiny_diffusion.tiny_dit().save_pretrained(tmp_path / "my_dit" / "transformer")
    tiny_diffusion.flow().save_pretrained(tmp_path / "my_dit" / "scheduler")
    (tmp_path / "prompts.txt").write_text("a cat\nx y z\n")
    return tmp_path


def run_command(words: list[str]) -> int:
    """Run a line of a shell block with small things in place of large ones; its exit code."""
    words = [COMMAND.get(word, word) for word in words]
    if words[0] == "python":
        quick = ["--seconds", "1", "--device", "cpu"] if "measure_power" in words[1] else []
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        script = [sys.executable, str(ROOT / words[1]), *words[2:], *quick]
        return subprocess.run(script, env=env, capture_output=True, timeout=300).returncode
    assert words[0] == "hwprune", words
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], *QUICK.get(words[1], "").split(), *_force(words)])
    return int(ended.value.code or 0)


def _force(words: list[str]) -> list[str]:
    """A command after the same in Python writes where that wrote."""
    there = "--out" in words and Path(words[words.index("--out") + 1]).is_dir()
    return ["--force"] if there else []


@pytest.mark.slow
def test_every_block_of_the_readme_runs_as_printed(workplace: Path) -> None:
    names: dict[str, Any] = {"torch": torch}
    ran = {"python": 0, "bash": 0}
    for language, text in blocks():
        if language == "text":
            continue
        assert language in ran, f"a block of {language or 'no language'}: say python, bash or text"
        ran[language] += 1
        if language == "python":
            for large, small in PYTHON.items():
                text = text.replace(large, small)
            exec(compile(text, f"README, block {ran}", "exec"), names)
            continue
        for words in commands(text):
            if words[0] in ELSEWHERE:
                assert os.access(ROOT / words[0], os.X_OK)
                continue
            code = run_command(words)
            # A machine that others use may not hold still enough for a contract: that is an answer, too.
            allowed = (0, 3) if any(w.startswith("latency=") for w in words) else (0,)
            assert code in allowed, f"{shlex.join(words)} ended with {code}"
    assert ran["python"] >= 6 and ran["bash"] >= 5
    _look_at(workplace, names)


def _look_at(workplace: Path, names: dict[str, Any]) -> None:
    """What the blocks left behind is what they promise."""
    opened, plain = names["model"].eval(), names["plain"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened(x), plain(x))
    assert isinstance(plain, torch.nn.Module)
    assert sum(p.numel() for p in opened.parameters()) < sum(
        p.numel() for p in names["dense"].parameters()
    )
    images = names["images"]
    torch.testing.assert_close(
        torch.from_numpy(names["logits"]), opened(images), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(names["exported"](images), opened(images), rtol=1e-3, atol=1e-3)
    energy = names["energy"]
    assert (energy.energy_j is None) == bool(energy.reason)
    assert names["y"].shape == (8, 197, 3072)
    unet = names["pipe"].unet
    assert unet.config["quantization_config"]["quant_method"] == "hwprune"
    for page in ("deit_tiny_070", "sdxl_080", "dit_065"):
        assert (workplace / page / "report.html").is_file(), page
    assert (workplace / "front" / "front.json").is_file()
    assert hwprune.load("dit_065/transformer") is not None


def test_the_readme_opens_with_the_two_commands() -> None:
    head = README.read_text(encoding="utf-8").split("##")[0]
    assert head.index("scripts/demo") < head.index("scripts/test")


def test_links_inside_the_readme_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    heads = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(#([^)]*)\)", text):
        assert target in heads, target
