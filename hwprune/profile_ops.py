"""Which operations a device profile measures: the shapes that pruned ViTs and diffusion models have.

Ordered so that a run that is cut short has what matters first: dense linears of ViTs whole and pruned,
attention with narrower heads, activations and norms, tiles at three densities, then the diffusion models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hwprune.ops import Op

BLOCKS = ((64, 64), (32, 32), (64, 32), (128, 64))
DENSITIES = (0.5, 0.25, 0.75)
# Kept fractions of a width; the odd ones give sizes that no tile divides, as pruning does.
KEPT = (1.0, 0.5, 0.75, 0.27, 0.12, 0.63, 0.9)

VITS = {"DeiT-Ti": (192, 3), "DeiT-S": (384, 6), "DeiT-B": (768, 12)}  # width, heads
VIT_TOKENS = 197
# q/k and v widths of a head: equal ones, unequal ones, odd ones
WIDTHS = (
    *((64, 64), (32, 64), (48, 48), (24, 40), (16, 32), (32, 32), (56, 64)),
    *((43, 37), (30, 21), (60, 45), (40, 40)),
)
NORMS = (192, 384, 768, 1152, 64, 256, 512, 1280)  # widths of layer norms
# tokens of one forward, heads and their width, (inputs, outputs) of its linears
DIFFUSION = {
    "DiT-XL": (256, 16, 72, ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))),
    "SDXL 1280": (1024, 20, 64, ((1280, 1280), (1280, 10240), (5120, 1280))),
    "SDXL 640": (4096, 10, 64, ((640, 640), (640, 5120), (2560, 640))),
    "SD3": (4096, 24, 64, ((1536, 1536), (1536, 6144), (6144, 1536))),
    "FLUX": (4608, 24, 128, ((3072, 3072), (3072, 12288), (12288, 3072))),
}


def profile_ops(batches: Sequence[int], dtypes: Sequence[str]) -> list[Op]:
    """All operations, the most useful first, none twice.

    Args:
        batches: images of a ViT's forward; diffusion models run one sample.
        dtypes: fp32, fp16, bf16.
    """
    found: dict[Op, None] = {}
    for make in (_whole, _pruned, _attention, _pointwise, _tiles, _diffusion):
        for dtype in dtypes:
            for batch in batches:
                found.update(dict.fromkeys(make(batch, dtype)))
    return list(found)


def _linears(width: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of a block's four linears."""
    return ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))


def _whole(batch: int, dtype: str) -> Iterator[Op]:
    for width, _ in VITS.values():
        for inputs, outputs in _linears(width):
            yield Op("linear", (batch * VIT_TOKENS, outputs, inputs), dtype)


def _pruned(batch: int, dtype: str) -> Iterator[Op]:
    """One side of each linear cut: outputs of qkv and fc1, inputs of proj and fc2."""
    for kept in KEPT:
        for width, _ in VITS.values():
            for i, (inputs, outputs) in enumerate(_linears(width)):
                n, k = (outputs, inputs) if i in (0, 2) else (inputs, outputs)
                cut = max(8, round(n * kept))
                shape = (cut, k) if i in (0, 2) else (k, cut)
                yield Op("linear", (batch * VIT_TOKENS, *shape), dtype)


def _attention(batch: int, dtype: str) -> Iterator[Op]:
    for _, heads in VITS.values():
        for d, e in WIDTHS:
            for kept in sorted({heads, max(1, heads // 2), max(1, heads - 1)}):
                yield Op("attention", (batch, kept, VIT_TOKENS, d, e), dtype)


def _tiles(batch: int, dtype: str) -> Iterator[Op]:
    for block in BLOCKS:
        for density in DENSITIES:
            for width, _ in reversed(VITS.values()):
                for inputs, outputs in _linears(width):
                    yield _tiles_of((batch * VIT_TOKENS, outputs, inputs), dtype, density, block)


def _tiles_of(
    shape: tuple[int, int, int], dtype: str, density: float, block: tuple[int, int]
) -> Op:
    """Whole tiles, so that a model's layer of that many is found verbatim."""
    grid = -(-shape[1] // block[0]) * -(-shape[2] // block[1])
    return Op.tiles(shape, dtype, block, max(1, round(density * grid)))


def _pointwise(batch: int, dtype: str) -> Iterator[Op]:
    for width in NORMS:
        yield Op("layer_norm", (batch * VIT_TOKENS, width), dtype)
    for width, _ in VITS.values():
        for kept in KEPT:
            wide = max(8, round(4 * width * kept))
            yield Op("gelu", (batch * VIT_TOKENS, wide), dtype)
            yield Op("silu", (batch * VIT_TOKENS, wide), dtype)


def _diffusion(batch: int, dtype: str) -> Iterator[Op]:
    if batch != 1:
        return
    for tokens, heads, width, linears in DIFFUSION.values():
        yield Op("attention", (1, heads, tokens, width, width), dtype)
        for inputs, outputs in linears:
            yield Op("linear", (tokens, outputs, inputs), dtype)
            for density in DENSITIES:
                yield _tiles_of((tokens, outputs, inputs), dtype, density, (64, 64))
