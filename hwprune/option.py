"""One way to leave a layer: its structure, what it loses, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwprune.cost import Structure


@dataclass(frozen=True)
class Option:
    """One way to leave a layer (or one linear of it, under blocks).

    Attributes:
        structure: what is left.
        keep: units name -> kept count.
        distortion: in the unit of the curves.
        macs: true multiply-accumulates of one image.
        params: parameters.
        latency_s, energy_j: of a batch, where a pricer was given.
        weight_bytes: of the weights, where memory was priced.
        peak_bytes: alive at the worst moment of the layer, where memory was priced.
    """

    structure: Structure
    keep: Mapping[str, int]
    distortion: float
    macs: float
    params: float
    latency_s: float = 0.0
    energy_j: float = 0.0
    weight_bytes: float = 0.0
    peak_bytes: float = 0.0


def dense_option(options: Sequence[Option]) -> Option:
    """The option that keeps everything as it is: no tiles, and the dearest of those that lose nothing."""
    lossless = (o for o in options if o.distortion <= 0)
    return max(lossless, key=lambda o: (not o.structure.tiles, o.macs, o.params))


def pareto(options: Sequence[Option], limited: Sequence[str] = ("macs", "params")) -> list[Option]:
    """Drop options that another beats on distortion and on all that is limited; dense stays.

    A unit that does nothing (a dead neuron) leaves the dense option beaten, but a budget that allows
    the dense model must be able to choose it.

    Args:
        options: of one layer.
        limited: the fields of an option that a budget limits.
    """
    dense = dense_option(options)
    costs = np.array([[getattr(o, name) for name in limited] for o in options])
    losses = np.array([o.distortion for o in options])
    order = np.lexsort((losses, *costs.T[::-1]))
    kept: list[int] = []
    for i in order:
        among = np.array(kept, dtype=np.int64)
        beaten = (losses[among] <= losses[i]) & (costs[among] <= costs[i]).all(1)
        if options[i] is dense or not beaten.any():
            kept.append(int(i))
    return [options[i] for i in kept]
