"""The real diffusion transformer of Fashion-MNIST, its own judge, and the scores of its pictures.

The judge is a small classifier trained here on the real images; Fréchet distances are between its features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.conditions import Conditions, label_conditions
from hwprune.teacher import Batch, Sampler

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data"
FEATURES = 64
# Far from the seeds pruning uses, which are small multiples of three.
_FIRST_SEED = 7_000_000_000_000_001


def missing(folder: Path = FOLDER) -> str:
    """Why the task cannot be loaded, or nothing."""
    absent = [n for n in ("dit_fashion", "fashion_mnist.npz") if not (folder / n).exists()]
    return f"{folder} has no {', '.join(absent)}" if absent else ""


def dense(folder: Path = FOLDER) -> tuple[nn.Module, DDIMScheduler]:
    """The model and its scheduler, opened by stock diffusers."""
    model = DiTTransformer2DModel.from_pretrained(
        folder / "dit_fashion" / "transformer", low_cpu_mem_usage=False
    )
    return model.eval(), DDIMScheduler.from_pretrained(folder / "dit_fashion" / "scheduler")


def fresh_batches(conditions: Conditions, images: int, batch: int) -> list[Batch]:
    """First latents and labels no run has learned from or was tuned on: seeds and labels of their own.

    Args:
        conditions: of all labels.
        images: how many.
        batch: images at a time.
    """
    draw = torch.Generator().manual_seed(_FIRST_SEED)
    labels = torch.randint(0, len(conditions.names), (images,), generator=draw).tolist()
    starts = torch.randn(images, *conditions.shape, generator=draw)
    return [
        Batch(
            tuple(labels[i : i + batch]),
            tuple(range(_FIRST_SEED + i, _FIRST_SEED + min(i + batch, images))),
            starts[i : i + batch],
            torch.empty(0),
        )
        for i in range(0, images, batch)
    ]


def drawn(model: nn.Module, steps: int, guidance: float, images: int, folder: Path) -> Tensor:
    """Final images of the fresh seeds and labels: [images, 1, 28, 28] in [-1, 1]."""
    _, scheduler = dense(folder)
    conditions = label_conditions(model, scheduler, range(10), steps=steps, guidance=guidance)
    sampler = Sampler(model, conditions)
    with torch.no_grad():
        return torch.cat([sampler.final(b) for b in fresh_batches(conditions, images, 50)])


class Judge(nn.Module):
    """A small convolutional classifier; its last features are what Fréchet distances are taken of."""

    def __init__(self) -> None:
        """Two convolutions, then `FEATURES` features."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images in [-1, 1]."""
        return self.head(self.body(x))


@dataclass(frozen=True)
class Real:
    """The real images.

    Attributes:
        train: [60000, 1, 28, 28] in [-1, 1], with `labels`.
        test: [10000, 1, 28, 28], with `test_labels`.
    """

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def real(folder: Path = FOLDER) -> Real:
    """Read them."""
    held = np.load(folder / "fashion_mnist.npz")

    def images(key: str) -> Tensor:
        return torch.from_numpy(held[key]).float().div(127.5).sub(1)[:, None]

    labels = (torch.from_numpy(held[k]).long() for k in ("train_y", "test_y"))
    train_y, test_y = labels
    return Real(images("train_x"), train_y, images("test_x"), test_y)


def trained_judge(data: Real, work: Path, *, epochs: float = 2.0) -> tuple[Judge, float]:
    """The judge and its accuracy on the test images; trained once, then read from the work folder."""
    torch.manual_seed(0)
    judge, file = Judge(), work / f"judge-{epochs:g}.pt"
    if file.is_file():
        judge.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimiser = torch.optim.Adam(judge.parameters(), lr=2e-3)
        draw = torch.Generator().manual_seed(0)
        for _ in range(int(epochs * len(data.train) / 128)):
            pick = torch.randint(0, len(data.train), (128,), generator=draw)
            loss = F.cross_entropy(judge(data.train[pick]), data.labels[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        work.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), file)
    judge.eval()
    with torch.no_grad():
        right = torch.cat([judge(x).argmax(1) for x in data.test.split(1000)]) == data.test_labels
    return judge, float(right.double().mean())


@torch.no_grad()
def features(judge: Judge, images: Tensor) -> Tensor:
    """[images, FEATURES], float64."""
    return torch.cat([judge.body(x) for x in images.split(1000)]).double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features as Gaussians.

    The trace of (A B)^1/2 is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, all real.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images in [-1, 1], pair by pair: [images] (Wang et al. 2004, 7 x 7 windows)."""
    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=1)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
    return (top / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def paired(judge: Judge, dense_images: Tensor, images: Tensor) -> dict[str, float]:
    """Scores of pictures against the dense model's from the same first latents, with standard errors."""
    off = (images.double() - dense_images.double()).flatten(1).square().mean(1)
    alike = ssim(dense_images, images)
    near, far = F.normalize(features(judge, dense_images)), F.normalize(features(judge, images))
    judged = (near - far).square().sum(1)
    with torch.no_grad():
        same = (judge(images).argmax(1) == judge(dense_images).argmax(1)).double()
    found: dict[str, float] = {}
    scores: Sequence[tuple[str, Tensor]] = (
        ("latent_mse", off),
        ("ssim", alike),
        ("feature_distance", judged),
        ("same_class", same),
    )
    for name, values in scores:
        found[name] = float(values.mean())
        found[f"{name}_se"] = float(values.std() / len(values) ** 0.5)
    return found
