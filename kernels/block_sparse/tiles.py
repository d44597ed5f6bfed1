"""Which tile of tokens, how many warps and how deep a pipeline a GPU kernel gets; no tuning at run time.

The rules come from the compiled kernels (registers, shared memory, spills; tests/test_kernel_compile.py
asserts them) and from the arithmetic of the memory hierarchy; a measured table overrides them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of shared memory a program may use: compute capability -> limit (CUDA C Programming Guide, table
# of technical specifications). 8.6, 8.9 and 12.x have 99 KiB.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        tokens: tokens a program computes.
        warps: warps of a program.
        stages: tiles in flight.
        tma: operands come through tensor descriptors.
        swap: the weight is the left operand, so that tokens lie along the MMA's wide side.
    """

    tokens: int
    warps: int
    stages: int
    tma: bool
    swap: bool


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory a program may use."""
    return _SHARED.get(capability, 99) * 1024


def fits(
    block: tuple[int, int], itemsize: int, capability: tuple[int, int], weights: int = 1
) -> bool:
    """Whether one step of the smallest launch fits in shared memory (float32 128 x 128 may not)."""
    needed = (16 + weights * block[0]) * block[1] * itemsize
    return needed <= shared_limit(capability) - 2048


def choose(
    tokens: int,
    rows: int,
    block: tuple[int, int],
    itemsize: int,
    capability: tuple[int, int],
    processors: int,
    *,
    weights: int = 1,
    act: str = "none",
    tma: bool | None = None,
) -> Config:
    """The launch for a product of `tokens` tokens by `rows` block-rows.

    Args:
        tokens: M.
        rows: block-rows of the weight (of its transpose, for the gradient).
        block: (rows of the weight tile, length of one step of the reduction).
        itemsize: bytes of an operand's entry.
        capability: of the device, e.g. (9, 0).
        processors: streaming multiprocessors.
        weights: 2 for a gated layer, which keeps two accumulators.
        act: what is fused behind the product.
        tma: use tensor descriptors; by default where the hardware has them.
    """
    high, step = block
    hopper = capability >= (9, 0) and capability[0] != 12
    # 256 tokens a program halve what 64-row tiles read from L2; two accumulators leave room for 128. Not
    # past what fills the device twice, nor past the tokens there are.
    widest = (256 if itemsize == 2 and hopper else 128) // weights
    if high >= 128 and (not hopper or act == "gelu"):
        # erf over an accumulator of 256 x 128 needs more than 255 registers: 184 bytes are spilled on sm_90
        widest = min(widest, 128 // weights)
    side = 16
    while side < widest and side < tokens:
        wider = side * 2
        if wider > 64 and -(-tokens // wider) * rows < 2 * processors:
            break
        side = wider
    limit = shared_limit(capability) - 2048  # barriers and what ptxas keeps
    # Triton keeps `stages` buffers for descriptors and wgmma, one fewer for cp.async and mma.sync.
    ahead, target = (0, max(4, 256 // step)) if hopper else (1, max(3, 128 // step))
    while True:
        ring = (side + weights * high) * step * itemsize
        buffers = min(target, 8, limit // ring)
        if (buffers >= 2 and side * high * 4 <= limit) or side <= 16:
            break
        side //= 2
    # A step of 128 keeps twice the operands in registers where mma.sync reads them from there.
    many = side * high * weights >= 128 * 128 or (step >= 128 and side >= 128 and not hopper)
    warps = 8 if many else 4
    stages = max(1, buffers) + ahead
    return Config(
        tokens=side,
        warps=warps,
        stages=stages,
        tma=hopper if tma is None else tma,
        # wgmma and tcgen05 want 64 rows on the left: weights have them, few tokens do not
        swap=hopper or high <= 64,
    )
