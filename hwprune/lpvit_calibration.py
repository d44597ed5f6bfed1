"""What LPViT needs to know of a model: gradients of its squared logits, and its linear FLOPs.

One forward and one backward pass over the calibration images; labels are not used.

Shapes: N calibration images, B images of a batch, T tokens, O x I a weight, J blocks of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwprune.statistics import model_output
from hwprune.units import Slice, reduce

Block = tuple[int, int]
Calls = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class LayerSums:
    """What the calibration pass keeps of one layer.

    Attributes:
        weight: [O, I] float64; a convolution's is flattened to [O, C*k*k].
        gradient: [O, I] float64, mean over images of the gradient of mean(logits^2).
        block_sums: [N, J] float64, sum over each block of weight * gradient of each image.
        tokens: rows of activations per image.
        repo_tokens: what the public code takes for them in its FLOPs: dimension 1 of the output,
            which for a classifier is the number of classes.
        repo_rows: what it takes for them in its power term: input features, or image height.
    """

    weight: Tensor
    gradient: Tensor
    block_sums: Tensor
    tokens: int
    repo_tokens: int
    repo_rows: int


def block_linears(model: nn.Module) -> list[str]:
    """Names of every `nn.Linear` inside `blocks`: qkv, proj, fc1, fc2 of a timm ViT or Swin.

    Raises:
        ValueError: the model has no such layers.
    """
    names = [
        name
        for name, module in model.named_modules()
        if "blocks" in name.split(".")[:-1] and isinstance(module, nn.Linear)
    ]
    if not names:
        raise ValueError(
            f"layers: expected a model with linears under `blocks`, got {type(model).__name__}; "
            "name the layers to prune"
        )
    return names


def sum_blocks(entries: Tensor, block: Block) -> Tensor:
    """Sum over each block, ragged at the edges: [O, I] -> [ceil(O / rows), ceil(I / columns)]."""
    return reduce(entries, Slice("", None, None, block))


def calibrate(
    model: nn.Module, batches: Sequence[Tensor], names: Sequence[str], block: Block
) -> dict[str, LayerSums]:
    """Gradients of mean(logits^2) by the named weights, summed over blocks, image by image.

    Memory: two float64 copies of each named weight, N x J block sums, one batch of activations.

    Args:
        model: images [B, 3, H, W] -> logits [B, classes]; evaluated, left as it was.
        batches: calibration images.
        names: `nn.Linear` or ungrouped `nn.Conv2d` modules.
        block: (output rows, input columns).

    Returns:
        The sums of each layer, in the order of `names`.

    Raises:
        ValueError: no images, an unknown or unsupported layer, one that does not run exactly once
            per forward, or non-finite values; the layer is named.
    """
    if not names:
        raise ValueError("layers: expected at least one layer name, got none")
    if not batches or not all(len(batch) for batch in batches):
        raise ValueError("batches: expected calibration images, got none; pass at least one batch")
    modules = {name: _supported(model, name) for name in names}
    weights = {name: m.weight.detach().flatten(1).double() for name, m in modules.items()}
    for name, weight in weights.items():
        _check_finite(weight, name, "weight")
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    block_sums: dict[str, list[Tensor]] = {name: [] for name in names}
    facts: dict[str, tuple[int, int, int]] = {}
    for batch in batches:
        with _recorded(model, modules) as calls, torch.enable_grad():
            logits = model_output(model, batch.detach().clone().requires_grad_())
            outputs = [_only_output(calls, name) for name in names]
            split = [n for n in names if len(calls[n][0][0]) != len(batch)]
            if split and not facts:  # once
                _check_images_first(calls, split, logits)
            _check_finite(logits, type(model).__name__, "output")
            loss = logits.square().flatten(1).mean(1).sum()  # a sum: images do not mix
            output_grads = torch.autograd.grad(loss, outputs)
        for name, output, output_grad in zip(names, outputs, output_grads, strict=True):
            module, x = modules[name], calls[name][0][0].detach()
            x_BTI, g_BTO = _rows(module, name, x, output_grad, len(batch))
            height = x.shape[2] if isinstance(module, nn.Conv2d) else x.shape[-1]
            facts[name] = (x_BTI.shape[1], output.shape[1], height)
            for x_TI, g_TO in zip(x_BTI, g_BTO, strict=True):
                gradient = (g_TO.mT @ x_TI).double()
                gradients[name] += gradient
                block_sums[name].append(sum_blocks(weights[name] * gradient, block).flatten())
    images = sum(len(batch) for batch in batches)
    return {
        n: LayerSums(weights[n], gradients[n] / images, torch.stack(block_sums[n]), *facts[n])
        for n in names
    }


def linear_macs(model: nn.Module, images: Tensor, *, repo_count: bool) -> float:
    """MACs of one image through every linear and convolution, attention products not counted.

    Args:
        model: the dense model.
        images: [B, 3, H, W], of which the first is used.
        repo_count: count as the public code does, a classifier once for each of its classes.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with _recorded(model, layers) as calls, torch.no_grad():
        model(images[:1])
    total = 0.0
    for name, module in layers.items():
        for _, y in calls[name]:
            tokens = y.shape[1] if repo_count else y.numel() // module.weight.shape[0]
            total += tokens * module.weight.numel()
    return total


def _supported(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return module
    got = "no such module" if module is None else type(module).__name__
    raise ValueError(
        f"layers: expected nn.Linear or an ungrouped, zero-padded nn.Conv2d at {name!r}, got "
        f"{got}; leave it out"
    )


def _check_finite(tensor: Tensor, name: str, what: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name}: expected finite values in its {what}, got NaN or infinity; check the weights"
        )


def _only_output(calls: Calls, name: str) -> Tensor:
    if len(calls[name]) != 1:
        raise ValueError(
            f"{name}: expected 1 call per forward, got {len(calls[name])}; leave it out of `layers`"
        )
    output = calls[name][0][1]
    _check_finite(output, name, "output")
    return output


@contextmanager
def _recorded(model: nn.Module, modules: dict[str, nn.Linear | nn.Conv2d]) -> Iterator[Calls]:
    """Evaluation mode, and (input, output) of every call of `modules`; undone on exit."""
    calls: Calls = {name: [] for name in modules}

    def record(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name].append((inputs[0], output))

    training = [m for m in model.modules() if m.training]
    model.eval()
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: record(name, x, y))
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _check_images_first(calls: Calls, names: Sequence[str], logits: Tensor) -> None:
    """Windows of an image may lie one after another, but images must not be interleaved.

    The first image's logits may depend on the first rows alone.
    """
    images = len(logits)
    whole = [n for n in names if len(calls[n][0][0]) % images == 0]
    outputs = [calls[n][0][1] for n in whole]
    first = torch.autograd.grad(logits[0].square().sum(), outputs, retain_graph=True)
    fine = {n: not g[len(g) // images :].any() for n, g in zip(whole, first, strict=True)}
    for name in names:
        if not fine.get(name, False):
            raise ValueError(
                f"{name}: expected an input with {images} images first, or the windows of each in turn, got "
                f"{tuple(calls[name][0][0].shape)}; leave it out of `layers`"
            )


def _rows(
    module: nn.Linear | nn.Conv2d, name: str, x: Tensor, output_grad: Tensor, images: int
) -> tuple[Tensor, Tensor]:
    """Inputs [B, T, I] and output gradients [B, T, O]: over T, their product is the gradient.

    The windows of an image, one after the other, are tokens of it.
    """
    windows = isinstance(module, nn.Linear) and x.dim() > 2 and not x.shape[0] % images
    if x.shape[0] != images and not windows:
        raise ValueError(
            f"{name}: expected an input with {images} images first, got {tuple(x.shape)}; "
            "leave it out of `layers`"
        )
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise ValueError(f"{name}: expected a numeric padding, got {module.padding!r}")
        x_BIT = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return x_BIT.mT, output_grad.flatten(2).mT
    return x.reshape(images, -1, x.shape[-1]), output_grad.reshape(
        images, -1, output_grad.shape[-1]
    )
