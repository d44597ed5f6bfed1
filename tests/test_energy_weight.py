"""Energy weighed against distortion: less of it at the same budget, refused where nothing knows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from test_contract import HIDDEN, KINDS, entries, images, vit

from hwprune import contract as contract_
from hwprune.allocate import Budget
from hwprune.device import DeviceProfile, Entry
from hwprune.operations import count_operations
from hwprune.predict import CostModel
from hwprune.pruning import prune


def power_w(entry: Entry) -> float:
    """MLPs draw ten times what all else does: what saves time does not save the most energy."""
    return 100.0 if HIDDEN in entry.op.shape[1:] else 10.0


def with_power() -> Iterator[Entry]:
    for entry in entries():
        watts = power_w(entry)
        yield replace(entry, power_w=watts, energy_j=watts * entry.latency_s)


@pytest.fixture(scope="module")
def costs() -> CostModel:
    device = {"type": "cpu", "name": "FAKE-device", "threads": 1}
    return CostModel(
        DeviceProfile(
            "FAKE", device, {}, {"source": "fake"}, tuple(with_power()), {}, synthetic=True
        )
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, costs: CostModel) -> None:
    monkeypatch.setattr(contract_, "device_costs", lambda *_, **__: costs)


def joules(costs: CostModel, model: object) -> float:
    ops = count_operations(model, images()[0], partly=True).ops  # type: ignore[arg-type]
    return sum(costs.predict(op).energy_j or 0.0 for op in ops)


@pytest.mark.parametrize("budget", [Budget(latency=0.85), Budget(macs=0.85)], ids=str)
def test_more_weight_saves_more_energy_within_the_same_budget(
    known: None, costs: CostModel, budget: Budget
) -> None:
    dense, found = joules(costs, vit()), []
    for weight in (0.0, 0.3, 100.0):
        model = vit()
        given = {"energy_weight": weight} if weight else {}
        device = "FAKE" if weight or "latency" in budget.given else None
        report = prune(model, images(), budget, kinds=KINDS, device=device, repair=False, **given)
        told = report.to_dict()
        found.append((joules(costs, model) / dense, report.distortion["predicted"]))
        assert report.distortion.get("energy_weight", 0.0) == weight
        if weight:
            predicted = told["predicted"]["energy_ratio"]["value"]
            assert predicted == pytest.approx(found[-1][0], rel=1e-6)
        if "latency" in budget.given:
            assert told["predicted"]["latency_ratio"]["value"] <= 0.85
        assert report.macs_ratio <= budget.given.get("macs", 1.0)
    assert found[0][0] > found[1][0] > found[2][0]
    assert found[0][1] < found[1][1] < found[2][1]


def test_a_device_without_figures_of_energy_is_refused_before_the_long_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = {"type": "cpu", "name": "FAKE-device", "threads": 1}
    silent = DeviceProfile("FAKE", device, {}, {}, tuple(entries()), {}, synthetic=True)
    monkeypatch.setattr(contract_, "device_costs", lambda *_, **__: CostModel(silent))
    monkeypatch.setattr("hwprune.pruning.analyse", lambda *_, **__: pytest.fail("calibrated"))
    with pytest.raises(
        ValueError, match=r"energy_weight: FAKE has no energy figures; name a device"
    ):
        prune(vit(), images(), Budget(macs=0.7), energy_weight=0.1)
    with pytest.raises(ValueError, match=r"budget energy: FAKE has no energy figures"):
        prune(vit(), images(), Budget(energy=0.7), energy_weight=0.1)


def test_a_machine_without_a_profile_is_told_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract_, "profile_here", lambda *_: None)
    with pytest.raises(ValueError, match=r"energy.*has no profile; measure it once"):
        prune(vit(), images(), Budget(macs=0.7), energy_weight=0.1)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="energy_weight: expected a number of at least 0"):
        prune(vit(), images(), Budget(macs=0.7), energy_weight=weight)
