"""NVIDIA's own binding over a library that fails in every way: the right reason, no zero, nothing left open."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator

import pytest

pynvml = pytest.importorskip(
    "pynvml", reason="nvidia-ml-py is not installed: pip install hwprune[power]"
)

from fakes.nvml_library import OK, FakeBoard, FakeLibrary, install  # noqa: E402 - needs pynvml
from fakes.virtual import Board, Sensor, VirtualClock  # noqa: E402

import hwprune  # noqa: E402
from hwprune.meter.energy_window import Chunk, EnergyWindow  # noqa: E402
from hwprune.meter.estimate import Unavailable  # noqa: E402
from hwprune.meter.nvml import NvmlSource, open_nvml  # noqa: E402
from hwprune.meter.window import energy_of  # noqa: E402

TRANSIENT = {"NOT_SUPPORTED", "FUNCTION_NOT_FOUND"}
LOST = {"GPU_IS_LOST", "RESET_REQUIRED"}
ERRORS = [*TRANSIENT, *LOST, "NO_PERMISSION", "UNINITIALIZED", "TIMEOUT", "UNKNOWN"]


def code(name: str) -> int:
    return int(getattr(pynvml, f"NVML_ERROR_{name}"))


class Rig:
    """A fake library with one board of 400 W under a virtual clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.truth = Board(self.clock, watts=400.0)
        self.sensor = Sensor(self.truth, phase_s=0.0317)
        self.board = FakeBoard(self.sensor)
        self.library = FakeLibrary([self.board])

    def open(self, spec: str = "nvml:0") -> NvmlSource:
        source = open_nvml(spec, self.clock)
        assert isinstance(source, NvmlSource), source
        return source

    def refused(self, *pieces: str, spec: str = "nvml:0") -> None:
        found = open_nvml(spec, self.clock)
        assert isinstance(found, Unavailable)
        assert not [piece for piece in pieces if piece not in found.reason], found.reason
        assert self.library.users == 0, "NVML was left open"

    def work(self) -> Chunk:
        self.clock.sleep(0.004)
        return Chunk(1, 0.004)

    def fail_from(
        self, start_s: float, name: str, times: int | None = None, what: str = "fields"
    ) -> None:
        """From a time on (seconds after the start), calls or field values fail, for ever or so many times."""
        start, self.failures = self.clock.now_ns() + start_s * 1e9, 0

        def fault(symbol: str | int) -> int:
            asked = symbol == "nvmlDeviceGetFieldValues" if what == "call" else symbol == 83
            if not asked or self.clock.now_ns() < start or self.failures == times:
                return OK
            self.failures += 1
            return code(name)

        self.library.fault = fault


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    with install(made.library):
        yield made


def test_one_call_a_reading_answers_everything(rig: Rig) -> None:
    rig.board.cumulative = {74: 5_000, 269: 20, 270: 3, 271: 1}
    source = rig.open()
    assert (source.caps.counter, source.caps.instant, source.caps.average) == (True, True, True)
    assert (source.caps.cap_w, source.caps.scope, source.caps.mapping) == (700.0, "gpu", "index")
    before = rig.library.calls["nvmlDeviceGetFieldValues"]
    reading = source.read()
    assert rig.library.calls["nvmlDeviceGetFieldValues"] == before + 1
    assert not rig.library.calls["nvmlDeviceGetClockInfo"]
    assert reading.energy_mj == rig.sensor.energy_mj(reading.t_ns)
    assert (reading.instant_mw, reading.average_mw) == (400_000, 400_000)
    assert (reading.capped_ns, reading.thermal_ns, reading.brake_ns) == (5_000, 23, 1)
    assert not reading.error and not reading.status and reading.clock_sm_mhz is None
    state = source.read(state=True)
    assert (state.clock_sm_mhz, state.clock_mem_mhz, state.temperature_c) == (1980, 3201, 55)
    assert state.reasons == pynvml.nvmlClocksThrottleReasonSwPowerCap
    source.close()
    source.close()
    assert rig.library.users == 0
    assert source.read().lost and "closed" in source.read().error


@pytest.mark.parametrize("name", ["DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", *ERRORS])
def test_an_error_at_the_start_is_a_reason(rig: Rig, name: str) -> None:
    rig.library.fault = lambda symbol: code(name) if symbol == "nvmlInitWithFlags" else OK
    rig.refused("NVIDIA driver cannot be asked")
    with hwprune.measure_energy("nvml:0", clock=rig.clock) as e:
        rig.clock.sleep(0.5)
    assert e.energy_j is None and "NVIDIA driver" in e.reason and e.duration_s == pytest.approx(0.5)
    rig.library.fault = lambda symbol: code(name) if symbol == "nvmlDeviceGetUUID" else OK
    rig.refused("cannot be opened")
    rig.library.fault = lambda _: OK
    rig.open().close()


def test_a_machine_without_the_library_says_so(rig: Rig) -> None:
    pynvml.nvmlLib = None
    if not isinstance(found := open_nvml("nvml:0"), Unavailable):
        found.close()
        pytest.skip("this machine has the library")
    assert "no NVIDIA driver here" in found.reason


@pytest.mark.parametrize("what", ["fields", "call"])
@pytest.mark.parametrize("start_s", [0.4, 3.0, 4.5], ids=["start", "middle", "end"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_that_stays_gives_its_reason_and_no_figure(
    rig: Rig, name: str, start_s: float, what: str
) -> None:
    source = rig.open()
    rig.fail_from(start_s, name, what=what)
    found = energy_of(source, rig.work, clock=rig.clock)
    assert isinstance(found, Unavailable), found
    assert str(pynvml.NVMLError(code(name))) in found.reason
    assert source.read().lost == (name in LOST)
    assert source.read().energy_mj is None
    source.close()
    assert rig.library.users == 0
    rig.library.fault = lambda _: OK
    again = rig.open()
    assert again.read().energy_mj
    again.close()


@pytest.mark.parametrize("start_s", [0.4, 3.0, 4.5], ids=["start", "middle", "end"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_that_passes_is_outlived_where_it_may_be(
    rig: Rig, name: str, start_s: float
) -> None:
    source = rig.open()
    times = 3 if name in TRANSIENT else 1
    rig.fail_from(start_s, name, times)
    found = energy_of(source, rig.work, clock=rig.clock)
    source.close()
    assert rig.failures == times
    outlived = name in TRANSIENT or (start_s < 1 and name not in LOST)
    assert isinstance(found, EnergyWindow) == outlived
    if isinstance(found, EnergyWindow):
        assert found.average_power_w == pytest.approx(400, rel=1e-3) and found.status == "ok"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_inside_any_block_gives_its_reason_and_its_time(rig: Rig, name: str) -> None:
    rig.fail_from(1.0, name, what="call")
    with hwprune.measure_energy("nvml:0", clock=rig.clock) as e:
        rig.clock.sleep(2)
    assert e.energy_j is None and e.average_power_w is None and e.uncertainty_rel is None
    assert str(pynvml.NVMLError(code(name))) in e.reason
    assert e.duration_s == pytest.approx(2, abs=0.01)
    assert rig.library.users == 0 and not rig.clock.beside_count


def test_a_block_that_forks_away_from_its_meter_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "libLoadLock", pynvml.libLoadLock)  # restored afterwards
    with hwprune.measure_energy("nvml:0", clock=rig.clock) as e:
        monkeypatch.setattr(os, "getpid", lambda: -1)
    assert e.energy_j is None and "forked" in e.reason


def test_a_broken_sensor_is_not_waited_for(rig: Rig) -> None:
    source = rig.open()
    rig.fail_from(0.2, "UNKNOWN", what="call")
    start = rig.clock.now_ns()
    assert isinstance(energy_of(source, rig.work, clock=rig.clock), Unavailable)
    assert rig.clock.now_ns() - start < 4e9, "fifteen seconds of a GPU were wasted"
    source.close()


def test_a_power_of_zero_is_no_power(rig: Rig) -> None:
    source = rig.open()
    rig.truth.draw(0.0)
    rig.clock.sleep(2)
    before = rig.library.calls["nvmlDeviceGetFieldValues"]
    reading = source.read()
    assert rig.library.calls["nvmlDeviceGetFieldValues"] == before + 4, "three more tries"
    assert reading.instant_mw is None and "0 mW" in reading.status["instant_mw"]
    assert reading.energy_mj and not reading.error
    source.close()


def test_an_error_while_shutting_down_stays_inside(rig: Rig) -> None:
    source = rig.open()
    rig.library.fault = lambda symbol: code("GPU_IS_LOST") if symbol == "nvmlShutdown" else OK
    source.close()


def test_what_a_board_lacks_is_decided_once_and_told(rig: Rig) -> None:
    rig.board.fields = ()
    rig.library.without |= {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    rig.library.without |= {"nvmlDeviceGetEnforcedPowerLimit"}
    source = rig.open()  # as a Jetson: it opens, counts one device and answers nothing
    assert not (source.caps.counter or source.caps.instant or source.caps.average)
    assert "Not Supported" in source.caps.missing["energy_mj"]
    found = energy_of(source, rig.work, clock=rig.clock)
    assert isinstance(found, Unavailable) and "neither energy nor power" in found.reason
    source.close()
    with hwprune.measure_energy("nvml:0", clock=rig.clock) as e:
        rig.clock.sleep(1)
    assert e.energy_j is None and e.reason and rig.library.users == 0


@pytest.mark.parametrize(
    ("architecture", "name", "instant"),
    [
        (4, "FAKE-P100", True),
        (7, "FAKE-3090", False),
        (7, "FAKE A100-SXM4", True),
        (9, "FAKE-H", False),
    ],
)
def test_older_drivers_are_asked_by_their_own_calls(
    rig: Rig, architecture: int, name: str, instant: bool
) -> None:
    rig.board.fields, rig.board.architecture, rig.board.name = (), architecture, name
    source = rig.open()
    assert (source.caps.instant, source.caps.average) == (instant, not instant)
    assert source.caps.counter
    found = energy_of(source, rig.work, clock=rig.clock)
    assert isinstance(found, EnergyWindow) and found.method == "counter"
    source.close()


def test_a_superchip_s_counter_covers_the_module(rig: Rig) -> None:
    rig.board.name = "FAKE GH200 480GB"
    source = rig.open()
    found = energy_of(source, rig.work, clock=rig.clock)
    assert isinstance(found, EnergyWindow)
    assert found.scope == "module" and "module_scope" in found.flags
    source.close()


def test_two_meters_share_the_library(rig: Rig) -> None:
    first, second = rig.open(), rig.open()
    first.close()
    assert rig.library.users == 1
    assert second.read().energy_mj
    second.close()
    assert rig.library.users == 0
    with (
        hwprune.measure_energy("nvml:0", clock=rig.clock) as a,
        hwprune.measure_energy("nvml:0", clock=rig.clock) as b,
    ):
        rig.clock.sleep(3)
    assert a.energy_j and b.energy_j == pytest.approx(1200, rel=0.03)
    assert rig.library.users == 0


def test_a_raising_block_closes_the_sensor(rig: Rig) -> None:
    with (
        pytest.raises(RuntimeError, match="mine"),
        hwprune.measure_energy("nvml:0", clock=rig.clock) as e,
    ):
        raise RuntimeError("mine")
    assert rig.library.users == 0 and not rig.clock.beside_count
    assert e.energy_j is None and "raised" in e.reason


def test_a_forked_child_opens_the_library_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old_lock = rig.open(), pynvml.libLoadLock
    monkeypatch.setattr(pynvml, "libLoadLock", threading.Lock())
    pynvml.libLoadLock.acquire()  # a thread of the parent held it, and no one will release it
    pynvml._nvmlGetFunctionPointer_cache.clear()
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    assert source.read().energy_mj
    assert rig.library.calls["nvmlInitWithFlags"] == 2
    assert source.read().energy_mj and rig.library.calls["nvmlInitWithFlags"] == 2, "once"
    source.close()
    assert pynvml.libLoadLock is not old_lock


def test_a_child_where_it_cannot_be_opened_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rig.open()
    monkeypatch.setattr(pynvml, "libLoadLock", pynvml.libLoadLock)  # restored afterwards
    monkeypatch.setattr(os, "getpid", lambda: -1)
    rig.library.fault = lambda symbol: code("UNKNOWN") if symbol == "nvmlInitWithFlags" else OK
    assert source.read().lost and "after a fork" in source.read().error


def test_another_module_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("pynvml")
    other.__file__ = "site-packages/pynvml/__init__.py"
    monkeypatch.setitem(sys.modules, "pynvml", other)
    found = open_nvml("nvml:0")
    assert isinstance(found, Unavailable) and "pip uninstall pynvml" in found.reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = open_nvml("nvml:0")
    assert isinstance(found, Unavailable) and "hwprune[power]" in found.reason


@pytest.mark.parametrize("hidden", [False, True])
def test_importing_warns_of_nothing_with_the_binding_and_without(hidden: bool) -> None:
    code = (
        f"import sys; sys.modules.update({{'pynvml': None}} if {hidden} else {{}}); "
        "import hwprune, hwprune.meter.energy, hwprune.meter.window\n"
        "assert 'torch' not in sys.modules\n"
        "with hwprune.measure_energy('nvml:0') as e: pass\n"
        "assert e.energy_j is None or e.energy_j > 0, e\n"
        "print(e.reason)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not hidden or "nvidia-ml-py is not installed" in done.stdout


def test_a_device_of_no_known_form_is_the_callers_error() -> None:
    with (
        pytest.raises(ValueError, match=r"expected a device as cuda:0, nvml:0.*got 'gpu0'"),
        hwprune.measure_energy("gpu0"),
    ):
        pass
