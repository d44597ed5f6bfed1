"""Gates that are 0 or 1 at every step of their training, within the budget at every step: ours.

What is trained is what is deployed: no soft gate is rounded afterwards, no threshold is chosen. For a
quadratic loss the difference between having a unit and not having it is, at any mask m,

    L(m_j = 1) - L(m_j = 0) = g_j + h_j (1/2 - m_j),

with g the gradient and h the curvature along the gate (the gradient of L's multilinear extension). g comes
through the whole trajectory with everything already removed taken into account; h is Gauss-Newton's,
from the pull-back of random signs, unbiased over any number of outputs. Each step the units with the
highest gain for their price are kept, as many as the budget of that step allows: the price at the
threshold is the Lagrange multiplier. A removed unit keeps its gradient and can come back; that a
kept one needs h_j less of it than a removed one damps swaps, and a growing share more lets them settle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hwprune.gates import ramp
from hwprune.gating import Layout
from hwprune.prices import Price, keep_within


class SettlingGates:
    """Binary gates that follow the budget down and settle.

    Args:
        layout: which gates there are.
        price: what the budget counts; differentiable, and higher with every unit.
        budget: of the dense price; reached over the first 60 % of the steps.
        steps: calls of `learn` in all.
        curvature: what is known of h from elsewhere, by units name, on the scale of the loss; None = it
            is first estimated on the dense model, for a tenth of the steps.
        memory: how much of the last steps' gradients is remembered, 0 to 1; the curvature's memory is
            longer, 0.95.
        trust: share of the gradient that is believed. Many units change in a step, and neighbours that do
            the same claim the same gain: at 1 the loss overshoots (0.31 after 8 % of a small DiT had
            gone, where 0.3 gave 0.1).
        swaps: price of what may come back in one step, as a share of all that goes; it shrinks to 0
            towards the last step.
        seed: of the random signs.
    """

    def __init__(
        self,
        layout: Layout,
        price: Price,
        budget: float,
        *,
        steps: int,
        curvature: Mapping[str, Tensor] | None = None,
        memory: float = 0.7,
        trust: float = 0.3,
        swaps: float = 0.02,
        seed: int = 0,
    ) -> None:
        """Start with every gate open."""
        self.layout, self.price, self.budget, self.steps = layout, price, budget, steps
        self.trust, self.swaps = trust, swaps
        self.generator = torch.Generator().manual_seed(seed)
        self.kept = torch.ones(layout.count, dtype=torch.bool)
        self.gradient = _Average(layout.count, memory)
        self.curvature = _Average(layout.count, 0.95)
        self.warm_up = 0 if curvature is not None else max(1, steps // 10)
        if curvature is not None:
            self.curvature.add(layout.join(curvature).double())
        self.step = 0
        self._drawn: Tensor | None = None

    def draw(self, images: int = 1) -> Tensor:
        """Gates of one trajectory, [images, N], each exactly 0 or 1; a leaf that requires grad.

        A row for each image takes their gradients apart: the curvature of B images costs one pull-back.
        """
        self._drawn = self.kept.float().repeat(images, 1).requires_grad_()
        return self._drawn

    def learn(self, loss: Tensor, final: Tensor) -> None:
        """Measure gradient and curvature, then choose the gates of the next step.

        Args:
            loss: mean squared distance of `final` to the teacher's latent, for the gates of the last
                `draw`.
            final: the trajectory's final latent, with its gradient.

        Raises:
            ValueError: nothing was drawn.
        """
        if self._drawn is None:
            raise ValueError("learn: expected gates from draw() first")
        shape, device = final.shape, final.device
        signs = torch.randint(0, 2, shape, generator=self.generator).to(device, final.dtype) * 2 - 1
        (pulled,) = torch.autograd.grad(final, self._drawn, signs, retain_graph=True)
        self.curvature.add((pulled.double().cpu() ** 2).sum(0) * (2 / final.numel()))
        (gradient,) = torch.autograd.grad(loss, self._drawn)
        self.gradient.add(gradient.double().cpu().sum(0))
        self._drawn = None
        self.step += 1
        if self.step > self.warm_up:
            self.kept = self._chosen()

    def gain(self) -> Tensor:
        """By how much the loss would rise without each unit, or falls with it if it is gone: [N]."""
        on = self.kept.double()
        late = (
            max(0.0, self.step / self.steps - 0.6) / 0.4
        )  # 0 while the budget falls, 1 at the end
        steadiness = 1 + 4 * late
        return self.curvature.value * steadiness * (on - 0.5) - self.trust * self.gradient.value

    def _chosen(self) -> Tensor:
        on = self.kept.double().requires_grad_()
        (each,) = torch.autograd.grad(self.price(on), on)
        worth = self.gain() / each.clamp_min(1e-12)
        done, left = self.step - self.warm_up, max(1, self.steps - self.warm_up)
        # What has gone comes back a little at a time, at least one unit (a head may be dearer than the swaps
        # of a step): with no limit half of the removed changed places in each step and nothing settled.
        swaps = self.swaps * (1 - self.budget) * (1 - done / left)
        away = (~self.kept).nonzero()[:, 0]
        away = away[worth[away].argsort(descending=True, stable=True)]
        back = away[each[away].cumsum(0) - each[away] < swaps]
        pool = torch.cat([self.kept.nonzero()[:, 0], back])
        order = pool[worth[pool].argsort(descending=True, stable=True)]
        return keep_within(self.price, order, ramp(done, left, self.budget), self.layout.count)

    def expected(self) -> float:
        """Price of the gates as they are."""
        return float(self.price(self.kept.double()))

    def settled(self) -> float:
        """Share of gates that are exactly 0 or 1: all, at every step."""
        return 1.0

    def keep(self) -> Tensor:
        """bool [N]: the gates as they are.

        Raises:
            ValueError: they are still above the budget, because too few steps were taken.
        """
        if self.expected() > self.budget + 1e-9:
            raise ValueError(
                f"the gates have come down to {self.expected():.3f} of the dense price after {self.step} of "
                f"{self.steps} steps, the budget is {self.budget:.3f}; take the remaining steps"
            )
        return self.kept.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next."""
        return {
            "kept": self.kept.clone(),
            "gradient": self.gradient.state_dict(),
            "curvature": self.curvature.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken.

        Raises:
            ValueError: it is of other units.
        """
        if state["kept"].shape != self.kept.shape:
            raise ValueError(
                f"the saved state has {len(state['kept'])} gates, this model {len(self.kept)}; resume with the "
                "same units"
            )
        self.kept = state["kept"].clone()
        self.gradient.load_state_dict(state["gradient"])
        self.curvature.load_state_dict(state["curvature"])
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])


class _Average:
    """A running mean that forgets, without the bias of its first steps."""

    def __init__(self, count: int, memory: float) -> None:
        self.total = torch.zeros(count, dtype=torch.float64)
        self.weight, self.memory = 0.0, memory

    def add(self, value: Tensor) -> None:
        self.total = self.memory * self.total + (1 - self.memory) * value
        self.weight = self.memory * self.weight + (1 - self.memory)

    @property
    def value(self) -> Tensor:
        return self.total / self.weight if self.weight else self.total

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.clone(), "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.weight = state["total"].clone(), float(state["weight"])
