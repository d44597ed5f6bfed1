"""Energy and power of AMD GPUs through amdsmi, which comes with ROCm.

Written against the documented interface of amdsmi and tested with a stand-in: nobody has run it on an AMD GPU
yet, and every capability says so in its notes. Some boards' counters do not tick (ROCm/amdsmi issue 22); the
cross-check against power finds those.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.source import Capabilities, Reading

_UNTRIED = "AMD readings were never compared with a real board by hwprune's authors"


class RocmSource:
    """One AMD GPU; open it with `open_rocm`."""

    def __init__(self, smi: Any, handle: Any, identity: str, mapping: str, clock: Clock) -> None:
        self._smi, self._handle, self._clock = smi, handle, clock
        self._closed = False
        self._wanted: tuple[str, ...] = ("energy_mj", "instant_mw", "average_mw")
        values, errors = self._ask()
        self._wanted = tuple(values)
        self._caps = Capabilities(
            backend="rocm",
            device=self._name(),
            scope="gpu",
            counter="energy_mj" in values,
            instant="instant_mw" in values,
            average="average_mw" in values,
            cap_w=self._cap_w(),
            identity=identity,
            mapping=mapping,
            missing=errors,
            notes=(_UNTRIED,),
        )

    @property
    def caps(self) -> Capabilities:
        """What it answers."""
        return self._caps

    def read(self, state: bool = False) -> Reading:
        """One reading; a field that fails is None with its reason."""
        before = self._clock.now_ns()
        if self._closed:
            return Reading(before, error="the sensor was closed", lost=True)
        values, errors = self._ask()
        after = self._clock.now_ns()
        all_failed = bool(self._wanted) and not values
        extra = self._state() if state else {}
        return Reading(
            t_ns=(before + after) // 2,
            took_ns=after - before,
            energy_mj=values.get("energy_mj"),
            instant_mw=values.get("instant_mw"),
            average_mw=values.get("average_mw"),
            clock_sm_mhz=extra.get("clock_sm_mhz"),
            clock_mem_mhz=extra.get("clock_mem_mhz"),
            temperature_c=extra.get("temperature_c"),
            status=errors,
            error=errors[self._wanted[0]] if all_failed else "",
        )

    def foreign(self) -> tuple[int, ...] | Unavailable:
        """Not asked for: amdsmi lists processes by names that change with its version."""
        return Unavailable("processes on AMD GPUs are not listed")

    def close(self) -> None:
        """Give amdsmi back."""
        if not self._closed:
            self._closed = True
            _shut_down(self._smi)

    def _ask(self) -> tuple[dict[str, float], dict[str, str]]:
        values: dict[str, float] = {}
        errors: dict[str, str] = {}
        power: dict[str, Any] = {}
        try:
            power = self._smi.amdsmi_get_power_info(self._handle)
        except self._smi.AmdSmiException as error:
            errors = dict.fromkeys(("instant_mw", "average_mw"), f"amdsmi says {error}")
        for name, key in (
            ("instant_mw", "current_socket_power"),
            ("average_mw", "average_socket_power"),
        ):
            watts = _number(power.get(key))
            if watts:  # 0 and "N/A" are both how amdsmi says that it does not know
                values[name] = watts * 1e3
            elif name in self._wanted:
                errors.setdefault(name, f"amdsmi answers {power.get(key)!r} as {key}")
        try:
            count = self._smi.amdsmi_get_energy_count(self._handle)
        except self._smi.AmdSmiException as error:
            errors["energy_mj"] = f"amdsmi says {error}"
        else:
            ticks = _number(count.get("energy_accumulator", count.get("power")))
            step_uj = _number(count.get("counter_resolution"))
            if ticks is not None and step_uj:
                values["energy_mj"] = ticks * step_uj / 1e3
            else:
                errors["energy_mj"] = f"amdsmi answers {count!r}"
        kept = {name: value for name, value in values.items() if name in self._wanted}
        return kept, {name: why for name, why in errors.items() if name in self._wanted}

    def _state(self) -> dict[str, float]:
        smi, handle = self._smi, self._handle
        asks: dict[str, Callable[[], Any]] = {
            "clock_sm_mhz": lambda: smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.GFX)["clk"],
            "clock_mem_mhz": lambda: smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.MEM)[
                "clk"
            ],
            "temperature_c": lambda: smi.amdsmi_get_temp_metric(
                handle, smi.AmdSmiTemperatureType.JUNCTION, smi.AmdSmiTemperatureMetric.CURRENT
            ),
        }
        found = {}
        for name, ask in asks.items():
            try:
                value = _number(ask())
            except (
                smi.AmdSmiException,
                AttributeError,
                KeyError,
            ):  # older versions name it otherwise
                continue
            if value is not None:
                found[name] = value
        return found

    def _name(self) -> str:
        try:
            return str(self._smi.amdsmi_get_gpu_asic_info(self._handle)["market_name"])
        except (self._smi.AmdSmiException, KeyError):
            return "AMD GPU"

    def _cap_w(self) -> float | None:
        try:
            cap = _number(self._smi.amdsmi_get_power_cap_info(self._handle).get("power_cap"))
        except self._smi.AmdSmiException:
            return None
        return None if not cap else cap / 1e6 if cap > 1e5 else cap  # microwatts, or watts of old


def open_rocm(
    spec: str,
    clock: Clock | None = None,
    pci: tuple[int, int, int] | None = None,
    smi: Any = None,
) -> RocmSource | Unavailable:
    """Opens an AMD GPU.

    Args:
        spec: "rocm:0" by amdsmi's own index; "cuda:0" (torch's name for it) by `pci`.
        clock: a test's own.
        pci: domain, bus and device number of the GPU that torch means.
        smi: a test's own module.
    """
    if smi is None:
        try:
            smi = importlib.import_module("amdsmi")
        except (ImportError, OSError, KeyError) as error:
            return Unavailable(
                f"amdsmi, which comes with ROCm, cannot be imported ({type(error).__name__}: {error})"
            )
    try:
        smi.amdsmi_init()
    except smi.AmdSmiException as error:
        return Unavailable(f"the AMD driver cannot be asked: amdsmi says {error}")
    try:
        found = _find(smi, spec, pci)
        if isinstance(found, tuple):
            return RocmSource(smi, *found, clock or RealClock())
    except smi.AmdSmiException as error:
        found = Unavailable(f"{spec} cannot be opened: amdsmi says {error}")
    except BaseException:
        _shut_down(smi)
        raise
    _shut_down(smi)
    return found


def _find(
    smi: Any, spec: str, pci: tuple[int, int, int] | None
) -> tuple[Any, str, str] | Unavailable:
    """Handle, address, and how it was found."""
    handles = smi.amdsmi_get_processor_handles()
    addresses = [str(smi.amdsmi_get_gpu_device_bdf(handle)).lower() for handle in handles]
    if pci is not None:
        wanted = "{:04x}:{:02x}:{:02x}.0".format(*pci)
        if wanted not in addresses:
            return Unavailable(f"amdsmi knows no GPU at {wanted}, where torch has its {spec}")
        index, mapping = addresses.index(wanted), "pci"
    else:
        index, mapping = int(spec.partition(":")[2] or 0), "index"
        if index >= len(handles):
            return Unavailable(f"there is no {spec}; amdsmi sees {len(handles)} GPU(s)")
    return handles[index], addresses[index], mapping


def _number(value: Any) -> float | None:
    """A number; None for "N/A" and what else stands for one."""
    return float(value) if isinstance(value, int | float) else None


def _shut_down(smi: Any) -> None:
    try:
        smi.amdsmi_shut_down()
    except smi.AmdSmiException:
        return  # nothing is left to free
