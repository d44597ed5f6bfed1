"""Model families, one file each: what can be removed from a model and what must leave together.

A file that has `takes` is a family of vision transformers and is found by `of`; denoisers are found by
`hwprune.families.denoiser`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwprune.units import Layer, Units


class Family(Protocol):
    """What a file of this folder offers to be found by `of`.

    Attributes:
        TAKES: the models it is for, in words.
    """

    TAKES: str

    def takes(self, model: nn.Module) -> bool:
        """Whether the model is of this family; says nothing yet of what can be cut."""

    def examples(self) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
        """Tiny random models, each with an input, for tests: name -> what builds them."""

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """Modules that run one after the other, each on the output of the one before, in order.

        Every layer is inside one of them.
        """

    def find_layers(self, model: nn.Module) -> tuple[list[Layer], list[str]]:
        """All attention and MLP layers in order, and the reasons for those left dense.

        Raises:
            ValueError: the model has no such layers, or one of them is not dense any more.
        """

    def find_units(
        self,
        model: nn.Module,
        kinds: Sequence[str] | None = None,
        *,
        block: tuple[int, int] = (32, 32),
    ) -> list[Units]:
        """Everything of `kinds` that can be removed; see `hwprune.families.vision_units`."""


def every() -> Iterator[tuple[str, Family]]:
    """(file name, family) of every family of vision transformers."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "takes"):
            yield found.name, cast(Family, module)


def of(model: nn.Module) -> Family:
    """The family of a vision transformer.

    Raises:
        ValueError: it is of none; says which there are.
    """
    known = []
    for _, family in every():
        if family.takes(model):
            return family
        known.append(family.TAKES)
    raise ValueError(
        f"{type(model).__name__} is of no family of vision transformers that hwprune can cut; expected one "
        f"of {'; '.join(known)}"
    )
