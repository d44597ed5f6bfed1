"""The built-in default: a small DeiT trained on scikit-learn's handwritten digits, no download.

The 1797 digits of 8x8 pixels are drawn at 16x16; the DeiT sees 16 patches of 4x4 pixels and a class
token. It has room to lose: 800 000 weights for a task that far fewer solve. Training is plain
PyTorch on one thread, so that a seed gives the same weights whatever the number of cores, and so
that a busy machine does not stall it (beside other jobs on 2 cores, two spinning OpenMP threads
took over 10 min for what one thread did in 1).

Shapes: N images, B images of a batch, C = 1 channel, H = W = 16 pixels.
Source: `sklearn.datasets.load_digits`, the test set of UCI's Optical Recognition of Handwritten
Digits (CC BY 4.0).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

Progress: TypeAlias = Callable[[int, int], None]  # (done, in all)

INPUT_SIZE = (1, 16, 16)  # channels, height, width
CLASSES = 10
ARCHITECTURE = "deit_tiny_patch16_224"  # the stock builder that MODEL_ARGS makes small
MODEL_ARGS: dict[str, Any] = {
    "img_size": INPUT_SIZE[1],
    "patch_size": 4,
    "in_chans": INPUT_SIZE[0],
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": CLASSES,
}


@dataclass(frozen=True)
class Recipe:
    """How the digits model is trained.

    timm's initialisation (std 0.02 everywhere) is made for long runs: at 16 epochs it reaches 80 %
    and positions drawn with std 0.5 reach 98.5 %, on the held-out third.

    Attributes:
        epochs: passes over the training images.
        batch: images a step.
        learning_rate: the highest, after a linear warm-up; a cosine takes it to zero.
        warmup: share of the steps spent warming up.
        betas: of AdamW.
        weight_decay: of AdamW.
        label_smoothing: of the cross-entropy.
        shift: largest random shift of an image, pixels of 16.
        position_std: spread of the initial position embedding.
    """

    epochs: int = 16
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: int = 1
    position_std: float = 0.5


RECIPE = Recipe()


class Digits(Dataset[tuple[Tensor, int]]):
    """Handwritten digits, as (image float32 [1, 16, 16] in [-1, 1], label 0..9).

    Args:
        images_NCHW: float32 [N, 1, 16, 16].
        labels_N: int64 [N].
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        self.images_NCHW = images_NCHW
        self.labels_N = labels_N

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images_NCHW[index], int(self.labels_N[index])


def digits_dataset(split: Literal["train", "test"]) -> Digits:
    """The digits of one split: every third image is "test" (599), the others are "train" (1198).

    Raises:
        ValueError: any other split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits have the splits 'train' and 'test', got {split!r}")
    _require_scikit_learn()
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels_NHW = torch.from_numpy(bunch.images).float() / 16  # 0..16 -> 0..1
    images_NCHW = F.interpolate(
        pixels_NHW[:, None], size=INPUT_SIZE[1:], mode="bilinear", align_corners=False
    )
    held_out_N = torch.arange(len(images_NCHW)) % 3 == 2
    chosen_N = held_out_N if split == "test" else ~held_out_N
    return Digits(images_NCHW[chosen_N] * 2 - 1, torch.from_numpy(bunch.target)[chosen_N].long())


def digits_model(
    *, seed: int = 0, pretrained: bool = True, progress: Progress | None = None
) -> nn.Module:
    """The small DeiT, trained on the digits unless asked not to, in eval mode on the CPU.

    The first call with a seed trains (under a minute) and keeps the weights in the user's cache
    folder (`$XDG_CACHE_HOME/hwprune` or `~/.cache/hwprune`); later calls read them. The file's name
    carries the versions of torch, timm and scikit-learn, the recipe and the seed, so nothing stale
    is read, and a damaged file is trained anew. A cache that cannot be written is a warning.

    Args:
        seed: of the initial weights, the order of images and their shifts.
        pretrained: False gives the initial weights, and trains and reads nothing.
        progress: called with (steps done, steps in all) while training.

    Raises:
        ModuleNotFoundError: timm or scikit-learn is not installed.
    """
    model = _build(seed)
    if not pretrained:
        return model
    _require_scikit_learn()
    path = _cache_path(seed)
    if not _read(path, model):
        model = _build(seed)  # a damaged file may have been read in part
        _train_(model, digits_dataset("train"), RECIPE, seed, progress)
        _write(path, model)
    return model.eval()


def _require_scikit_learn() -> None:
    try:
        import sklearn.datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the built-in digits need scikit-learn, which is not installed: "
            "pip install 'hwprune[digits]'"
        ) from error


def _build(seed: int) -> nn.Module:
    """The untrained model, from the stock builder, its metadata true to what it is."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the built-in digits model needs timm, which is not installed: "
            "pip install 'hwprune[timm]'"
        ) from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            ARCHITECTURE,
            pretrained=False,
            # Without these timm would take the weights and the transform of ImageNet's DeiT-Tiny.
            pretrained_cfg_overlay={
                "url": "",
                "hf_hub_id": None,
                "tag": "digits",
                "license": None,
                "input_size": INPUT_SIZE,
                "mean": (0.5,),
                "std": (0.5,),
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "num_classes": CLASSES,
                "label_names": tuple(str(digit) for digit in range(CLASSES)),
            },
            **MODEL_ARGS,
        )
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.xavier_uniform_(model.get_parameter("patch_embed.proj.weight").data.flatten(1))
        nn.init.normal_(model.get_parameter("pos_embed"), std=RECIPE.position_std)
    if not hasattr(model, "_model_args"):  # timm 1.0.31 keeps this record, 1.0.15 does not
        setattr(model, "_model_args", dict(MODEL_ARGS))  # noqa: B010 (not a declared attribute)
    return model.eval()


def _train_(
    model: nn.Module, data: Digits, recipe: Recipe, seed: int, progress: Progress | None
) -> None:
    """Trains in place: AdamW, cosine, cross-entropy, random shifts, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _train_steps_(model.train(), data, recipe, seed, progress)
    finally:
        torch.set_num_threads(threads)
        model.eval()


def _train_steps_(
    model: nn.Module, data: Digits, recipe: Recipe, seed: int, progress: Progress | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shifts = 2 * recipe.shift + 1
    size = INPUT_SIZE[1]
    padded_NHW = F.pad(data.images_NCHW[:, 0], (recipe.shift,) * 4, value=-1.0)
    # every shifted copy of every image, as a view: [N, shifts, shifts, H, W]
    shifted = padded_NHW.unfold(1, size, 1).unfold(2, size, 1)

    steps_per_epoch = len(data) // recipe.batch
    steps = steps_per_epoch * recipe.epochs
    warm = max(1, round(recipe.warmup * steps))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm)
            * 0.5
            * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        ),
    )
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order_N = torch.randperm(len(data), generator=generator)
        start = step % steps_per_epoch * recipe.batch
        chosen_B = order_N[start : start + recipe.batch]
        row_B, col_B = torch.randint(shifts, (2, len(chosen_B)), generator=generator)
        logits = model(shifted[chosen_B, row_B, col_B][:, None])
        loss = F.cross_entropy(
            logits, data.labels_N[chosen_B], label_smoothing=recipe.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)


def _cache_path(seed: int) -> Path:
    import sklearn
    import timm

    described = {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "recipe": asdict(RECIPE),
        "seed": seed,
        "versions": [torch.__version__, timm.__version__, sklearn.__version__],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hwprune" / f"digits_seed{seed}_{key}.safetensors"


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, model: nn.Module) -> bool:
    """Loads the cached weights; False where there are none, or they are damaged."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = (file.metadata() or {}).get("sha256") == _digest(state)
        if intact:
            model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError):
        return False
    return intact


def _write(path: Path, model: nn.Module) -> None:
    """Writes the weights so that a reader finds all of them or none."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            save_file(state, name, metadata={"sha256": _digest(state)})
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the trained digits model could not be kept in {path.parent} ({error}); it will be "
            "trained again next time. Set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=3,
        )
