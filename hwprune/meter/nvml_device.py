"""Which NVML board a name means: "cuda:0", "nvml:0", "GPU-..." or a PCI address.

A CUDA index is no NVML index: CUDA counts the fastest device first and only those made visible, NVML in an
order that may change with each boot. So a CUDA device is found by its UUID or PCI address, and what both
libraries say of it (name, memory, address) is compared before a joule is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwprune.meter.estimate import Unavailable

FORMS = "cuda:0, nvml:0, GPU-<uuid>, <domain>:<bus>:<device>.0, rocm:0 or rapl"
_UUID = re.compile(r"(?:GPU-)?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.0)?", re.IGNORECASE)
_INDEXED = re.compile(r"(cuda|nvml)(?::(\d+))?")
_MEMORY_REL = 0.1  # CUDA reports a few per cent less than NVML: what the driver keeps


@dataclass(frozen=True)
class CudaDevice:
    """What CUDA says of a device; empty or None where it does not say.

    Attributes:
        pci: domain, bus and device number.
    """

    name: str
    uuid: str
    memory_bytes: int
    pci: tuple[int, int, int] | None
    count: int = 1


@dataclass(frozen=True)
class Board:
    """A board that was found.

    Attributes:
        handle: NVML's.
        mapping: how: "uuid", "pci", "index" (the caller's own NVML index) or "single-device".
    """

    handle: Any
    name: str
    uuid: str
    pci: tuple[int, int, int]
    mapping: str


def is_nvidia(spec: str) -> bool:
    """Whether a name is of a form that means an NVIDIA board."""
    return spec.startswith("MIG-") or any(
        form.fullmatch(spec) is not None for form in (_INDEXED, _UUID, _PCI)
    )


def cuda_device(index: int | None) -> CudaDevice | Unavailable:
    """What torch says of its CUDA (or ROCm) device; the current one where no index is given."""
    import torch

    if not torch.cuda.is_available():
        return Unavailable(
            "torch sees no CUDA device; name the board as nvml:0 to measure it all the same"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if index is None else index
    if index >= count:
        return Unavailable(f"there is no cuda:{index}; torch sees {count} CUDA device(s)")
    found: Any = torch.cuda.get_device_properties(index)
    pci = None
    if hasattr(found, "pci_bus_id"):
        pci = (found.pci_domain_id, found.pci_bus_id, found.pci_device_id)
    uuid = str(getattr(found, "uuid", ""))
    return CudaDevice(found.name, uuid, found.total_memory, pci, count)


def find_board(
    nvml: Any, spec: str, cuda: Callable[[int | None], CudaDevice | Unavailable] = cuda_device
) -> Board | Unavailable:
    """The board a name means, or why it is not certain.

    Args:
        nvml: the binding, initialised.
        spec: see the module.
        cuda: what tells of CUDA devices.

    Raises:
        ValueError: a name of no known form.
        NVMLError: NVML failed in another way than not finding the board.
    """
    if spec.startswith("MIG-"):
        return Unavailable(_MIG.format(spec))
    indexed = _INDEXED.fullmatch(spec)
    if indexed is None:
        board = _by_identity(nvml, spec)
    elif indexed[1] == "nvml":
        index, count = int(indexed[2] or 0), nvml.nvmlDeviceGetCount()
        if index >= count:
            return Unavailable(f"there is no {spec}; NVML sees {count} device(s)")
        board = _board(nvml, nvml.nvmlDeviceGetHandleByIndex(index), "index")
    else:
        wanted = cuda(None if indexed[2] is None else int(indexed[2]))
        board = wanted if isinstance(wanted, Unavailable) else _by_cuda(nvml, spec, wanted)
    if isinstance(board, Board) and _in_mig_mode(nvml, board.handle):
        return Unavailable(_MIG.format(f"{spec} ({board.name})"))
    return board


_MIG = (
    "{} is cut up by MIG: NVML's power and energy are the whole board's, not the slice's; switch MIG off, or "
    "measure on a whole board"
)


def _by_identity(nvml: Any, spec: str) -> Board | Unavailable:
    if match := _UUID.fullmatch(spec):
        handle = _handle(nvml, nvml.nvmlDeviceGetHandleByUUID, f"GPU-{match[1].lower()}")
        mapping = "uuid"
    elif match := _PCI.fullmatch(spec):
        address = f"{int(match[1] or '0', 16):08x}:{match[2]}:{match[3]}.0"
        handle = _handle(nvml, nvml.nvmlDeviceGetHandleByPciBusId, address)
        mapping = "pci"
    else:
        raise ValueError(f"expected a device as {FORMS}, got {spec!r}")
    if handle is None:
        return Unavailable(f"NVML knows no board {spec}")
    return _board(nvml, handle, mapping)


def _by_cuda(nvml: Any, spec: str, wanted: CudaDevice) -> Board | Unavailable:
    """By UUID, else by address, else by being the only one; never by index."""
    handle, mapping = None, ""
    if match := _UUID.fullmatch(wanted.uuid):
        handle = _handle(nvml, nvml.nvmlDeviceGetHandleByUUID, f"GPU-{match[1].lower()}")
        mapping = "uuid"
    if handle is None and wanted.pci is not None:
        domain, bus, device = wanted.pci
        address = f"{domain:08x}:{bus:02x}:{device:02x}.0"
        handle = _handle(nvml, nvml.nvmlDeviceGetHandleByPciBusId, address)
        mapping = "pci"
    if handle is None and wanted.count == 1 and nvml.nvmlDeviceGetCount() == 1:
        handle, mapping = nvml.nvmlDeviceGetHandleByIndex(0), "single-device"
    if handle is None:
        return Unavailable(
            f"NVML knows no board with the UUID {wanted.uuid or '(unknown)'} or the PCI address of {spec} "
            f"({wanted.name}), and there is more than one; name it as GPU-<uuid> (nvidia-smi -L lists them)"
        )
    board = _board(nvml, handle, mapping)
    if differs := _differs(nvml, board, wanted):
        return Unavailable(
            f"{spec} and NVML's board found by its {mapping} do not agree ({differs}), so its joules could be "
            "another board's; name the board as GPU-<uuid>"
        )
    return board


def _differs(nvml: Any, board: Board, wanted: CudaDevice) -> str:
    """What the two libraries say differently of one board; "" where they agree."""
    if wanted.name.removeprefix("NVIDIA ") != board.name.removeprefix("NVIDIA "):
        return f"name: {wanted.name!r}, {board.name!r}"
    if board.mapping == "uuid" and wanted.pci is not None and wanted.pci != board.pci:
        return f"PCI address: {wanted.pci}, {board.pci}"
    try:
        memory_bytes = nvml.nvmlDeviceGetMemoryInfo(board.handle).total
    except nvml.NVMLError:  # boards that share memory with the CPU do not answer
        return ""
    if abs(wanted.memory_bytes / memory_bytes - 1) > _MEMORY_REL:
        return f"memory: {wanted.memory_bytes} and {memory_bytes} bytes"
    return ""


def _handle(nvml: Any, find: Callable[[str], Any], key: str) -> Any:
    """A handle; None where NVML knows no such board."""
    try:
        return find(key)
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            return None
        raise


def _board(nvml: Any, handle: Any, mapping: str) -> Board:
    info = nvml.nvmlDeviceGetPciInfo(handle)
    return Board(
        handle=handle,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        pci=(info.domain, info.bus, info.device),
        mapping=mapping,
    )


def _in_mig_mode(nvml: Any, handle: Any) -> bool:
    try:
        current: int = nvml.nvmlDeviceGetMigMode(handle)[0]
    except nvml.NVMLError:  # most boards have no MIG and say so in one of several ways
        return False
    return current != 0


def foreign_processes(nvml: Any, handle: Any) -> tuple[int, ...]:
    """Processes that compute on a board, without this one and those it started.

    In a container NVML may list the host's numbers: a lone process that is not known here is then taken
    for ourselves, because it cannot be told apart.

    Raises:
        NVMLError: NVML does not list processes.
    """
    listed = [int(p.pid) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    unknown = [pid for pid in listed if not _is_ours(pid)]
    if len(listed) == 1 and not Path(f"/proc/{listed[0]}").exists():
        return ()
    return tuple(unknown)


def _is_ours(pid: int) -> bool:
    """Whether a process is this one or descends from it."""
    mine = os.getpid()
    while pid > 1:
        if pid == mine:
            return True
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return False
        parent = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
        pid = int(parent[1]) if parent else 0
    return False
