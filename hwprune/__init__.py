"""Prune vision transformers and diffusion models to a latency, energy, size or FLOP budget.

The public names; importing them brings torch and nothing heavier. Everything else may change.
"""

from hwprune.allocate import Budget as Budget
from hwprune.allocate import UnreachableBudget as UnreachableBudget
from hwprune.checkpoint import CheckpointError as CheckpointError
from hwprune.checkpoint import load as load
from hwprune.checkpoint import save as save
from hwprune.integrations.lazy import install as _install
from hwprune.layers import BlockSparseLinear as BlockSparseLinear
from hwprune.layers import ConstantBranch as ConstantBranch
from hwprune.layers import SlimAttention as SlimAttention
from hwprune.pruning import Analysis as Analysis
from hwprune.pruning import analyse as analyse
from hwprune.pruning import prune as prune
from hwprune.report import Report as Report

__version__ = "0.1.0"

_install()  # when timm is imported, now or later, it learns to open pruned folders
