"""Gradients through the sampling loop equal plain back-propagation, in the memory of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoisers import Denoiser
from hwprune.solvers import Solver
from hwprune.trajectory import sample

diffusers = pytest.importorskip("diffusers")

SOLVERS: dict[str, Callable[[], Any]] = {
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "flow-match Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "DPM++ 3M": lambda: diffusers.DPMSolverMultistepScheduler(
        solver_order=3, lower_order_final=False
    ),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "UniPC, flow, third order": lambda: diffusers.UniPCMultistepScheduler(
        solver_order=3,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    ),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "LCM": lambda: diffusers.LCMScheduler(clip_sample=False),
    "SDE-DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "PNDM with Runge-Kutta": lambda: diffusers.PNDMScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)
STEPS, GUIDANCE = 4, 3.0


def tiny_unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def tiny_flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def unet_inputs(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"encoder_hidden_states": torch.randn(2, 5, 12, generator=draw, dtype=dtype)}


def flux_inputs(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=draw, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 10, generator=draw, dtype=torch.float64),
        "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
        "img_ids": torch.arange(48, dtype=torch.float64).view(16, 3) / 8,
    }


def scheduler(name: str, steps: int = STEPS) -> Any:
    made = SOLVERS[name]()
    made.set_timesteps(steps)
    return made


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


def gate_(model: nn.Module, suffix: str) -> dict[str, Tensor]:
    """Masks on the inputs of some linears, as pruning's gates are."""
    masks = {}
    for name, module in model.named_modules():
        if name.endswith(suffix) and isinstance(module, nn.Linear):
            draw = torch.Generator().manual_seed(len(masks))
            dtype = next(model.parameters()).dtype
            mask = torch.rand(module.in_features, generator=draw).to(dtype) + 0.5
            masks[name] = mask.requires_grad_()
            module.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m.to(args[0]),))
    assert masks
    return masks


def plainly(call: Callable[[Tensor, Tensor], Tensor], solver: Any, start: Tensor) -> Tensor:
    """The loop of diffusers' own pipelines, with stock schedulers and the whole graph kept."""
    draw, latent = torch.Generator().manual_seed(9), start
    for t in solver.timesteps:
        scaled = (
            solver.scale_model_input(latent, t) if hasattr(solver, "scale_model_input") else latent
        )
        extra = {} if "PNDM" in type(solver).__name__ else {"generator": draw}
        if type(solver).__name__ in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
            extra = {}
        if type(solver).__name__ == "HeunDiscreteScheduler":
            extra = {}
        latent = solver.step(call(scaled, t), t, latent, **extra).prev_sample
    return latent


def closeness(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(
    model: nn.Module, denoise: Denoiser, plain: Any, name: str, shape: tuple[int, ...], suffix: str
) -> None:
    masks = gate_(model, suffix)
    model.requires_grad_(False)
    target = noise(shape).roll(1, -1)
    results = []
    for way in ("plain", "ours"):
        start = noise(shape).requires_grad_()
        if way == "plain":
            final = plainly(
                plain, scheduler(name), start * float(Solver(scheduler(name)).start_scale)
            )
        else:
            solver = Solver(scheduler(name))
            final = sample(
                denoise,
                solver,
                start * solver.start_scale,
                parameters=list(masks.values()),
                generator=torch.Generator().manual_seed(9),
            )
        loss = (final - target).square().mean()
        grads = torch.autograd.grad(loss, [start, *masks.values()])
        results.append((final.detach(), *grads))
    for expected, got in zip(*results, strict=True):
        assert float(expected.norm()) > 0
        assert closeness(got, expected) < 1e-12


@each_solver
def test_gradients_of_a_unet_under_guidance_equal_plain_back_propagation(name: str) -> None:
    model = tiny_unet().double()
    given, empty = unet_inputs(1), unet_inputs(2)
    denoise = Denoiser(model, given, empty, guidance=GUIDANCE)

    def plain(latent: Tensor, t: Tensor) -> Tensor:
        text = torch.cat([empty["encoder_hidden_states"], given["encoder_hidden_states"]])
        out = model(torch.cat([latent, latent]), t, encoder_hidden_states=text).sample
        return out[:2] + GUIDANCE * (out[2:] - out[:2])

    compare(model, denoise, plain, name, (2, 4, 8, 8), ("to_out.0", "net.2"))


@each_solver
def test_gradients_of_flux_under_both_guidances_equal_plain_back_propagation(name: str) -> None:
    model = tiny_flux().double()
    given, empty = flux_inputs(1), flux_inputs(2)
    denoise = Denoiser(model, given, empty, guidance=GUIDANCE, embedded_guidance=3.5)

    def plain(latent: Tensor, t: Tensor) -> Tensor:
        out = [
            model(
                hidden_states=latent,
                timestep=(t / 1000).expand(2),
                guidance=torch.full([2], 3.5),
                return_dict=False,
                **inputs,
            )[0]
            for inputs in (empty, given)
        ]
        return out[0] + GUIDANCE * (out[1] - out[0])

    compare(model, denoise, plain, name, (2, 16, 8), ("to_out.0", "net.2", "proj_out"))


def trained(model: nn.Module) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if "to_out" in n]


def gradients(model: nn.Module, name: str = "DPM++ 2M", **options: Any) -> list[Tensor]:
    """Gradients of some weights, in float32."""
    model.requires_grad_(False)
    weights = [p.requires_grad_() for p in trained(model)]
    dtype = weights[0].dtype
    denoise = Denoiser(model, unet_inputs(1, dtype), unet_inputs(2, dtype), guidance=GUIDANCE)
    draw = torch.Generator().manual_seed(9)
    start = noise((2, 4, 8, 8), torch.float32)
    final = sample(
        denoise, Solver(scheduler(name)), start, parameters=weights, generator=draw, **options
    )
    loss = final.square().mean()
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, found, again))
    return list(found)


def test_the_models_own_gradient_checkpointing_composes_bit_for_bit() -> None:
    plain, nested = tiny_unet(), tiny_unet()
    nested.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(plain), gradients(nested)))


@pytest.mark.parametrize("name", ["UniPC", "Euler ancestral"])
def test_dropout_and_noise_are_replayed_as_they_were(name: str) -> None:
    found = []
    for checkpoint in (True, False):
        model = tiny_unet().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        torch.manual_seed(3)
        found.append(gradients(model, name, checkpoint=checkpoint))
        found.append([torch.rand(1)])  # the global generator is where a plain loop leaves it
    assert all(closeness(a, b) < 1e-5 for a, b in zip(found[0], found[2], strict=True))
    assert torch.equal(found[1][0], found[3][0])


def test_a_loop_without_gradient_gives_the_same_latent_and_keeps_no_graph() -> None:
    model = tiny_unet()
    denoise = Denoiser(model, unet_inputs(1, torch.float32))
    start, solver = noise((2, 4, 8, 8), torch.float32), Solver(scheduler("UniPC"))
    plain = sample(denoise, solver, start)
    assert not plain.requires_grad  # though the model's own weights require grad
    assert torch.equal(sample(denoise, solver, start), plain)
    model.requires_grad_(False)
    assert torch.equal(sample(denoise, solver, start.clone().requires_grad_()), plain)


def test_masks_and_adjoint_stay_in_float32_with_the_model_in_bfloat16() -> None:
    model = tiny_unet().bfloat16().requires_grad_(False)
    seen: list[torch.dtype] = []
    mask = torch.ones((), requires_grad=True)

    def denoise(latent: Tensor, t: Tensor) -> Tensor:
        seen.append(latent.dtype)
        return Denoiser(model, unet_inputs(1, torch.bfloat16))(latent, t) * mask

    start = noise((2, 4, 8, 8), torch.bfloat16).requires_grad_()
    final = sample(denoise, Solver(scheduler("Euler")), start, parameters=[mask])
    final.square().mean().backward()
    assert final.dtype == torch.float32 and mask.grad is not None
    assert set(seen) == {torch.float32} and mask.grad.dtype == torch.float32
    assert float(mask.grad.abs()) > 0


def test_autocast_is_replayed_as_it_was() -> None:
    found = []
    for checkpoint in (True, False):
        model = tiny_unet().requires_grad_(False)
        weights = [p.requires_grad_() for p in trained(model)]
        denoise = Denoiser(model, unet_inputs(1, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solver = Solver(scheduler("UniPC"))
            start = noise((2, 4, 8, 8), torch.float32)
            final = sample(denoise, solver, start, parameters=weights, checkpoint=checkpoint)
        found.append(torch.autograd.grad(final.square().mean(), weights))
    for ours, plain in zip(*found, strict=True):
        assert closeness(ours, plain) < 0.02  # bfloat16 sums in another order


def test_two_trajectories_with_their_own_masks_can_be_open_at_once() -> None:
    model = tiny_unet().double().requires_grad_(False)
    inner, solver = Denoiser(model, unet_inputs(1)), Solver(scheduler("DPM++ 2M"))
    start = noise((2, 4, 8, 8))

    def loss(scale: Tensor) -> Tensor:
        final = sample(lambda z, t: inner(z, t) * scale, solver, start, parameters=[scale])
        return final.square().mean()

    scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (0.9, 1.1)]
    apart = [torch.autograd.grad(loss(s), s)[0] for s in scales]
    together = torch.autograd.grad(loss(scales[0]) + loss(scales[1]), scales)
    assert all(map(torch.equal, apart, together))


def test_masks_computed_from_logits_pass_their_gradient_on() -> None:
    model = tiny_unet().double().requires_grad_(False)
    inner, solver = Denoiser(model, unet_inputs(1)), Solver(scheduler("UniPC"))
    found = []
    for checkpoint in (True, False):
        logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        mask = torch.sigmoid(logit)
        final = sample(
            lambda z, t, m=mask: inner(z, t) * m,
            solver,
            noise((2, 4, 8, 8)),
            parameters=[mask],
            checkpoint=checkpoint,
        )
        found.append(torch.autograd.grad(final.square().mean(), logit)[0])
    assert closeness(*found) < 1e-12
