"""Prune vision transformers and diffusion models to a latency, energy, size or FLOP budget.

The public names, each imported when it is first used, so that `import hwprune` and `hwprune --help` are
quick and bring not even torch. Everything else may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hwprune.integrations.lazy import install as _install

if TYPE_CHECKING:
    from hwprune.analysis import Analysis as Analysis
    from hwprune.analysis import analyse as analyse
    from hwprune.budget import Budget as Budget
    from hwprune.budget import UnreachableBudget as UnreachableBudget
    from hwprune.checkpoint import load as load
    from hwprune.checkpoint import save as save
    from hwprune.diffusion import prune_diffusion as prune_diffusion
    from hwprune.diffusion_report import DiffusionReport as DiffusionReport
    from hwprune.hub import push_to_hub as push_to_hub
    from hwprune.layers import BlockSparseLinear as BlockSparseLinear
    from hwprune.layers import ConstantBranch as ConstantBranch
    from hwprune.layers import SlimAttention as SlimAttention
    from hwprune.meter.compare import measure as measure
    from hwprune.meter.energy import MeasuredEnergy as MeasuredEnergy
    from hwprune.meter.energy import measure_energy as measure_energy
    from hwprune.meter.measurement import Measurement as Measurement
    from hwprune.pruning import prune as prune
    from hwprune.report import Report as Report
    from hwprune.route import route_ as route_
    from hwprune.spec import CheckpointError as CheckpointError
    from hwprune.sweeping import sweep as sweep

__version__ = "0.1.0"

_HOMES = {
    "Analysis": "analysis",
    "BlockSparseLinear": "layers",
    "Budget": "budget",
    "CheckpointError": "spec",
    "ConstantBranch": "layers",
    "DiffusionReport": "diffusion_report",
    "MeasuredEnergy": "meter.energy",
    "Measurement": "meter.measurement",
    "Report": "report",
    "SlimAttention": "layers",
    "UnreachableBudget": "budget",
    "analyse": "analysis",
    "load": "checkpoint",
    "measure": "meter.compare",
    "measure_energy": "meter.energy",
    "prune": "pruning",
    "prune_diffusion": "diffusion",
    "push_to_hub": "hub",
    "route_": "route",
    "save": "checkpoint",
    "sweep": "sweeping",
}


def __getattr__(name: str) -> object:
    """A public name, from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hwprune' has no attribute {name!r}")
    found: object = getattr(import_module(f"hwprune.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What is there, imported or not."""
    return sorted({*globals(), *_HOMES})


_install()  # when timm is imported, now or later, it learns to open pruned folders
