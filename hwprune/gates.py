"""Gates with logits: hard concrete as EcoDiff publishes it, and a straight-through top-k under a budget.

Both have the calls of `hwprune.settling.SettlingGates`, so one loop trains any of them:

    gates.draw() -> flat gates of one trajectory; gates.learn(loss, final); gates.keep() -> the mask

Sources: hard concrete, Louizos et al., arXiv 1712.01312; its damped noise and L1 of the logits, EcoDiff,
arXiv 2412.02852 and its code (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hwprune.gating import Layout
from hwprune.prices import Multiplier, Price, keep_within

ALPHA, ZETA, GAMMA = 0.83, 1.1, -0.1  # temperature and stretch of the published gates


def hard_concrete(logit: Tensor, u: Tensor, *, delta: float) -> Tensor:
    """Gates in [0, 1], exactly 0 or 1 with some probability.

    Args:
        logit: [N].
        u: [..., N] uniform in (0, 1).
        delta: bounds the noise by log((1 + delta) / delta): 0.5 for SDXL and SD2, 0.1 for FLUX, 1 for
            SD3.5 as published; near 0 = Louizos et al.

    Returns:
        [..., N].
    """
    noise = torch.log(u + delta) - torch.log(1 - u + delta)
    stretched = torch.sigmoid((noise + logit) / ALPHA) * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0, 1)


def hard_concrete_alive(logit: Tensor, *, delta: float) -> Tensor:
    """P(gate > 0), exactly, for that delta; the usual closed form holds for delta = 0 only.

    The gate is 0 where noise + logit <= x0 = alpha log(-gamma / zeta). The noise has the distribution
    P(noise <= y) = ((1 + delta) e^y - delta) / (1 + e^y), clipped.
    """
    return _alive_before_clipping(logit, delta).clamp(0, 1)


def _alive_before_clipping(logit: Tensor, delta: float) -> Tensor:
    y = ALPHA * math.log(-GAMMA / ZETA) - logit
    return 1 - ((1 + delta) * torch.sigmoid(y) - delta * torch.sigmoid(-y))


def ramp(step: int, steps: int, budget: float, share: float = 0.6) -> float:
    """The budget at a step: from 1 down to `budget` over the first `share` of the steps."""
    done = min(1.0, step / max(1.0, share * steps))
    return 1.0 + (budget - 1.0) * done


class HardConcreteGates:
    """Hard concrete gates under a budget, or under EcoDiff's own regulariser.

    Args:
        layout: which gates there are.
        price: what the budget counts.
        budget: of the dense price.
        steps: calls of `learn` in all.
        delta: noise bound.
        initial: logit to start from.
        rate: AdamW's learning rate.
        beta: None = a multiplier drives the exact expected price to the budget; a number = EcoDiff's
            regulariser of that weight, mean |logit| of each module, whatever the budget says.
        weight_decay: AdamW's; EcoDiff leaves it at 0.01.
        rows: 0 = one draw a trajectory, and the next trajectory gets its antithetic twin 1 - u; T = draws of
            their own for each of T steps, as EcoDiff does.
        accumulate: calls of `learn` an optimiser step takes.
        seed: of the noise.
    """

    def __init__(
        self,
        layout: Layout,
        price: Price,
        budget: float,
        *,
        steps: int,
        delta: float = 0.5,
        initial: float = 3.0,
        rate: float = 0.1,
        beta: float | None = None,
        weight_decay: float = 0.0,
        rows: int = 0,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        """Start with every gate nearly open."""
        self.layout, self.price, self.budget, self.steps = layout, price, budget, steps
        self.delta, self.beta, self.rows, self.accumulate = delta, beta, rows, accumulate
        self.logit = torch.full((layout.count,), initial, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.logit], lr=rate, weight_decay=weight_decay)
        self.multiplier = Multiplier()
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self._twin: Tensor | None = None

    def draw(self) -> Tensor:
        """Gates of one trajectory: [N], or [T, N] with a row for each step."""
        if self.rows:
            u = torch.rand(self.rows, self.layout.count, generator=self.generator)
        elif self._twin is not None:
            u, self._twin = self._twin, None
        else:
            u = torch.rand(self.layout.count, generator=self.generator)
            self._twin = 1 - u
        return hard_concrete(self.logit, u, delta=self.delta)

    def learn(self, loss: Tensor, final: Tensor | None = None) -> None:
        """Take the gradient of a trajectory's loss; step the optimiser when enough are gathered.

        Args:
            loss: of the gates of the last `draw`.
            final: not used here.
        """
        loss.backward()
        self.step += 1
        if self.step % self.accumulate:
            return
        self._regularise()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _regularise(self) -> None:
        """Add the gradient of the price, or of EcoDiff's regulariser, once an optimiser step."""
        if self.beta is not None:
            (self.beta * self._published()).backward()
            return
        # With delta = 0.5 a gate is surely open down to a logit of -0.9, where the exact probability is flat:
        # its value counts, and the slope is that of the formula before it is clipped.
        smooth = _alive_before_clipping(self.logit, self.delta)
        price = self.price(smooth + (smooth.clamp(0, 1) - smooth).detach())
        (slope,) = torch.autograd.grad(price, self.logit)
        assert self.logit.grad is not None
        excess = float(price.detach()) - ramp(self.step, self.steps, self.budget)
        norms = float(self.logit.grad.norm()), float(slope.norm())
        self.logit.grad += self.multiplier.weight(excess, *norms) * slope

    def _published(self) -> Tensor:
        """Mean |logit| of each module, its mean over the modules of a kind, summed over kinds."""
        kinds: dict[str, list[Tensor]] = {}
        parts = self.layout.split(self.logit)
        for unit in self.layout.units:
            kinds.setdefault(unit.kind, []).append(parts[unit.name].abs().mean())
        return torch.stack([torch.stack(means).mean() for means in kinds.values()]).sum()

    def expected(self) -> float:
        """Expected price of the gates as they are."""
        with torch.no_grad():
            return float(self.price(hard_concrete_alive(self.logit, delta=self.delta)))

    def settled(self) -> float:
        """Share of gates that are exactly 0 or 1 whatever the noise says."""
        with torch.no_grad():
            ends = torch.tensor([[0.0], [1.0]])
            low, high = hard_concrete(self.logit, ends, delta=self.delta)
        return float(((low == high) & ((low == 0) | (low == 1))).float().mean())

    def keep(self) -> Tensor:
        """bool [N]: the highest logits that fit the budget (a threshold, as published)."""
        order = self.logit.detach().argsort(descending=True, stable=True)
        return keep_within(self.price, order, self.budget, self.layout.count)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next."""
        return {
            "logit": self.logit.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "multiplier": self.multiplier.state_dict(),
            "generator": self.generator.get_state(),
            "twin": self._twin,
            "gathered": self.logit.grad,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken."""
        _restore(self.logit, state["logit"], state["gathered"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.multiplier.load_state_dict(state["multiplier"])
        self.generator.set_state(state["generator"])
        self._twin, self.step = state["twin"], int(state["step"])


class TopKGates:
    """The units of highest score within the budget are kept; the gradient passes straight through.

    Args:
        layout: which gates there are.
        price: what the budget counts.
        budget: of the dense price; reached step by step over the first 60 % of the steps.
        steps: calls of `learn` in all.
        scores: to start from; None = all alike.
        rate: Adam's learning rate; scores start with standard deviation 1 or 0.
    """

    def __init__(
        self,
        layout: Layout,
        price: Price,
        budget: float,
        *,
        steps: int,
        scores: Mapping[str, Tensor] | None = None,
        rate: float = 0.05,
    ) -> None:
        """Start with every gate open."""
        self.layout, self.price, self.budget, self.steps = layout, price, budget, steps
        start = layout.join(scores) if scores is not None else torch.zeros(layout.count)
        spread = float(start.std()) if layout.count > 1 else 0.0
        start = (start - start.mean()) / (spread if spread > 0 else 1.0)
        self.score = start.requires_grad_()
        self.optimizer = torch.optim.Adam([self.score], lr=rate)
        self.step = 0

    def draw(self) -> Tensor:
        """Gates of one trajectory, [N], each exactly 0 or 1."""
        hard = self._within(ramp(self.step, self.steps, self.budget)).float()
        return hard + (self.score - self.score.detach())

    def learn(self, loss: Tensor, final: Tensor | None = None) -> None:
        """Take the gradient of a trajectory's loss and step the optimiser; `final` is not used here."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def _within(self, budget: float) -> Tensor:
        order = self.score.detach().argsort(descending=True, stable=True)
        return keep_within(self.price, order, budget, self.layout.count)

    def expected(self) -> float:
        """Price of the gates as they are."""
        return float(self.price(self._within(ramp(self.step, self.steps, self.budget)).float()))

    def settled(self) -> float:
        """Share of gates that are exactly 0 or 1: all."""
        return 1.0

    def keep(self) -> Tensor:
        """bool [N]: the highest scores that fit the budget."""
        return self._within(self.budget)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next."""
        return {
            "score": self.score.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken."""
        _restore(self.score, state["score"], None)
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.step = int(state["step"])


@torch.no_grad()
def _restore(parameter: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"the saved state has {len(value)} gates, this model {len(parameter)}; resume with the same units"
        )
    parameter.copy_(value)
    parameter.grad = None if gradient is None else gradient.clone()
