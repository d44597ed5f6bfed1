"""`hwprune.measure`: a model alone or against others, from inputs to figures.

All arms are built and checked first, warmed up, and then timed in interleaved rounds with the model twice
among them (the A/A arm); energy follows in rounds of its own. What was measured is left as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hwprune.meter.arms import (
    Arm,
    check_outputs,
    device_of,
    make_ready,
    still_the_same,
    unique_modules,
)
from hwprune.meter.clock import Clock, RealClock
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.figures import arm_figures, cpu_seconds
from hwprune.meter.inputs import Inputs, prepare_inputs
from hwprune.meter.measurement import AGAIN, Measurement
from hwprune.meter.memory import Memory, peak_memory
from hwprune.meter.modes import CompileWatch, Mode, check_mode
from hwprune.meter.open import open_source
from hwprune.meter.provenance import load_average, provenance
from hwprune.meter.rounds import Limits
from hwprune.meter.schedule import EnergyOf, Progress, Rounds, energy_rounds, latency_rounds
from hwprune.meter.source import EnergySource
from hwprune.meter.timing import L2, Timer, make_timer, noise_rel
from hwprune.meter.untouched import untouched
from hwprune.meter.validity import RoundWatch
from hwprune.meter.window import energy_of

MODEL = "model"  # the arm measure() is about
LATENCY_HALF_WIDTH, ENERGY_HALF_WIDTH = 0.01, 0.02


@dataclass(frozen=True)
class Bench:
    """What measures: a test's own, or the machine's.

    Attributes:
        timer: of the device.
        clock: for time limits and steps.
        source: sensor of the energy, or why there is none.
        energy_of: measures one window.
        noise_rel: the machine's own noise, now.
    """

    timer: Timer
    clock: Clock
    source: EnergySource | Unavailable
    energy_of: EnergyOf
    noise_rel: Callable[[], float]


def measure(
    model: Callable[..., Any],
    inputs: object,
    *,
    against: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    energy: bool = True,
    mode: Mode = "eager",
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    rounds: int | None = None,
    l2: L2 = "hot",
    equivalent: Mapping[str, str] | None = None,
    allow_constant: bool = False,
    seconds_per_arm: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """Latency, memory, power and energy of a model, alone or against others, with 95 % intervals.

    Args:
        model: an `nn.Module`, or a function of the inputs. It is run in eval mode without gradients, and
            left as it was.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's device. All
            arms get the same; they should be real data, since values change power and speed.
        against: a model, called "dense", or several by name.
        energy: measure it where there is a sensor; else it is `Unavailable` with the reason.
        mode: "eager", "compile" (torch.compile) or "graph" (CUDA graph).
        dtype: measure copies of the models in this type; None = as they are.
        batch: images a call; None = the first size of the first input tensor.
        rounds: most rounds, 2 or more; None = 8 to 32, as many as the intervals need.
        l2: "cold" flushes the last-level cache before each call, outside its time.
        equivalent: arm -> arm whose output it must have; one that differs is not timed.
        allow_constant: measure inputs of one value only, flagged.
        seconds_per_arm: after which no further round starts; for latency and for energy each.
        seed: of the order of the arms and of the bootstrap.
        progress: called with (step, done, total).

    Returns:
        Measurement. An arm that cannot be run has `Unavailable` figures and its error; the others are
        measured.

    Raises:
        ValueError: inputs, names, mode, rounds or devices that make no sense, before anything is run.

    Example:
        >>> import torch
        >>> import hwprune
        >>> found = hwprune.measure(torch.nn.Linear(64, 64), torch.randn(8, 64), rounds=2, energy=False)
        >>> found.latency_s.value > 0
        True
    """
    forwards = _forwards(model, against)
    equal = dict(equivalent or {})
    for name in {*equal, *equal.values()} - set(forwards):
        raise ValueError(f"equivalent: no arm {name!r}; expected of {', '.join(forwards)}")
    limits = _limits(rounds, seconds_per_arm, len(forwards))
    prepared = prepare_inputs(inputs, batch=batch, dtype=dtype, allow_constant=allow_constant)
    device = device_of(model, prepared.tensors())
    check_mode(mode, device)
    for name, forward in forwards.items():
        other = device_of(forward, prepared.tensors())
        if other != device:
            raise ValueError(f"{name} is on {other}, the model on {device}; move it there")
    timer = make_timer(device, l2)
    if dtype is not None:
        forwards = {
            name: in_type(forward, dtype) if isinstance(forward, nn.Module) else forward
            for name, forward in forwards.items()
        }
    arms = [Arm(name, forward, equal.get(name)) for name, forward in forwards.items()]
    clock = RealClock()
    source = open_source(device)

    def window(
        sensor: EnergySource | Unavailable, run: Callable[[], Any], drain: Callable[[], None]
    ) -> Any:
        return energy_of(sensor, run, drain=drain, clock=clock)

    hot = make_timer(device)
    bench = Bench(timer, clock, source, window, lambda: noise_rel(hot))
    settings = {
        "batch": prepared.batch,
        "mode": mode,
        "l2": l2,
        "dtype": _dtype_name(arms[0].module, prepared),
        "device": str(device),
        "seed": seed,
        "energy": energy,
        "inputs": prepared.digest,
        "flush_bytes": timer.flush.bytes if timer.flush is not None else None,
    }
    try:
        return compare(
            arms,
            prepared,
            bench,
            limits,
            mode=mode,
            energy=energy,
            settings=settings,
            progress=progress,
        )
    finally:
        if not isinstance(source, Unavailable):
            source.close()


def _forwards(
    model: Callable[..., Any],
    against: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None,
) -> dict[str, Callable[..., Any]]:
    others: dict[str, Callable[..., Any]] = {}
    if isinstance(against, Mapping):
        others = dict(against)
    elif against is not None:
        others = {"dense": against}
    reserved = {MODEL, AGAIN} & set(others)
    if reserved:
        raise ValueError(f"against: the name {reserved.pop()!r} is taken; choose another")
    found = {MODEL: model, **others}
    for name, forward in found.items():
        if not callable(forward):
            raise ValueError(
                f"{name}: expected a model or a function, got {type(forward).__name__}; open a name or a "
                "folder with hwprune.load or timm.create_model first"
            )
    return found


def _limits(rounds: int | None, seconds_per_arm: float, arms: int) -> Limits:
    """Rounds enough that the test over all comparisons can say something at all."""
    least, most = Limits.least, Limits.most
    # The smallest p of n signed ranks is 2^(1-n), and Holm multiplies it by the comparisons.
    least = max(least, math.ceil(1 + math.log2(max(1, arms - 1) / 0.05)))
    if rounds is not None:
        least, most = min(least, rounds), rounds
    return Limits(least, max(least, most), LATENCY_HALF_WIDTH, seconds_per_arm)


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type; the model itself where it has that type already."""
    types = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    return module if types <= {dtype} else copy.deepcopy(module).to(dtype)


def _dtype_name(module: nn.Module | None, inputs: Inputs) -> str:
    tensors = [*(module.parameters() if module is not None else ()), *inputs.tensors()]
    floating = next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)
    return str(floating).removeprefix("torch.")


def compare(
    arms: Sequence[Arm],
    inputs: Inputs,
    bench: Bench,
    limits: Limits,
    *,
    mode: Mode,
    energy: bool,
    settings: Mapping[str, Any],
    progress: Progress | None = None,
) -> Measurement:
    """Check, warm up, time and meter arms; the first is the reference of all ratios.

    Args:
        arms: nothing of them is run yet.
        inputs: of all.
        bench: what measures.
        limits: of the latency rounds; energy has the same with twice the half-width.
        mode: checked.
        energy: whether to meter it.
        settings: noted in the result; "seed" is used.
        progress: called with (step, done, total).
    """
    first, device, seed = arms[0].name, bench.timer.device, int(settings["seed"])
    seconds: dict[str, float] = {}
    facts = provenance(device, bench.source)
    compiled = CompileWatch()
    memory: dict[str, Memory | Unavailable] = {}

    @contextmanager
    def timed(step: str) -> Any:
        start = bench.clock.now_ns()
        yield
        seconds[step] = (bench.clock.now_ns() - start) / 1e9

    def tell(step: str, done: int, total: int) -> None:
        if progress is not None:
            progress(step, done, total)

    for arm in arms:
        if arm.module is not None and arm.module.training:
            arm.flags.append("was_training")
    modules = unique_modules(arms)
    with untouched(modules, device) as written, compiled.watching():
        with timed("check"):
            tell("check outputs", 0, 1)
            outputs = check_outputs(arms, inputs)
            tell("check outputs", 1, 1)
        with timed("warm up"):
            for done, arm in enumerate(arms):
                tell("warm up", done, len(arms))
                if not arm.error:
                    make_ready(
                        arm,
                        inputs,
                        outputs[arm.name],
                        mode,
                        bench.timer,
                        compiled.count,
                        limits.seconds_per_arm,
                    )
            tell("warm up", len(arms), len(arms))
        noise = [bench.noise_rel()]
        running = timed_arms = [*(arm for arm in arms if not arm.error), *_again(arms[0])]
        watch = RoundWatch(bench.clock, compiled.count, bench.source)
        with timed("latency"):
            latency = latency_rounds(
                running,
                bench.timer,
                limits,
                reference=first,
                seed=seed,
                watch=watch,
                clock=bench.clock,
                progress=progress,
            )
        noise.append(bench.noise_rel())
        running = [arm for arm in running if not arm.error]
        joules = Rounds(unavailable="it was not asked for")
        if energy:
            with timed("energy"):
                joules = energy_rounds(
                    running,
                    bench.source,
                    bench.energy_of,
                    replace(limits, half_width_rel=ENERGY_HALF_WIDTH),
                    images=inputs.batch,
                    device=device,
                    reference=first,
                    seed=seed,
                    clock=bench.clock,
                    progress=progress,
                )
        with timed("memory"):
            for arm in arms:
                if not arm.error:
                    still_the_same(arm, outputs[arm.name])
                    memory[arm.name] = _memory(arm, inputs, mode, device)
    for arm in arms:
        if arm.module is not None and id(arm.module) in written:
            arm.flags.append("writes_its_weights")
    figures = {
        arm.name: arm_figures(arm, latency, joules, memory.get(arm.name), inputs, seed)
        for arm in arms
    }
    no_energy = joules.unavailable or joules.ledger.invalid
    found = Measurement(
        arms=figures,
        rounds_s={name: latency.ledger.values(name) for name in latency.ledger.figures},
        rounds_cpu_s={arm.name: cpu_seconds(arm, latency) for arm in timed_arms if not arm.error},
        rounds_j={}
        if no_energy
        else {name: joules.ledger.values(name) for name in joules.ledger.figures},
        latency_limit=limits.half_width_rel,
        energy_limit=ENERGY_HALF_WIDTH,
        noise_rel=(noise[0], noise[1]),
        discarded=tuple(
            (step, index, reason)
            for step, rounds in (("latency", latency), ("energy", joules))
            for index, reason in rounds.ledger.discarded
        ),
        invalid=latency.ledger.invalid,
        settings=settings,
        provenance=facts | {"load_average_after": load_average()},
        warnings=(),
        seconds=seconds,
        energy_reason=no_energy,
    )
    return replace(found, warnings=tuple(_warnings(found, latency, joules, inputs, bench)))


def _again(arm: Arm) -> list[Arm]:
    """The A/A arm: the same work under another name."""
    if arm.error:
        return []
    return [replace(arm, name=AGAIN, flags=[])]


def _memory(arm: Arm, inputs: Inputs, mode: Mode, device: torch.device) -> Memory | Unavailable:
    """Of one forward: a graph's lies in a pool of its own, so the eager one is looked at."""
    assert arm.runnable is not None
    eager = mode != "compile" or arm.runnable.per_call > 1
    call: Callable[[], object] = (lambda: arm.once(inputs)) if eager else arm.call
    tensors: list[Tensor] = inputs.tensors()
    try:
        return peak_memory(call, arm.module, tensors, device)
    except Exception as error:  # a figure less is no reason to lose the others
        return Unavailable(f"{type(error).__name__}: {str(error)[:200]}")


def _warnings(
    found: Measurement, latency: Rounds, joules: Rounds, inputs: Inputs, bench: Bench
) -> list[str]:
    said = []
    if found.invalid:
        said.append(f"nothing here counts: {found.invalid}")
    aa = found.aa.latency
    if isinstance(aa, Estimate) and not aa.contains(1.0):
        said.append(
            f"the model differs from itself (A/A {aa.value:.4f}, [{aa.lo:.4f}, {aa.hi:.4f}]): differences of "
            "that size between arms mean nothing; quieten the machine and measure again"
        )
    for what, rounds, limit in (
        ("latency", latency, found.latency_limit),
        ("energy", joules, found.energy_limit),
    ):
        if rounds.ledger.kept and not rounds.tight:
            said.append(
                f"after {rounds.ledger.kept} rounds not every {what} ratio is known to ±{100 * limit:g} %; "
                "give more rounds or time, or a quieter machine"
            )
    if "constant_inputs" in inputs.flags:
        said.append("the inputs hold one value only; real data is slower and hotter")
    flush = bench.timer.flush
    if flush is not None and flush.source == "assumed":
        said.append(
            f"the size of the last-level cache is not told; {flush.bytes} bytes are flushed"
        )
    return said
