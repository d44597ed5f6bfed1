"""Counts true MACs and parameters of a realised model, with none of hwprune's own cost model in it.

Torch's FLOP counter sees every convolution, linear and attention product of a forward pass. A
`BlockSparseLinear` is counted by its stored blocks instead, cropped at ragged edges.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hwprune.layers import BlockSparseLinear


def true_macs(model: nn.Module, image: Tensor) -> float:
    """MACs of one image [1, 3, H, W]: attention products counted, the classifier once."""
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    tokens: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda module, _, y, name=name: tokens.update({name: y.numel() // module.out_features})
        )
        for name, module in sparse.items()
    ]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    for handle in handles:
        handle.remove()
    total = counter.get_total_flops() / 2
    inside = counter.get_flop_counts()
    for name, module in sparse.items():
        ran = inside.get(f"{type(model).__name__}.{name}", {})
        total += tokens[name] * stored_entries(module) - sum(ran.values()) / 2
    return total


def parameters(model: nn.Module) -> int:
    """Weights and biases, padding of ragged blocks left out."""
    padding = sum(
        m.values.numel() - stored_entries(m)
        for m in model.modules()
        if isinstance(m, BlockSparseLinear)
    )
    return sum(p.numel() for p in model.parameters()) - padding


def stored_entries(layer: BlockSparseLinear) -> int:
    """Entries of the weight that the kept blocks cover."""
    rows, columns = layer.block
    row_of, column_of = layer.tiles.keep().nonzero(as_tuple=True)
    heights = (layer.out_features - row_of * rows).clamp(max=rows)
    widths = (layer.in_features - column_of * columns).clamp(max=columns)
    return int((heights * widths).sum())
