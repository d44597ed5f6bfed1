"""Routing: a routed model computes what it did, and none of its layers is slower than F.linear."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.profiles import entry_of, profile_of
from torch import Tensor, nn
from torch.nn import functional as F

import hwprune
from hwprune import route
from hwprune.device import DeviceProfile, Entry, ProfileError
from hwprune.families import timm_vit
from hwprune.layers import BlockSparseLinear, CompactLinear
from hwprune.ops import Op
from hwprune.predict import CostModel
from hwprune.route import Choice, profile_here, route_

HERE = {"type": "cpu", "name": "FAKE-CPU", "threads": 1}
KEY = "FAKE-CPU, 1 thread(s)"
M, N, K, BLOCK = 6, 48, 40, (16, 8)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "this_device", lambda device: KEY)


def sparse(
    keep: Tensor, bias: bool = True, dtype: torch.dtype = torch.float32
) -> BlockSparseLinear:
    return BlockSparseLinear.from_dense(nn.Linear(K, N, bias=bias).to(dtype), keep, BLOCK)


def grid(kind: str = "some") -> Tensor:
    """3 x 5 tiles: "some", "slim" with a row and two columns of none, "none", "all"."""
    keep = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    if kind == "slim":
        keep[1], keep[:, 1], keep[:, 3] = False, False, False
    return {"none": torch.zeros_like(keep), "all": torch.ones_like(keep)}.get(kind, keep)


def costs(
    dense: tuple[float, float, float],
    tiles: tuple[float, float, float] | None,
    compact: tuple[float, float, float] | None = None,
    kept: int = 10,
    slim: tuple[int, int] = (32, 24),
) -> CostModel:
    """A profile that says so, as (lower end, seconds, upper end); moving columns takes a nanosecond."""
    told: list[tuple[Op, tuple[float, float, float]]] = [(Op("linear", (M, N, K), "fp32"), dense)]
    if tiles is not None:
        told.append((Op.tiles((M, N, K), "fp32", BLOCK, kept), tiles))
    if compact is not None:
        told.append((Op("linear", (M, *slim), "fp32"), compact))
    told.append((Op("gelu", (M, N + K), "fp32"), (1e-9, 1e-9, 1e-9)))
    entries = tuple(entry_of(op, s, lo_s=lo, hi_s=hi) for op, (lo, s, hi) in told)
    return CostModel(DeviceProfile("fake", HERE, {}, {}, entries, {}, synthetic=True))


def routed(kind: str, *given: Any, **more: Any) -> tuple[Choice, nn.Module]:
    model = nn.Sequential(sparse(grid(kind)))
    (choice,) = route_(model, torch.randn(M, K), costs=costs(*given, **more))
    return choice, model[0]


FAST, SLOW = (0.9e-3, 1e-3, 1.1e-3), (1.8e-3, 2e-3, 2.2e-3)


# --- the rule ------------------------------------------------------------------------------------


def test_tiles_stay_where_they_are_surely_faster() -> None:
    choice, layer = routed("some", SLOW, FAST)
    assert choice.impl == "block_sparse" and isinstance(layer, BlockSparseLinear)
    assert choice.seconds == {"dense": 2e-3, "block_sparse": 1e-3} and choice.reason == "fake"


@pytest.mark.parametrize(
    "tiles", [SLOW, (0.9e-3, 1e-3, 1.9e-3), None], ids=["slow", "unsure", "unknown"]
)
def test_dense_it_is_where_tiles_are_slower_unsure_or_unknown(tiles: Any) -> None:
    choice, layer = routed("some", SLOW if tiles is not SLOW else FAST, tiles)
    assert choice.impl == "dense" and type(layer) is nn.Linear
    assert "nothing is surely faster" in choice.reason


def test_dense_it_is_where_the_dense_layer_itself_is_unknown() -> None:
    model = nn.Sequential(sparse(grid()))
    (choice,) = route_(model, torch.randn(M + 1, K), costs=costs(SLOW, FAST))
    assert choice.impl == "dense" and "says nothing about the dense layer" in choice.reason


def test_the_faster_of_two_sure_ones_is_taken() -> None:
    faster = (0.4e-3, 0.5e-3, 0.6e-3)
    choice, layer = routed("slim", SLOW, FAST, faster, kept=5)
    assert choice.impl == "compact" and isinstance(layer, CompactLinear)
    choice, layer = routed("slim", SLOW, faster, FAST, kept=5)
    assert choice.impl == "block_sparse"
    choice, layer = routed("slim", SLOW, None, FAST)  # tiles unknown, compact is not
    assert choice.impl == "compact"


def test_moving_columns_is_part_of_the_price() -> None:
    model = nn.Sequential(sparse(grid("slim")))
    cheap = costs(SLOW, None, FAST)
    dear = [e if e.op.kind != "gelu" else entry_of(e.op, 1e-3) for e in cheap.entries.values()]
    (choice,) = route_(
        model, torch.randn(M, K), costs=CostModel(DeviceProfile("f", HERE, {}, {}, tuple(dear), {}))
    )
    assert choice.impl == "dense"  # 2.1 ms with it


def test_a_routed_layer_is_never_slower_whatever_the_profile_says() -> None:
    """Random intervals that hold the truth: whatever is chosen, its true time is at most the dense one."""
    generator = random.Random(0)
    wins = 0
    for _ in range(300):
        truth = {i: generator.uniform(0.5e-3, 2e-3) for i in ("dense", "tiles", "compact")}
        ends = {
            i: (t * generator.uniform(0.6, 1), t, t * generator.uniform(1, 1.6))
            for i, t in truth.items()
        }
        choice, _ = routed("slim", ends["dense"], ends["tiles"], ends["compact"], kept=5)
        taken = {"block_sparse": "tiles"}.get(choice.impl, choice.impl)
        assert truth[taken] <= truth["dense"] + 2e-9
        wins += taken != "dense"
    assert 20 < wins < 250


def test_a_layer_of_no_tiles_is_its_bias() -> None:
    choice, layer = routed("none", SLOW, None)
    assert choice.impl == "compact" and isinstance(layer, CompactLinear)
    assert torch.equal(layer(torch.randn(2, 3, K)), layer.bias.expand(2, 3, N))


def test_without_a_profile_dense_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "list_devices", dict)
    model = nn.Sequential(sparse(grid()))
    (choice,) = route_(model, torch.randn(M, K))
    assert choice.impl == "dense" and "no profile of this device" in choice.reason


def test_a_type_nobody_measures_is_dense() -> None:
    model = nn.Sequential(sparse(grid(), dtype=torch.float64))
    x = torch.randn(M, K, dtype=torch.float64)
    before = model(x)
    (choice,) = route_(model, x, costs=costs(SLOW, FAST))
    assert choice.impl == "dense" and "float64" in choice.reason
    torch.testing.assert_close(model(x), before)


# --- measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "impl"),
    [
        ({"dense": 1.0, "block_sparse": 0.5}, "block_sparse"),
        ({"dense": 1.0, "block_sparse": 0.98}, "dense"),  # a tie
        ({"dense": 1.0, "block_sparse": 0.9, "compact": 0.8}, "compact"),
        ({"dense": 1.0, "block_sparse": 1.5, "compact": 2.0}, "dense"),
    ],
)
def test_a_measured_choice(
    seconds: dict[str, float], impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(candidates: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
        assert set(candidates) == {"dense", "block_sparse", "compact"}
        return seconds

    monkeypatch.setattr(route, "_timed", timed)
    model = nn.Sequential(sparse(grid("slim")))
    (choice,) = route_(model, torch.randn(M, K), measure=True)
    assert (choice.impl, choice.reason, choice.seconds) == (impl, "measured here", seconds)


def test_measuring_times_every_implementation_on_the_layers_own_input() -> None:
    model = nn.Sequential(sparse(grid("slim")))
    (choice,) = route_(model, torch.randn(M, K), measure=True)
    assert set(choice.seconds) == {"dense", "block_sparse", "compact"}
    assert min(choice.seconds.values()) > 0


# --- what stays ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of all densities, one that never runs, one called by keyword, one under two names."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.some, self.slim, self.none, self.all = (
            sparse(grid(kind), bias, dtype) for kind in ("some", "slim", "none", "all")
        )
        self.idle = sparse(grid(), bias, dtype)
        self.named = sparse(grid(), bias, dtype)
        self.alias = self.some
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = (
            self.some(x)
            + self.slim(x)
            + self.none(x)
            + self.named(x=x)
            + self.all(x)
            + self.alias(x)
        )
        return self.drop(first)


FATES: dict[str, Any] = {
    "all dense": {"dense": 1.0, "block_sparse": 2.0, "compact": 2.0},
    "all compact": {"dense": 1.0, "block_sparse": 2.0, "compact": 0.1},
    "all tiles": {"dense": 1.0, "block_sparse": 0.1, "compact": 2.0},
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_function_stays(
    fate: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        route, "_timed", lambda candidates, x: {i: FATES[fate][i] for i in candidates}
    )
    model = Net(bias, dtype).eval()
    x = torch.randn(2, 3, K, dtype=dtype)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    made = route_(model, x, measure=True)
    assert [c.layer for c in made] == ["some", "slim", "none", "all", "idle", "named"]
    out = model(x).detach()
    assert out.dtype == dtype
    limit = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert float((out.double() - exact).norm() / exact.norm()) < limit
    assert model.alias is model.some
    for choice in made[-2:]:
        assert choice.impl == "block_sparse" and "did not run" in choice.reason
    assert all(p.dtype == dtype for p in model.parameters())


def test_training_mode_and_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "_timed", lambda candidates, x: dict.fromkeys(candidates, 1.0))
    model = Net()
    model.slim.eval()
    model.all.requires_grad_(False)
    state = torch.get_rng_state()
    route_(model, torch.randn(M, K, generator=torch.Generator().manual_seed(0)), measure=True)
    assert torch.equal(torch.get_rng_state(), state)  # dropout did not run
    assert model.training and model.some.training and not model.slim.training
    assert model.some.weight.requires_grad and not model.all.weight.requires_grad
    assert not any(m._forward_pre_hooks for m in model.modules())
    model(torch.randn(M, K)).sum().backward()
    assert model.some.weight.grad is not None


def test_no_token_routes_nothing() -> None:
    model = nn.Sequential(sparse(grid()))
    for x in (torch.randn(0, K), torch.randn(2, 0, K)):
        (choice,) = route_(model, x, costs=costs(FAST, SLOW))
        assert choice.impl == "block_sparse" and isinstance(model[0], BlockSparseLinear)
    assert not vars(model).get("hwprune_routed")


def test_the_largest_of_a_layers_inputs_decides() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = sparse(grid())

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).sum() + self.fc(x[:1]).sum()

    (choice,) = route_(Twice(), torch.randn(M, K), costs=costs(SLOW, FAST))
    assert choice.seconds["dense"] == 2e-3  # of M tokens, not of one


def test_nothing_sparse_is_nothing_to_do_and_a_bare_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert route_(model, torch.randn(2, 3)) == []
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        route_(sparse(grid()), torch.randn(M, K))


def test_a_routed_model_is_not_saved(tmp_path: Path) -> None:
    model, x = timm_vit.example()
    hwprune.prune(model, [x], hwprune.Budget(macs=0.7), kinds=("block",), repair=False)
    hwprune.save(model, tmp_path / "before")
    before = model(x)
    empty = CostModel(profile_of({Op("gelu", (1, 1), "fp32"): 1.0}, device=HERE))
    made = route_(model, x, costs=empty)
    assert made and {choice.impl for choice in made} == {"dense"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="save before route_"):
        hwprune.save(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()


# --- whose profile -------------------------------------------------------------------------------


def test_another_devices_profile_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "this_device", lambda device: "OTHER")
    model = nn.Sequential(sparse(grid()))
    with pytest.raises(ProfileError, match="this is OTHER"):
        route_(model, torch.randn(M, K), costs=costs(SLOW, FAST))
    with pytest.warns(UserWarning, match="not on OTHER"):
        (choice,) = route_(model, torch.randn(M, K), costs=costs(SLOW, FAST), force=True)
    assert choice.impl == "dense"  # twice as fast there is not sure to be faster here


def test_the_profile_of_this_device_is_found_and_ones_own_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry: Entry = entry_of(Op("gelu", (4, 4), "fp32"), 1e-5)
    found = {
        "shipped": DeviceProfile("shipped", HERE, {}, {}, (entry,), {}),
        "own": DeviceProfile("own", HERE, {}, {}, (entry,), {}),
        "other": DeviceProfile("other", {"name": "H200"}, {}, {}, (entry,), {}),
    }
    for name, profile in found.items():
        profile.save(tmp_path / f"{name}.json")
    (tmp_path / "broken.json").write_text("{")
    names = ["shipped", "own", "other", "broken"]
    monkeypatch.setattr(
        route, "list_devices", lambda: {name: tmp_path / f"{name}.json" for name in names}
    )
    here = profile_here(torch.device("cpu"))
    assert here is not None and here.profile.name == "own"
    assert profile_here(torch.device("cpu"), "graph") is None  # measured eagerly only


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["some", "slim", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_compact_linear_is_the_linear_it_came_from(kind: str, bias: bool) -> None:
    tiles = sparse(grid(kind), bias)
    layer = CompactLinear.from_dense(tiles.to_dense(), tiles.bias)
    for shape in ((K,), (3, K), (2, 3, K), (0, K)):
        x = torch.randn(shape)
        expected = F.linear(x, tiles.to_dense(), tiles.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    other = CompactLinear(K, N, layer.rows, layer.cols, bias=bias)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
