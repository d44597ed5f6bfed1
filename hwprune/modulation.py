"""AdaLN modulation as a unit kind: its linears factored in the basis of the conditions they ever see.

Shifts, scales and gates of a diffusion transformer are a linear map of silu(time + class or pooled text),
27 to 33 % of the parameters of FLUX.1, SD3.5 and Qwen-Image and 0.01 % of their MACs. Its input moves
along few directions, so with mean m and covariance C of that input the map is written

    y = W m + b + A B (x - m),   B = V' C^-1/2,  A = W C^1/2 V,   V the eigenvectors of C^1/2 W'W C^1/2

whose components come sorted by what they bring to y. Only so many are made as are together no larger than
W; each is a unit with a gate of its own, as a head is. Directions that the timesteps shown do not reveal
are held at 1e-6 of the mean variance, so that W is kept there too while there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hwprune.factored import modulation_linears, most_components, put_, put_factors_
from hwprune.obs import sqrt_psd
from hwprune.teacher import Batch, Sampler
from hwprune.trajectory_scores import Moments, gathered
from hwprune.units import get_linear

_UNSEEN = 1e-6  # of the mean variance
_TIMES = 8  # timesteps a batch is shown at
_BATCHES = 16  # with as many batches 128 calls: some five updates' worth of time


@contextmanager
def factored_modulation(sampler: Sampler, batches: Sequence[Batch]) -> Iterator[Callable[[], None]]:
    """Factor every modulation linear of a denoiser in place; after a failure inside they are back.

    Args:
        sampler: of the dense model.
        batches: whose conditions it is shown.

    Yields:
        What puts the dense linears back.

    Raises:
        ValueError: the model has none.
    """
    model = sampler.model
    names = modulation_linears(model)
    if not names:
        raise ValueError(
            f"kinds: {type(model).__name__} has no AdaLN modulation linears; leave the kind modulation out"
        )
    dense = {name: get_linear(model, name) for name in names}
    moments = condition_moments(sampler, batches, names)

    def back() -> None:
        for name in names:
            put_(model, name, dense[name])

    try:
        for name in names:
            put_factors_(model, name, *factors(dense[name], moments[name]))
        yield back
    except BaseException:
        back()
        raise


@torch.no_grad()
def condition_moments(
    sampler: Sampler, batches: Sequence[Batch], names: Sequence[str]
) -> dict[str, Moments]:
    """Moments of what modulation linears read, over the solver's whole range of timesteps.

    They read time and condition alone, so any latent serves, and timesteps between those of the solver are
    shown too: a model is often sampled with more steps than it is pruned with.
    """
    times = sampler.solver.timesteps
    first, last = float(times.max()), float(times.min())
    some = batches[:_BATCHES]
    count = _TIMES * len(some)
    whole = not times.is_floating_point()
    with gathered(sampler.model, names, lambda: 1.0) as found:
        for i, batch in enumerate(some):
            denoise, latent = sampler.denoise(batch), batch.start.to(sampler.device)
            # Batch i sees every len(some)-th of `count` even times: all of them see the range.
            for place in range(i, count, len(some)):
                time = first + (last - first) * place / max(1, count - 1)
                denoise(latent, torch.tensor(round(time) if whole else time).to(times))
    return found


@torch.no_grad()
def factors(linear: nn.Linear, moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two factors of a linear: B [K, I], -B m [K], A [O, K], W m + b [O].

    Args:
        linear: dense, [O, I].
        moments: of its inputs.
    """
    weight_OI = linear.weight.detach().double()
    second_II = moments.second(centred=True)
    held = _UNSEEN * float(second_II.diagonal().mean()) + 1e-30
    second_II = second_II + held * torch.eye(
        len(second_II), dtype=torch.float64, device=second_II.device
    )
    root_II, inverse_II = sqrt_psd(second_II, floor=1e-12)
    energy_II = root_II @ (weight_OI.T @ weight_OI) @ root_II
    _, vectors_II = torch.linalg.eigh((energy_II + energy_II.T) / 2)
    kept = min(most_components(linear), len(vectors_II))
    basis_IK = vectors_II.flip(1)[:, :kept]  # eigh gives the smallest first
    first_KI = basis_IK.T @ inverse_II
    second_O = weight_OI @ moments.mean
    if linear.bias is not None:
        second_O = second_O + linear.bias.double()
    return first_KI, -first_KI @ moments.mean, weight_OI @ (root_II @ basis_IK), second_O
