"""What the sampling loop under gradient costs in memory, and how it fails: loudly, with names."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwprune.denoisers import Denoiser
from hwprune.solvers import Solver
from hwprune.trajectory import sample

diffusers = pytest.importorskip("diffusers")


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


def text() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"encoder_hidden_states": torch.randn(2, 5, 12, generator=draw)}


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def euler(steps: int = 4) -> Solver:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return Solver(scheduler)


def dpm(steps: int = 4) -> Solver:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    return Solver(scheduler)


class SavedBytes:
    """Counts the bytes autograd holds at a time, by hooks on what it saves."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Any:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if self.alive.get(key, 0) == 0:
            self.now += size
        self.alive[key] = self.alive.get(key, 0) + 1
        self.peak = max(self.peak, self.now)

        class Packed:
            value = tensor

        packed = Packed()
        weakref.finalize(packed, self.free, key, size)
        return packed

    def free(self, key: int, size: int) -> None:
        self.alive[key] -= 1
        if self.alive[key] == 0:
            self.now -= size

    def unpack(self, packed: Any) -> Tensor:
        value: Tensor = packed.value
        return value


def peak_bytes(steps: int, *, checkpoint: bool = True) -> int:
    model = tiny_unet().requires_grad_(False)
    mask = torch.ones((), requires_grad=True)
    inner = Denoiser(model, text())
    count, solver = SavedBytes(), dpm(steps)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
        final = sample(
            lambda z, t: inner(z * mask, t),
            solver,
            noise(),
            parameters=[mask],
            checkpoint=checkpoint,
        )
        final.square().mean().backward()
    assert mask.grad is not None
    return count.peak


def test_fifty_steps_hold_the_activations_of_one() -> None:
    one, fifty = peak_bytes(1), peak_bytes(50)
    latents = 50 * 3 * 2 * 4 * 8 * 8 * 4  # the latent and two past predictions of each step
    assert fifty <= 1.1 * one + latents
    assert peak_bytes(4, checkpoint=False) > 2.5 * one  # what the count is of


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nan_is_an_error_that_names_step_and_layer(where: str) -> None:
    model = tiny_unet().requires_grad_(False)
    calls = 0

    def break_(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if where == "backward":
            out.register_hook(lambda g: g * float("nan")) if out.requires_grad else None
            return out
        return out * float("nan") if calls > 2 else out

    model.mid_block.attentions[0].proj_in.register_forward_hook(break_)
    start = noise().requires_grad_()
    denoise = Denoiser(model, text())

    def run() -> None:
        sample(denoise, euler(), start).sum().backward()

    if where == "forward":
        words = r"NaN or Inf in the trajectory at step 2 of 4 \(timestep 333.*, EulerDiscrete"
        words += r"Scheduler\), first in mid_block\.attentions\.0\.proj_in \(Conv2d\)"
    else:
        words = r"NaN or Inf in the gradient at step 3 of 4 .*first behind the output of "
        words += r"mid_block\.attentions\.0\.proj_in"
    with pytest.raises(FloatingPointError, match=words):
        run()


def test_a_tensor_that_would_lose_its_gradient_is_named() -> None:
    model = tiny_unet()
    start = noise().requires_grad_()
    denoise = Denoiser(model, text())
    final = sample(denoise, euler(), start)
    with pytest.raises(ValueError, match=r"conv_in\.bias requires grad inside denoise but is not"):
        final.sum().backward()


def test_parameters_that_take_no_part_are_an_error() -> None:
    model = tiny_unet().requires_grad_(False)
    denoise = Denoiser(model, text())
    mask = torch.ones(3, requires_grad=True)
    start = noise().requires_grad_()
    final = sample(denoise, euler(), start, parameters=[mask])
    with pytest.raises(ValueError, match="none of the 1 parameters takes part in the trajectory"):
        final.sum().backward()


def test_progress_is_told_forward_and_back() -> None:
    model = tiny_unet().requires_grad_(False)
    seen: list[tuple[str, int]] = []
    start = noise().requires_grad_()
    final = sample(
        Denoiser(model, text()),
        euler(),
        start,
        watch=lambda phase, step, norm: seen.append((phase, step)) if norm > 0 else None,
    )
    final.sum().backward()
    assert seen == [("forward", k) for k in range(4)] + [("backward", k) for k in (3, 2, 1, 0)]


@pytest.mark.gpu
def test_offloaded_latents_give_the_same_gradients_on_a_gpu() -> None:
    model = tiny_unet().cuda().requires_grad_(False)
    inputs = {k: v.cuda() for k, v in text().items()}
    found = []
    for offload in (False, True):
        start = noise().cuda().requires_grad_()
        solver = dpm()
        final = sample(Denoiser(model, inputs), solver, start, offload=offload)
        found.append(torch.autograd.grad(final.square().mean(), start)[0])
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-5
