"""The real ViT-Tiny and the ImageNet pictures, where the folder that holds them is beside the repository."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data"
ARCHITECTURE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
CALIBRATION, TEST, CLASSES = (
    "imagenet_calib1000.tar",
    "imagenet_val_dev650.tar",
    "imagenet_classes.txt",
)


@dataclass(frozen=True)
class Task:
    """A dense model, unlabelled images to calibrate on, and labelled images to be judged on.

    Attributes:
        model: dense, in evaluation mode, float32.
        calibration: batches [32, 3, H, W].
        calibration_labels: of the same batches, for those peers that work better with labels.
        images: test batches [50, 3, H, W].
        labels: [number of test images].
    """

    model: nn.Module
    calibration: list[Tensor]
    calibration_labels: list[Tensor]
    images: list[Tensor]
    labels: Tensor


def missing(folder: Path = FOLDER) -> str:
    """Why the task cannot be loaded, or nothing."""
    absent = [n for n in (WEIGHTS, CALIBRATION, TEST, CLASSES) if not (folder / n).is_file()]
    return f"{folder} has no {', '.join(absent)}" if absent else ""


def load(calibration_images: int, seed: int, folder: Path = FOLDER) -> Task:
    """Read weights and images.

    Args:
        calibration_images: drawn without replacement from the calibration tar.
        seed: of that draw.
        folder: where the files are.
    """
    model = timm.create_model(ARCHITECTURE, pretrained=False).eval()
    weights = load_file(folder / WEIGHTS)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    calibration, test = (
        create_dataset(
            "", root=str(folder / tar), class_map=str(folder / CLASSES), transform=transform
        )
        for tar in (CALIBRATION, TEST)
    )
    draw = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    chosen = draw[:calibration_images].sort().values.tolist()
    x_cal, y_cal = _read(Subset(calibration, chosen), 32)
    x_test, y_test = _read(test, 50)
    return Task(model, x_cal, y_cal, x_test, torch.cat(y_test))


def _read(dataset: torch.utils.data.Dataset, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    images, labels = zip(*DataLoader(dataset, batch_size=batch), strict=True)
    return list(images), list(labels)
