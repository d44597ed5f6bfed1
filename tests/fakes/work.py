"""A model whose calls take a known time of a virtual clock, and a bench for `measure` that runs by it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from fakes.virtual import VirtualClock
from torch import Tensor, nn

from hwprune.meter import compare, timing
from hwprune.meter.estimate import Estimate, Unavailable

NO_SENSOR = Unavailable("no sensor in this test")


def virtual_bench(patch: pytest.MonkeyPatch) -> VirtualClock:
    """A clock by which `measure` runs from now on, without a sensor, on a steady machine."""
    clock = VirtualClock()

    def make_timer(device: torch.device, l2: str = "hot") -> timing.CpuTimer:
        return timing.CpuTimer(None, clock.now_ns, lambda: 2 * clock.now_ns())  # two threads

    patch.setattr(compare, "make_timer", make_timer)
    patch.setattr(compare, "RealClock", lambda: clock)
    patch.setattr(compare, "open_source", lambda device: NO_SENSOR)
    patch.setattr(compare, "noise_rel", lambda timer: 0.01)
    return clock


def value(figure: Estimate | Unavailable) -> float:
    """Of a figure that must be there."""
    assert isinstance(figure, Estimate), figure
    return figure.value


class Work(nn.Module):
    """A linear layer that takes its time.

    Args:
        seconds: a call.
        noise: deviation of the logarithm of that.
    """

    def __init__(
        self, clock: VirtualClock, seconds: float, noise: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(6, 4)
        self.clock, self.seconds, self.noise = clock, seconds, noise
        self.generator = random.Random(seed)
        self.modes: set[bool] = set()
        self.eval()

    def forward(self, x_BI: Tensor) -> Any:
        self.modes.add(self.training)
        self.clock.sleep(self.seconds * math.exp(self.noise * self.generator.gauss(0, 1)))
        return self.fc(x_BI)

    def __deepcopy__(self, memo: dict[int, Any]) -> Work:
        twin = Work(self.clock, self.seconds, self.noise)
        twin.load_state_dict(self.state_dict())
        return twin
