"""The activations that run through the stages of a vision transformer, caught one stage at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Raised by a hook once it has what it came for."""


@dataclass
class Stream:
    """The activations entering one stage of the pruned model, for all calibration images.

    Attributes:
        others: what the stage gets after the activations: by position, by name.
    """

    module: nn.Module
    others: tuple[tuple[Any, ...], Mapping[str, Any]]
    inputs: list[Tensor]

    def run(self, batch: Tensor) -> Tensor:
        """Output of the stage."""
        out: Tensor = self.module(batch, *self.others[0], **self.others[1])
        return out

    def capture(self, linear: nn.Linear, batch: Tensor) -> Tensor:
        """Input of `linear` [B * T, I] when the stage runs on `batch`; T tokens an image, or of its windows."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].detach())
            raise _Stop

        handle = linear.register_forward_pre_hook(hook)
        try:
            with suppress(_Stop):
                self.run(batch)
        finally:
            handle.remove()
        return seen[0].flatten(0, -2)


def stage_calls(
    model: nn.Module, stages: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[tuple[tuple[Any, ...], Mapping[str, Any]]]]:
    """Inputs of the first stage for every batch, and what every stage gets beside them.

    Raises:
        ValueError: a stage's input is not the output of the stage before, or comes with other tensors.
    """
    others: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = [((), {}) for _ in stages]
    last: list[Tensor] = []
    handles = []
    for i, stage in enumerate(stages):

        def before(
            _: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any], i: int = i
        ) -> None:
            others[i] = args[1:], given
            tensors = any(isinstance(a, Tensor) for a in args[1:])
            if not args or tensors or (i and not (last and torch.equal(args[0], last[-1]))):
                raise ValueError(
                    f"stage {i} takes something else than the output of the stage before: repair needs a "
                    "plain column of blocks; prune with repair=False"
                )

        def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            last[:] = [out]

        handles.append(stage.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(stage.register_forward_hook(after))
    try:
        model(batches[0])
    finally:
        for handle in handles:
            handle.remove()
    inputs: list[Tensor] = []

    def first(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().clone())
        raise _Stop

    handle = stages[0].register_forward_pre_hook(first)
    try:
        for batch in batches:
            with suppress(_Stop):
                model(batch)
    finally:
        handle.remove()
    return inputs, others
