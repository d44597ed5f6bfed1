"""A network's operations and time: read off a plan as off the realised model, and nothing left out silently."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from fakes.profiles import profile_of
from torch import Tensor, nn
from torch.nn import functional as F

from hwprune.cost import Structure, count_macs, dense_structure
from hwprune.families import timm_vit
from hwprune.layers import ConstantBranch
from hwprune.network import NetworkModel, costs_of
from hwprune.operations import (
    UncountedModules,
    count_operations,
    layer_operations,
    operations,
    plan_operations,
)
from hwprune.ops import Op
from hwprune.predict import CostModel, UnknownOp
from hwprune.realise import realise_
from hwprune.units import AttentionLayer, Mask, Units

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hwprune[timm]")

BATCH, BLOCK = 3, (16, 32)


def vit(**given: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, num_classes=10, **given).eval()


def eva(**given: Any) -> nn.Module:
    """Rotary embeddings, SwiGLU, q/k/v apart."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.models.Eva(**sizes, num_classes=10, use_rot_pos_emb=True, **given).eval()


MODELS = {
    "vit": vit,
    "qk-norm": lambda: vit(qk_norm=True),
    "no bias": lambda: vit(qkv_bias=False),
    "packed SwiGLU": lambda: vit(mlp_layer=timm.layers.SwiGLUPacked),
    "GEGLU": lambda: vit(mlp_layer=timm.layers.GluMlp, act_layer=nn.GELU),
    "eva": lambda: eva(swiglu_mlp=True, qkv_fused=False),
    "eva, rope in timm's own": lambda: eva(attn_type="rope"),
    "eva with norms": lambda: eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
}
KINDS = ("head", "qk", "vo", "neuron")


def images(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def some_mask(units: list[Units], seed: int, empty: bool = False) -> Mask:
    """Each unit kept with 60 %, the first always; `empty`: the first of each kind lose all their units."""
    generator, mask, seen = torch.Generator().manual_seed(seed), {}, set()
    for unit in units:
        keep = torch.rand(unit.shape, generator=generator) < 0.6
        keep.view(-1)[0], keep.view(-1)[-1] = True, False
        if empty and unit.kind in ("head", "neuron", "vo", "block") and unit.kind not in seen:
            keep = torch.zeros_like(keep)
        seen.add(unit.kind)
        mask[unit.name] = keep
    return mask


def structures(units: list[Units], mask: Mask, block: tuple[int, int]) -> dict[str, Structure]:
    """What a mask leaves of each layer, told without realising it."""
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        kept, grid = int(mask[unit.name].sum()), mask[unit.name]
        if bool(grid.all()):
            continue
        told = found.setdefault(unit.layer.name, {})
        if unit.kind == "block":
            name = unit.slices[0].param.removesuffix(".weight")
            told.setdefault("weights", {})[name] = kept * block[0] * block[1]
            told.setdefault("tiles", {})[name] = block
        else:
            told[{"head": "heads", "qk": "qk", "vo": "v", "neuron": "neurons"}[unit.kind]] = kept
    layers = {unit.layer.name: unit.layer for unit in units}
    return {
        name: Structure(**told)
        if "weights" in told
        else Structure(**{**vars(dense_structure(layers[name])), **told})
        for name, told in found.items()
    }


POSSIBLE = {
    "qk-norm": ("head", "vo", "neuron", "all", "block"),
    "eva": ("neuron", "all", "block"),
    "eva, rope in timm's own": ("head", "vo", "neuron", "all", "block"),
    "eva with norms": ("block",),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(m, k) for m in MODELS for k in POSSIBLE.get(m, (*KINDS, "all", "block"))],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_plan_has_the_operations_of_the_model_it_becomes(
    name: str, kind: str, empty: bool
) -> None:
    model = MODELS[name]()
    units = timm_vit.find_units(model, None if kind == "all" else (kind,), block=BLOCK)
    mask = some_mask(units, seed=len(name), empty=empty)
    layers, _ = timm_vit.find_layers(model)
    planned = plan_operations(model, layers, structures(units, mask, BLOCK), images())
    realised = copy.deepcopy(model)
    realise_(realised, units, mask)
    assert sorted(planned) == sorted(operations(realised, images()))
    assert sorted(planned) != sorted(operations(model, images()))


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_all_the_products_of_a_model(name: str) -> None:
    """Against torch's FLOP counter."""
    model = MODELS[name]()
    counted = count_operations(model, images())
    products = sum(op.macs for op in counted.ops if op.kind in ("linear", "attention"))
    assert not counted.left_out
    assert products == pytest.approx(BATCH * count_macs(model, images()), rel=1e-9)
    assert counted.parts[0] == ("patch_embed.proj", Op("linear", (BATCH * 16, 48, 192), "fp32"))


def test_a_gated_activation_is_no_gelu() -> None:
    ops = operations(MODELS["eva"](), images())
    assert {op.kind for op in ops} == {"linear", "attention", "silu", "layer_norm"}
    assert "silu" not in {op.kind for op in operations(vit(), images())}


def test_an_activation_that_no_profile_measures_is_left_to_the_residual() -> None:
    assert {op.kind for op in operations(vit(act_layer=nn.ReLU), images())} == {
        "linear",
        "attention",
        "layer_norm",
    }


class Biased(nn.Module):
    """Attention of a class of its own, with a bias table; the names timm has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 16
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_an_attention_of_another_class_is_named_not_costed_wrong() -> None:
    model = vit()
    model.blocks[1].attn = Biased()
    with pytest.raises(UncountedModules, match=r"1 module.*blocks\.1\.attn \(Biased, \d"):
        operations(model, images())
    told = count_operations(model, images(), partly=True).left_out
    assert told["blocks.1.attn"] == BATCH * 3 * 17 * 17 * 32


def test_attention_that_is_not_fused_is_named() -> None:
    model = vit()
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(UncountedModules, match=r"blocks\.0\.attn"):
        operations(model, images())
    layer = timm_vit.find_layers(model)[0][0]
    with pytest.raises(UncountedModules, match=r"blocks\.0\.attn"):
        layer_operations(model, layer, dense_structure(layer), images=1, tokens=17, dtype="fp32")


def test_convolutions_whose_windows_overlap_are_named() -> None:
    with pytest.raises(UncountedModules, match=r"2 module.*0 \(Conv2d, 7\d\.\d%\)"):
        operations(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3)), images())
    for odd in ({"padding": 1}, {"dilation": 2}, {"groups": 3}):
        with pytest.raises(UncountedModules, match="Conv2d"):
            operations(nn.Conv2d(3, 6, 2, stride=2, **odd), images())


def test_products_outside_any_known_module_are_named() -> None:
    class Bare(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ self.fc.weight

    with pytest.raises(UncountedModules, match=r"the model itself \(Root, 50\.0%\)"):
        operations(Root(), torch.randn(2, 4))
    assert operations(nn.Sequential(Bare(4, 4)), torch.randn(2, 4)) == [
        Op("linear", (2, 4, 4), "fp32")
    ]


def test_counting_leaves_the_model_as_it_was() -> None:
    model = vit().train()
    model.blocks[0].eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    operations(model, images())
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_type_no_profile_measures_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected bf16, fp16, fp32, got torch\.float64"):
        operations(vit().double(), images().double())


def test_the_batch_and_the_type_are_those_of_the_input() -> None:
    ops = operations(vit().bfloat16(), images(2).bfloat16())
    assert {op.dtype for op in ops} == {"bf16"}
    assert Op("linear", (34, 144, 48), "bf16") in ops
    assert Op("attention", (2, 3, 17, 16, 16), "bf16") in ops


def test_a_plan_of_layers_the_model_lacks_is_refused() -> None:
    model = vit()
    layers, _ = timm_vit.find_layers(model)
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp"):
        plan_operations(model, layers, {"blocks.9.mlp": Structure(neurons=3)}, images())


def test_stored_weights_must_be_whole_tiles() -> None:
    model = vit()
    mlp = timm_vit.find_layers(model)[0][1]
    keep = Structure(weights={"blocks.0.mlp.fc1": 100}, tiles={"blocks.0.mlp.fc1": BLOCK})
    with pytest.raises(ValueError, match=r"whole tiles of \(16, 32\), got 100"):
        layer_operations(model, mlp, keep, images=1, tokens=17, dtype="fp32")
    keep = Structure(weights={"blocks.0.mlp.fc1": 100})
    with pytest.raises(ValueError, match="block of its tiles"):
        layer_operations(model, mlp, keep, images=1, tokens=17, dtype="fp32")


def test_a_linear_the_plan_does_not_cut_stays_dense() -> None:
    """fc2 is 48 x 192, which (64, 64) tiles do not divide: its grid is larger than itself."""
    model = vit()
    mlp = timm_vit.find_layers(model)[0][1]
    name = "blocks.0.mlp.fc1"
    keep = Structure(weights={name: 2 * 64 * 64}, tiles={name: (64, 64)})
    ops = layer_operations(model, mlp, keep, images=1, tokens=17, dtype="fp32")
    assert Op("linear", (17, 48, 192), "fp32") in ops
    assert Op.tiles((17, 192, 48), "fp32", (64, 64), 2) in ops


def test_an_emptied_layer_costs_nothing() -> None:
    model = vit()
    for layer in timm_vit.find_layers(model)[0][:2]:
        keep = (
            Structure(heads=0, qk=16, v=16)
            if isinstance(layer, AttentionLayer)
            else Structure(neurons=0)
        )
        assert layer_operations(model, layer, keep, images=1, tokens=17, dtype="fp32") == []
    model.blocks[0].attn = ConstantBranch(48)
    kinds = [op.kind for op in operations(model, images())]
    assert kinds.count("attention") == 1


# --- times ---------------------------------------------------------------------------------------


def seconds(op: Op) -> float:
    """Of a machine with 1e9 products a second and 10 us a launch."""
    return 1e-5 + op.macs / 1e9


def costs(ops: list[Op], power_w: float | None = None) -> CostModel:
    return CostModel(profile_of({op: seconds(op) for op in ops}, power_w=power_w))


def moved(ops: list[Op]) -> float:
    """By hand: in and out of each operation; an addition (two in, one out) comes with each norm."""
    size = {"fp32": 4}
    bytes_ = 0.0
    for op in ops:
        if op.kind == "linear":
            m, n, k = op.shape
            values = m * (n + k)
        elif op.kind == "attention":
            b, h, t, d, e = op.shape
            values = b * t * h * (2 * d + e + e)
        else:
            values = op.shape[0] * op.shape[1] * (5 if op.kind == "layer_norm" else 2)
        bytes_ += size[op.dtype] * values
    return bytes_


def test_one_network_gives_the_residual_by_the_bytes_it_moves() -> None:
    ops = operations(vit(), images())
    model = NetworkModel.fitted(costs(ops), [(ops, sum(map(seconds, ops)) + 0.5e-3)])
    assert (model.scale, model.spread_rel) == (1.0, 0.0)
    assert model.s_per_byte == pytest.approx(0.5e-3 / moved(ops))
    for some in (ops, ops[:5]):
        found = model.predict(some)
        assert found.latency_s == pytest.approx(
            sum(map(seconds, some)) + 0.5e-3 * moved(some) / moved(ops)
        )
        assert found.lo_s <= found.latency_s <= found.hi_s
        assert found.energy_j is None


def test_networks_quicker_than_their_parts_do_not_make_others_negative() -> None:
    ops = operations(vit(), images())
    model = NetworkModel.fitted(costs(ops), [(ops, 0.5 * sum(map(seconds, ops)))])
    assert (model.s_per_byte, model.scale) == (0.0, pytest.approx(0.5))
    assert model.predict(ops[:1]).latency_s == pytest.approx(0.5 * seconds(ops[0]))


def test_three_networks_give_scale_residual_and_spread() -> None:
    ops = operations(vit(), images())
    parts = [ops[: n * len(ops) // 3] for n in (1, 2, 3)]
    seen = [(o, 1.2 * sum(map(seconds, o)) + 1e-9 * moved(o)) for o in parts]
    model = NetworkModel.fitted(costs(ops), seen)
    assert (model.scale, model.s_per_byte) == (pytest.approx(1.2), pytest.approx(1e-9))
    assert model.spread_rel == pytest.approx(0, abs=1e-9)
    off = [(seen[0][0], seen[0][1] * 1.1), *seen[1:]]
    assert 0.005 < NetworkModel.fitted(costs(ops), off).spread_rel < 0.1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_fit_is_negative(count: int) -> None:
    ops, generator = operations(vit(), images()), random.Random(count)
    for _ in range(20):
        seen = [
            (
                part := ops[: generator.randint(3, len(ops))],
                generator.uniform(0.1, 3) * sum(map(seconds, part)),
            )
            for _ in range(count)
        ]
        model = NetworkModel.fitted(costs(ops), seen)
        assert model.scale >= 0 and model.s_per_byte >= 0
        found = model.predict(ops[:2])
        assert 0 <= found.lo_s <= found.latency_s <= found.hi_s and found.latency_s > 0


def test_energy_of_a_network_is_power_times_its_time() -> None:
    ops = operations(vit(), images())
    model = NetworkModel.fitted(costs(ops, power_w=200.0), [(ops, sum(map(seconds, ops)) + 0.5e-3)])
    found = model.predict(ops)
    assert found.energy_j == pytest.approx(200 * found.latency_s)
    assert found.energy_lo_j <= found.energy_j <= found.energy_hi_j


@pytest.mark.parametrize("seen", [[], [([], 1.0)], [([Op("gelu", (8, 8), "fp32")], 0.0)]])
def test_a_residual_needs_measured_networks(seen: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected at least one measured network"):
        NetworkModel.fitted(costs(operations(vit(), images())), seen)


def test_an_operation_the_profile_does_not_know_raises() -> None:
    ops = operations(vit(), images())
    with pytest.raises(UnknownOp, match="block_sparse"):
        costs_of(costs(ops), [*ops, Op.tiles((51, 144, 48), "fp32", (16, 16), 4)])


def test_a_network_of_nothing_costs_nothing() -> None:
    ops = operations(vit(), images())
    model = NetworkModel.fitted(costs(ops, power_w=100.0), [(ops, 2 * sum(map(seconds, ops)))])
    assert model.predict([]).latency_s == 0 and model.predict([]).energy_j is None
