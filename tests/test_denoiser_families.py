"""Every family of denoisers: masked equals realised, costs are exact, what cannot be cut is named."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoiser_cost import denoiser_cost, module_macs
from hwprune.families.denoiser import family_of, find_layers, find_units
from hwprune.realise import masked, realise_, reshape_
from hwprune.units import CoupledLayer, Mask, ResidualBlock, Units, full_mask

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).resolve().parent.parent / "hwprune" / "families"
TINY: dict[str, Callable[[], Any]] = {}
for path in sorted(FOLDER.glob("*.py")):
    if "\ndef tiny(" in path.read_text():
        module = importlib.import_module(f"hwprune.families.{path.stem}")
        for function, make in inspect.getmembers(module, inspect.isfunction):
            if function.startswith("tiny"):
                TINY[f"{path.stem}.{function}"] = make
each_model = pytest.mark.parametrize("which", TINY)
each_kinds = pytest.mark.parametrize(
    "kinds", [["head"], ["neuron"], ["depth"], ["head", "neuron", "depth"]], ids=",".join
)


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return value


def opened(which: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A tiny model in float64 whose every weight matters, and how to call it or a copy."""
    model, latent, inputs = TINY[which]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero: a lost one would not be seen
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    latent, inputs, time = latent.double(), doubled(inputs), torch.tensor([0.3, 0.7])

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(latent, timestep=time, **inputs, return_dict=False)[0]
        return out

    return model.double(), call


def some(units: list[Units], share: float = 0.6) -> Mask:
    """A random mask that removes something of everything, and keeps about `share`."""
    draw, mask = torch.Generator().manual_seed(3), {}
    for i, unit in enumerate(units):
        grid = torch.rand(unit.shape, generator=draw) < share
        if share:
            grid[-1] = i % 2 > 0
        mask[unit.name] = grid
    return mask


@each_model
@each_kinds
@pytest.mark.parametrize("share", [0.6, 0.0])
def test_masked_equals_realised_and_costs_are_exact(
    which: str, kinds: list[str], share: float
) -> None:
    model, call = opened(which)
    units = find_units(model, kinds)
    mask = some(units, share)
    cost = denoiser_cost(model, find_layers(model)[0], lambda: call(model), 2)
    before = copy.deepcopy(model.state_dict())
    dense = call(model)
    with masked(model, units, mask):
        zeroed = call(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    realise_(model, units, mask)
    assert float((zeroed - dense).abs().max()) > 1e-4
    assert float((call(model) - zeroed).abs().max()) < 1e-12
    macs, params = cost.of(mask)
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == pytest.approx(module_macs(model, lambda: call(model), 2)[""], rel=1e-12)


@each_model
def test_a_reshaped_model_takes_the_pruned_weights_on_the_meta_device_too(which: str) -> None:
    model, call = opened(which)
    config = dict(model.config)
    units = find_units(model, ["head", "neuron", "depth"])
    shape = realise_(model, units, some(units))
    fresh = type(model).from_config(config)
    with torch.device("meta"):
        empty = type(model).from_config(config)
    for other in (fresh, empty):
        reshape_(other, find_layers(other)[0], shape)
        found = {k: v.shape for k, v in other.state_dict().items()}
        assert found == {k: v.shape for k, v in model.state_dict().items()}
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(call(fresh.double().eval()), call(model))


@each_model
def test_sizes_that_modules_note_are_kept_in_step(which: str) -> None:
    model, _ = opened(which)
    units = find_units(model)
    realise_(model, units, some(units))
    for name, module in model.named_modules():
        if hasattr(module, "to_q") and hasattr(module, "heads"):
            width = module.to_q.out_features
            assert module.inner_dim == width, name
            assert width % module.heads == 0 and module.to_q.weight.shape[0] == width
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
        if hasattr(module, "mlp_hidden_dim"):
            assert module.mlp_hidden_dim == module.proj_mlp.out_features
            packed = [module.attn.to_q.out_features, module.mlp_hidden_dim]
            assert sum(packed) == module.proj_out.in_features
            assert getattr(module.proj_out, "_tp_packed_row_blocks", packed) == packed


@each_model
def test_a_realised_model_runs_under_gradient_and_under_its_own_checkpointing(which: str) -> None:
    model, latent, inputs = TINY[which]()
    units = find_units(model)
    realise_(model, units, some(units))
    model.enable_gradient_checkpointing()
    latent.requires_grad_()
    model(latent, timestep=torch.tensor([0.3, 0.7]), **inputs, return_dict=False)[
        0
    ].sum().backward()
    assert latent.grad is not None and float(latent.grad.norm()) > 0


@each_model
def test_no_entry_of_a_parameter_belongs_to_two_units_of_one_layer(which: str) -> None:
    model, _ = opened(which)
    for unit in find_units(model, ["head", "neuron", "depth"]):
        for part in unit.slices:
            assert part.index is not None
            flat = part.index.flatten().tolist()
            assert len(flat) == len(set(flat)), unit.name


def test_every_class_has_a_tiny_model() -> None:
    made = {type(make()[0]).__name__ for make in TINY.values()}
    assert made == {name for which in TINY for name in family_of(TINY[which]()[0]).CLASSES}


def test_a_head_of_flux_is_one_unit_over_both_streams() -> None:
    model = TINY["mmdit.tiny"]()[0]
    unit = next(u for u in find_units(model, ["head"]))
    own = {p.param: p.index[1].tolist() for p in unit.slices if p.index is not None}
    weights = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    for name in (*weights, "to_out.0", "to_add_out"):
        assert own[f"transformer_blocks.0.attn.{name}.weight"] == list(range(8, 16))
    assert "transformer_blocks.0.attn.to_out.0.bias" not in own


def test_neurons_of_a_single_block_read_the_columns_behind_the_heads() -> None:
    model = TINY["mmdit.tiny"]()[0]
    units = {u.name: u for u in find_units(model)}
    part = units["single_transformer_blocks.0.proj_mlp:neuron"].slices[-1]
    assert (part.param, part.dim) == ("single_transformer_blocks.0.proj_out.weight", 1)
    assert part.index is not None and part.index[5].tolist() == [24 + 5]


def test_a_neuron_of_a_gated_mlp_is_a_hidden_and_gate_pair() -> None:
    model = TINY["unet.tiny"]()[0]
    unit = next(u for u in find_units(model, ["neuron"]))
    own = {p.param: p.index[2].tolist() for p in unit.slices if p.index is not None}
    name = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net"
    assert own[f"{name}.0.proj.weight"] == own[f"{name}.0.proj.bias"] == [2, 2 + unit.count]
    assert own[f"{name}.2.weight"] == [2]


def test_the_first_block_of_a_dit_stays_and_the_reason_is_told() -> None:
    model = TINY["dit.tiny"]()[0]
    layers, left = find_layers(model)
    blocks = [layer.name for layer in layers if isinstance(layer, ResidualBlock)]
    assert blocks == ["transformer_blocks.1", "transformer_blocks.2"]
    assert left == [
        "transformer_blocks.0: it holds the embedding the output layer uses, so it stays"
    ]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("WanTransformer3DModel", {"ffn_dim": 8, "text_dim": 8}),
        ("LTXVideoTransformer3DModel", {"cross_attention_dim": 24, "caption_channels": 8}),
    ],
)
def test_norms_across_heads_are_refused_by_name(name: str, config: dict[str, int]) -> None:
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    model = getattr(diffusers, name)(**sizes, **config)
    with pytest.raises(ValueError, match=f"{name} cannot be pruned exactly: its q/k norm"):
        find_units(model)


def test_models_of_another_make_are_refused_with_what_is_known() -> None:
    with pytest.raises(
        ValueError, match="Linear is no denoiser hwprune can cut; expected one of UNet"
    ):
        find_units(nn.Linear(2, 2))


def test_a_norm_over_all_heads_inside_a_known_model_leaves_the_layer_dense() -> None:
    model, _, _ = TINY["sana.tiny"]()
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    other = type(model)(**{**config, "qk_norm": "rms_norm_across_heads"})
    layers, left = find_layers(other)
    heads = [x for x in layers if isinstance(x, CoupledLayer) and x.kind == "head"]
    assert not heads and len(left) == 4
    assert "attn1: norm_q normalises over all heads at once" in left[0]
    with pytest.raises(
        ValueError, match=r"no layer of SanaTransformer2DModel has units .* all heads"
    ):
        find_units(other, ["head"])


def test_processors_and_fused_projections_that_are_not_known_leave_heads_dense() -> None:
    model = TINY["unet.tiny"]()[0]
    attn = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")

    class Mine:
        def __call__(self) -> None: ...

    attn.processor = Mine()
    _, left = find_layers(model)
    assert left == [
        f"{attn_name(model, attn)}: the attention processor Mine is not known to be cut exactly"
    ]
    flux = TINY["mmdit.tiny"]()[0]
    flux.fuse_qkv_projections()
    assert "call unfuse_qkv_projections() first" in find_layers(flux)[1][0]


def attn_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


@pytest.mark.parametrize("kinds", [["qk"], []])
def test_kinds_that_do_not_exist_are_refused(kinds: list[str]) -> None:
    with pytest.raises(
        ValueError, match="expected some of head, neuron, depth, modulation for a diffusion model"
    ):
        find_units(TINY["dit.tiny"]()[0], kinds)


def test_a_mask_that_keeps_everything_and_a_pruned_model_are_refused() -> None:
    model, _ = opened("dit.tiny")
    units = find_units(model)
    with pytest.raises(ValueError, match="keeps everything"):
        realise_(model, units, full_mask(units))

    class Wrapped(nn.Linear):
        """As LoRA and quantisers leave a linear."""

    model.transformer_blocks[1].attn1.to_q = Wrapped(24, 24)
    with pytest.raises(
        ValueError, match=r"attn1\.to_q: expected nn\.Linear .* got Wrapped; prune the"
    ):
        find_units(model)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"nothing": {"type": "units", "kept": 1}}, "nothing: the file's shape"),
        ({"transformer_blocks.1.ff": {"type": "units", "kept": 96}}, "expected kept of 0 to 95"),
        ({"transformer_blocks.1.ff": {"type": "units", "kept": True}}, "got True"),
        ({"transformer_blocks.1.ff": {"type": "removed"}}, "fits no layer of this model"),
        ({"transformer_blocks.0": {"type": "removed"}}, "fits no layer of this model"),
        (
            {
                "transformer_blocks.1.ff": {"type": "units", "kept": 1},
                "transformer_blocks.1": {"type": "removed"},
            },
            "cuts a layer of a block it removes",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(shape: dict[str, Any], words: str) -> None:
    model = TINY["dit.tiny"]()[0]
    with pytest.raises(ValueError, match=words):
        reshape_(model, find_layers(model)[0], shape)


def test_a_layer_that_takes_no_part_has_no_cost() -> None:
    model = TINY["dit.tiny"]()[0]
    with pytest.raises(ValueError, match=r"attn1\.to_q took no part when the model was called"):
        denoiser_cost(model, find_layers(model)[0], lambda: None, 1)
