"""Whether what a file holds fits a model, and whether the model opened from it is the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.layers import BlockSparseLinear
from hwprune.spec import CheckpointError

_TRAINING_ONLY = ("Dropout", "DropPath", "PatchDropout", "Identity")  # no part of the function
# What decides a module's function beside its weights and what it prints of itself.
_TOLD = (
    *(
        "num_heads",
        "head_dim",
        "scale",
        "num_prefix_tokens",
        "rotate_half",
        "global_pool",
    ),  # timm's
    *("heads", "inner_dim", "inner_kv_dim", "mlp_hidden_dim"),  # diffusers'
)


def difference(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The first tensor that is missing, too much, or of another shape, and how many are."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing:
        return f"{missing[0]} is missing from the file ({len(missing)} such)"
    if extra:
        return f"{extra[0]} is in the file, but the model has no place for it ({len(extra)} such)"
    names = [name for name in expected if expected[name] != given[name]]
    first = names[0]
    return f"{first}: expected {expected[first]}, got {given[first]} ({len(names)} such)"


def check_types(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse whole numbers where a model has fractions, and the other way round.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, expected in model.state_dict().items():
        got = tensors[name].dtype if name in tensors else expected.dtype
        if got != expected.dtype and not (got.is_floating_point and expected.is_floating_point()):
            raise CheckpointError(f"{name}: expected {expected.dtype} or like it, got {got}")


def check_tiles(model: nn.Module) -> None:
    """Refuse stored tiles that lie outside their weight, twice in one place, or out of order.

    Raises:
        CheckpointError: naming the layer.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BlockSparseLinear):
            continue
        try:
            module.tiles.check()
        except ValueError as error:
            raise CheckpointError(
                f"{name}: its tiles do not fit a weight of {module.out_features} x {module.in_features} "
                f"({error}); the file is damaged: save the model again"
            ) from None


def check_tensors(again: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Compare an opened model with what was written.

    Args:
        again: the opened model, on the CPU.
        tensors: what was written, on the CPU.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    read = again.state_dict()
    for name, tensor in tensors.items():
        same = name in read and tensor.dtype == read[name].dtype and _same_bits(tensor, read[name])
        if not same:
            raise CheckpointError(f"{name} did not come back from the file as it is in the model")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check_structure(again: nn.Module, model: nn.Module) -> None:
    """Compare what every module is, and the buffers that timm computes and does not store.

    Args:
        again: the opened model.
        model: the model in memory, on any device.

    Raises:
        CheckpointError: the model was changed in a way no file of ours can say, naming the module.
    """
    before, after = structure(model), structure(again)
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            raise CheckpointError(
                f"{name or 'the model'} is {before.get(name)} here, but {after.get(name)} when built "
                "by its name and arguments: it was changed after it was created in a way a "
                "file cannot say; create it with that change as an argument"
            )
    live, stored = dict(model.named_buffers()), set(model.state_dict())
    for name, buffer in again.named_buffers():
        if name in live and name not in stored and not torch.equal(live[name].cpu(), buffer):
            raise CheckpointError(
                f"{name} is not stored by timm and differs from what timm computes when it builds the "
                "model; create the model at the input size it shall have"
            )


def structure(model: nn.Module) -> dict[str, str]:
    """Module name -> type, sizes, and how attention is split; without what only training uses."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _TRAINING_ONLY:
            continue
        told = {key: getattr(module, key, None) for key in _TOLD}
        extra = [f"{k}={v}" for k, v in told.items() if isinstance(v, bool | int | float | str)]
        found[name] = f"{kind}({', '.join(filter(None, [module.extra_repr(), *extra]))})"
    return found
