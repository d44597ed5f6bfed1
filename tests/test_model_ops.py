"""A profile for one model measures what that model comes to have, and little else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hwprune.digits import digits_model
from hwprune.model_ops import model_ops
from hwprune.operations import count_operations
from hwprune.profile_ops import profile_ops
from hwprune.realise import realise_

pytest.importorskip("timm")

from hwprune.families import timm_vit


def cut(kept: dict[str, int]) -> Any:
    """The digits model with the first units of each kind kept."""
    model = digits_model(pretrained=False)
    units = timm_vit.find_units(model, list(kept))
    realise_(model, units, {u.name: torch.arange(u.count) < kept[u.kind] for u in units})
    return model


@pytest.mark.parametrize(
    "kept", [{"neuron": 256}, {"head": 2, "neuron": 384}, {"qk": 16, "vo": 16, "neuron": 320}]
)
def test_what_a_cut_model_runs_is_measured_verbatim(kept: dict[str, int]) -> None:
    x = torch.zeros(4, 1, 16, 16)
    measured = set(model_ops(digits_model(pretrained=False), x))
    # The oracle: the operations of a model that was really cut so.
    ran = set(count_operations(cut(kept), x, partly=True).ops)
    assert ran <= measured, ran - measured


def test_it_is_a_small_part_of_a_whole_profile() -> None:
    found = model_ops(digits_model(pretrained=False), torch.zeros(8, 1, 16, 16))
    assert len(found) == len(set(found)) < len(profile_ops([8], ["fp32"])) / 4
    dense = count_operations(digits_model(pretrained=False), torch.zeros(8, 1, 16, 16), partly=True)
    assert found[: len(set(dense.ops))] == list(dict.fromkeys(dense.ops))  # the dense ones first


def test_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear"):
        model_ops(torch.nn.Linear(2, 2), torch.zeros(1, 2))
