"""What NVML answers on this machine, call by call: the value, or the error in its words.

Behind a proxied driver, a vGPU or a container some calls fail that work elsewhere, so nothing is assumed.
"""

from __future__ import annotations

from typing import Any

from hwprune.meter.nvml import FIELDS, NvmlSource

# Calls without arguments, and calls of a device; (name, further arguments).
_SYSTEM = (
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetNVMLVersion",
    "nvmlSystemGetCudaDriverVersion",
)
_DEVICE: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("nvmlDeviceGetName", ()),
    ("nvmlDeviceGetArchitecture", ()),
    ("nvmlDeviceGetVbiosVersion", ()),
    ("nvmlDeviceGetVirtualizationMode", ()),
    ("nvmlDeviceGetPersistenceMode", ()),
    ("nvmlDeviceGetComputeMode", ()),
    ("nvmlDeviceGetEccMode", ()),
    ("nvmlDeviceGetMigMode", ()),
    ("nvmlDeviceGetPowerUsage", ()),
    ("nvmlDeviceGetTotalEnergyConsumption", ()),
    ("nvmlDeviceGetEnforcedPowerLimit", ()),
    ("nvmlDeviceGetPowerManagementLimit", ()),
    ("nvmlDeviceGetPowerManagementDefaultLimit", ()),
    ("nvmlDeviceGetPowerManagementLimitConstraints", ()),
    ("nvmlDeviceGetClockInfo", (1,)),
    ("nvmlDeviceGetClockInfo", (2,)),
    ("nvmlDeviceGetMaxClockInfo", (1,)),
    ("nvmlDeviceGetMaxClockInfo", (2,)),
    ("nvmlDeviceGetApplicationsClock", (1,)),
    ("nvmlDeviceGetTemperature", (0,)),
    ("nvmlDeviceGetPerformanceState", ()),
    ("nvmlDeviceGetUtilizationRates", ()),
    ("nvmlDeviceGetCurrentClocksThrottleReasons", ()),
    ("nvmlDeviceGetSupportedClocksThrottleReasons", ()),
    ("nvmlDeviceGetMemoryInfo", ()),
    ("nvmlDeviceGetComputeRunningProcesses", ()),
    ("nvmlDeviceGetCurrPcieLinkGeneration", ()),
    ("nvmlDeviceGetSamples", (0, 0)),
)


def answers(source: NvmlSource) -> dict[str, Any]:
    """Every call of the lists above and every field, once."""
    nvml, handle = source.nvml, source.board.handle
    found: dict[str, Any] = {name: _ask(nvml, name, ()) for name in _SYSTEM}
    for name, arguments in _DEVICE:
        key = name + "".join(f"_{a}" for a in arguments)
        found[key] = _ask(nvml, name, (handle, *arguments))
    fields: dict[str, Any] = {}
    for name, number in FIELDS.items():
        try:
            (one,) = nvml.nvmlDeviceGetFieldValues(handle, [number])
        except nvml.NVMLError as error:
            fields[name] = {"value": None, "reason": str(error)}
            continue
        if one.nvmlReturn != nvml.NVML_SUCCESS:
            fields[name] = {"value": None, "reason": str(nvml.NVMLError(one.nvmlReturn))}
        else:
            fields[name] = {
                "value": int(one.value.uiVal if one.valueType == 1 else one.value.ullVal),
                "value_type": one.valueType,
                "timestamp_us": one.timestamp,
                "latency_us": one.latencyUsec,
            }
    return found | {"fields": fields}


def _ask(nvml: Any, name: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    call = getattr(nvml, name, None)
    if call is None:
        return {"value": None, "reason": "this nvidia-ml-py has no such call"}
    try:
        return {"value": _plain(call(*arguments))}
    except nvml.NVMLError as error:
        return {"value": None, "reason": str(error)}


def _plain(value: Any) -> Any:
    """JSON-able: numbers, text, lists of them; a struct by its fields."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    names = [name for name, _ in getattr(value, "_fields_", ())] or list(vars(value))
    return {name: _plain(getattr(value, name)) for name in names}
