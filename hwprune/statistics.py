"""One streaming, label-free calibration pass: what goes into each linear and what its output is worth.

For every batch: one forward, and one backward of a random probe v of the output whose covariance is
the Fisher of KL(dense ‖ pruned), E[v vᵀ] = diag(p) - p pᵀ (for models without a classifier the identity:
squared feature distance). So for any small change δy of a layer's output, ½ E[(Σ_t g_t · δy_t)²] is the
distortion of the model's output (Gauss-Newton; Martens and Grosse 2015 for the Kronecker form).

Shapes: N images, T tokens, O outputs, I inputs, H heads, D channels of a head, U units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hwprune.units import AttentionLayer, Units, get_linear, reduce, vision_layer

Progress = Callable[[int, int], None]  # (done, total)
Weighting = Literal["gradient", "uniform"]

# Part of the token weight that does not follow the gradient. In the last blocks of a ViT only the class
# token has a gradient: without this, 256 images are 256 samples for 768 neurons, and half of them look free.
_UNIFORM_SHARE = 0.05
_FIELDS = (
    "logits",
    "image_embeds",
    "pooler_output",
    "last_hidden_state",
)  # of transformers' outputs


@dataclass
class Moments:
    """Streaming second moments around one linear (or the queries of one attention).

    Attributes:
        centred: [..., I, I] float64, weighted second moment of x over tokens about its mean: what a
            re-fitted bias leaves. (A running sum about the shift until `finish`.)
        mean: [..., I] float64, weighted mean of x.
        metric: [..., O, O] float64, sum over tokens of g gᵀ, averaged over images.
        token_weight: [N, T] float32, gradient energy |g_t|² of each token; None under uniform
            weighting.
    """

    centred: Tensor
    mean: Tensor
    metric: Tensor
    weight_sum: Tensor
    token_weight: Tensor | None = None
    _shift: Tensor | None = None
    _weights: list[Tensor] = field(default_factory=list)

    @property
    def second(self) -> Tensor:
        """Weighted mean of x xᵀ: what counts where there is no bias to re-fit."""
        return self.centred + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    def add(self, x: Tensor, grad: Tensor, weighting: Weighting) -> None:
        """Add a batch. x: [..., M, I] and grad: [..., M, O], M rows."""
        if x.element_size() < 4:  # half precision would lose the covariance in its products
            x, grad = x.float(), grad.float()
        if weighting == "gradient":
            energy = grad.square().sum(-1)
            weight = energy / energy.mean(-1, keepdim=True).clamp_min(1e-30)
            weight = (1 - _UNIFORM_SHARE) * weight + _UNIFORM_SHARE
            self._weights.append(energy)
        else:
            weight = torch.ones_like(grad[..., 0])
        # Sums run about the first batch's mean: attention outputs of a flat layer differ from their mean
        # by 1e-4 of it, and a float32 GEMM of the raw values would leave no digit of the covariance.
        if self._shift is None:
            self._shift = x.mean(-2, keepdim=True)
        x = x - self._shift
        weighted = x * weight.unsqueeze(-1)
        # One float32 GEMM a batch, float64 sums over batches: float32 sums over 50 000 tokens lose
        # the small eigenvalues that the elimination order rests on.
        self.centred += (x.mT @ weighted).double()
        self.mean += weighted.sum(-2).double()
        self.metric += (grad.mT @ grad).double()
        self.weight_sum += weight.sum(-1).double()

    def finish(self, images: int, weighting: Weighting) -> None:
        """Turn sums into means."""
        total = self.weight_sum.clamp_min(1e-300)
        assert self._shift is not None
        mean = self.mean / total[..., None]
        self.centred /= total[..., None, None]
        self.centred -= mean.unsqueeze(-1) * mean.unsqueeze(-2)
        self.mean = mean + self._shift.squeeze(-2).double()
        self.metric /= images
        if weighting == "gradient" and self._weights[0].dim() == 1:
            self.token_weight = torch.cat(self._weights).view(images, -1)
        self._weights = []

    @classmethod
    def zeros(
        cls, lead: tuple[int, ...], inputs: int, outputs: int, device: torch.device
    ) -> Moments:
        """Empty moments."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros((*lead, *shape), dtype=torch.float64, device=device)

        return cls(zero(inputs, inputs), zero(inputs), zero(outputs, outputs), zero())


@dataclass
class Statistics:
    """What one calibration pass found.

    Attributes:
        linear: linear name -> moments of its input and metric of its output.
        queries: attention name -> moments of q and metric of ∂/∂q, per head [H, D, D].
        sums: units name -> [N, U] per-sample sums B[n, j] = Σ_{w in unit j} w ∂/∂w, where asked for.
        images: N.
        weighting: how tokens were weighted in `second` and `mean`.
        output: "kl" (classifier) or "feature".
        seconds: wall time of the pass.
        peak_bytes: of the statistics themselves.
    """

    linear: dict[str, Moments]
    queries: dict[str, Moments]
    sums: dict[str, Tensor]
    images: int
    weighting: Weighting
    output: Literal["kl", "feature"]
    seconds: float
    peak_bytes: int


def model_output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output as one [B, C] tensor.

    Of what transformers answers with: the logits, else the projected image, else the pooled one, else all
    tokens side by side.

    Raises:
        ValueError: it is something else.
    """
    out = model(x)
    if not isinstance(out, Tensor):
        fields = (getattr(out, name, None) for name in _FIELDS)
        out = next((field for field in fields if isinstance(field, Tensor)), out)
        if isinstance(out, Tensor) and out.dim() == 3:
            out = out.flatten(1)
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model output: expected logits or features [B, C], got {got}")
    return out


def is_classifier(model: nn.Module) -> bool:
    """Whether the outputs are logits (timm: num_classes > 0; transformers: a class with num_labels > 0)."""
    if hasattr(model, "main_input_name"):  # every model of transformers has it, and no other
        return int(getattr(model, "num_labels", 0)) > 0
    return int(getattr(model, "num_classes", 1) or 0) > 0


def output_distance(out: Tensor, reference: Tensor, *, classifier: bool) -> Tensor:
    """Per-image distortion [N] of `out` against `reference`: KL(reference ‖ out), or ½ |Δ|² of features."""
    if classifier:
        log_p, log_q = reference.double().log_softmax(-1), out.double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return 0.5 * (out - reference).double().square().sum(-1)


def _probe(out: Tensor, classifier: bool, generator: torch.Generator) -> Tensor:
    """A random v with E[v vᵀ] = the Hessian of the distortion at zero. out: [B, C]."""
    sign = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
    if not classifier:
        return sign
    p = out.softmax(-1)
    root = p.sqrt() * sign
    return root - p * root.sum(-1, keepdim=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; both restored on exit."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in its weights, naming the parameter."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"{name}: expected finite weights, found NaN or Inf; reload the checkpoint"
            )


def calibrate(
    model: nn.Module,
    units: Sequence[Units],
    batches: Sequence[Tensor],
    *,
    weighting: Weighting = "gradient",
    sums: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    """Run the calibration pass.

    Args:
        model: the dense model; unchanged.
        units: what may be pruned; decides which linears are watched.
        batches: images [B, 3, height, width]; labels are not used.
        weighting: weight tokens by the gradient energy at the layer's output, or all the same.
            In the last blocks of a ViT only the class token has a gradient: planned with uniform weights
            ViT-Tiny at 0.70 of its MACs lost KL 1.07 against 0.73 (256 images, prototype, 256 others).
        sums: also collect per-sample block sums B[n, j] for every unit.
        seed: of the random probe.
        progress: called with (images done, images in all).

    Returns:
        Statistics.

    Raises:
        ValueError: no images, NaN in weights or activations (names the layer).
    """
    images = sum(len(b) for b in batches)
    if images == 0:
        raise ValueError("calibration: expected at least one image, got none")
    check_finite(model)
    start = time.perf_counter()
    classifier = is_classifier(model)
    generator = torch.Generator().manual_seed(seed)
    linear, queries, handles = _watch(model, units, weighting)
    unit_sums: dict[str, list[Tensor]] = {u.name: [] for u in units} if sums else {}
    if sums:
        handles += _watch_sums(model, units, unit_sums)
    done = 0
    try:
        with frozen(model), torch.enable_grad():
            for batch in (b for b in batches if len(b)):
                out = model_output(model, batch.detach().clone().requires_grad_(True))
                if not bool(torch.isfinite(out).all()):
                    raise ValueError("model output: NaN or Inf on calibration images")
                out.backward(_probe(out.detach(), classifier, generator))
                done += len(batch)
                if progress is not None:
                    progress(done, images)
    finally:
        for handle in handles:
            handle.remove()
    for name, moments in [*linear.items(), *queries.items()]:
        if not bool((moments.metric.diagonal(dim1=-2, dim2=-1).sum(-1) > 0).all()):
            raise ValueError(
                f"{name}: no gradient reaches it, so the output does not depend on it (an untrained or "
                "zero classifier?); prune a trained model"
            )
        moments.finish(images, weighting)
    held = [t for m in [*linear.values(), *queries.values()] for t in (m.centred, m.metric)]
    held += [t for parts in unit_sums.values() for t in parts]
    return Statistics(
        linear,
        queries,
        {name: torch.cat(parts) for name, parts in unit_sums.items()},
        images,
        weighting,
        "kl" if classifier else "feature",
        time.perf_counter() - start,
        sum(t.numel() * t.element_size() for t in held),
    )


def _watch(
    model: nn.Module, units: Sequence[Units], weighting: Weighting
) -> tuple[dict[str, Moments], dict[str, Moments], list[RemovableHandle]]:
    """Hook every linear whose moments some unit needs."""
    linear: dict[str, Moments] = {}
    queries: dict[str, Moments] = {}
    handles: list[RemovableHandle] = []
    for unit in units:
        if unit.kind == "block":
            names = [unit.slices[0].param.removesuffix(".weight")]
        else:
            names = [vision_layer(unit).out]
        for name in names:
            if name not in linear:
                module = get_linear(model, name)
                device = module.weight.device
                linear[name] = Moments.zeros((), module.in_features, module.out_features, device)
                handles.append(_hook_linear(module, name, linear[name], weighting))
        if unit.kind == "qk" and isinstance(unit.layer, AttentionLayer):
            layer = unit.layer
            module = get_linear(model, layer.q.linear)
            queries[layer.name] = Moments.zeros(
                (layer.heads,), layer.head_dim, layer.head_dim, module.weight.device
            )
            handles.append(_hook_queries(module, layer, queries[layer.name], weighting))
    return linear, queries, handles


def _hook_linear(
    module: nn.Linear, name: str, moments: Moments, weighting: Weighting
) -> RemovableHandle:
    def forward(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach()
        if not bool(torch.isfinite(x.sum())):
            raise ValueError(f"{name}: NaN or Inf in its input on calibration images")

        def backward(grad: Tensor) -> None:
            moments.add(x.flatten(0, -2), grad.flatten(0, -2), weighting)

        out.register_hook(backward)

    return module.register_forward_hook(forward)


def _hook_queries(
    module: nn.Linear, layer: AttentionLayer, moments: Moments, weighting: Weighting
) -> RemovableHandle:
    rows = slice(layer.q.start, layer.q.start + layer.q.count)

    def heads_first(t: Tensor) -> Tensor:  # [B, T, O] -> [H, B * T, D]
        return t[..., rows].reshape(-1, layer.heads, layer.head_dim).transpose(0, 1)

    def forward(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        q_HMD = heads_first(out.detach())

        def backward(grad: Tensor) -> None:
            moments.add(q_HMD, heads_first(grad), weighting)

        out.register_hook(backward)

    return module.register_forward_hook(forward)


def _watch_sums(
    model: nn.Module, units: Sequence[Units], sums: dict[str, list[Tensor]]
) -> list[RemovableHandle]:
    """Per-sample sums B[n, j]: one einsum a linear for the per-sample weight gradient."""
    images = [
        0
    ]  # of the batch that runs: the windows of an image are samples of it, and no samples
    wanted: dict[str, list[Units]] = {}
    for unit in units:
        wanted.setdefault(unit.slices[_cut(unit)].param.removesuffix(".weight"), []).append(unit)

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        images[0] = len(args[0])

    handles = [model.register_forward_pre_hook(count)]
    for name, members in wanted.items():
        module = get_linear(model, name)

        def forward(
            module: nn.Module,
            args: tuple[Tensor, ...],
            out: Tensor,
            members: list[Units] = members,
        ) -> None:
            assert isinstance(module, nn.Linear)
            x_NTI = args[0].detach().reshape(images[0], -1, module.in_features)
            weight = module.weight.detach()

            def backward(grad: Tensor) -> None:
                grad_NTO = grad.reshape(*x_NTI.shape[:2], -1)
                grad_NOI = torch.einsum("nto,nti->noi", grad_NTO, x_NTI) * weight
                for unit in members:
                    part = unit.slices[_cut(unit)]
                    sums[unit.name].append(
                        torch.stack([reduce(g, part) for g in grad_NOI]).flatten(1)
                    )

            out.register_hook(backward)

        handles.append(module.register_forward_hook(forward))
    return handles


def _cut(unit: Units) -> int:
    """Index of the slice whose zeroing alone takes the unit out of the computation.

    The output columns for heads, neurons and v channels; the tile itself for blocks. q and k rows
    share one merged slice: its sum counts a qk channel twice, once from each side.
    """
    return 0 if unit.kind in ("block", "qk") else len(unit.slices) - 1
