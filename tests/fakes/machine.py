"""A device of the virtual clock that a profile is measured on: what ran, what fails, what it draws."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fakes.virtual import Board, VirtualClock
from torch import Tensor

from hwprune.device import DeviceProfile
from hwprune.meter.estimate import Unavailable
from hwprune.meter.modes import Runnable
from hwprune.meter.timing import CpuTimer
from hwprune.ops import Op, Pool
from hwprune.profiling import Bench, measure_device

CPU = torch.device("cpu")
NONE = Unavailable("no sensor in this test")
OPS = [Op("linear", (m, n, 64), "fp32") for m in (8, 64) for n in (32, 64, 128, 256, 512, 1024)]


def seconds(op: Op) -> float:
    return 1e-3 * (1 + op.macs / 1e6)


class Machine:
    """A device of the virtual clock: what ran, how often, and what fails.

    Args:
        noise: deviation of the logarithm of a call's time.
        fails: called before each call; may raise.
        watts: power of an operation, to a fake board.
    """

    def __init__(
        self,
        noise: float = 0.0,
        fails: Callable[[Op, int], None] = lambda op, calls: None,
        watts: Callable[[Op], float] | None = None,
    ) -> None:
        self.clock, self.noise, self.fails, self.watts = VirtualClock(), noise, fails, watts
        self.calls: Counter[Op] = Counter()
        self.generator = random.Random(0)
        self.board = Board(self.clock, watts=80.0)
        self.captured: list[int] = []

    def make(self, op: Op, pool: Pool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            self.calls[op] += 1
            self.fails(op, self.calls[op])
            if self.watts is not None:
                self.board.draw(self.watts(op))
            self.clock.sleep(seconds(op) * math.exp(self.noise * self.generator.gauss(0, 1)))
            return torch.zeros(1)

        return call

    def graph(self, call: Callable[[], object], device: torch.device, count: int) -> Runnable:
        self.captured.append(count)

        def replay() -> object:
            for _ in range(count):
                out = call()
            return out

        return Runnable(replay, count)

    def bench(self, source: Any = NONE, graphs: bool = False) -> Bench:
        timer = CpuTimer(None, self.clock.now_ns, lambda: 2 * self.clock.now_ns())
        graph = self.graph if graphs else None
        return Bench(timer, self.clock, source, False, graph, self.make, lambda timer: 0.01)

    def measure(self, minutes: float = 2.0, **given: Any) -> DeviceProfile:
        bench = given.pop("bench", None) or self.bench()
        return measure_device(
            given.pop("ops", OPS), CPU, name="fake", minutes=minutes, bench=bench, **given
        )

    @property
    def now_s(self) -> float:
        return self.clock.now_ns() / 1e9
