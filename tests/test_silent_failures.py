"""The ways public pruning tools go wrong without a word; each is a test here.

Seen in others: heads mixed up, the softmax scale of the new width, nothing pruned and no message, NaN
after a load that did not match, an optimizer holding the old parameters, a version that drifts, mask
buffers left in the state dict, a target met on paper only.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hwprune
from hwprune.allocate import Budget
from hwprune.layers import SlimAttention
from hwprune.pruning import prune
from hwprune.realise import masked, realise_, reshape_
from hwprune.units import Mask, Units

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm

HEADS, WIDTH, TOKENS = 3, 8, 17


def vit(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": HEADS}
    model = timm.create_model(name, **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def pruned(macs: float = 0.6) -> nn.Module:
    model = vit()
    prune(model, [images()], Budget(macs=macs))
    return model


def cut(kinds: list[str], mask: dict[str, list[int]]) -> tuple[nn.Module, list[Units], Mask]:
    """A realised model that keeps the units listed by kind, and what it was cut by."""
    model = vit()
    units = timm_vit.find_units(model, kinds)
    grids = {u.name: torch.zeros(u.count, dtype=torch.bool) for u in units}
    for u in units:
        grids[u.name][mask[u.kind]] = True
    realise_(model, units, grids)
    return model, units, grids


@pytest.mark.parametrize("kept", [[0, 2], [1], [1, 2]])
def test_each_head_left_is_one_of_the_old_heads_and_no_mixture(kept: list[int]) -> None:
    dense, (model, _, _) = vit(), cut(["head"], {"head": kept})
    old = dense.get_parameter("blocks.0.attn.qkv.weight").view(3, HEADS, WIDTH, 24)
    new = model.get_parameter("blocks.0.attn.qkv.weight").view(3, len(kept), WIDTH, 24)
    assert torch.equal(new, old[:, kept])
    old_bias = dense.get_parameter("blocks.0.attn.qkv.bias").view(3, HEADS, WIDTH)
    new_bias = model.get_parameter("blocks.0.attn.qkv.bias").view(3, len(kept), WIDTH)
    assert torch.equal(new_bias, old_bias[:, kept])
    old_out = dense.get_parameter("blocks.0.attn.proj.weight").view(24, HEADS, WIDTH)
    new_out = model.get_parameter("blocks.0.attn.proj.weight").view(24, len(kept), WIDTH)
    assert torch.equal(new_out, old_out[:, kept])


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_softmax_scale_stays_that_of_the_dense_width(width: int) -> None:
    model, _, _ = cut(["qk"], {"qk": list(range(width))})
    slim = model.get_submodule("blocks.0.attn")
    assert isinstance(slim, SlimAttention)
    assert slim.qk_width == width
    assert slim.scale == pytest.approx(1 / math.sqrt(WIDTH))


def by_definition(slim: SlimAttention, x: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v, head by head, from the layer's weights."""
    q, k, v = slim.qkv(x).split(
        [slim.num_heads * w for w in (slim.qk_width, slim.qk_width, slim.v_width)], dim=-1
    )
    heads = []
    for h in range(slim.num_heads):
        own_q, own_k = (t[..., h * slim.qk_width : (h + 1) * slim.qk_width] for t in (q, k))
        own_v = v[..., h * slim.v_width : (h + 1) * slim.v_width]
        heads.append(F.softmax(own_q @ own_k.mT * scale, dim=-1) @ own_v)
    return slim.proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize(("qk", "v"), [(3, 8), (8, 5), (4, 4), (2, 7)])
def test_slim_attention_is_attention_by_definition_on_every_path(qk: int, v: int) -> None:
    model, _, _ = cut(
        ["head", "qk", "vo"], {"head": [0, 2], "qk": list(range(qk)), "vo": [*range(v)]}
    )
    slim = model.get_submodule("blocks.1.attn")
    assert isinstance(slim, SlimAttention)
    x = torch.randn(2, TOKENS, 24)
    with torch.no_grad():
        expected = by_definition(slim, x, WIDTH**-0.5)
        torch.testing.assert_close(slim(x), expected, rtol=1e-5, atol=1e-5)
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(slim(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_fused_and_unfused_attention_of_timm_are_cut_to_the_same(name: str, fused: bool) -> None:
    model = vit(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    units = timm_vit.find_units(model, ["head", "vo"])
    mask = {u.name: torch.arange(u.count) > 0 for u in units}
    with torch.no_grad():
        with masked(model, units, mask):
            zeroed = model(images())
        realise_(model, units, mask)
        torch.testing.assert_close(model(images()), zeroed, rtol=1e-5, atol=1e-5)


def test_nothing_pruned_is_said_in_the_report() -> None:
    report = prune(vit(), [images()], Budget(macs=1.0))
    assert any("nothing was removed" in warning for warning in report.warnings)
    assert "nothing was removed" in str(report)


def test_nothing_to_prune_is_an_error_and_no_silent_success() -> None:
    with pytest.raises(ValueError, match="norm over the hidden neurons"):
        prune(vit(scale_mlp_norm=True), [images()], Budget(macs=0.9), kinds=["neuron"])
    with pytest.raises(ValueError, match="ResNet is of no family of vision transformers"):
        prune(timm.create_model("resnet18"), [images()], Budget(macs=0.9))


def test_realising_a_mask_that_keeps_everything_is_an_error() -> None:
    model = vit()
    units = timm_vit.find_units(model)
    with pytest.raises(ValueError, match="there is nothing to remove"):
        realise_(model, units, {u.name: torch.ones(u.shape, dtype=torch.bool) for u in units})


def test_dense_weights_do_not_load_into_a_pruned_model() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        pruned().load_state_dict(vit().state_dict())


def test_pruned_weights_do_not_load_into_a_dense_model() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        vit().load_state_dict(pruned().state_dict())


def test_weights_of_another_pruning_do_not_load_into_this_shape() -> None:
    model, _, _ = cut(["head", "neuron"], {"head": [0, 1], "neuron": list(range(40))})
    other, _, _ = cut(["head", "neuron"], {"head": [0, 1], "neuron": list(range(48))})
    shape = {f"blocks.{i}.attn": {"type": "attention", "heads": 2, "qk": 8, "v": 8} for i in (0, 1)}
    shape |= {f"blocks.{i}.mlp": {"type": "mlp", "neurons": 40} for i in (0, 1)}
    fresh = vit()
    reshape_(fresh, timm_vit.find_layers(fresh)[0], shape)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(other.state_dict())
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images()), model(images()))


def test_weights_with_nan_are_refused_before_anything_is_cut() -> None:
    model = vit()
    model.get_parameter("blocks.1.attn.qkv.weight").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight: expected finite weights"):
        prune(model, [images()], Budget(macs=0.6))


def test_a_pruned_model_gives_finite_outputs_on_images_it_has_not_seen() -> None:
    for macs in (0.8, 0.5, 0.3):
        with torch.no_grad():
            assert bool(torch.isfinite(pruned(macs)(10 * torch.randn(8, 3, 16, 16))).all())


def test_an_optimizer_made_after_pruning_holds_the_parameters_that_are_used() -> None:
    model = pruned()
    x = images()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        out = model(x)
    model(x).square().sum().backward()
    optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still, f"a step moved everything but {still}"
    with torch.no_grad():
        assert not torch.equal(model(x), out)


def test_every_parameter_of_a_pruned_model_is_a_trainable_leaf_that_gets_a_gradient() -> None:
    model = pruned()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.is_leaf, name
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_rebuilt_layers_have_new_parameters_that_share_no_memory_with_the_dense_model() -> None:
    model = vit()
    old = {name: p for name, p in model.named_parameters() if ".attn." in name or ".mlp." in name}
    prune(model, [images()], Budget(macs=0.4))
    new = dict(model.named_parameters())
    rebuilt = [n for n in old if n in new and new[n].shape != old[n].shape]
    assert rebuilt
    storages = {p.untyped_storage().data_ptr() for p in old.values()}
    for name in rebuilt:
        assert new[name] is not old[name], name
        assert new[name].untyped_storage().data_ptr() not in storages, name


def test_a_pruned_model_can_be_trained_further_and_improves() -> None:
    dense, model, x = vit(), pruned(0.4), images(64)
    with torch.no_grad():
        target = dense(x).softmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.kl_div(model(x).log_softmax(-1), target, reduction="batchmean")
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_version_is_that_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("hwprune")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hwprune is not installed here, only on the path")
    assert hwprune.__version__ == installed


def test_no_masks_or_other_buffers_are_left_in_the_state_dict() -> None:
    model, dense = pruned(), vit()
    assert set(model.state_dict()) == set(dense.state_dict())
    assert not [n for n in model.state_dict() if "mask" in n]
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}


def test_no_hooks_are_left_on_a_pruned_model() -> None:
    for name, module in pruned().named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks), name


def linear_and_attention_macs(model: nn.Module, x: Tensor) -> float:
    """An own count of one image: products of linears, of the patch convolution, of q kᵀ and of p v."""
    total, handles = 0.0, []

    def linear(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Linear)
        total += args[0].numel() / len(x) * module.out_features

    def conv(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += out.numel() / len(x) * module.weight[0].numel()

    def attention(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        qk = getattr(module, "qk_width", module.head_dim)
        total += module.num_heads * args[0].shape[1] ** 2 * (qk + getattr(module, "v_width", qk))

    for module in model.modules():
        hook = linear if isinstance(module, nn.Linear) else None
        hook = conv if isinstance(module, nn.Conv2d) else hook
        hook = attention if hasattr(module, "num_heads") and hasattr(module, "proj") else hook
        if hook is not None:
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("macs", [0.8, 0.55, 0.3])
def test_the_target_is_met_by_an_independent_count_of_the_realised_model(macs: float) -> None:
    model = vit()
    report = prune(model, [images()], Budget(macs=macs))
    counted = linear_and_attention_macs(model, images(2))
    dense = linear_and_attention_macs(vit(), images(2))
    assert counted <= macs * dense
    assert counted == pytest.approx(report.macs, rel=1e-3)
    assert dense == pytest.approx(report.dense_macs, rel=1e-3)


def test_a_parameter_target_does_not_hide_a_model_that_computes_more() -> None:
    report = prune(vit(), [images()], Budget(params=0.5))
    assert report.params_ratio <= 0.5
    assert report.macs_ratio < 0.75


def test_pruning_a_copy_leaves_the_original_alone() -> None:
    model = vit()
    with torch.no_grad():
        before = model(images())
        prune(copy.deepcopy(model), [images()], Budget(macs=0.4))
        assert torch.equal(model(images()), before)
