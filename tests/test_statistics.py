"""The calibration pass against autograd and plain float64 sums over collected activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hwprune.statistics import Statistics, calibrate, model_output, output_distance
from hwprune.units import MlpLayer, Rows, Slice, Units

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

Probe = Callable[[Tensor, bool, torch.Generator], Tensor]


def vit(**changes: object) -> nn.Module:
    """A tiny float64 ViT whose every weight matters: 16 + 1 tokens, 3 heads of 8."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, 16, 16, dtype=torch.float64) for n in sizes]


def known_probe(out: Tensor, classifier: bool, generator: torch.Generator) -> Tensor:
    """The same for every image, so that batches can be split at will."""
    return torch.linspace(-1, 1.5, out.shape[1], dtype=out.dtype).expand_as(out)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setattr("hwprune.statistics._probe", known_probe)
    return known_probe


def observed(model: nn.Module, name: str, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Input [N, T, I] of a linear and the gradient [N, T, O] of the known probe at its output."""
    xs, gs = [], []
    for batch in batches:
        kept: list[tuple[Tensor, Tensor]] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, args, out, kept=kept: kept.append((args[0].detach(), out))
        )
        out = model(batch)
        handle.remove()
        ((x, y),) = kept
        scalar = (out * known_probe(out.detach(), True, torch.Generator())).sum()
        xs.append(x)
        gs.append(torch.autograd.grad(scalar, y)[0])
    return torch.cat(xs), torch.cat(gs)


WATCHED = ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]


def test_moments_under_uniform_weights_are_plain_averages_over_all_tokens() -> None:
    model, batches = vit(), images(3, 4)
    found = calibrate(model, timm_vit.find_units(model), batches, weighting="uniform")
    assert sorted(found.linear) == sorted(WATCHED)
    for name in WATCHED:
        x = observed(model, name, batches)[0].flatten(0, 1)
        moments, mean = found.linear[name], x.mean(0)
        centred = (x - mean).T @ (x - mean) / len(x)
        torch.testing.assert_close(moments.mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.centred, centred, rtol=1e-10, atol=1e-12)


def test_the_metric_is_the_mean_over_images_of_summed_gradient_products(known: Probe) -> None:
    model, batches = vit(), images(3, 4)
    found = calibrate(model, timm_vit.find_units(model), batches)
    for name in WATCHED:
        g_NTO = observed(model, name, batches)[1]
        expected = torch.einsum("nto,ntp->op", g_NTO, g_NTO) / 7
        torch.testing.assert_close(found.linear[name].metric, expected, rtol=1e-9, atol=1e-15)


def test_token_weights_are_the_squared_gradients_of_each_token(known: Probe) -> None:
    model, batches = vit(), images(3, 4)
    found = calibrate(model, timm_vit.find_units(model), batches)
    for name in WATCHED:
        expected = observed(model, name, batches)[1].square().sum(-1)
        got = found.linear[name].token_weight
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, check_dtype=False)


def test_the_moments_of_queries_are_those_of_each_head(known: Probe) -> None:
    model, batches = vit(), images(3, 4)
    found = calibrate(
        model, timm_vit.find_units(model, ["qk"]), batches, weighting="uniform"
    ).queries["blocks.1.attn"]
    kept: list[Tensor] = []
    handle = model.get_submodule("blocks.1.attn.qkv").register_forward_hook(
        lambda _, args, out: kept.append(out)
    )
    out = model(torch.cat(batches))
    handle.remove()
    scalar = (out * known(out.detach(), True, torch.Generator())).sum()
    (gradient,) = torch.autograd.grad(scalar, kept[0])
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)  # q comes first in timm's fused qkv
        q = kept[0].detach()[..., rows].flatten(0, 1)
        g = gradient[..., rows].flatten(0, 1)
        torch.testing.assert_close(found.second[head], q.T @ q / len(q), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.metric[head], g.T @ g / 7, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["head", "neuron", "qk", "vo", "block"])
def test_block_sums_are_the_weight_times_its_gradient_for_each_image(
    kind: str, known: Probe
) -> None:
    model, batches = vit(), images(2, 3)
    units = timm_vit.find_units(model, [kind], block=(7, 10))
    sums = calibrate(model, units, batches, sums=True).sums
    for unit in units:
        # What zeroing alone takes the unit out: output columns, or q and k rows, or the tile.
        part = unit.slices[0] if kind in ("qk", "block") else unit.slices[-1]
        weight = model.get_parameter(part.param)
        expected = torch.zeros(5, unit.count, dtype=torch.float64)
        for n, image in enumerate(torch.cat(batches).split(1)):
            out = model(image)
            scalar = (out * known(out.detach(), True, torch.Generator())).sum()
            product = weight.detach() * torch.autograd.grad(scalar, weight)[0]
            for j in range(unit.count):
                if part.index is None:
                    row, col = divmod(j, unit.shape[1])
                    own = product[7 * row : 7 * row + 7, 10 * col : 10 * col + 10]
                else:
                    own = product.index_select(part.dim or 0, part.index[j])
                expected[n, j] = own.sum()
        torch.testing.assert_close(sums[unit.name], expected, rtol=1e-9, atol=1e-12)


class Ending(nn.Module):
    """Hidden units and an output linear that is the model's output: its gradient is the probe."""

    def __init__(self, inputs: int, outputs: int, num_classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Identity(), nn.Linear(inputs, outputs)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(x)


def ending_units(model: Ending) -> list[Units]:
    inputs = model.fc2.in_features
    layer = MlpLayer("mlp", 0, (Rows("fc1", 0, inputs),), "fc2", inputs)
    part = Slice("fc2.weight", 1, torch.arange(inputs)[:, None])
    return [Units("mlp:neuron", layer, "neuron", (inputs,), (part,))]


def test_the_probe_of_a_classifier_has_the_covariance_of_the_fisher() -> None:
    model = Ending(2, 4, num_classes=4)
    nn.init.zeros_(model.fc2.weight)
    model.fc2.bias.data = torch.tensor([1.0, -0.5, 0.3, 2.0])
    draws = 40_000
    found = calibrate(model, ending_units(model), [torch.randn(draws, 2)])
    p = model.fc2.bias.detach().double().softmax(0)
    # Entries of v are at most 1 in size, so the average of products is within 4 sigma of 4 / √draws.
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(found.linear["fc2"].metric, expected, rtol=0, atol=4 * draws**-0.5)


def test_the_probe_of_a_feature_model_has_unit_covariance() -> None:
    model = Ending(2, 3, num_classes=0)
    draws = 40_000
    found = calibrate(model, ending_units(model), [torch.randn(draws, 2)])
    assert found.output == "feature"
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.linear["fc2"].metric, eye, rtol=0, atol=4 * draws**-0.5)


def test_a_small_spread_about_a_large_mean_keeps_its_digits_in_float32() -> None:
    x, model = 1e3 + 1e-1 * torch.randn(512, 6), Ending(6, 3, num_classes=0)
    found = calibrate(model, ending_units(model), list(x.split(128)), weighting="uniform")
    exact = torch.cov(x.double().T, correction=0)
    # Raw float32 sums of squares near 1e6 would carry an error of 0.1, ten times the variance itself.
    torch.testing.assert_close(found.linear["fc2"].centred, exact, rtol=1e-3, atol=1e-5)


def test_gradient_weights_follow_the_token_the_output_reads() -> None:
    model = vit(depth=1)  # the classifier reads only the class token, so only it has a gradient
    (batch,) = images(6)
    units = timm_vit.find_units(model, ["neuron"])
    name = "blocks.0.mlp.fc2"
    weighted = calibrate(model, units, [batch]).linear[name].mean
    uniform = calibrate(model, units, [batch], weighting="uniform").linear[name].mean
    class_token = observed(model, name, [batch])[0][:, 0].mean(0)
    assert (weighted - class_token).norm() < 0.5 * (uniform - class_token).norm()


def compare(a: Statistics, b: Statistics) -> None:
    assert a.images == b.images
    for name in a.linear:
        for field in ("second", "mean", "centred", "metric"):
            torch.testing.assert_close(
                getattr(a.linear[name], field),
                getattr(b.linear[name], field),
                rtol=1e-9,
                atol=1e-12,
            )


def test_uniform_statistics_do_not_depend_on_how_images_are_batched(known: Probe) -> None:
    model, (batch,) = vit(), images(12)
    units = timm_vit.find_units(model)
    whole = calibrate(model, units, [batch], weighting="uniform")
    for size in (1, 5, 12):
        compare(whole, calibrate(model, units, list(batch.split(size)), weighting="uniform"))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_batch_among_others_changes_nothing(place: int, known: Probe) -> None:
    model, (batch,) = vit(), images(4)
    units = timm_vit.find_units(model, ["neuron"])
    split = [batch[:1], batch[1:]]
    more = [*split[:place], batch[:0], *split[place:]]
    compare(calibrate(model, units, split), calibrate(model, units, more))


def test_a_seed_decides_the_probe() -> None:
    model, batches = vit(), images(4)
    units = timm_vit.find_units(model, ["neuron"])

    def metric(seed: int) -> Tensor:
        return calibrate(model, units, batches, seed=seed).linear["blocks.0.mlp.fc2"].metric

    assert torch.equal(metric(3), metric(3))
    assert not torch.equal(metric(3), metric(4))


def test_calibration_leaves_the_model_as_it_was_bit_for_bit() -> None:
    model, batches = vit(), images(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, timm_vit.find_units(model), batches, sums=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_training_mode_and_frozen_flags_and_hooks_are_as_before(fails: bool) -> None:
    model, batches = vit(), images(2)
    model.train()
    model.get_submodule("blocks.0").eval()
    model.get_parameter("blocks.1.mlp.fc1.weight").requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    units = timm_vit.find_units(model)
    if fails:
        with pytest.raises(ValueError, match="NaN"):
            calibrate(model, units, [batches[0] * float("nan")], sums=True)
    else:
        calibrate(model, units, batches, sums=True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not [name for name, m in model.named_modules() if m._forward_hooks]


def test_calibration_works_on_a_model_whose_weights_are_all_frozen() -> None:
    model, batches = vit(), images(2)
    units = timm_vit.find_units(model)
    expected = calibrate(model, units, batches)
    compare(expected, calibrate(model.requires_grad_(False), units, batches))


def test_calibration_works_under_no_grad() -> None:
    model, batches = vit(), images(2)
    with torch.no_grad():
        found = calibrate(model, timm_vit.find_units(model, ["head"]), batches)
    assert float(found.linear["blocks.0.attn.proj"].metric.trace()) > 0


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 16, 16)]])
def test_no_images_are_refused(batches: list[Tensor]) -> None:
    model = vit()
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        calibrate(model, timm_vit.find_units(model), batches)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = vit()
    model.get_parameter("blocks.1.mlp.fc1.weight").data[3, 2] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight: expected finite weights"):
        calibrate(model, timm_vit.find_units(model), images(2))


def test_an_image_with_nan_names_the_first_layer_it_reaches() -> None:
    model, (batch,) = vit(), images(2)
    batch[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj: NaN or Inf in its input"):
        calibrate(model, timm_vit.find_units(model), [batch])


def test_activations_that_overflow_name_the_layer() -> None:
    model, batches = vit().float(), [b.float() for b in images(2)]
    model.get_parameter("blocks.1.norm2.weight").data.fill_(1e30)
    model.get_parameter("blocks.1.mlp.fc1.weight").data.mul_(1e10)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2: NaN or Inf in its input"):
        calibrate(model, timm_vit.find_units(model), batches)


def test_a_classifier_of_zeros_is_refused_because_no_gradient_passes_it() -> None:
    model = vit()
    nn.init.zeros_(model.get_parameter("head.weight"))
    with pytest.raises(ValueError, match=r"blocks\.0\..*: no gradient reaches it.*trained model"):
        calibrate(model, timm_vit.find_units(model), images(2))


def test_an_output_that_is_no_row_of_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits or features \[B, C\], got \(2, 3, 4\)"):
        model_output(nn.Identity(), torch.zeros(2, 3, 4))


def test_progress_counts_images_up_to_all_of_them() -> None:
    model, batches = vit(), images(3, 2)
    seen: list[tuple[int, int]] = []
    calibrate(
        model,
        timm_vit.find_units(model, ["head"]),
        batches,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 5), (5, 5)]


def test_the_bytes_reported_are_those_of_the_tensors_kept() -> None:
    model, batches = vit(depth=1), images(2)
    found = calibrate(model, timm_vit.find_units(model, ["neuron"]), batches)
    hidden, width = 96, 24
    assert found.peak_bytes >= 8 * (hidden * hidden + width * width)
    assert found.peak_bytes < 2 * 8 * (hidden * hidden + width * width)


def test_distance_of_logits_is_the_divergence_from_the_reference() -> None:
    out, reference = torch.randn(4, 7), torch.randn(4, 7)
    expected = nn.functional.kl_div(
        out.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    got = output_distance(out, reference, classifier=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert bool((got > 0).all())


def test_distance_of_features_is_half_the_squared_distance() -> None:
    out, reference = torch.randn(4, 7), torch.randn(4, 7)
    got = output_distance(out, reference, classifier=False)
    expected = 0.5 * torch.cdist(out, reference).diagonal().square()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
