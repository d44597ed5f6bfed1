"""Closed-form re-fit of what is kept, layer after layer, on inputs from the already pruned model.

For each cut layer, in the order the model runs them: the dense layer and the cut layer see the same
input (the stream of the already pruned model), and the kept columns of the output linear are re-fitted
by weighted least squares so that the cut layer says what the dense one would, the mean folded into the
bias. Fitting to the dense model's own stream instead (an asymmetric target) shrinks every branch and
compounds: on ViT-Tiny at 0.70 of the MACs, KL 0.96 against 0.59 (256 images, one run).

Shapes: N images, T tokens, I inputs and O outputs of a linear, S kept inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwprune.realise import restore_, zero_
from hwprune.stage_stream import Stream, stage_calls
from hwprune.statistics import Progress, Statistics, frozen
from hwprune.units import Layer, Mask, Units, expand, get_linear, layers_of

# Tried on held-out calibration images, layer by layer: the share of tokens weighted alike (the rest follows
# the gradient energy of their position) and the ridge. Gradient weights alone leave about one effective
# token an image in the last blocks of a ViT, 256 for up to 768 regressors: fitted that closely, KL on
# other images is 0.74 where 0.65 is possible (ViT-Tiny, 0.70 of the MACs).
_SHARES = (0.05, 0.2, 0.5)
_RIDGES = (1e-2, 1e-1, 5e-1)
_HELD_OUT = 4  # every 4th batch


@dataclass
class _Sums:
    """Cross moments between the cut and the full input of one linear, about a shift.

    Leading index W: 0 = weighted by gradient energy, 1 = all tokens alike.
    """

    shift_cut: Tensor
    shift_full: Tensor
    cut_cut_WII: Tensor
    cut_full_WII: Tensor
    cut_WI: Tensor
    full_WI: Tensor
    weight_W: Tensor

    @classmethod
    def zeros(cls, shift_cut: Tensor, shift_full: Tensor) -> _Sums:
        """Empty sums about a shift: the first batch's mean (see `Moments.add`)."""
        inputs = len(shift_cut)
        line = torch.zeros(2, inputs, dtype=torch.float64, device=shift_cut.device)
        square = line[:, :, None].repeat(1, 1, inputs)
        weight_W = torch.zeros(2, dtype=torch.float64, device=shift_cut.device)
        return cls(shift_cut, shift_full, square, square.clone(), line, line.clone(), weight_W)

    def add(self, cut_MI: Tensor, full_MI: Tensor, weight_M: Tensor) -> None:
        """Add a batch of M tokens."""
        same = cut_MI is full_MI
        if cut_MI.element_size() < 4:  # half precision would lose the covariance in its products
            cut_MI, full_MI = cut_MI.float(), full_MI.float()
        cut = cut_MI - self.shift_cut
        full = cut if same else full_MI - self.shift_full
        for w, weight in enumerate((weight_M, torch.ones_like(weight_M))):
            weighted_MI = cut * weight[:, None]
            product = (weighted_MI.T @ cut).double()
            self.cut_cut_WII[w] += product
            self.cut_full_WII[w] += product if same else (weighted_MI.T @ full).double()
            self.cut_WI[w] += weighted_MI.sum(0).double()
            self.full_WI[w] += (full * weight[:, None]).sum(0).double()
        self.weight_W = self.weight_W + torch.stack(
            [weight_M.sum(), weight_M.new_tensor(len(weight_M))]
        )

    def plus(self, other: _Sums) -> _Sums:
        """Both together; the shifts are the same."""
        return _Sums(
            self.shift_cut,
            self.shift_full,
            self.cut_cut_WII + other.cut_cut_WII,
            self.cut_full_WII + other.cut_full_WII,
            self.cut_WI + other.cut_WI,
            self.full_WI + other.full_WI,
            self.weight_W + other.weight_W,
        )

    def finish(self, share: float, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E[cut cutᵀ], E[cut fullᵀ] (centred or raw), E[cut], E[full] with `share` of uniform weight."""
        mix_W = torch.tensor([1 - share, share], dtype=torch.float64, device=self.cut_WI.device)
        mix_W = mix_W / self.weight_W.clamp_min(1e-300)
        cut, full = mix_W @ self.cut_WI, mix_W @ self.full_WI
        cut_cut = torch.einsum("w,wij->ij", mix_W, self.cut_cut_WII) - torch.outer(cut, cut)
        cut_full = torch.einsum("w,wij->ij", mix_W, self.cut_full_WII) - torch.outer(cut, full)
        mean_cut, mean_full = cut + self.shift_cut.double(), full + self.shift_full.double()
        if not centred:
            cut_cut = cut_cut + torch.outer(mean_cut, mean_cut)
            cut_full = cut_full + torch.outer(mean_cut, mean_full)
        return cut_cut, cut_full, mean_cut, mean_full

    def rounding(self) -> Tensor:
        """Variance below which an input is float32 rounding and no signal: 1e-11 of the inputs' energy.

        Behind an emptied linear every input is constant but for a rounding of 1e-14 of its energy, and how
        that rounding goes with the full input is anything: fitted to it, weights of 1e16 come out (1e4
        with a ridge of 1e-12 of the energy, depending on the number of threads).
        """
        variance = self.cut_cut_WII[1].diagonal() / self.weight_W[1].clamp_min(1e-300)
        return 1e-11 * (variance + self.shift_cut.double().square()).mean()


def token_weights(statistics: Statistics, name: str, tokens: int) -> Tensor:
    """Gradient energy of each token position [T] at the output of one linear, mean 1."""
    moments = statistics.linear.get(name)
    weight = moments.token_weight if moments is not None else None
    if weight is None or weight.shape[1] != tokens:
        return torch.ones(tokens)
    average = weight.mean(0)
    return average / average.mean().clamp_min(1e-30)


def _gather(
    stream: Stream,
    name: str,
    statistics: Statistics,
    model: nn.Module,
    dense: Mapping[str, Tensor],
    current: Mapping[str, Tensor] | None,
) -> tuple[_Sums, _Sums | None]:
    """Cross moments of a linear's input under the dense and the current (cut) layer: to fit, to check."""
    folds: list[_Sums] = []
    linear = get_linear(model, name)
    for i, batch in enumerate(stream.inputs):
        full_MI = stream.capture(linear, batch)
        weight_T = token_weights(statistics, name, len(full_MI) // len(batch))
        cut_MI = full_MI
        if current is not None:
            restore_(model, current)
            cut_MI = stream.capture(linear, batch)
            restore_(model, dense)
        if not folds:
            shifts = cut_MI.mean(0), full_MI.mean(0)
            folds = [_Sums.zeros(*shifts), _Sums.zeros(*shifts)]
        held_out = i % _HELD_OUT == _HELD_OUT - 1
        folds[held_out].add(cut_MI, full_MI, weight_T.repeat(len(batch)).to(full_MI))
    return folds[0], folds[1] if len(stream.inputs) >= _HELD_OUT else None


def _solve(
    cut_cut: Tensor, target: Tensor, prior: Tensor, ridge_rel: float, floor: Tensor
) -> Tensor:
    """Ridge towards the kept weights: (A + r I)⁻¹ (target + r prior). [S, S], [S, O], [S, O]."""
    ridge = torch.maximum(ridge_rel * cut_cut.diagonal().mean(), floor).clamp_min(1e-30)
    system = cut_cut + ridge * torch.eye(len(cut_cut), dtype=cut_cut.dtype, device=cut_cut.device)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise ValueError("repair: moments are not positive definite; give more calibration images")
    return torch.cholesky_solve(target + ridge * prior, factor)


def fit_columns(
    weight_OI: Tensor,
    keep_OI: Tensor,
    cut_cut: Tensor,
    cut_full: Tensor,
    ridge: float,
    floor: Tensor,
) -> Tensor:
    """Ridge least squares on the entries `keep_OI` marks; rows with the same pattern are solved together.

    Args:
        weight_OI: dense, float64.
        keep_OI: bool.
        cut_cut: [I, I] second moment of the inputs as they will be.
        cut_full: [I, I] of those with the dense layer's inputs.
        ridge: towards the dense weights, of the mean diagonal.
        floor: an input of less variance is rounding.
    """
    # An input that is rounding explains nothing: without moments the ridge leaves its weights alone.
    signal_I = (cut_cut.diagonal() > floor).to(cut_cut.dtype)
    cut_cut, cut_full = cut_cut * torch.outer(signal_I, signal_I), cut_full * signal_I[:, None]
    target_IO = cut_full @ weight_OI.T
    fresh_OI = torch.zeros_like(weight_OI)
    patterns, member = torch.unique(keep_OI, dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        rows, kept = (member == i).nonzero()[:, 0], pattern.nonzero()[:, 0]
        if len(kept):
            prior = weight_OI[rows][:, kept].T
            own_SS = cut_cut[kept][:, kept]
            fitted_SO = _solve(own_SS, target_IO[kept][:, rows], prior, ridge, floor)
            fresh_OI[rows[:, None], kept] = fitted_SO.T
    return fresh_OI


def _choose(
    weight_OI: Tensor, keep_OI: Tensor, fit: _Sums, check: _Sums | None, centred: bool
) -> tuple[float, float]:
    """The (share, ridge) whose fit errs least on held-out images, gradient-weighted."""
    if check is None:
        return _SHARES[1], _RIDGES[1]
    cut_cut, cut_full, _, _ = check.finish(_SHARES[0], centred)
    cross_OI = weight_OI @ cut_full.T
    best = (float("inf"), _SHARES[1], _RIDGES[1])
    for share in _SHARES:
        own_cut, own_full, _, _ = fit.finish(share, centred)
        for ridge in _RIDGES:
            fresh = fit_columns(weight_OI, keep_OI, own_cut, own_full, ridge, fit.rounding())
            # The constant term, the energy of the target, is the same for all candidates.
            error = float(((fresh @ cut_cut) * fresh).sum() - 2 * (fresh * cross_OI).sum())
            best = min(best, (error, share, ridge))
    return best[1], best[2]


@torch.no_grad()
def _refit_(linear: nn.Linear, keep_OI: Tensor, fit: _Sums, check: _Sums | None) -> None:
    """Re-fit a linear on the entries `keep_OI` marks, its bias taking up the change of the mean."""
    weight_OI = linear.weight.detach().double()
    centred = linear.bias is not None
    share, ridge = _choose(weight_OI, keep_OI, fit, check, centred)
    whole = fit if check is None else fit.plus(check)
    cut_cut, cut_full, mean_cut, mean_full = whole.finish(share, centred)
    fresh_OI = fit_columns(weight_OI, keep_OI, cut_cut, cut_full, ridge, whole.rounding())
    if linear.bias is not None:
        shift = weight_OI @ mean_full - fresh_OI @ mean_cut
        linear.bias.copy_((linear.bias.double() + shift).to(linear.bias.dtype))
    linear.weight.copy_(fresh_OI.to(linear.weight.dtype))


def _params(model: nn.Module, units: Sequence[Units], layer: Layer) -> dict[str, Tensor]:
    """Copies of every parameter a layer's units touch, the output bias included."""
    names = {part.param for unit in units for part in unit.slices} | {f"{layer.out}.weight"}
    names |= {name.removesuffix("weight") + "bias" for name in names}
    known = dict(model.named_parameters())
    return {name: known[name].detach().clone() for name in names if name in known}


def _repair_layer(
    model: nn.Module,
    layer: Layer,
    units: Sequence[Units],
    mask: Mask,
    statistics: Statistics,
    stream: Stream,
) -> None:
    """Re-fit one layer and leave it zeroed where the mask says so."""
    dense = _params(model, units, layer)
    blocks = {u.slices[0].param.removesuffix(".weight"): u for u in units if u.kind == "block"}
    # What the output linear reads changes only if something before it is cut in another way than by
    # dropping whole columns: q/k channels and tiles.
    first_in_order = list(blocks) or [layer.out]
    current: dict[str, Tensor] | None = None
    if not blocks:
        upstream = [u for u in units if u.kind == "qk" and not bool(mask[u.name].all())]
        if upstream:
            zero_(model, upstream, {u.name: mask[u.name] for u in upstream})
            current = _params(model, units, layer)
            restore_(model, dense)
    for name in first_in_order:
        linear = get_linear(model, name)
        fit, check = _gather(stream, name, statistics, model, dense, current)
        keep = torch.ones_like(linear.weight, dtype=torch.bool)
        for unit in units:
            for part in unit.slices:
                if part.param == f"{name}.weight" and part.dim in (1, None):
                    grid = mask[unit.name].to(keep.device)
                    keep &= expand(grid, part, linear.weight.shape)
        if current is not None:
            restore_(model, current)
            get_linear(model, name).weight.data.copy_(dense[f"{name}.weight"])
        _refit_(linear, keep, fit, check)
        current = _params(model, units, layer)
        restore_(model, dense)
    assert current is not None
    restore_(model, current)
    zero_(model, units, {u.name: mask[u.name] for u in units})


@torch.no_grad()
def repair_(
    model: nn.Module,
    units: Sequence[Units],
    mask: Mask,
    statistics: Statistics,
    batches: Sequence[Tensor],
    stages: Sequence[nn.Module],
    *,
    progress: Progress | None = None,
) -> None:
    """Zero what the mask drops and re-fit what it keeps, in place.

    Args:
        model: dense, rotated where the mask speaks of qk or vo channels.
        units: the units the mask is about.
        mask: True = keep; names left out are kept.
        statistics: of the same images, for token weights.
        batches: the calibration images, in the order `statistics` saw them.
        stages: the blocks of the model in order, from the family's `stages`.
        progress: called with (stages done, stages).

    Raises:
        ValueError: no images; a model whose blocks do not form a plain column.
    """
    if not sum(len(b) for b in batches):
        raise ValueError("repair: expected calibration images, got none")
    by_stage: dict[int, list[Layer]] = {}
    for layer in layers_of(units):
        mine = [u for u in units if u.layer.name == layer.name and u.name in mask]
        if any(not bool(mask[u.name].all()) for u in mine):
            by_stage.setdefault(layer.stage, []).append(layer)
    with frozen(model):
        inputs, others = stage_calls(model, stages, batches)
        for i, stage in enumerate(stages):
            stream = Stream(stage, others[i], inputs)
            for layer in by_stage.get(i, []):
                mine = [u for u in units if u.layer.name == layer.name and u.name in mask]
                _repair_layer(model, layer, mine, mask, statistics, stream)
            for j, batch in enumerate(inputs):
                inputs[j] = stream.run(batch)
            if progress is not None:
                progress(i + 1, len(stages))
