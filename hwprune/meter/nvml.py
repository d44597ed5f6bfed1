"""Energy and power of NVIDIA boards through NVML (package nvidia-ml-py), one call a reading.

What a board can answer is decided once, when it is opened; the same error later is a passing one, tried
again three times. No error becomes a zero: see `read`.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.nvml_device import (
    Board,
    CudaDevice,
    cuda_device,
    find_board,
    foreign_processes,
)
from hwprune.meter.source import Capabilities, Reading

# nvml.h: field numbers are stable, and older bindings lack the names of the newer ones.
FIELDS = {
    "energy_mj": 83,  # since the driver was loaded; Volta and newer
    "instant_mw": 186,
    "average_mw": 185,  # over 1 s; Ampere (but GA100) and newer
    "capped_ns": 74,
    "thermal_sw_ns": 269,
    "thermal_hw_ns": 270,
    "brake_ns": 271,
}
_POWERS = ("instant_mw", "average_mw")
_RETRIES, _RETRY_S = 3, 0.003
_SUPERCHIP = re.compile(
    r"\bG[HB]\d{2,3}\b"
)  # GH200, GB200, GB10: the counter covers CPU and memory too
_GA100 = re.compile(r"\b(A100|A800|A30|A30X|A100X)\b")
_AMPERE = 7  # nvmlDeviceGetArchitecture
_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_UNINSTALL = (
    "the module pynvml at {} is not NVIDIA's own binding, which the package pynvml hides; run pip uninstall "
    "pynvml and then pip install --force-reinstall nvidia-ml-py"
)


def load_nvml() -> Any:
    """NVIDIA's binding, as a module, or `Unavailable`."""
    try:
        with warnings.catch_warnings():  # the package pynvml 13 makes every import of it warn
            warnings.simplefilter("ignore")
            import pynvml
    except ImportError:
        return Unavailable("nvidia-ml-py is not installed: pip install 'hwprune[power]'")
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        return Unavailable(_UNINSTALL.format(getattr(pynvml, "__file__", "an unknown place")))
    return pynvml


def explain(error: Exception) -> str:
    """What NVML said, as a clause."""
    return f"NVML says {str(error)!r}"


class NvmlSource:
    """One board; open it with `open_nvml`."""

    def __init__(self, nvml: Any, board: Board, clock: Clock) -> None:
        self._nvml, self._board, self._clock = nvml, board, clock
        self._pid = os.getpid()
        self._lost = ""
        self._closed = False
        self._last: dict[str, int] = {}
        self._fields = dict(FIELDS)
        self._calls: dict[str, Callable[[Any], int]] = {}
        self._caps = self._probe()

    @property
    def caps(self) -> Capabilities:
        """What the board answers."""
        return self._caps

    @property
    def board(self) -> Board:
        """Its handle and names, for calls beyond energy."""
        return self._board

    @property
    def nvml(self) -> Any:
        """The binding, for the same."""
        return self._nvml

    def read(self, state: bool = False) -> Reading:
        """One reading, by one `nvmlDeviceGetFieldValues`.

        "Not supported" of a field that was answered before, and a power of 0 mW, are tried again three times: a
        driver polled too fast says so. Then the field is None with the reason in `status`. A lost board is
        `lost`, now and from then on.
        """
        now = self._clock.now_ns()
        if self._closed or self._lost:
            return Reading(now, error=self._lost or "the sensor was closed", lost=True)
        if os.getpid() != self._pid and (failed := self._again_after_fork()):
            return Reading(now, error=failed, lost=True)
        for attempt in range(1 + _RETRIES):
            before = self._clock.now_ns()
            values, errors = self._ask()
            after = self._clock.now_ns()
            if not any(map(self._passing, errors.values())):
                break
            if attempt < _RETRIES:
                self._clock.sleep(_RETRY_S)
        extra: dict[str, float] = self._state(errors) if state else {}
        status = {name: explain(error) for name, error in errors.items()}
        for error in errors.values():
            if _code(error) in self._gone:
                self._lost = f"{self._caps.device} was lost: {explain(error)}"
                return Reading(after, error=self._lost, lost=True)
        wanted = [*self._fields, *self._calls]
        failed = status[wanted[0]] if all(name in status for name in wanted) else ""
        thermal = [values[n] for n in ("thermal_sw_ns", "thermal_hw_ns") if n in values]
        return Reading(
            t_ns=(before + after) // 2,
            took_ns=after - before,
            energy_mj=values.get("energy_mj"),
            instant_mw=values.get("instant_mw"),
            average_mw=values.get("average_mw"),
            capped_ns=values.get("capped_ns"),
            thermal_ns=sum(thermal) if thermal else None,
            brake_ns=values.get("brake_ns"),
            clock_sm_mhz=extra.get("clock_sm_mhz"),
            clock_mem_mhz=extra.get("clock_mem_mhz"),
            temperature_c=extra.get("temperature_c"),
            reasons=int(extra["reasons"]) if "reasons" in extra else None,
            status=status,
            error=failed,
        )

    def foreign(self) -> tuple[int, ...] | Unavailable:
        """Processes of others on the board."""
        try:
            return foreign_processes(self._nvml, self._board.handle)
        except self._nvml.NVMLError as error:
            return Unavailable(f"who else computes on {self._caps.device}: {explain(error)}")

    def close(self) -> None:
        """Give NVML back; it counts its users, so another meter goes on."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return  # a forked child that never read: the parent's count is not ours to lower
        _shut_down(self._nvml)

    # --- asking ---------------------------------------------------------------------------------

    @property
    def _gone(self) -> tuple[int, int]:
        return self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED

    def _passing(self, error: Exception) -> bool:
        nvml = self._nvml
        return _code(error) in (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            _ZERO_POWER,
        )

    def _ask(self) -> tuple[dict[str, int], dict[str, Exception]]:
        """Values and errors by name, of everything that is wanted."""
        values: dict[str, int] = {}
        errors: dict[str, Exception] = {}
        if self._fields:
            try:
                ids = list(self._fields.values())
                found = self._nvml.nvmlDeviceGetFieldValues(self._board.handle, ids)
            except self._nvml.NVMLError as error:
                errors = dict.fromkeys(self._fields, error)
            else:
                for name, one in zip(self._fields, found, strict=True):
                    if one.nvmlReturn != self._nvml.NVML_SUCCESS:
                        errors[name] = self._nvml.NVMLError(one.nvmlReturn)
                    else:
                        values[name] = int(getattr(one.value, _VALUE_TYPES[one.valueType]))
        for name, call in self._calls.items():
            try:
                values[name] = int(call(self._board.handle))
            except self._nvml.NVMLError as error:
                errors[name] = error
        for name in _POWERS:
            if values.get(name) == 0:  # no board that answers draws nothing
                del values[name]
                errors[name] = _ZeroPower()
        return values, errors

    def _state(self, errors: dict[str, Exception]) -> dict[str, float]:
        """Clocks, temperature, throttle reasons; what fails is put among the errors."""
        nvml, handle = self._nvml, self._board.handle
        # The binding's older name asks for a symbol that every driver has.
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        asks: dict[str, Callable[[], Any]] = {
            "clock_sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "clock_mem_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "reasons": lambda: reasons(handle),
        }
        found: dict[str, float] = {}
        for name, ask in asks.items():
            try:
                found[name] = ask()
            except nvml.NVMLError as error:
                errors[name] = error
        return found

    def _again_after_fork(self) -> str:
        """Rebuild in a forked child; why it failed, or "".

        The child inherits a lock that a thread of the parent may hold for ever, and a count of users that
        says initialised.
        """
        self._pid = os.getpid()
        self._nvml.libLoadLock = threading.Lock()
        try:
            self._nvml.nvmlInit()
            handle = self._nvml.nvmlDeviceGetHandleByUUID(self._board.uuid)
        except self._nvml.NVMLError as error:
            self._lost = f"NVML could not be opened again after a fork: {explain(error)}"
            return self._lost
        self._board = Board(
            handle, self._board.name, self._board.uuid, self._board.pci, self._board.mapping
        )
        return ""

    # --- what it can do -------------------------------------------------------------------------

    def _probe(self) -> Capabilities:
        """Decide once what the board answers, and ask for nothing else afterwards."""
        nvml, board = self._nvml, self._board
        missing: dict[str, str] = {}
        for attempt in range(1 + _RETRIES):
            _, errors = self._ask()
            if not errors or attempt == _RETRIES:
                break
            self._clock.sleep(_RETRY_S)
        for name, error in errors.items():
            if _code(error) in self._gone:
                raise error
            del self._fields[name]
            missing[name] = explain(error)
        for name, call in self._older_calls(missing):
            try:
                if int(call(board.handle)) == 0 and name in _POWERS:
                    continue
            except nvml.NVMLError:
                continue
            self._calls[name] = call
            del missing[name]
        have = {*self._fields, *self._calls}
        cap_w = None
        try:
            cap_w = nvml.nvmlDeviceGetEnforcedPowerLimit(board.handle) / 1e3
        except nvml.NVMLError as error:
            missing["cap_w"] = explain(error)
        return Capabilities(
            backend="nvml",
            device=board.name,
            scope="module" if _SUPERCHIP.search(board.name) else "gpu",
            counter="energy_mj" in have,
            instant="instant_mw" in have,
            average="average_mw" in have,
            cap_w=cap_w,
            identity=board.uuid,
            mapping=board.mapping,
            missing=missing,
        )

    def _older_calls(self, missing: dict[str, str]) -> list[tuple[str, Callable[[Any], int]]]:
        """Calls of older drivers for what the fields do not answer.

        `nvmlDeviceGetPowerUsage` is instantaneous up to GA100, and a 1 s average from Ampere on: what is not
        known is taken for the average, of which less is believed.
        """
        nvml, found = self._nvml, []
        if "energy_mj" in missing:
            found.append(("energy_mj", nvml.nvmlDeviceGetTotalEnergyConsumption))
        if "instant_mw" in missing and "average_mw" in missing:
            try:
                old = nvml.nvmlDeviceGetArchitecture(self._board.handle) < _AMPERE
            except nvml.NVMLError:
                old = False
            name = "instant_mw" if old or _GA100.search(self._board.name) else "average_mw"
            found.append((name, nvml.nvmlDeviceGetPowerUsage))
        return found


_ZERO_POWER = -1


class _ZeroPower(Exception):
    """A power of 0 mW, which a driver polled too fast answers."""

    value = _ZERO_POWER

    def __str__(self) -> str:
        return "0 mW"


def _code(error: Exception) -> int:
    return int(getattr(error, "value", _ZERO_POWER))


def open_nvml(
    spec: str,
    clock: Clock | None = None,
    cuda: Callable[[int | None], CudaDevice | Unavailable] = cuda_device,
) -> NvmlSource | Unavailable:
    """Open a board by name; `Unavailable` where there is none, or it is not certain which.

    Raises:
        ValueError: a name of no known form.
    """
    nvml = load_nvml()
    if isinstance(nvml, Unavailable):
        return nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return Unavailable("no NVIDIA driver here: libnvidia-ml.so.1 was not found")
        return Unavailable(f"the NVIDIA driver cannot be asked: {explain(error)}")
    try:
        board = find_board(nvml, spec, cuda)
        if isinstance(board, Board):
            return NvmlSource(nvml, board, clock or RealClock())
    except nvml.NVMLError as error:
        board = Unavailable(f"{spec} cannot be opened: {explain(error)}")
    except BaseException:
        _shut_down(nvml)
        raise
    _shut_down(nvml)
    return board


def _shut_down(nvml: Any) -> None:
    """Lower NVML's count of users."""
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError:
        return  # a board that fell off the bus cannot be shut down, and nothing is left to free
