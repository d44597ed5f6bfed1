"""The whole sampling loop under gradient, with the activations of one denoising step alive.

Timestep gradient checkpointing (EcoDiff, arXiv 2412.02852, made exact): the forward pass keeps each step's
latent and solver history; the backward pass takes the steps again from the last to the first and carries
the adjoint of latent and history back. One forward, one recomputation and one backward call a step.
Equal to back-propagation through all steps: noise, dropout and autocast are replayed as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hwprune.culprit import broken_gradient, broken_layer, finite, unlisted
from hwprune.solvers import Solver, State

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Watch: TypeAlias = Callable[[Literal["forward", "backward"], int, float], None]


def sample(
    denoise: Denoise,
    solver: Solver,
    start: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    checkpoint: bool = True,
    offload: bool = False,
    model: nn.Module | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Run the solver from noise to the final latent, differentiably where something asks for it.

    Args:
        denoise: (latent, scalar timestep) -> prediction of the latent's shape; `Denoiser`, or a function
            that sets masks and then calls one (`Gating.wrap`). It is called again in the backward pass and
            must then use the same masks: let it close over them. If it has a context manager `held()`,
            that is entered around each step's recomputation and gradient.
        solver: the scheduler with its timesteps set.
        start: [B, ...] noise times `solver.start_scale`. Latents and adjoint are kept in float32 at
            least, whatever the model's own dtype.
        parameters: the tensors gradients are wanted for (masks, weights ...), leaves or not. Every
            tensor that requires grad inside `denoise` must be among them.
        generator: source of solver noise (ancestral, LCM); advanced as by the plain loop.
        checkpoint: False = keep all activations of all steps, as plain back-propagation does.
        offload: keep the latents of the steps in CPU memory.
        model: where to look for the layer an error is about; None = `denoise.model` if there is one.
        watch: called after each step with the norm of the latent (forward) or adjoint (backward).

    Returns:
        The final latent; with a gradient if `start` or one of `parameters` requires it.

    Raises:
        FloatingPointError: NaN or Inf, naming step and layer; also from `backward()`.
        ValueError: from `backward()`: something requires grad and is not listed, or none of
            `parameters` takes part.
    """
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    if model is None:
        found = getattr(denoise, "model", None)
        model = found if isinstance(found, nn.Module) else None
    wanted = any(t.requires_grad for t in (start, *parameters))
    run = _Run(denoise, solver, generator, offload, model, watch)
    if checkpoint and wanted and torch.is_grad_enabled():
        final: Tensor = _Checkpointed.apply(run, start, *parameters)
        return final
    with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        return run.forward(start, keep=False)


class _Checkpointed(torch.autograd.Function):
    """The trajectory as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, start: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        return run.forward(start.detach().clone(), keep=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.run.backward(gradient, ctx.parameters))


class _Run:
    """One pass over the steps, and what is kept of it to take them again."""

    def __init__(
        self,
        denoise: Denoise,
        solver: Solver,
        generator: torch.Generator | None,
        offload: bool,
        model: nn.Module | None,
        watch: Watch | None,
    ) -> None:
        self.denoise, self.solver, self.generator = denoise, solver, generator
        self.offload, self.model, self.watch = offload, model, watch
        self.kept: list[tuple[State, _Randomness]] = []

    def forward(self, start: Tensor, *, keep: bool) -> Tensor:
        """Take all steps; `keep` their states for `backward`."""
        self.autocast, self.device = _autocast_of(start.device.type), start.device
        state = self.solver.begin(start)
        stored = self._stored(state, None)
        for step in range(len(self.solver)):
            if keep:
                self.kept.append((stored, _Randomness(start.device, self.generator)))
            before, state = state, self._step(state, state.tensors, step, self.generator)
            if not finite(state.tensors[0]):
                raise FloatingPointError(self._broken(before, step))
            if keep and step + 1 < len(self.solver):
                stored = self._stored(state, (before, stored))
            if self.watch is not None:
                self.watch("forward", step, float(state.tensors[0].norm()))
        return state.tensors[0]

    def backward(self, gradient: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Carry an adjoint back.

        Args:
            gradient: of the loss with respect to the final latent.
            parameters: as given to `sample`.

        Returns:
            Gradients of the start and of each parameter; None where there is none.
        """
        live = [i for i, p in enumerate(parameters) if p.requires_grad]
        wanted = [parameters[i] for i in live]
        sums: list[Tensor | None] = [None] * len(wanted)
        adjoint: list[Tensor | None] = [gradient]
        for step in reversed(range(len(self.solver))):
            last = step == len(self.solver) - 1
            before, found = self._pull(adjoint, wanted, step, check_listed=last)
            if not finite(*(g for g in (*before, *found) if g is not None)):
                raise FloatingPointError(self._broken_gradient(adjoint, wanted, step))
            sums = [_added(total, g) for total, g in zip(sums, found, strict=True)]
            adjoint = before
            if self.watch is not None:
                norm = 0.0 if adjoint[0] is None else float(adjoint[0].norm())
                self.watch("backward", step, norm)
        if wanted and all(total is None for total in sums):
            raise ValueError(
                f"none of the {len(wanted)} parameters takes part in the trajectory; check that denoise "
                "uses these very tensors (a detached copy, or .data, has no gradient)"
            )
        results: list[Tensor | None] = [None] * len(parameters)
        for i, total in zip(live, sums, strict=True):
            results[i] = None if total is None else total.to(parameters[i].dtype)
        return (adjoint[0], *results)

    def _pull(
        self,
        adjoint: Sequence[Tensor | None],
        wanted: Sequence[Tensor],
        step: int,
        *,
        check_listed: bool = False,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Take one step again and differentiate it: the adjoint before it, and of `wanted`."""
        # Gates stay in force while layers are run again by the model's own gradient checkpointing.
        held = getattr(self.denoise, "held", nullcontext)
        with held():
            return self._pulled(adjoint, wanted, step, check_listed=check_listed)

    def _pulled(
        self,
        adjoint: Sequence[Tensor | None],
        wanted: Sequence[Tensor],
        step: int,
        *,
        check_listed: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        state, randomness = self.kept[step]
        leaves = [_leaf(t, self.device) for t in state.tensors]
        with randomness.replayed() as generator, torch.enable_grad(), _autocast(self.autocast):
            after = self._step(state, leaves, step, generator)
        # The last step's history leads nowhere: the loss sees the final latent alone.
        padded = [*adjoint, *[None] * (len(after.tensors) - len(adjoint))]
        pairs = [
            (t, g)
            for t, g in zip(after.tensors, padded, strict=True)
            if g is not None and t.requires_grad
        ]
        if check_listed:
            self._check_listed([t for t, _ in pairs], [*leaves, *wanted])
        inputs = [t for t in leaves if t.requires_grad]
        outputs, gradients = [t for t, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(outputs, [*inputs, *wanted], gradients, allow_unused=True)
        of_state = dict(zip(map(id, inputs), found[: len(inputs)], strict=True))
        return [of_state.get(id(t)) for t in leaves], list(found[len(inputs) :])

    def _step(
        self,
        state: State,
        tensors: Sequence[Tensor],
        step: int,
        generator: torch.Generator | None,
    ) -> State:
        latent = self.solver.restore(state, tensors)
        scaled = self.solver.scaled(latent, step)
        prediction = self.denoise(scaled, self.solver.timesteps[step])
        return self.solver.capture(self.solver.advance(prediction, latent, step, generator))

    def _stored(self, state: State, last: tuple[State, State] | None) -> State:
        """A state as it is kept; what the state before (and its kept form) holds too is kept once."""
        if not self.offload or self.device.type == "cpu":
            return state
        copies = {}
        if last is not None:
            copies = dict(zip(map(id, last[0].tensors), last[1].tensors, strict=True))
        kept = [copies[id(t)] if id(t) in copies else t.to("cpu") for t in state.tensors]
        return State(tuple(kept), state.frame)

    def _where(self, step: int) -> str:
        time = float(self.solver.timesteps[step])
        return f"step {step} of {len(self.solver)} (timestep {time:g}, {self.solver.name})"

    def _broken(self, before: State, step: int) -> str:
        latent = self.solver.restore(before)
        scaled, time = self.solver.scaled(latent, step), self.solver.timesteps[step]
        layer = broken_layer(self.model, lambda: self.denoise(scaled, time))
        return (
            f"NaN or Inf in the trajectory at {self._where(step)}, first {layer}; use another dtype, fewer "
            "steps, or less guidance"
        )

    def _check_listed(self, outputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        names = unlisted(outputs, given, self.model)
        if names:
            raise ValueError(
                f"{names[0]} requires grad inside denoise but is not among parameters, so its gradient would "
                f"be lost ({len(names)} such); list it, or call model.requires_grad_(False)"
            )

    def _broken_gradient(
        self, adjoint: Sequence[Tensor | None], wanted: Sequence[Tensor], step: int
    ) -> str:
        layer = broken_gradient(self.model, lambda: self._pull(adjoint, wanted, step))
        return (
            f"NaN or Inf in the gradient at {self._where(step)}, first {layer}; use float32, fewer "
            "steps, or less guidance"
        )


class _Randomness:
    """Where the random generators stood before a step."""

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        self.cpu = torch.get_rng_state()
        self.device = device if device.type == "cuda" else None
        self.cuda = torch.cuda.get_rng_state(device) if self.device is not None else None
        self.own = generator.get_state() if generator is not None else None
        self.own_device = generator.device if generator is not None else None

    @contextmanager
    def replayed(self) -> Iterator[torch.Generator | None]:
        """The generators as they stood; the global ones are put back afterwards."""
        devices = [self.device] if self.device is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                assert self.device is not None
                torch.cuda.set_rng_state(self.cuda, self.device)
            if self.own is None:
                yield None
                return
            assert self.own_device is not None
            generator = torch.Generator(self.own_device)
            generator.set_state(self.own)
            yield generator


def _leaf(kept: Tensor, device: torch.device) -> Tensor:
    return kept.to(device).detach().requires_grad_(kept.is_floating_point())


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A sum over steps in float32 at least: fifty terms in bfloat16 keep two digits."""
    if gradient is None:
        return total
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide if total is None else total + wide


def _autocast_of(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _autocast(state: tuple[str, bool, torch.dtype]) -> torch.autocast:
    device, enabled, dtype = state
    # Weights cast in the forward pass, without gradient, must not be taken from autocast's cache.
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
