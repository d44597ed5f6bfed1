"""SDXL's UNet and FLUX.1 at their real sizes, structure only (meta device); and one with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwprune.denoiser_cost import denoiser_cost, module_macs
from hwprune.factored import blank_factors_, modulation_linears, most_components
from hwprune.families.denoiser import find_layers, find_units
from hwprune.realise import masked, realise_
from hwprune.units import Mask, Units

diffusers = pytest.importorskip("diffusers")


def sdxl() -> nn.Module:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def call_sdxl(model: nn.Module) -> None:
    with torch.device("meta"):
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 77, 2048)
        latent = torch.empty(1, 4, 128, 128)
        model(
            latent,
            timestep=torch.empty(1),
            encoder_hidden_states=text,
            added_cond_kwargs=added,
        )


def flux() -> nn.Module:
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def call_flux(model: nn.Module) -> None:
    with torch.device("meta"):
        model(
            torch.empty(1, 4096, 64),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            encoder_hidden_states=torch.empty(1, 512, 4096),
            pooled_projections=torch.empty(1, 768),
            txt_ids=torch.empty(512, 3),
            img_ids=torch.empty(4096, 3),
        )


def removal(units: list[Units], share: float) -> Mask:
    draw = torch.Generator().manual_seed(0)
    return {u.name: torch.rand(u.shape, generator=draw) < share for u in units}


@pytest.mark.parametrize(
    ("make", "call", "heads", "neurons", "blocks", "params"),
    [
        (sdxl, call_sdxl, 2600, 332_800, 70, 2_567_463_684),
        (flux, call_flux, 1368, 933_888, 57, 11_901_408_320),
    ],
)
def test_units_and_every_plans_cost_are_exact_at_full_size(
    make: Any, call: Any, heads: int, neurons: int, blocks: int, params: int
) -> None:
    model = make()
    units = find_units(model, ["head", "neuron", "depth"])
    total = {
        kind: sum(u.count for u in units if u.kind == kind) for kind in ("head", "neuron", "depth")
    }
    assert total == {"head": heads, "neuron": neurons, "depth": blocks}
    cost = denoiser_cost(model, find_layers(model)[0], lambda: call(model), 1)
    assert cost.params == params
    mask = removal(units, 0.7)
    predicted = cost.of(mask)
    realise_(model, units, mask)
    assert predicted[1] == sum(p.numel() for p in model.parameters())
    assert predicted[0] == pytest.approx(module_macs(model, lambda: call(model), 1)[""], rel=1e-12)


def test_modulation_is_a_quarter_of_flux_and_factors_of_every_rank_cost_what_they_hold() -> None:
    model = flux()
    names = modulation_linears(model)
    held = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    total = sum(p.numel() for p in model.parameters())
    assert len(names) == 2 * 19 + 38 + 1
    assert held / total == pytest.approx(0.273, abs=5e-4)
    for name in names:
        linear: Any = model.get_submodule(name)
        blank_factors_(model, name, most_components(linear))
    before = sum(p.numel() for p in model.parameters())
    assert 0.997 * total < before <= total
    units = find_units(model, ["modulation"])
    assert sum(u.count for u in units) == sum(
        (o * 3072) // (o + 3073) for o in [18432] * 38 + [9216] * 38 + [6144]
    )
    cost = denoiser_cost(model, find_layers(model)[0], lambda: call_flux(model), 1)
    mask = removal(units, 0.1)
    predicted = cost.of(mask)
    realise_(model, units, mask)
    assert predicted[1] == sum(p.numel() for p in model.parameters()) < 0.77 * total
    assert predicted[0] == pytest.approx(
        module_macs(model, lambda: call_flux(model), 1)[""], rel=1e-12
    )
    assert predicted[0] > 0.9998 * cost.macs  # parameters, not arithmetic


def test_a_real_transformer_is_cut_exactly_and_keeps_what_it_learned(shared_data: Path) -> None:
    folder = shared_data / "dit_fashion" / "transformer"
    if not folder.is_dir():
        pytest.skip("no dit_fashion in ../shared/data, so no real diffusion transformer")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()
    latent = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {"timestep": torch.tensor([400, 800]), "class_labels": torch.tensor([1, 1000])}
    units = find_units(model)
    mask = removal(units, 0.9)
    with torch.no_grad():
        dense = model(latent, **inputs).sample
        with masked(model, units, mask):
            zeroed = model(latent, **inputs).sample
        realise_(model, units, mask)
        realised = model(latent, **inputs).sample
    assert float((realised - zeroed).abs().max()) < 1e-5
    assert 1e-3 < float((zeroed - dense).norm() / dense.norm()) < 1
