"""Arms: what is measured side by side. Each is checked before it is timed, so a broken fast one never is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.meter.inputs import Inputs, tensors_in
from hwprune.meter.modes import (
    Mode,
    Runnable,
    lengthened,
    limits_that_fail,
    make_runnable,
)
from hwprune.meter.timing import Timer, calls_per_block, warm_up

# Of the output's norm: two ways to sum up the same products. 1e-3 is what TF32 and 12 layers leave.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}

_SEED = 0  # of checked calls: a model that draws noise then gives the same output twice


class ArmError(ValueError):
    """Why an arm is not measured."""


@dataclass(eq=False)
class Arm:
    """One thing to measure.

    Attributes:
        name: as the caller calls it.
        forward: a module, or a function of the inputs.
        equivalent_to: the arm whose output it must have, within `TOLERANCE`.
        error: why it is not, or no longer, measured; "" while it is.
        flags: what a reader of its figures must know.
        runnable: made ready for the mode.
        call_s: seconds a call of the runnable.
        calls: in a block.
    """

    name: str
    forward: Callable[..., Any]
    equivalent_to: str | None = None
    error: str = ""
    flags: list[str] = field(default_factory=list)
    runnable: Runnable | None = None
    call_s: float = 0.0
    calls: int = 0

    @property
    def module(self) -> nn.Module | None:
        """The forward, where it is a module."""
        return self.forward if isinstance(self.forward, nn.Module) else None

    @property
    def call(self) -> Callable[[], Any]:
        """Runs it; only of an arm that was made ready."""
        assert self.runnable is not None
        return self.runnable.call

    def once(self, inputs: Inputs) -> Any:
        """One eager forward."""
        return self.forward(*inputs.args, **inputs.kwargs)

    def seeded(self) -> Any:
        """One call of the runnable, with the random numbers every checked call has."""
        torch.manual_seed(_SEED)
        return self.call()

    def fail(self, error: BaseException) -> None:
        """Leave it out from now on, with the reason."""
        self.error = describe(error)
        self.runnable = None


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    said = next((line for line in lines if line), "")[:300]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory; use a smaller batch"
    return said if isinstance(error, ArmError) else f"{type(error).__name__}: {said}".rstrip(": ")


def device_of(forward: object, inputs: Sequence[Tensor]) -> torch.device:
    """Where an arm runs: with its weights, or, where it has none, with its inputs.

    Raises:
        ValueError: weights on several devices, on the meta device, or elsewhere than the inputs.
    """
    tensors = [*forward.parameters(), *forward.buffers()] if isinstance(forward, nn.Module) else []
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the model lies on {names}; expected one device: move it with model.to(...)"
        )
    device = devices.pop() if devices else inputs[0].device
    if device.type == "meta":
        raise ValueError("the model is on the meta device and has no weights; load it first")
    for tensor in inputs:
        if tensor.ndim and tensor.device != device:
            raise ValueError(
                f"an input of shape {tuple(tensor.shape)} is on {tensor.device}, the model on {device}; "
                f'move it with inputs.to("{device}")'
            )
    return device


def check_outputs(arms: Sequence[Arm], inputs: Inputs) -> dict[str, list[Tensor]]:
    """Run every arm once, eagerly, and refuse those whose output is none.

    Finite, of the shapes of the first arm that has an output, and equal to the arm it is declared
    `equivalent_to`. Arms that fail get their reason.

    Returns:
        Arm -> its output tensors.
    """
    outputs: dict[str, list[Tensor]] = {}
    shapes: tuple[str, list[tuple[int, ...]]] | None = None
    for arm in arms:
        try:
            torch.manual_seed(_SEED)
            with inputs.guarded() as written:
                found = [t.detach().clone() for t in _checked(arm.once(inputs), arm)]
            if written:
                raise ArmError(
                    "it writes to its inputs, so every call would see other ones; measure a function that "
                    "copies them first"
                )
            now = [tuple(t.shape) for t in found]
            shapes = shapes or (arm.name, now)
            if now != shapes[1]:
                raise ArmError(
                    f"its output has the shapes {now}, that of {shapes[0]} has {shapes[1]}; they do not do the "
                    "same work"
                )
            outputs[arm.name] = found
        except (
            Exception
        ) as error:  # whatever a model raises: the other arms are measured all the same
            arm.fail(error)
    for arm in arms:
        if arm.error or arm.equivalent_to is None:
            continue
        other = outputs.get(arm.equivalent_to)
        try:
            if other is None:
                raise ArmError(f"{arm.equivalent_to}, whose output it shall have, has none")
            _compare(outputs[arm.name], other, f"from that of {arm.equivalent_to}")
        except ArmError as error:
            arm.fail(error)
    return outputs


def _checked(output: object, arm: Arm) -> list[Tensor]:
    """The tensors of an output, which must be there and finite."""
    tensors = tensors_in(output)
    if not tensors:
        raise ArmError(f"expected tensors as output, got {type(output).__name__}")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            share = 1 - float(tensor.isfinite().double().mean())
            raise ArmError(
                f"{100 * share:.3g} % of its output is NaN or Inf; a broken model is not timed"
            )
        if tensor.requires_grad and "grad_enabled" not in arm.flags:
            arm.flags.append("grad_enabled")
    return tensors


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for a, b in zip(found, expected, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise ArmError(f"its output differs {what}")
            continue
        size = float(b.double().norm())
        error = float((a.double() - b.double()).norm()) / max(size, 1e-30)
        allowed = TOLERANCE.get(a.dtype, 1e-1)
        if not math.isfinite(error) or error > allowed:
            raise ArmError(
                f"its output differs {what} by {error:.2e} of its norm (allowed {allowed:.0e}); a wrong "
                "result is not timed"
            )


def make_ready(
    arm: Arm,
    inputs: Inputs,
    expected: Sequence[Tensor],
    mode: Mode,
    timer: Timer,
    compilations: Callable[[], int],
    seconds_per_arm: float,
) -> None:
    """Prepare an arm for its mode, see that it computes, warm it up, choose its block; or note why not.

    Args:
        arm: checked by `check_outputs`.
        inputs: the same for all.
        expected: its eager output.
        mode: checked.
        timer: of the device.
        compilations: counts what was compiled.
        seconds_per_arm: the time there is.
    """
    try:
        with limits_that_fail(mode):
            arm.runnable = make_runnable(arm.forward, inputs, mode, timer.device)
            _compare(_checked(arm.seeded(), arm), expected, f"in mode {mode} from the eager one")
            _refuse_cached(arm, inputs)
            arm.call_s, flags = warm_up(timer, arm.call, compilations)
            cold = timer.flush is not None
            longer = lengthened(
                arm.runnable, arm.call_s, mode, lambda: arm.once(inputs), timer.device, cold=cold
            )
            if longer is not arm.runnable:
                arm.runnable = longer
                arm.call_s, flags = warm_up(timer, arm.call, compilations)
            arm.flags += flags
        arm.calls = calls_per_block(arm.call_s, timer.device, seconds_per_arm)
    except Exception as error:  # of compilers, graphs, kernels: as above
        arm.fail(error)


def _refuse_cached(arm: Arm, inputs: Inputs) -> None:
    """Refuse an arm that hands out what it has computed before.

    Its output must follow its inputs; and where two calls give the same memory, as graphs and static buffers
    do, so must a call on other inputs: one that then gives other memory keeps a result for each input.

    Raises:
        ArmError: it does not compute.
    """
    first = _checked(arm.seeded(), arm)
    kept = [t.detach().clone() for t in first]
    again = _checked(arm.seeded(), arm)
    with inputs.varied() as changed:
        try:
            other = tensors_in(arm.seeded()) if changed else []
        except Exception:  # these values are ours: that it cannot take them is no fault of the arm
            other = []
        if not other:
            arm.flags.append("inputs_not_varied")
            return
        if all(torch.equal(a, b) for a, b in zip(other, kept, strict=True)):
            raise ArmError(
                "its output is the same for other inputs: it is cached or constant, and timing it would time a "
                "memory read"
            )
        if _places(first) == _places(again) != _places(other):
            raise ArmError(
                "it hands out the same tensor for the same input: it keeps its results, and timing it would "
                "time a memory read"
            )


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def still_the_same(arm: Arm, expected: Sequence[Tensor]) -> None:
    """Flag an arm whose output is no longer that of before the timing."""
    try:
        _compare(_checked(arm.seeded(), arm), expected, "from that before the timing")
    except ArmError:
        arm.flags.append("output_changed")


def unique_modules(arms: Sequence[Arm]) -> list[nn.Module]:
    """The modules of the arms, each once."""
    return list({id(arm.module): arm.module for arm in arms if arm.module is not None}.values())
