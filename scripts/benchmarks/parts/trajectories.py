"""Solvers, tiny denoisers, and the plain sampling loop gradients through a trajectory are held against."""

import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hwprune.denoisers import Denoiser
from hwprune.solvers import Solver
from hwprune.trajectory import sample

GUIDANCE = 3.0
SOLVERS: dict[str, Callable[[], Any]] = {
    "Euler": diffusers.EulerDiscreteScheduler,
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "flow-match Euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "LCM": lambda: diffusers.LCMScheduler(clip_sample=False),
}
_NO_GENERATOR = ("UniPCMultistepScheduler",)


def unet(channels: tuple[int, ...], layers: int, head: int, text: int) -> nn.Module:
    """A UNet with random weights; every level but the first attends."""
    torch.manual_seed(0)
    down = ["DownBlock2D", *["CrossAttnDownBlock2D"] * (len(channels) - 1)]
    up = [*["CrossAttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"]
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=text,
        attention_head_dim=head,
        norm_num_groups=4,
    ).eval()


def flux() -> nn.Module:
    """A tiny FLUX with random weights: one double and one single block, embedded guidance."""
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


def _inputs(model: nn.Module, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = {"encoder_hidden_states": random(2, 5, 12)}
    if isinstance(model, diffusers.FluxTransformer2DModel):
        found |= {
            "pooled_projections": random(2, 10),
            "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
            "img_ids": torch.arange(48, dtype=torch.float64).view(16, 3) / 8,
        }
    return found


def _predicted(model: nn.Module, inputs: dict[str, Tensor], latent: Tensor, time: Tensor) -> Tensor:
    """One branch, called as the model's own pipeline calls it."""
    if isinstance(model, diffusers.FluxTransformer2DModel):
        scale = torch.full([2], 3.5)
        return model(
            latent, timestep=(time / 1000).expand(2), guidance=scale, return_dict=False, **inputs
        )[0]
    return model(latent, time, return_dict=False, **inputs)[0]


def gates(model: nn.Module) -> list[Tensor]:
    """Masks on what output projections read, as pruning's gates are."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(("to_out.0", "net.2", "proj_out")) and isinstance(module, nn.Linear):
            draw = torch.Generator().manual_seed(len(found))
            mask = (torch.rand(module.in_features, generator=draw).double() + 0.5).requires_grad_()
            module.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m.to(args[0]),))
            found.append(mask)
    return found


def gradient_error(name: str, which: str, steps: int) -> float:
    """Largest relative error of a gradient, in float64, against the stock scheduler and the whole graph.

    Args:
        name: of the solver.
        which: unet or flux.
        steps: T.
    """
    model = (unet((8, 16), 1, 2, 12) if which == "unet" else flux()).double().requires_grad_(False)
    masks = gates(model)
    given, empty = _inputs(model, 1), _inputs(model, 2)
    shape = (2, 4, 8, 8) if which == "unet" else (2, 16, 8)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    stock = SOLVERS[name]()
    stock.set_timesteps(steps)
    draw, latent = torch.Generator().manual_seed(9), start * float(Solver(stock).start_scale)
    for time in stock.timesteps:
        scaled = (
            stock.scale_model_input(latent, time) if hasattr(stock, "scale_model_input") else latent
        )
        without, with_ = (_predicted(model, inputs, scaled, time) for inputs in (empty, given))
        guided = without + GUIDANCE * (with_ - without)
        extra = {} if type(stock).__name__ in _NO_GENERATOR else {"generator": draw}
        latent = stock.step(guided, time, latent, **extra).prev_sample
    expected = torch.autograd.grad(latent.square().mean(), masks)

    again = SOLVERS[name]()
    again.set_timesteps(steps)
    solver = Solver(again)
    embedded = 3.5 if which == "flux" else None
    final = sample(
        Denoiser(model, given, empty, guidance=GUIDANCE, embedded_guidance=embedded),
        solver,
        start * solver.start_scale,
        parameters=masks,
        generator=torch.Generator().manual_seed(9),
    )
    got = torch.autograd.grad(final.square().mean(), masks)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


class SavedBytes:
    """Counts the bytes autograd holds at a time, by hooks on what it saves."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Note a tensor that is saved; memory shared with another one counts once."""
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if self.alive.get(key, 0) == 0:
            self.now += size
        self.alive[key] = self.alive.get(key, 0) + 1
        self.peak = max(self.peak, self.now)
        packed = _Packed(tensor)
        weakref.finalize(packed, self._free, key, size)
        return packed

    def _free(self, key: int, size: int) -> None:
        self.alive[key] -= 1
        if self.alive[key] == 0:
            self.now -= size

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor again."""
        return packed.value


class _Packed:
    """A saved tensor that says when it is let go."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Work:
    """One gradient through a trajectory of a UNet large enough to see.

    Args:
        steps: T.
        checkpoint: ours, or plain back-propagation through all steps.
        side: of the latent.
    """

    def __init__(self, steps: int, *, checkpoint: bool, side: int = 32) -> None:
        """Build the model and set the solver."""
        self.model = unet((32, 64, 128), 1, 16, 64).requires_grad_(False)
        self.masks = gates(self.model.double().float())
        scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(steps)
        self.solver, self.checkpoint = Solver(scheduler), checkpoint
        draw = torch.Generator().manual_seed(0)
        text = torch.randn(2, 1, 16, 64, generator=draw)
        self.denoise = Denoiser(
            self.model,
            {"encoder_hidden_states": text[0]},
            {"encoder_hidden_states": text[1]},
            guidance=GUIDANCE,
        )
        self.start = torch.randn(1, 4, side, side, generator=draw)

    def __call__(self) -> list[Tensor]:
        """The gradients of the masks."""
        final = sample(
            self.denoise,
            self.solver,
            self.start,
            parameters=self.masks,
            checkpoint=self.checkpoint,
        )
        return list(torch.autograd.grad(final.square().mean(), self.masks))

    def saved_bytes(self) -> int:
        """Peak of what autograd saves in one call."""
        count = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
            self()
        return count.peak
