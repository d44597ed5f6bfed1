"""What every test shares: fixed seeds, the reason a gpu test is skipped, one tiny model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device; scripts/gpu runs this where one is")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - scikit-learn and timm draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and images beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout, so no real weights or images")
    return folder


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A timm ViT with random weights: 2 blocks, 3 heads of 16, 32x32 images, 10 classes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    # timm starts biases at zero and norms at one, where a lost bias or scale would go unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture
def tiny_images() -> Tensor:
    """Eight images for tiny_vit: float32 [8, 3, 32, 32]."""
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
