"""The page in a real browser: nothing is refused or fetched, both schemes are drawn, nothing sticks out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import hwprune
from hwprune.digits import digits_model
from hwprune.page.build import write_page

pytest.importorskip("timm")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]
PAPER = {"light": (255, 255, 255), "dark": (20, 24, 31)}  # --paper of the page's style sheet


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = digits_model(pretrained=False)
    x = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    hwprune.prune(model, [x], hwprune.Budget(macs=0.6), kinds=["head", "qk", "vo", "neuron"])
    out = tmp_path_factory.mktemp("browser") / "pruned"
    hwprune.save(model, out)
    return write_page(out)


def browse(page: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the browser on the page, without a window, a profile of its own beside the page."""
    assert BROWSER is not None
    profile = page.parent.parent / "profile"
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    try:
        done = subprocess.run(
            [BROWSER, *fixed, f"--user-data-dir={profile}", *words, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(page.parent.parent)},
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the browser did not answer in 120 s: this machine is too busy for it")
    return done


def test_the_browser_has_nothing_to_complain_of(page: Path) -> None:
    done = browse(page, "--enable-logging=stderr", "--v=0", "--dump-dom")
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    # What the browser made of it: every section stands in main, so no tag was closed by mistake.
    main = done.stdout[done.stdout.index("<main>") : done.stdout.index("</main>")]
    sections = ["asked", "figures", "structure", "distortion", "provenance"]
    assert re.findall(r'<section id="(\w+)"', main) == sections
    assert main.count("<svg") == main.count("</svg>") == 8


def test_the_policy_refuses_what_would_be_fetched(page: Path) -> None:
    bad = page.with_name("bad.html")
    text = page.read_text().replace(
        "</main>", '<img src="http://localhost:9/x.png" alt="x"></main>'
    )
    bad.write_text(text)
    done = browse(bad, "--enable-logging=stderr", "--v=0", "--dump-dom")
    bad.unlink()
    assert "Content Security Policy" in done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])
def test_both_schemes_are_drawn_and_nothing_sticks_out(
    page: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, *dark, f"--window-size={width},2400", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    paper = np.array(PAPER[scheme])
    assert (pixels[0, 0] == paper).all(), pixels[0, 0]
    inked = np.abs(pixels - paper).sum(-1) > 60
    assert 0.01 < inked.mean() < 0.5
    # The margins of the page stay empty: no table or picture runs over them.
    assert not inked[:, :8].any() and not inked[:, -8:].any()
    # Bars in the colour of the scheme.
    kept = np.array((47, 111, 196) if scheme == "light" else (106, 165, 238))
    assert (np.abs(pixels - kept).sum(-1) < 12).sum() > 1000
