"""A CUDA device is the NVML board of the same UUID or address, or none: never the one of the same index."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install hwprune[power]")

from fakes.nvml_library import FakeBoard, FakeLibrary, install
from fakes.virtual import Board, Sensor, VirtualClock

from hwprune.meter.estimate import Unavailable
from hwprune.meter.nvml import NvmlSource, open_nvml
from hwprune.meter.nvml_device import CudaDevice

UUIDS = [f"GPU-{i:08x}-aaaa-bbbb-cccc-{i:012x}" for i in range(3)]
MEMORY = 80 * 2**30


@pytest.fixture
def boards() -> Iterator[list[FakeBoard]]:
    """Three boards as NVML counts them."""
    clock = VirtualClock()
    made = [
        FakeBoard(
            Sensor(Board(clock)),
            name=f"NVIDIA FAKE-{i}",
            uuid=uuid,
            pci=(0, 0x10 + i, 0),
            memory_bytes=MEMORY,
        )
        for i, uuid in enumerate(UUIDS)
    ]
    with install(FakeLibrary(made)) as library:
        yield made
    assert library.users == 0, "NVML was left open"


def as_cuda(board: FakeBoard, count: int = 3, **changes: object) -> CudaDevice:
    facts = {
        "name": board.name,
        "uuid": board.uuid.removeprefix("GPU-"),
        "memory_bytes": int(MEMORY * 0.98),
        "pci": board.pci,
        "count": count,
    }
    return CudaDevice(**(facts | changes))  # type: ignore[arg-type]


def opened(spec: str, cuda: CudaDevice | None = None) -> NvmlSource | Unavailable:
    def tell(index: int | None) -> CudaDevice:
        assert cuda is not None, "CUDA was asked for no reason"
        return cuda

    source = open_nvml(spec, VirtualClock(), tell)
    if isinstance(source, NvmlSource):
        source.close()
    return source


@pytest.mark.parametrize("nvml_index", [0, 1, 2])
def test_a_cuda_device_is_found_by_its_uuid_whatever_its_index(
    boards: list[FakeBoard], nvml_index: int
) -> None:
    found = opened("cuda:0", as_cuda(boards[nvml_index]))
    assert isinstance(found, NvmlSource)
    assert (found.caps.identity, found.caps.mapping) == (UUIDS[nvml_index], "uuid")


def test_without_a_uuid_the_address_decides(boards: list[FakeBoard]) -> None:
    for uuid in ("", "ffffffff-0000-0000-0000-000000000000"):
        found = opened("cuda:0", as_cuda(boards[2], uuid=uuid))
        assert isinstance(found, NvmlSource)
        assert (found.caps.identity, found.caps.mapping) == (UUIDS[2], "pci")


def test_one_device_on_either_side_is_the_same_one(boards: list[FakeBoard]) -> None:
    lost = {"uuid": "", "pci": None}
    refused = opened("cuda:0", as_cuda(boards[0], count=1, **lost))
    assert isinstance(refused, Unavailable) and "more than one" in refused.reason
    del boards[1:]
    found = opened("cuda", as_cuda(boards[0], count=1, **lost))
    assert isinstance(found, NvmlSource) and found.caps.mapping == "single-device"
    assert isinstance(opened("cuda:0", as_cuda(boards[0], count=2, **lost)), Unavailable)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "NVIDIA FAKE-9"}, "name"),
        ({"memory_bytes": MEMORY // 2}, "memory"),
        ({"pci": (0, 0x77, 0)}, "PCI address"),
    ],
)
def test_what_the_two_libraries_say_must_agree(
    boards: list[FakeBoard], changes: dict[str, object], word: str
) -> None:
    found = opened("cuda:1", as_cuda(boards[1], **changes))
    assert (
        isinstance(found, Unavailable) and "do not agree" in found.reason and word in found.reason
    )


@pytest.mark.parametrize("spec", [UUIDS[1], UUIDS[1].upper().replace("GPU", "GPU"), UUIDS[1][4:]])
def test_every_form_of_a_uuid_is_understood(boards: list[FakeBoard], spec: str) -> None:
    found = opened(spec)
    assert isinstance(found, NvmlSource) and found.caps.identity == UUIDS[1]


@pytest.mark.parametrize("spec", ["00000000:11:00.0", "0000:11:00.0", "11:00.0", "11:00"])
def test_every_form_of_an_address_is_understood(boards: list[FakeBoard], spec: str) -> None:
    found = opened(spec)
    assert isinstance(found, NvmlSource) and found.caps.identity == UUIDS[1]


def test_what_is_not_there_is_told(boards: list[FakeBoard]) -> None:
    for spec, piece in (("nvml:3", "NVML sees 3"), ("GPU-" + "0" * 8 + "-1-1-1-1", "")):
        if not piece:
            with pytest.raises(ValueError, match="expected a device as"):
                opened(spec)
            continue
        found = opened(spec)
        assert isinstance(found, Unavailable) and piece in found.reason
    for spec in ("77:00.0", "GPU-ffffffff-0000-0000-0000-000000000000"):
        found = opened(spec)
        assert isinstance(found, Unavailable) and "knows no board" in found.reason


def test_a_sliced_board_is_refused_whichever_way_it_is_named(boards: list[FakeBoard]) -> None:
    boards[1].mig, boards[2].mig = True, False
    for spec, cuda in (
        ("nvml:1", None),
        (UUIDS[1], None),
        ("cuda:0", as_cuda(boards[1], uuid="ffffffff-0000-0000-0000-000000000000")),
        ("MIG-4711", None),
    ):
        found = opened(spec, cuda)
        assert isinstance(found, Unavailable) and "MIG" in found.reason
    assert isinstance(opened("nvml:2"), NvmlSource)


def test_torch_without_a_gpu_is_told(boards: list[FakeBoard]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    found = open_nvml("cuda:0", VirtualClock())
    assert isinstance(found, Unavailable) and "torch sees no CUDA device" in found.reason


def test_foreign_processes_are_those_that_are_not_ours(boards: list[FakeBoard]) -> None:
    source = open_nvml("nvml:0", VirtualClock())
    assert isinstance(source, NvmlSource)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for pids, foreign in (
            ((), ()),
            ((os.getpid(),), ()),
            ((os.getpid(), child.pid), ()),  # what we started
            ((os.getpid(), 1), (1,)),
            (
                (2**22 + 5,),
                (),
            ),  # a lone number of another namespace: ourselves, as the host sees us
            ((2**22 + 5, 2**22 + 6), (2**22 + 5, 2**22 + 6)),
        ):
            boards[0].pids = pids
            assert source.foreign() == foreign
    finally:
        child.communicate(b"\n")
        source.close()
