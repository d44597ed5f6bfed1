"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: what ptxas makes of them.

For each launch that `tiles.choose` picks: the MMA instruction, the depth of the pipeline (the test that
would have caught what makes public block-sparse kernels slow), 16-byte asynchronous copies or TMA,
registers, spills and shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hwprune.kernels.block_sparse import tiles

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402 - needs triton
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hwprune.kernels.block_sparse import gpu_backward, gpu_forward  # noqa: E402

BLOCKS = [
    (32, 32),
    (32, 128),
    (64, 16),
    (64, 32),
    (64, 64),
    (64, 128),
    (128, 32),
    (128, 64),
    (128, 128),
]
TOKENS = [12608, 16]
PROCESSORS = {80: 108, 90: 132, 100: 148}
WORDS = {"bf16": 2, "fp16": 2, "fp32": 4}
each_arch = pytest.mark.parametrize("arch", PROCESSORS)
each_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@dataclass(frozen=True)
class Built:
    """What came of a compilation."""

    ptx: str
    shared: int
    registers: int
    spilled: int

    @property
    def mma(self) -> set[str]:
        found = re.findall(
            r"(tcgen05\.mma|wgmma\.mma_async|mma\.sync)(?:\.sync)?(?:\.aligned)?(?:\.(m\d+n\d+k\d+))?",
            self.ptx,
        )
        return {" ".join(filter(None, parts)) for parts in found}

    @property
    def copies_16(self) -> int:
        """Asynchronous copies of 16 bytes."""
        return len(
            re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", self.ptx)
        )

    @property
    def boxes(self) -> int:
        """TMA loads."""
        return len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", self.ptx))


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    divisible: set[str],
    arch: int,
    warps: int,
    folder: Path,
) -> Built:
    """Compile for an architecture and ask ptxas for its resources."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    ptx = folder / "kernel.ptx"
    ptx.write_text(made.asm["ptx"])
    target = f"sm_{arch}{'a' if arch >= 90 else ''}"
    command = [
        get_ptxas(arch).path,
        "-v",
        f"--gpu-name={target}",
        ptx,
        "-o",
        folder / "kernel.cubin",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(p, said) for p in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
    )
    assert registers and spilled, said
    return Built(made.asm["ptx"], made.metadata.shared, int(registers[1]), int(spilled[1]))


def forward(
    folder: Path,
    arch: int,
    block: tuple[int, int],
    tokens: int,
    dtype: str = "bf16",
    act: str = "none",
    gated: bool = False,
    tma: bool | None = None,
    even: bool = True,
) -> tuple[Built, tiles.Config]:
    """The forward kernel with the launch that is chosen for it."""
    weights = 2 if gated else 1
    config = tiles.choose(
        tokens,
        3072 // block[0],
        block,
        WORDS[dtype],
        (arch // 10, arch % 10),
        PROCESSORS[arch],
        weights=weights,
        act=act,
        tma=tma,
    )
    pointer = f"*{dtype}"
    operands = {"x_ref": pointer, "w_ref": pointer}
    if config.tma:
        operands = {
            "x_ref": f"tensordesc<{dtype}[{config.tokens},{block[1]}]>",
            "w_ref": f"tensordesc<{dtype}[{block[0]},{block[1]}]>",
        }
    types = operands | dict.fromkeys(("idx", "crow", "order"), "*i32")
    types |= dict.fromkeys(("bias", "residual", "y"), pointer)
    types |= dict.fromkeys(("tokens", "width", "outputs", "stored", "stride_x"), "i32")
    constants = {
        "BM": config.tokens,
        "BN": block[0],
        "BK": block[1],
        "STAGES": config.stages,
        "COUNT": 0,
        "ACT": act,
        "GATED": gated,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": act != "none",
        "EVEN_K": even,
        "SWAP": config.swap,
        "TMA": config.tma,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
    }
    divisible = {"bias", "residual", "y", "width", "outputs", "stride_x"}
    divisible |= set() if config.tma else {"x_ref", "w_ref"}
    built = build(gpu_forward.forward, types, constants, divisible, arch, config.warps, folder)
    return built, config


def buffers(
    built: Built, config: tiles.Config, block: tuple[int, int], size: int, n: int = 1
) -> int:
    """Tiles in flight: shared memory over what one step of the ring takes."""
    return built.shared // ((config.tokens + n * block[0]) * block[1] * size)


@each_arch
@each_block
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_forward_kernel_keeps_its_pipeline_and_its_registers(
    tmp_path: Path, arch: int, block: tuple[int, int], tokens: int
) -> None:
    built, config = forward(tmp_path, arch, block, tokens)
    ahead = 0 if config.tma else 1  # cp.async keeps one tile fewer than it has stages
    depth = buffers(built, config, block, 2)
    short = 1 if arch >= 90 and block[0] == 32 else 0  # mma.sync on Hopper: descriptors, one fewer
    assert depth >= config.stages - ahead - short >= 2, (config, depth)
    assert built.spilled == 0
    assert built.shared <= tiles.shared_limit((arch // 10, arch % 10))
    assert built.registers * config.warps * 32 <= 65536
    if config.tma:
        assert built.boxes >= 2 * (config.stages - 1)
        wide = config.tokens if config.swap else block[0]
        if arch == 90 and block[0] >= 64 and config.tokens >= 64:
            assert all(m.startswith("wgmma.mma_async m64n") for m in built.mma), built.mma
            assert max(int(re.search(r"n(\d+)", m.split()[1])[1]) for m in built.mma) >= min(
                wide, 128
            )  # type: ignore[index]
        if arch == 100 and block[0] >= 64 and config.tokens >= 64:
            assert built.mma == {"tcgen05.mma"}
    else:
        assert built.copies_16 > 0 and built.mma == {"mma.sync m16n8k16"}
        rest = re.findall(r"cp\.async\.ca\.shared\.global", built.ptx)
        assert len(rest) <= 2 * config.stages  # the indices, four bytes each


@pytest.mark.parametrize("block", [(64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
@each_arch
def test_an_epilogue_costs_no_spill_and_no_stage(
    tmp_path: Path, arch: int, block: tuple[int, int], act: str
) -> None:
    fused, config = forward(tmp_path, arch, block, 12608, act=act)
    assert fused.spilled == 0 and config.tokens >= 128
    assert buffers(fused, config, block, 2) >= config.stages - (0 if config.tma else 1)


@pytest.mark.parametrize("block", [(32, 32), (64, 32), (64, 64), (128, 64)], ids=str)
@each_arch
def test_a_gated_kernel_holds_two_accumulators_without_a_spill(
    tmp_path: Path, arch: int, block: tuple[int, int]
) -> None:
    built, config = forward(tmp_path, arch, block, 12608, act="gelu", gated=True)
    assert built.spilled == 0 and built.shared <= tiles.shared_limit((arch // 10, arch % 10))
    assert buffers(built, config, block, 2, 2) >= 2


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("block", [(64, 32), (128, 32)], ids=str)
@each_arch
def test_other_types_keep_the_pipeline_too(
    tmp_path: Path, arch: int, block: tuple[int, int], dtype: str
) -> None:
    built, config = forward(tmp_path, arch, block, 12608, dtype)
    assert built.spilled == 0 and buffers(built, config, block, WORDS[dtype]) >= 2
    kinds = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    assert all(m.startswith(kinds[arch]) for m in built.mma), built.mma


@pytest.mark.parametrize("arch", [80, 90])
def test_an_input_that_no_descriptor_can_speak_of_is_still_pipelined(
    tmp_path: Path, arch: int
) -> None:
    built, config = forward(tmp_path, arch, (64, 64), 12608, tma=False)
    assert built.copies_16 > 0 and built.spilled == 0
    assert buffers(built, config, (64, 64), 2) >= 2


@each_arch
def test_a_ragged_width_is_loaded_with_a_mask_and_still_in_a_pipeline(
    tmp_path: Path, arch: int
) -> None:
    built, config = forward(tmp_path, arch, (64, 64), 12608, even=False, tma=False)
    assert built.spilled == 0 and buffers(built, config, (64, 64), 2) >= 2


@pytest.mark.parametrize("block", [(64, 32), (64, 64), (128, 64)], ids=str)
@each_arch
def test_the_input_s_gradient_carries_both_indices(
    tmp_path: Path, arch: int, block: tuple[int, int]
) -> None:
    turned = (block[1], block[0])
    capability = (arch // 10, arch % 10)
    config = tiles.choose(12608, 768 // block[1], turned, 2, capability, PROCESSORS[arch])
    types = dict.fromkeys(("g_ref", "w_ref", "dx"), "*bf16")
    types |= dict.fromkeys(("ridx", "perm", "ccol"), "*i32")
    types |= dict.fromkeys(("tokens", "width", "outputs", "stride_g"), "i32")
    constants = {"BM": config.tokens, "BN": block[0], "BK": block[1], "STAGES": config.stages}
    constants |= {"EVEN_N": True, "PRECISION": "ieee"}  # type: ignore[dict-item]
    divisible = {"g_ref", "w_ref", "dx", "width", "outputs", "stride_g"}
    kernel = gpu_backward.input_gradient_kernel
    built = build(kernel, types, constants, divisible, arch, config.warps, tmp_path)
    assert built.spilled == 0 and built.copies_16 > 0
    assert built.shared <= tiles.shared_limit(capability)
    assert buffers(built, config, turned, 2) >= 2


@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 128)], ids=str)
@each_arch
def test_the_weight_s_gradient_does_not_spill(
    tmp_path: Path, arch: int, block: tuple[int, int]
) -> None:
    types = dict.fromkeys(("g_ref", "x_ref", "dw"), "*bf16")
    types |= dict.fromkeys(("row_of", "idx"), "*i32")
    counts = ("tokens", "width", "outputs", "stored", "stride_g", "stride_x", "share")
    types |= dict.fromkeys(counts, "i32")
    constants = {"BM": 64, "BN": block[0], "BK": block[1], "STAGES": 4, "EVEN_N": True}
    constants |= {"EVEN_K": True, "PRECISION": "ieee"}  # type: ignore[dict-item]
    divisible = {"g_ref", "x_ref", "dw", "width", "outputs", "stride_g", "stride_x", "share"}
    kernel = gpu_backward.weight_gradient_kernel
    warps = 8 if block[0] * block[1] >= 128 * 128 else 4
    built = build(kernel, types, constants, divisible, arch, warps, tmp_path)
    assert built.spilled == 0 and built.shared <= tiles.shared_limit((arch // 10, arch % 10))
    assert built.copies_16 > 0 and built.shared // (64 * sum(block) * 2) >= 2


@each_arch
@each_block
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_every_launch_fits_its_device(
    arch: int, block: tuple[int, int], weights: int, size: int
) -> None:
    capability = (arch // 10, arch % 10)
    assert tiles.fits(block, size, capability, weights)
    for tokens in (1, 15, 16, 100, *TOKENS, 10**6):
        config = tiles.choose(
            tokens, 48, block, size, capability, PROCESSORS[arch], weights=weights
        )
        ring = (config.tokens + weights * block[0]) * block[1] * size
        held = config.stages if config.tma else config.stages - 1
        assert max(1, held) * ring <= tiles.shared_limit(capability)
        assert config.tokens >= 16 and config.tokens & (config.tokens - 1) == 0
        assert config.tokens < 2 * max(16, tokens)
        assert config.warps in (4, 8)


def test_what_does_not_fit_a_small_gpu_is_known_before_the_launch() -> None:
    assert not tiles.fits((128, 128), 4, (8, 9), 2)  # 136 KiB of 99
    assert tiles.fits((128, 64), 4, (8, 9), 2) and tiles.fits((128, 128), 2, (8, 9), 2)
