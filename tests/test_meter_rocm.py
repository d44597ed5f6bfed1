"""AMD GPUs through a stand-in for amdsmi: what it answers, what it does not, and that it is given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes.virtual import Board, Sensor, VirtualClock

from hwprune.meter.energy_window import Chunk, EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.open import open_source
from hwprune.meter.rocm import RocmSource, open_rocm
from hwprune.meter.window import energy_of

STEP_UJ = 15.259


class AmdSmiException(Exception):
    """As the library's own."""


class FakeSmi:
    """The calls of amdsmi that are used, over a sensor of known truth."""

    AmdSmiException = AmdSmiException
    AmdSmiClkType = SimpleNamespace(GFX="gfx", MEM="mem")
    AmdSmiTemperatureType = SimpleNamespace(JUNCTION="junction")
    AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="current")

    def __init__(self, count: int = 2) -> None:
        self.clock = VirtualClock()
        self.truth = Board(self.clock, watts=500.0)
        self.sensor = Sensor(self.truth, refresh_s=0.02, phase_s=0.007)
        self.handles = list(range(count))
        self.users = 0
        self.power: dict[str, Any] = {"average_socket_power": "N/A"}
        self.counter_key: str = "energy_accumulator"
        self.broken = False

    def _check(self) -> None:
        if self.broken or not self.users:
            raise AmdSmiException("AMDSMI_STATUS_NOT_INIT")

    def amdsmi_init(self) -> None:
        self.users += 1

    def amdsmi_shut_down(self) -> None:
        self.users -= 1

    def amdsmi_get_processor_handles(self) -> list[int]:
        self._check()
        return self.handles

    def amdsmi_get_gpu_device_bdf(self, handle: int) -> str:
        return f"0000:0{handle + 3}:00.0"

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, str]:
        return {"market_name": "FAKE-MI300X"}

    def amdsmi_get_power_cap_info(self, handle: int) -> dict[str, int]:
        return {"power_cap": 750_000_000}

    def amdsmi_get_power_info(self, handle: int) -> dict[str, Any]:
        self._check()
        watts = self.sensor.instant_mw(self.clock.now_ns()) // 1000
        return {"current_socket_power": watts} | self.power

    def amdsmi_get_energy_count(self, handle: int) -> dict[str, float]:
        self._check()
        mj = self.sensor.energy_mj(self.clock.now_ns())
        return {self.counter_key: int(mj * 1e3 / STEP_UJ), "counter_resolution": STEP_UJ}

    def amdsmi_get_clock_info(self, handle: int, kind: str) -> dict[str, int]:
        return {"clk": 2100 if kind == "gfx" else 1300}

    def amdsmi_get_temp_metric(self, handle: int, kind: str, metric: str) -> int:
        return 61


def opened(smi: FakeSmi, spec: str = "rocm:1", **options: Any) -> RocmSource:
    source = open_rocm(spec, smi.clock, smi=smi, **options)
    assert isinstance(source, RocmSource), source
    return source


def work(smi: FakeSmi) -> Chunk:
    smi.clock.sleep(0.004)
    return Chunk(1)


@pytest.mark.parametrize("counter_key", ["energy_accumulator", "power"])  # since 6.2.1, and before
def test_energy_of_work_on_an_amd_gpu(counter_key: str) -> None:
    smi = FakeSmi()
    smi.counter_key = counter_key
    source = opened(smi)
    assert (source.caps.device, source.caps.cap_w) == ("FAKE-MI300X", 750.0)
    assert source.caps.instant and not source.caps.average
    assert "N/A" in source.caps.missing["average_mw"]
    assert "never compared" in source.caps.notes[0]
    found = energy_of(source, lambda: work(smi), clock=smi.clock)
    assert isinstance(found, EnergyWindow) and found.flags == ()
    assert found.average_power_w == pytest.approx(500, rel=2e-3)
    assert (found.clock_sm_mhz, found.clock_mem_mhz, found.temperature_c) == (2100, 1300, 61)
    source.close()
    source.close()
    assert smi.users == 0 and source.read().lost


def test_a_counter_that_stands_still_falls_back_to_power() -> None:
    smi = FakeSmi()
    smi.amdsmi_get_energy_count = lambda handle: {  # type: ignore[method-assign]
        "energy_accumulator": 7,
        "counter_resolution": STEP_UJ,
    }
    found = energy_of(opened(smi), lambda: work(smi), clock=smi.clock)
    assert isinstance(found, EnergyWindow) and found.flags == ("integrated_power",)
    assert found.average_power_w == pytest.approx(500, rel=2e-3)


def test_an_error_in_the_window_gives_no_figure() -> None:
    smi = FakeSmi()
    source = opened(smi)

    def breaking() -> Chunk:
        smi.broken = smi.clock.now_ns() > 1003e9
        return work(smi)

    found = energy_of(source, breaking, clock=smi.clock)
    assert isinstance(found, Unavailable) and "NOT_INIT" in found.reason
    source.close()


def test_torch_s_device_is_found_by_its_address() -> None:
    smi = FakeSmi()
    assert opened(smi, "cuda:0", pci=(0, 4, 0)).caps.identity == "0000:04:00.0"
    assert opened(smi, "cuda:0", pci=(0, 4, 0)).caps.mapping == "pci"
    users = smi.users
    found = open_rocm("cuda:0", smi.clock, pci=(0, 9, 0), smi=smi)
    assert isinstance(found, Unavailable) and "0000:09:00.0" in found.reason
    found = open_rocm("rocm:2", smi.clock, smi=smi)
    assert isinstance(found, Unavailable) and "sees 2" in found.reason
    smi.broken = True
    assert isinstance(open_rocm("rocm:0", smi.clock, smi=smi), Unavailable)
    assert smi.users == users, "amdsmi was left open"


def test_without_rocm_the_reason_is_told() -> None:
    found = open_source("rocm:0")
    if not isinstance(found, Unavailable):
        found.close()
        pytest.skip("this machine has ROCm")
    assert "amdsmi" in found.reason
