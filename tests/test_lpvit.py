"""LPViT's masks against float64 brute force on models small enough to enumerate."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from hwprune.lpvit import (
    KAPPA,
    LEVELS,
    SMOOTH,
    block_scores,
    derivative,
    distortion_curve,
    lpvit_masks,
    slope_search,
    tangents,
)
from hwprune.lpvit_calibration import (
    LayerSums,
    block_linears,
    calibrate,
    linear_macs,
)

DEIT_SHAPES = {"S": 384, "B": 768}


class Tiny(nn.Module):
    """Patches, two residual linears under `blocks`, mean over tokens, classifier. 12 tokens."""

    def __init__(self, dim: int = 10, hidden: int = 14) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, stride=2)
        self.blocks = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, dim)])
        self.head = nn.Linear(dim, 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        x = x + self.blocks[1](torch.tanh(self.blocks[0](x)))
        return self.head(x.mean(1))


@pytest.fixture
def tiny() -> tuple[Tiny, list[Tensor]]:
    torch.manual_seed(0)
    return Tiny().double().eval(), [torch.randn(n, 3, 6, 8, dtype=torch.float64) for n in (5, 4)]


def spread(grid: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Independent of hwprune: element (o, i) belongs to block (o // rows, i // columns)."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return grid[rows][:, columns]


def image_gradients(model: nn.Module, batches: list[Tensor], name: str) -> Tensor:
    """[N, O, I], one plain backward pass an image."""
    weight, gradients = model.get_submodule(name).weight, []
    for image in torch.cat(batches).split(1):
        loss = model(image).square().mean()
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten(1))
    return torch.stack(gradients)


def removed_at(level: int, blocks: int) -> int:
    return blocks - math.floor((1 - level / 100) * blocks + 1e-9)


def brute_curve(
    weight: Tensor, g_NOI: Tensor, block: tuple[int, int], fidelity: str
) -> list[float]:
    """Every level from its full element-wise perturbation, with an explicit Hessian."""
    g_OI = g_NOI.mean(0)
    grid = (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    owner = spread(torch.arange(math.prod(grid)).view(grid), block, weight.shape)
    score = torch.stack([(weight * g_OI).abs()[owner == j].mean() for j in range(math.prod(grid))])
    order = score.argsort(stable=True)
    n = weight.numel()
    eye = torch.eye(n, dtype=weight.dtype)
    hessian = KAPPA * eye + g_NOI.flatten(1).mT @ g_NOI.flatten(1) / len(g_NOI)
    curve, quadratic, before = [], 0.0, torch.zeros(n, dtype=weight.dtype)
    for level in range(LEVELS):
        gone = torch.isin(owner, order[: removed_at(level, len(order))])
        delta = -(weight * gone).flatten()
        if fidelity == "paper":
            second = delta @ hessian @ delta
            curve.append(((g_NOI.flatten(1) @ delta + second / 2) ** 2).mean().item())
        else:
            step, g = delta - before, g_OI.flatten()
            quadratic += 0.5 * ((2 * delta + step) @ (g * (g @ step) + KAPPA)).item()
            curve.append(((delta * g) ** 2).mean().item() + quadratic)
            before = delta
    last, smoothed = 0.0, []
    for d, value in enumerate(curve):
        last = SMOOTH * last + (1 - SMOOTH) * value
        smoothed.append(last / (1 - SMOOTH ** (d + 1)))
    return smoothed


@pytest.mark.parametrize("fidelity", ["paper", "repo"])
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (32, 64)])
def test_curve_equals_brute_force(tiny, fidelity, block):
    model, batches = tiny
    for name, sums in calibrate(model, batches, block_linears(model), block).items():
        score = block_scores(sums.weight * sums.gradient, block)
        curve = distortion_curve(sums, score.flatten().argsort(stable=True), block, fidelity)
        weight = model.get_submodule(name).weight.detach()
        brute = brute_curve(weight, image_gradients(model, batches, name), block, fidelity)
        torch.testing.assert_close(
            curve, torch.tensor(brute, dtype=curve.dtype), rtol=1e-9, atol=1e-18
        )


@pytest.mark.parametrize("name", ["blocks.0", "head", "patch_embed"])
def test_block_sums_equal_one_backward_pass_per_image(tiny, name):
    model, batches = tiny
    sums = calibrate(model, batches, [name], (3, 4))[name]
    g_NOI = image_gradients(model, batches, name)
    torch.testing.assert_close(sums.gradient, g_NOI.mean(0))
    weight = model.get_submodule(name).weight.detach().flatten(1)
    grid = (-(-weight.shape[0] // 3), -(-weight.shape[1] // 4))
    owner = spread(torch.arange(math.prod(grid)).view(grid), (3, 4), weight.shape)
    for j in range(math.prod(grid)):
        expected = (g_NOI * weight)[:, owner == j].sum(1)
        torch.testing.assert_close(sums.block_sums[:, j], expected)


def test_derivative_is_exact_on_a_cubic_inside_and_one_sided_at_the_ends():
    alpha = torch.arange(LEVELS, dtype=torch.float64) / 100
    slope = derivative(alpha**3 - 2 * alpha, 4)
    torch.testing.assert_close(slope[8:93], (3 * alpha**2 - 2)[8:93])
    one_sided = (0.04**3 - 2 * 0.04) / 0.04
    assert slope[0].item() == pytest.approx(one_sided)
    assert slope[100].item() == pytest.approx(((1 - 2) - (0.96**3 - 2 * 0.96)) / 0.04)


@pytest.mark.parametrize("seed", range(8))
def test_slope_search_finds_the_best_common_slope(seed):
    g = torch.Generator().manual_seed(seed)
    slopes = torch.rand(4, 12, generator=g, dtype=torch.float64).cumsum(1)  # convex curves
    costs = torch.rand(4, 12, generator=g, dtype=torch.float64).cumsum(1).flip(1)
    weight = 0.5 + torch.rand(4, generator=g, dtype=torch.float64)
    total = costs[:, 0].sum().item()
    for budget in (0.4 * total, 0.7 * total):
        levels = slope_search(
            slopes, costs, 0.1, budget, lambda s: s * weight, (-1.0, 30.0), tolerance=0.0
        )
        # A layer changes level only where s * weight passes midway between two of its slopes.
        turns = ((slopes[:, 1:] + slopes[:, :-1]) / 2 / weight[:, None]).flatten().sort().values
        tries = torch.cat([turns[:1] - 1, (turns[1:] + turns[:-1]) / 2, turns[-1:] + 1])
        all_levels = [(slopes - s * weight[:, None]).abs().argmin(1) for s in tries]
        gaps = [abs(0.1 + costs[range(4), at].sum().item() - budget) for at in all_levels]
        gap = abs(0.1 + costs[range(4), levels].sum().item() - budget)
        assert gap == pytest.approx(min(gaps), abs=1e-12)
        assert any(torch.equal(levels, at) for at in all_levels)


def kept_macs(
    model: nn.Module, masks: dict[str, Tensor], block: tuple[int, int], tokens: int
) -> int:
    kept = 0
    for name, keep in masks.items():
        shape = model.get_submodule(name).weight.shape
        kept += tokens * int(spread(keep, block, shape).sum())
    return kept


@pytest.mark.parametrize("fidelity", ["paper", "repo"])
@pytest.mark.parametrize("keep_ratio", [0.8, 0.5])
def test_true_macs_budget_is_met_within_one_block(fidelity, keep_ratio):
    torch.manual_seed(0)
    model, block = Tiny(40, 56), (2, 3)
    batches = [torch.randn(6, 3, 6, 8)]
    masks = lpvit_masks(
        model, batches, keep_ratio=keep_ratio, block=block, fidelity=fidelity, true_macs=True
    )
    dense = 12 * (12 * 40 + 2 * 40 * 56) + 40 * 7
    macs = dense - 12 * 2 * 40 * 56 + kept_macs(model, masks, block, 12)
    assert keep_ratio * dense - 12 * 6 < macs <= keep_ratio * dense
    assert macs / dense == pytest.approx(keep_ratio, rel=0.002)


def test_published_budget_counts_linears_within_two_points():
    torch.manual_seed(0)
    model, batches = Tiny(40, 56), [torch.randn(6, 3, 6, 8)]
    masks = lpvit_masks(model, batches, keep_ratio=0.6, block=(2, 3))
    dense = linear_macs(model, batches[0], repo_count=False)
    macs = dense - 12 * 2 * 40 * 56 + kept_macs(model, masks, (2, 3), 12)
    assert abs(macs / dense - 0.6) <= 0.02


def test_repo_counts_the_classifier_once_for_each_class(tiny):
    model, batches = tiny
    head, rest = 10 * 7, 12 * (12 * 10 + 2 * 10 * 14)
    assert linear_macs(model, batches[0], repo_count=False) == rest + head
    # dimension 1 of a convolution's output is its channels, which the public code takes for tokens
    assert linear_macs(model, batches[0], repo_count=True) == 12 * 280 + 10 * 120 + 7 * head


def test_repo_masks_by_magnitude_and_paper_by_taylor(tiny):
    model, batches = tiny
    for fidelity in ("paper", "repo"):
        masks = lpvit_masks(model, batches, keep_ratio=0.6, block=(2, 2), fidelity=fidelity)
        assert any(not keep.all() for keep in masks.values())
        for name, keep in masks.items():
            weight = model.get_submodule(name).weight.detach()
            g_OI = image_gradients(model, batches, name).mean(0)
            saliency = weight if fidelity == "repo" else weight * g_OI
            score = saliency.abs().unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3))
            order = score.flatten().argsort()
            removed = int((~keep).sum())
            assert not keep.flatten()[order[:removed]].any(), (fidelity, name)


def flat_sums(tokens: int, outputs: int, inputs: int) -> LayerSums:
    ones = torch.ones(outputs, inputs, dtype=torch.float64)
    return LayerSums(ones, ones, ones[:1], tokens, tokens, inputs)


def two_layers() -> tuple[dict[str, LayerSums], Tensor, Tensor]:
    """The same curve twice; fc2 has four times fc1's inputs."""
    sums = {"fc1": flat_sums(197, 64, 16), "fc2": flat_sums(197, 16, 64)}
    alpha = torch.arange(LEVELS, dtype=torch.float64) / 100
    return sums, (alpha**2).expand(2, -1), 1 - alpha.expand(2, -1)


def test_power_changes_nothing_in_paper_and_spares_wide_inputs_in_repo():
    """With equal tokens the stated power is FLOPs; the code's makes fc2 dear and prunes it less."""
    sums, curves, costs = two_layers()
    levels = {}
    for fidelity in ("paper", "repo"):
        for power in (False, True):
            slopes, threshold, bounds = tangents(curves, costs, sums, fidelity, power)
            levels[fidelity, power] = slope_search(
                slopes, costs, 0.0, 1.2, threshold, bounds, 0.0
            ).tolist()
    assert levels["paper", True] == levels["paper", False] == levels["repo", False]
    assert levels["paper", True][0] == levels["paper", True][1]
    fc1, fc2 = levels["repo", True]
    assert fc1 > fc2


def test_paper_weights_slopes_by_flops_and_repo_does_not():
    sums, curves, costs = two_layers()
    costs = costs * torch.tensor([[4.0], [1.0]], dtype=torch.float64)
    levels = {}
    for fidelity in ("paper", "repo"):
        slopes, threshold, bounds = tangents(curves, costs, sums, fidelity, power=False)
        levels[fidelity] = slope_search(slopes, costs, 0.0, 3.5, threshold, bounds, 0.0).tolist()
    assert levels["paper"][0] > levels["paper"][1]
    assert levels["repo"][0] == levels["repo"][1]


def test_repo_curve_differs_from_the_right_quadratic_by_its_two_mistakes(tiny):
    """At the last level the mistakes do not telescope away: d'(gg' + kappa)d / 2 is not reached."""
    model, batches = tiny
    sums = calibrate(model, batches, ["blocks.0"], (2, 2))["blocks.0"]
    order = block_scores(sums.weight * sums.gradient, (2, 2)).flatten().argsort(stable=True)
    repo = distortion_curve(sums, order, (2, 2), "repo")
    removed = spread(torch.ones(7, 5, dtype=torch.bool), (2, 2), (14, 10))
    delta = -(sums.weight * removed).flatten()
    right = ((delta * sums.gradient.flatten()) ** 2).mean()
    right += (delta @ sums.gradient.flatten()) ** 2 / 2 + KAPPA * (delta @ delta) / 2
    assert abs(repo[-1] / right - 1) > 0.05


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize("block", [(32, 32), (32, 64), (64, 32), (16, 16)])
def test_deit_block_shapes_tile_every_linear(size, block):
    d = DEIT_SHAPES[size]
    for shape in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d)):
        score = block_scores(torch.ones(shape), block)
        assert score.shape == (shape[0] // block[0], shape[1] // block[1])
        assert torch.equal(score, torch.ones_like(score))


def test_deit_masks_have_the_published_grids():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", depth=1, img_size=32, num_classes=10)
    masks = lpvit_masks(model, [torch.randn(2, 3, 32, 32)], keep_ratio=0.6)
    names = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert list(masks) == [f"blocks.0.{name}" for name in names]
    assert [keep.numel() for keep in masks.values()] == [432, 144, 576, 576]


def test_everything_is_kept_at_ratio_one(tiny):
    model, batches = tiny
    assert all(keep.all() for keep in lpvit_masks(model, batches, keep_ratio=1.0).values())


def test_model_is_left_as_it_was(tiny):
    model, batches = tiny
    model.blocks[0].train()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    lpvit_masks(model, batches, keep_ratio=0.7, block=(2, 2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.blocks[0].training and not model.blocks[1].training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_refused_with_the_layer_and_the_next_step(tiny):
    model, batches = tiny
    cases = [
        ({"keep_ratio": 0.0}, r"keep_ratio: expected a number in \(0, 1\], got 0.0"),
        (
            {"keep_ratio": 0.1},
            r"expected at least 0\.\d+, what is left once 95 % of the blocks of 2",
        ),
        ({"keep_ratio": 0.5, "fidelity": "code"}, "expected 'paper' or 'repo', got 'code'"),
        ({"keep_ratio": 0.5, "block": (0, 4)}, "expected two positive sizes"),
        ({"keep_ratio": 0.5, "layers": ["nope"]}, "at 'nope', got no such module; leave it out"),
        ({"keep_ratio": 0.5, "layers": ["blocks"]}, "at 'blocks', got ModuleList"),
        ({"keep_ratio": 0.5, "layers": []}, "expected at least one layer name"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            lpvit_masks(model, batches, **arguments)
    with pytest.raises(ValueError, match="batches: expected calibration images, got none"):
        lpvit_masks(model, [], keep_ratio=0.5)
    with pytest.raises(ValueError, match="linears under `blocks`, got Sequential"):
        lpvit_masks(nn.Sequential(nn.Linear(3, 3)), batches, keep_ratio=0.5)
    model.blocks[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.1: expected finite values in its weight"):
        lpvit_masks(model, batches, keep_ratio=0.5)


def test_activations_that_are_not_finite_name_their_layer(tiny):
    model, batches = tiny
    model.blocks[0].bias.data[3] = math.inf
    with pytest.raises(ValueError, match=r"blocks\.0: expected finite values in its output"):
        lpvit_masks(model, batches, keep_ratio=0.5)
