"""Gates: the distribution as published, budgets met by the trained mask, a killed run that resumes alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hwprune.families import dit
from hwprune.families.denoiser import find_units
from hwprune.gates import (
    ALPHA,
    GAMMA,
    ZETA,
    HardConcreteGates,
    TopKGates,
    hard_concrete,
    hard_concrete_alive,
    ramp,
)
from hwprune.gating import Layout
from hwprune.prices import Price
from hwprune.settling import SettlingGates
from hwprune.units import CoupledLayer, Units

pytest.importorskip("diffusers")


def layout(count: int) -> Layout:
    """The gates of one layer of `count` neurons; no model is needed to train them."""
    layer = CoupledLayer("ff", 0, "neuron", count, 1, (), ())
    return Layout([Units("ff:neuron", layer, "neuron", (count,), ())])


def weighted(costs: Tensor) -> Price:
    shares = costs.double() / costs.double().sum()
    return lambda keep: (keep.double() * shares).sum()


class Quadratic:
    """A 'trajectory' whose final latent is linear in the gates: every quantity is known exactly."""

    def __init__(self, count: int, images: int = 4, seed: int = 0, spread: float = 1.5) -> None:
        draw = torch.Generator().manual_seed(seed)
        scale = torch.exp(spread * torch.randn(count, generator=draw))
        self.effect = torch.randn(images, 20, count, generator=draw) * scale
        self.target = self.effect.sum(2)

    def final(self, gates: Tensor) -> Tensor:
        rows = gates if gates.ndim == 2 else gates.expand(len(self.effect), -1)
        return torch.einsum("bon,bn->bo", self.effect, rows)

    def loss(self, gates: Tensor) -> Tensor:
        return (self.final(gates) - self.target).square().mean()

    def best(self, price: Price, budget: float) -> float:
        """The least loss any mask within the budget has, by trying all."""
        count = self.effect.shape[2]
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)))
        fits = torch.stack([price(m) for m in masks]) <= budget + 1e-9
        finals = torch.einsum("bon,mn->mbo", self.effect, masks[fits])
        return float((finals - self.target).square().mean((1, 2)).min())


def train(gates: Any, problem: Quadratic, steps: int) -> list[float]:
    losses = []
    images = len(problem.effect)
    for _ in range(steps):
        flat = gates.draw(images) if isinstance(gates, SettlingGates) else gates.draw()
        final = problem.final(flat)
        loss = (final - problem.target).square().mean()
        gates.learn(loss, final)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("delta", [1e-8, 0.1, 0.5, 1.0])
def test_the_probability_of_an_open_gate_is_exact_for_every_delta(delta: float) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for logit in (-4.0, -2.0, -1.0, -0.5, 0.0, 0.7, 3.0):
        value = torch.tensor(logit, dtype=torch.float64)
        drawn = float((hard_concrete(value, u, delta=delta) > 0).double().mean())
        exact = float(hard_concrete_alive(value, delta=delta))
        assert exact == pytest.approx(drawn, abs=1e-5)


def test_the_published_distribution_has_the_figures_measured_on_it() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    table = [(0.5, 3, 0.966, 0, 1.0), (0.5, 0, 0, 0, 0.5), (0.5, -2, 0, 0.505, 0.040)]
    table += [
        (0.1, 3, 0.780, 0, 0.978),
        (1e-8, 0, 0.120, 0.120, 0.5),
        (1e-8, 3, 0.733, 0.007, 0.932),
    ]
    for delta, logit, ones, zeros, mean in table:
        gates = hard_concrete(torch.tensor(float(logit), dtype=torch.float64), u, delta=delta)
        found = [float(x.double().mean()) for x in (gates == 1, gates == 0, gates)]
        assert found == pytest.approx([ones, zeros, mean], abs=1e-3)


def test_delta_bounds_the_noise_and_louizos_form_is_the_limit() -> None:
    logit = torch.linspace(-3, 3, 7, dtype=torch.float64)
    closed = torch.sigmoid(logit - ALPHA * math.log(-GAMMA / ZETA))
    torch.testing.assert_close(hard_concrete_alive(logit, delta=1e-12), closed, rtol=0, atol=1e-9)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    soft = hard_concrete(torch.tensor([0.88], dtype=torch.float64), ends, delta=0.5)
    assert float(soft[0]) > 0 and float(soft[1]) < 1  # |logit| < 0.891: never 0 or 1


def test_twins_are_antithetic_and_rows_are_independent() -> None:
    price = weighted(torch.ones(1000))
    gates = HardConcreteGates(layout(1000), price, 0.5, steps=10, initial=0.0)
    one, other, third = gates.draw(), gates.draw(), gates.draw()
    torch.testing.assert_close(one + other, torch.ones(1000), rtol=0, atol=1e-5)
    assert float((third - one).abs().mean()) > 0.05
    rows = HardConcreteGates(layout(1000), price, 0.5, steps=10, initial=0.0, rows=3).draw()
    assert rows.shape == (3, 1000)
    assert abs(float(torch.corrcoef(rows.detach())[0, 1])) < 0.2


def test_hard_concrete_under_the_multiplier_ends_at_its_budget() -> None:
    problem, price = Quadratic(60, spread=0.7), weighted(torch.rand(60) + 0.5)
    gates = HardConcreteGates(layout(60), price, 0.5, steps=300)
    train(gates, problem, 300)
    assert gates.expected() == pytest.approx(0.5, abs=0.03)
    keep = gates.keep()
    assert float(price(keep)) <= 0.5 + 1e-9
    random = [float(problem.loss((torch.rand(60) < 0.5).float())) for _ in range(20)]
    assert float(problem.loss(keep.float())) < 0.5 * sum(random) / len(random)


def test_ecodiffs_regulariser_is_the_mean_size_of_logits_module_by_module() -> None:
    model, _, _ = dit.tiny()
    units = find_units(model)
    gates = HardConcreteGates(
        Layout(units), weighted(torch.ones(Layout(units).count)), 0.5, steps=9, beta=0.5
    )
    with torch.no_grad():
        gates.logit.copy_(torch.randn(gates.layout.count))
    parts = gates.layout.split(gates.logit.detach())
    by_hand = sum(
        sum(float(parts[u.name].abs().mean()) for u in units if u.kind == kind) / 3
        for kind in ("head", "neuron")
    )
    assert float(gates._published()) == pytest.approx(by_hand)


def test_accumulated_steps_add_their_gradients_and_the_regulariser_once() -> None:
    problem, price = Quadratic(20), weighted(torch.ones(20))
    gates = HardConcreteGates(layout(20), price, 0.5, steps=8, accumulate=4, initial=0.5)
    before = gates.logit.detach().clone()
    train(gates, problem, 3)
    assert torch.equal(gates.logit.detach(), before)
    train(gates, problem, 1)
    assert not torch.equal(gates.logit.detach(), before)


@pytest.mark.parametrize("seed", range(4))
def test_top_k_is_binary_within_its_budget_and_keeps_what_matters_most(seed: int) -> None:
    problem, price = Quadratic(12, seed=seed), weighted(torch.ones(12))
    gates = TopKGates(layout(12), price, 0.5, steps=200)
    for step in range(200):
        flat = gates.draw()
        assert set(flat.detach().tolist()) <= {0.0, 1.0}
        assert float(price(flat.detach())) <= ramp(step, 200, 0.5) + 1e-9
        gates.learn(problem.loss(flat), None)
    assert int(gates.keep().sum()) == 6
    assert bool(gates.keep()[problem.effect.square().sum((0, 1)).argmax()])


@pytest.mark.parametrize("seed", range(8))
def test_settling_gates_come_close_to_the_best_mask_there_is(seed: int) -> None:
    problem = Quadratic(12, seed=seed)
    price = weighted(torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.5)
    gates = SettlingGates(layout(12), price, 0.5, steps=80, seed=seed)
    for step in range(80):
        flat = gates.draw(4)
        assert set(flat.flatten().tolist()) <= {0.0, 1.0}
        assert float(price(flat[0].detach())) <= ramp(max(0, step - 8), 72, 0.5) + 1e-9
        final = problem.final(flat)
        gates.learn((final - problem.target).square().mean(), final)
    found, best = float(problem.loss(gates.keep().float())), problem.best(price, 0.5)
    dense = float(problem.loss(torch.zeros(12)))
    assert float(price(gates.keep())) <= 0.5 + 1e-9
    assert found <= best + 0.03 * dense  # a search by single swaps; random masks are at 0.5


def test_settling_gates_do_settle() -> None:
    problem, price = Quadratic(200, spread=0.5), weighted(torch.ones(200))
    gates, changed = SettlingGates(layout(200), price, 0.6, steps=60), []
    for _ in range(60):
        before = gates.kept.clone()
        train(gates, problem, 1)
        changed.append(int((gates.kept != before).sum()))
    assert sum(changed[:40]) >= 80 and sum(changed[-5:]) <= 4
    assert gates.settled() == 1.0 and gates.expected() <= 0.6 + 1e-9


def test_the_curvature_of_settling_gates_is_gauss_newtons() -> None:
    problem, price = Quadratic(15, images=8), weighted(torch.ones(15))
    gates = SettlingGates(layout(15), price, 0.5, steps=10**6)
    gates.curvature.memory = 0.999
    train(gates, problem, 400)
    exact = problem.effect.double().square().sum((0, 1)) * 2 / (8 * 20)
    assert float(((gates.curvature.value - exact) / exact).abs().max()) < 0.15


def test_the_gain_is_the_true_difference_of_a_quadratic_loss() -> None:
    problem, price = Quadratic(10), weighted(torch.ones(10))
    exact = problem.effect.double().square().sum((0, 1)) * 2 / (4 * 20)
    gates = SettlingGates(
        layout(10), price, 0.5, steps=100, trust=1.0, curvature={"ff:neuron": exact.float()}
    )
    gates.kept = torch.arange(10) % 3 > 0
    flat = gates.draw(4)
    (gradient,) = torch.autograd.grad(problem.loss(flat), flat)
    gates.gradient.add(gradient.double().sum(0))
    for j, gain in enumerate(gates.gain()):
        on, off = gates.kept.float(), gates.kept.float()
        on[j], off[j] = 1, 0
        difference = float(problem.loss(off) - problem.loss(on))
        assert float(gain) == pytest.approx(difference, rel=1e-3, abs=1e-4)


def test_gates_asked_too_early_say_that_the_budget_is_not_met_yet() -> None:
    gates = SettlingGates(layout(10), weighted(torch.ones(10)), 0.5, steps=50)
    train(gates, Quadratic(10), 5)
    with pytest.raises(
        ValueError, match=r"come down to 1\.000 of the dense price after 5 of 50 steps"
    ):
        gates.keep()
    with pytest.raises(ValueError, match=r"expected gates from draw\(\) first"):
        gates.learn(torch.zeros(()), torch.zeros(1))


MAKE: dict[str, Callable[[Layout, Price], Any]] = {
    "hard concrete": lambda x, p: HardConcreteGates(x, p, 0.5, steps=30, accumulate=2),
    "EcoDiff": lambda x, p: HardConcreteGates(
        x, p, 0.5, steps=30, beta=0.5, weight_decay=0.01, accumulate=4
    ),
    "top-k": lambda x, p: TopKGates(x, p, 0.5, steps=30),
    "settling": lambda x, p: SettlingGates(x, p, 0.5, steps=30),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("cut", [7, 15])
def test_a_killed_run_resumes_to_the_same_result(name: str, cut: int, tmp_path: Any) -> None:
    problem, price = Quadratic(25), weighted(torch.ones(25))
    whole = MAKE[name](layout(25), price)
    first = train(whole, problem, 30)
    killed = MAKE[name](layout(25), price)
    train(killed, problem, cut)
    torch.save(killed.state_dict(), tmp_path / "state.pt")
    resumed = MAKE[name](layout(25), price)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(resumed, problem, 30 - cut) == first[cut:]
    assert torch.equal(resumed.keep(), whole.keep())
    with pytest.raises(
        ValueError, match="the saved state has 25 gates, this model 24; resume with"
    ):
        MAKE[name](layout(24), weighted(torch.ones(24))).load_state_dict(whole.state_dict())


def test_scores_from_elsewhere_can_start_gates() -> None:
    scores = {"ff:neuron": torch.arange(10.0)}
    gates = TopKGates(layout(10), weighted(torch.ones(10)), 0.5, steps=1, scores=scores)
    assert gates.keep().tolist() == [False] * 5 + [True] * 5
    settled = SettlingGates(
        layout(10),
        weighted(torch.ones(10)),
        0.5,
        steps=1,
        curvature={"ff:neuron": torch.arange(10.0)},
    )
    assert settled.warm_up == 0 and settled.curvature.value.tolist() == list(range(10))
