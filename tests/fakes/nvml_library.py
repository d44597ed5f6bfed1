"""A library in the place of libnvidia-ml.so.1, under NVIDIA's own binding: real structs, real error classes.

It leans on three private names of the binding; `install` fails loudly where one is gone.
"""

# ruff: noqa: N802 - the methods are named as the C symbols

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pynvml
from fakes.virtual import Sensor

OK, NOT_FOUND = pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@dataclass
class FakeBoard:
    """One board of the library; names start with FAKE- so that no figure of it can pass for real."""

    sensor: Sensor
    name: str = "FAKE-H200"
    uuid: str = "GPU-00000000-aaaa-bbbb-cccc-000000000001"
    pci: tuple[int, int, int] = (0, 0x18, 0)
    memory_bytes: int = 140 * 2**30
    mig: bool | None = None
    pids: tuple[int, ...] = ()
    fields: tuple[int, ...] = (83, 186, 185, 74, 269, 270, 271)
    cumulative: dict[int, int] = field(default_factory=dict)
    architecture: int = 9


class FakeLibrary:
    """Methods by the names of the C symbols; `symbols` that are taken away are not found.

    Attributes:
        fault: (symbol, or field number) -> an error code, or 0; asked at every call.
        users: initialisations less shutdowns.
        calls: how often each symbol was called.
    """

    def __init__(self, boards: list[FakeBoard]) -> None:
        self.boards = boards
        self.fault: Callable[[str | int], int] = lambda _: OK
        self.users = 0
        self.calls: Counter[str] = Counter()
        self.without: set[str] = set()

    def __getattr__(self, symbol: str) -> Any:
        implementation = getattr(type(self), f"c_{symbol}", None)
        if implementation is None or symbol in self.without:
            raise AttributeError(symbol)
        return partial(self._call, symbol, implementation)

    def _call(self, symbol: str, implementation: Any, *arguments: Any) -> int:
        self.calls[symbol] += 1
        if symbol != "nvmlInitWithFlags" and self.users < 1:
            return int(pynvml.NVML_ERROR_UNINITIALIZED)
        return int(self.fault(symbol) or implementation(self, *arguments))

    def _board(self, handle: Any) -> FakeBoard:
        number = ctypes.cast(handle, ctypes.c_void_p).value
        assert number, "a handle that was never filled in"
        return self.boards[number - 1]

    def _hand_out(self, index: int | None, into: Any) -> int:
        if index is None:
            return int(NOT_FOUND)
        number = ctypes.c_void_p(index + 1)
        ctypes.memmove(into, ctypes.byref(number), ctypes.sizeof(number))
        return int(OK)

    def c_nvmlInitWithFlags(self, flags: int) -> int:
        self.users += 1
        return OK

    def c_nvmlShutdown(self) -> int:
        self.users -= 1
        return OK

    def c_nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.boards)
        return OK

    def c_nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:
        text.value = b"FAKE-570.00"
        return OK

    def c_nvmlDeviceGetHandleByIndex_v2(self, index: Any, into: Any) -> int:
        return self._hand_out(index.value if index.value < len(self.boards) else None, into)

    def c_nvmlDeviceGetHandleByUUID(self, uuid: Any, into: Any) -> int:
        wanted = uuid.value.decode()
        return self._hand_out(self._first(lambda b: b.uuid == wanted), into)

    def c_nvmlDeviceGetHandleByPciBusId_v2(self, address: Any, into: Any) -> int:
        wanted = address.value.decode()
        return self._hand_out(
            self._first(lambda b: "{:08x}:{:02x}:{:02x}.0".format(*b.pci) == wanted), into
        )

    def _first(self, fits: Callable[[FakeBoard], bool]) -> int | None:
        return next((i for i, board in enumerate(self.boards) if fits(board)), None)

    def c_nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> int:
        text.value = self._board(handle).name.encode()
        return OK

    def c_nvmlDeviceGetUUID(self, handle: Any, text: Any, size: Any) -> int:
        text.value = self._board(handle).uuid.encode()
        return OK

    def c_nvmlDeviceGetPciInfo_v3(self, handle: Any, into: Any) -> int:
        info = into._obj
        info.domain, info.bus, info.device = self._board(handle).pci
        return OK

    def c_nvmlDeviceGetMemoryInfo(self, handle: Any, into: Any) -> int:
        into._obj.total = self._board(handle).memory_bytes
        return OK

    def c_nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        mig = self._board(handle).mig
        if mig is None:
            return int(UNSUPPORTED)
        current._obj.value = pending._obj.value = int(mig)
        return OK

    def c_nvmlDeviceGetArchitecture(self, handle: Any, into: Any) -> int:
        into._obj.value = self._board(handle).architecture
        return OK

    def c_nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, into: Any) -> int:
        into._obj.value = 700_000
        return OK

    def c_nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, into: Any) -> int:
        into._obj.value = 1980 if kind.value == pynvml.NVML_CLOCK_SM else 3201
        return OK

    def c_nvmlDeviceGetTemperature(self, handle: Any, kind: Any, into: Any) -> int:
        into._obj.value = 55
        return OK

    def c_nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, into: Any) -> int:
        into._obj.value = pynvml.nvmlClocksThrottleReasonSwPowerCap
        return OK

    def c_nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, into: Any) -> int:
        pids = self._board(handle).pids
        room, count._obj.value = count._obj.value, len(pids)
        if not pids:
            return OK
        if room < len(pids):
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        for slot, pid in zip(into, pids, strict=False):
            slot.pid = pid
        return OK

    def c_nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, into: Any) -> int:
        into._obj.value = self._value(self._board(handle), 83)
        return OK

    def c_nvmlDeviceGetPowerUsage(self, handle: Any, into: Any) -> int:
        board = self._board(handle)
        into._obj.value = self._value(board, 186 if board.architecture < 7 else 185)
        return OK

    def c_nvmlDeviceGetFieldValues(self, handle: Any, count: Any, values: Any) -> int:
        board = self._board(handle)
        for one in values._obj:
            one.nvmlReturn = self.fault(one.fieldId) or (
                OK if one.fieldId in board.fields else UNSUPPORTED
            )
            if one.nvmlReturn != OK:
                one.value.ullVal = 0  # as drivers leave it: the trap for who does not look
                continue
            wide = one.fieldId not in (185, 186)
            one.valueType = 3 if wide else 1
            value = self._value(board, one.fieldId)
            if wide:
                one.value.ullVal = value
            else:
                one.value.uiVal = value
        return OK

    def _value(self, board: FakeBoard, number: int) -> int:
        now = board.sensor.board.clock.now_ns()
        by_sensor = {
            83: board.sensor.energy_mj,
            186: board.sensor.instant_mw,
            185: board.sensor.average_mw,
        }
        return by_sensor[number](now) if number in by_sensor else board.cumulative.get(number, 0)


@contextmanager
def install(library: FakeLibrary) -> Iterator[FakeLibrary]:
    """Put a library under the binding, and take it away again."""
    cache, old = pynvml._nvmlGetFunctionPointer_cache, pynvml.nvmlLib
    saved, users = dict(cache), pynvml._nvmlLib_refcount
    cache.clear()
    pynvml.nvmlLib = library
    try:
        yield library
    finally:
        cache.clear()
        cache.update(saved)
        pynvml.nvmlLib = old
        pynvml._nvmlLib_refcount = users
