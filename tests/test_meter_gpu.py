"""Energy on a real GPU: the right board, twice the work is twice the joules, zeros cost less than data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hwprune
from hwprune.meter.energy_window import EnergyWindow
from hwprune.meter.estimate import Unavailable
from hwprune.meter.gemm_load import GemmLoad
from hwprune.meter.open import open_source
from hwprune.meter.source import EnergySource
from hwprune.meter.window import energy_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def source() -> Iterator[EnergySource]:
    opened = open_source("cuda:0")
    if isinstance(opened, Unavailable):
        pytest.skip(f"no sensor for cuda:0: {opened.reason}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def load() -> GemmLoad:
    return GemmLoad(torch.device("cuda:0"))


def measured(source: EnergySource, load: GemmLoad, values: str) -> EnergyWindow:
    run_chunk, drain = load.chunks(values)  # type: ignore[arg-type]
    found = energy_of(source, run_chunk, drain=drain)
    assert isinstance(found, EnergyWindow), found
    return found


def test_the_board_is_the_one_torch_computes_on(source: EnergySource) -> None:
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ")
    assert source.caps.device.removeprefix("NVIDIA ") == name
    assert source.caps.mapping in ("uuid", "pci", "single-device")


def test_zeros_take_less_energy_than_data(source: EnergySource, load: GemmLoad) -> None:
    random, zeros = measured(source, load, "random"), measured(source, load, "zeros")
    assert zeros.energy_per_iteration_j < 0.97 * random.energy_per_iteration_j
    assert "sensor_disagreement" not in random.flags
    if source.caps.cap_w is not None:
        assert 0.2 * source.caps.cap_w < random.average_power_w < 1.1 * source.caps.cap_w
    assert random.meter_share < 0.005, f"the meter took {random.meter_share:.2%} of a core"


def test_twice_the_time_is_twice_the_joules(source: EnergySource, load: GemmLoad) -> None:
    load.busy(3.0)  # warm
    joules, slack = [], 0.0
    for seconds in (4.0, 8.0):
        with hwprune.measure_energy("cuda:0", source=source) as e:
            load.busy(seconds)
        assert e.energy_j is not None and e.uncertainty_rel is not None, e.reason
        joules.append(e.energy_j)
        slack += e.uncertainty_rel
    assert joules[1] / joules[0] == pytest.approx(2, rel=0.03 + slack)
