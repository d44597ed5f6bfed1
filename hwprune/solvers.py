"""A diffusers scheduler as a pure function: (latent, history, step) in, (latent, history) out.

Schedulers keep hidden state: a step index, past model outputs, the corrected sample of a predictor-
corrector. Multistep solvers (DPM++ 2M, UniPC) differentiate through that history, so restoring the latent
and the step index alone gives wrong gradients (52 % off in a two-step toy). Here everything a step changes
is found by comparing attributes, not by knowing the class; what cannot be put back is refused by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, np.generic)
_GIVEN = ("model_output", "timestep", "sample")


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the history: its index in `State.tensors`."""

    index: int


@dataclass(frozen=True, eq=False)
class State:
    """All that decides the rest of a trajectory, without the noise still to be drawn.

    Attributes:
        tensors: the latent first, then each tensor of the solver's history once.
        frame: attribute name -> its value with `_Slot`s for tensors, for attributes a step has changed.
    """

    tensors: tuple[Tensor, ...]
    frame: Mapping[str, Any]


class Solver:
    """A private copy of a scheduler whose steps can be taken again from any captured state.

    Args:
        scheduler: any diffusers scheduler after `set_timesteps`; it is copied, never changed.
        eta: noise of DDIM or TCD, 0 = deterministic; None = the scheduler's own default.

    Raises:
        ValueError: timesteps are not set; the step asks for more than a prediction, a timestep and a
            sample; or taking a step again does not give the same, bit for bit, with a gradient.
    """

    def __init__(self, scheduler: Any, *, eta: float | None = None) -> None:
        """Copy the scheduler and try its steps on eight numbers."""
        self.name = type(scheduler).__name__
        self._arguments = _step_arguments(scheduler, self.name, eta)
        steps = getattr(scheduler, "num_inference_steps", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or (steps is None and len(timesteps) >= _train_steps(scheduler)):
            raise ValueError(
                f"{self.name}: expected a scheduler whose timesteps are set; call "
                "scheduler.set_timesteps(STEPS) first"
            )
        self._scheduler = copy.deepcopy(scheduler)
        self._start = {key: _shallow(value) for key, value in vars(self._scheduler).items()}
        for key, value in self._start.items():
            if key != "_internal_dict":  # the config, which no step changes
                _check_value(value, f"{self.name}.{key}")
        self.timesteps: Tensor = self._scheduler.timesteps
        # Runge-Kutta steps (PNDM's) sum into their history in place: those get copies of it.
        self._copies = False
        if self._refused() is not None:
            self._copies = True
            reason = self._refused()
            if reason is not None:
                raise ValueError(reason)

    def __len__(self) -> int:
        """Number of steps: evaluations of the model."""
        return len(self.timesteps)

    @property
    def start_scale(self) -> float:
        """Standard deviation of the first latent (1 for most, the first sigma for Euler)."""
        return float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def begin(self, latent: Tensor) -> State:
        """The state before the first step."""
        return State((latent,), {})

    def restore(self, state: State, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """Put a state into the scheduler.

        Args:
            state: from `begin` or `capture`.
            tensors: in place of `state.tensors`, e.g. leaves that record gradients.

        Returns:
            The latent.
        """
        given = tuple(tensors) if tensors is not None else state.tensors
        if self._copies:
            given = tuple(t.clone() for t in given)
        attributes = vars(self._scheduler)
        for key in set(attributes) - set(self._start):
            del attributes[key]
        for key, value in self._start.items():
            attributes[key] = _shallow(value)
        for key, value in state.frame.items():
            attributes[key] = _filled(value, given)
        return given[0]

    def capture(self, latent: Tensor) -> State:
        """The state after a step that gave `latent`.

        Raises:
            ValueError: the scheduler keeps something that cannot be put back, named.
        """
        tensors = [latent]
        slots = {id(latent): 0}
        frame = {}
        for key, value in vars(self._scheduler).items():
            if key not in self._start or not _same(value, self._start[key]):
                _check_value(value, f"{self.name}.{key}")
                frame[key] = _emptied(value, tensors, slots)
        return State(tuple(tensors), frame)

    def scaled(self, latent: Tensor, step: int) -> Tensor:
        """The model's input at a step: `scale_model_input`, where the scheduler has one."""
        scale = getattr(self._scheduler, "scale_model_input", None)
        if scale is None:
            return latent
        scaled: Tensor = scale(latent, self.timesteps[step])
        return scaled.to(latent.dtype)

    def advance(
        self,
        prediction: Tensor,
        latent: Tensor,
        step: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One solver step, from the state the scheduler is in.

        Args:
            prediction: the model's output after guidance, shape of the latent.
            latent: before the step.
            step: index into `timesteps`.
            generator: source of the noise, for solvers that draw some.

        Returns:
            The next latent, in the latent's dtype.
        """
        chosen = dict(self._arguments)
        if "generator" in chosen:
            chosen["generator"] = generator
        after = self._scheduler.step(prediction, self.timesteps[step], latent, **chosen)
        following: Tensor = after[0]
        return following.to(latent.dtype)

    def _refused(self) -> str | None:
        """Take every step twice on a small latent, the second time with a gradient; what differs."""
        draw = torch.Generator(self.timesteps.device).manual_seed(0)
        state = self.begin(_noise(draw) * self.start_scale)
        for step in range(len(self)):
            prediction = _noise(draw)
            versions = [t._version for t in state.tensors]
            try:
                with torch.no_grad():
                    first = self._tried(state, state.tensors, prediction, step)
                leaves = [_leaf(t) for t in (*state.tensors, prediction)]
                with torch.enable_grad():
                    again = self._tried(state, leaves[:-1], leaves[-1], step)
            except Exception as error:  # whatever a step makes of a restored state
                said = " ".join(str(error).split())[:200]
                return f"{self._sentence(step)} ({type(error).__name__}: {said})"
            if [t._version for t in state.tensors] != versions:
                return f"{self._sentence(step)} (it changes its history in place)"
            same = len(first.tensors) == len(again.tensors) and all(
                torch.equal(a, b.detach())
                for a, b in zip(first.tensors, again.tensors, strict=True)
            )
            if not same:
                return f"{self._sentence(step)} (a second time it gives another latent)"
            if not again.tensors[0].requires_grad:
                return f"{self._sentence(step)} (its result has no gradient)"
            state = first
        return None

    def _tried(
        self, state: State, tensors: Sequence[Tensor], prediction: Tensor, step: int
    ) -> State:
        latent = self.restore(state, tensors)
        self.scaled(latent, step)
        noise = torch.Generator(self.timesteps.device).manual_seed(step)
        return self.capture(self.advance(prediction, latent, step, noise))

    def _sentence(self, step: int) -> str:
        return (
            f"{self.name}: step {step} of {len(self)} cannot be replayed under gradient; use another "
            "scheduler of the same model, e.g. DDIM, Euler, flow-match Euler, DPM++ 2M or UniPC"
        )


def _noise(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 4, 1, 1, generator=generator, device=generator.device)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _train_steps(scheduler: Any) -> int:
    return int(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))


def _step_arguments(scheduler: Any, name: str, eta: float | None) -> dict[str, Any]:
    """What to pass to `step` besides prediction, timestep and sample."""
    step = getattr(scheduler, "step", None)
    if step is None:
        raise ValueError(f"{name}: expected a diffusers scheduler with a step method")
    known = inspect.signature(step).parameters
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if tuple(needed) != _GIVEN:
        raise ValueError(
            f"{name}: its step takes ({', '.join(needed)}), expected ({', '.join(_GIVEN)}); use a "
            "scheduler of images or latents, e.g. DDIM, Euler or DPM++ 2M"
        )
    chosen: dict[str, Any] = {}
    if eta is not None:
        if "eta" not in known:
            raise ValueError(f"{name}: its step takes no eta; leave eta out or use DDIM")
        chosen["eta"] = eta
    if "generator" in known:
        chosen["generator"] = None
    return {**chosen, "return_dict": False} if "return_dict" in known else chosen


def _check_value(value: Any, where: str) -> None:
    """Refuse what a shallow copy does not preserve."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_value(item, where)
    elif isinstance(value, dict):
        for item in value.values():
            _check_value(item, where)
    elif value is not None and not isinstance(
        value, (*_PLAIN, Tensor, np.ndarray, FunctionType, range)
    ):
        raise ValueError(
            f"{where} is a {type(value).__name__}, whose state cannot be captured, so the scheduler's step "
            "cannot be replayed; use one without it, e.g. DDIM, Euler, DPM++ 2M or UniPC"
        )


def _shallow(value: Any) -> Any:
    """A copy of the containers; tensors stay the same objects."""
    if type(value) is list:
        return [_shallow(item) for item in value]
    if type(value) is dict:
        return {key: _shallow(item) for key, item in value.items()}
    return value


def _same(value: Any, before: Any) -> bool:
    """Whether an attribute is as it was: the same object, or equal plain values."""
    if type(value) is not type(before):
        return False
    if isinstance(value, list | tuple):
        return len(value) == len(before) and all(map(_same, value, before))
    if type(value) is dict:
        return value.keys() == before.keys() and all(_same(v, before[k]) for k, v in value.items())
    if isinstance(value, _PLAIN):
        return bool(value == before)
    return value is before


def _emptied(value: Any, tensors: list[Tensor], slots: dict[int, int]) -> Any:
    """Replace tensors by slots; each distinct tensor is noted once."""
    if isinstance(value, Tensor):
        if id(value) not in slots:
            slots[id(value)] = len(tensors)
            tensors.append(value)
        return _Slot(slots[id(value)])
    if isinstance(value, list | tuple):
        items = [_emptied(item, tensors, slots) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _emptied(item, tensors, slots) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The transpose of `_emptied`; containers are new, so that a step may change them."""
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, list | tuple):
        items = [_filled(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value
