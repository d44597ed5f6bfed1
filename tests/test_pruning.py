"""The one road from a dense model to a smaller one: what it promises and what it undoes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hwprune.allocate import Budget, UnreachableBudget
from hwprune.cost import count_macs
from hwprune.layers import BlockSparseLinear
from hwprune.pruning import Analysis, analyse, prune

timm = pytest.importorskip("timm")


def vit(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model(name, **{**args, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(batches: int = 2, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(batches * size, 3, 16, 16, generator=generator).split(size))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """Of `vit()` on `images()`."""
    return analyse(vit(), images())


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.5}, {"macs": 0.7, "params": 0.6}])
def test_the_pruned_model_keeps_the_budget_by_its_own_count(
    budget: dict[str, float], analysis: Analysis
) -> None:
    dense, model = vit(), vit()
    report = prune(model, images(), Budget(**budget), analysis=analysis)
    macs, params = count_macs(model, images()[0][:1]), sum(p.numel() for p in model.parameters())
    assert (report.macs, report.params) == (macs, params)
    assert macs <= budget.get("macs", 1) * count_macs(dense, images()[0][:1])
    assert params <= budget.get("params", 1) * sum(p.numel() for p in dense.parameters())


def test_pruning_changes_the_model_in_place(analysis: Analysis) -> None:
    model = vit()
    blocks = model.get_submodule("blocks")
    prune(model, images(), Budget(macs=0.6), analysis=analysis)
    assert model.get_submodule("blocks") is blocks
    assert count_macs(model, images()[0]) < count_macs(vit(), images()[0])


@pytest.mark.parametrize(
    "budget",
    [Budget(macs=1.0), Budget(params=1.0), Budget(macs=1.0, params=1.0), Budget(macs=1e12)],
)
def test_a_budget_of_one_leaves_the_model_bit_for_bit_and_says_so(
    budget: Budget, analysis: Analysis
) -> None:
    model = vit()
    before, modules = state(model), dict(model.named_modules())
    report = prune(model, images(), budget, analysis=analysis)
    assert same(state(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert "nothing was removed" in " ".join(report.warnings)
    assert report.macs_ratio == report.params_ratio == 1
    assert report.distortion["measured"] == 0


def test_a_budget_of_one_keeps_dead_neurons_too() -> None:
    model = vit()
    model.get_parameter("blocks.0.mlp.fc2.weight").data[:, :40] = 0
    before = state(model)
    prune(model, images(), Budget(macs=1.0))
    assert same(state(model), before)


def test_one_analysis_serves_several_budgets_as_separate_ones_would(analysis: Analysis) -> None:
    for macs in (0.5, 0.8):
        shared, own = vit(), vit()
        prune(shared, images(), Budget(macs=macs), analysis=analysis)
        prune(own, images(), Budget(macs=macs))
        assert same(state(shared), state(own))


def test_a_smaller_budget_never_predicts_less_distortion(analysis: Analysis) -> None:
    predicted = [
        prune(vit(), images(), Budget(macs=macs), analysis=analysis).distortion["predicted"]
        for macs in (0.8, 0.6, 0.4)
    ]
    assert predicted == sorted(predicted) and predicted[0] > 0


def test_the_same_seed_prunes_the_same() -> None:
    runs = []
    for seed in (5, 5, 6):
        model = vit()
        prune(model, images(), Budget(macs=0.6), seed=seed)
        runs.append(state(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_pruning_does_not_touch_the_global_random_state() -> None:
    model = vit()
    before = torch.get_rng_state()
    prune(model, images(), Budget(macs=0.6))
    assert torch.equal(torch.get_rng_state(), before)


def test_repair_loses_less_than_cutting_alone(analysis: Analysis) -> None:
    measured = {
        repair: prune(
            vit(), images(), Budget(macs=0.6), analysis=analysis, repair=repair
        ).distortion["measured"]
        for repair in (True, False)
    }
    assert 0 < measured[True] < 0.5 * measured[False]


def test_the_measured_distortion_is_the_divergence_on_the_calibration_images(
    analysis: Analysis,
) -> None:
    dense, model = vit(), vit()
    report = prune(model, images(), Budget(macs=0.6), analysis=analysis)
    with torch.no_grad():
        p, q = (torch.cat([m(b).double() for b in images()]).softmax(-1) for m in (dense, model))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert report.distortion["measured"] == pytest.approx(expected, rel=1e-4)
    assert report.distortion["unit"] == "nats"


def test_kinds_block_gives_block_sparse_linears_and_no_smaller_ones() -> None:
    model = vit()
    report = prune(model, images(), Budget(macs=0.6), kinds=["block"], block=(8, 8))
    sparse = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert sparse and all(m.block == (8, 8) and m.density < 1 for m in sparse)
    linears = {n: m for n, m in vit().named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        now = model.get_submodule(name)
        assert (now.in_features, now.out_features) == (linear.in_features, linear.out_features)
    assert report.kinds == ("block",)
    assert report.macs_ratio <= 0.6


def test_tiles_cut_down_to_empty_linears_still_give_a_sane_model() -> None:
    model, dense = vit(), vit()
    report = prune(model, images(8), Budget(macs=0.3), kinds=["block"], block=(24, 24))
    unrepaired = prune(
        dense, images(8), Budget(macs=0.3), kinds=["block"], block=(24, 24), repair=False
    )
    assert report.distortion["measured"] < unrepaired.distortion["measured"]


@pytest.mark.parametrize("kinds", [["head"], ["neuron"], ["qk", "vo"], ["head", "neuron"]])
def test_only_the_kinds_asked_for_are_cut(kinds: list[str]) -> None:
    model = vit()
    report = prune(model, images(), Budget(macs=0.8), kinds=kinds)
    assert report.macs_ratio <= 0.8
    now = dict(model.named_modules())
    for name, module in vit().named_modules():
        if name.endswith(".fc1"):
            assert "neuron" in kinds or now[name].out_features == module.out_features
        if name.endswith(".attn"):
            slim = now[name]
            assert "head" in kinds or slim.num_heads == 3
            assert "qk" in kinds or getattr(slim, "qk_width", 8) == 8
            assert "vo" in kinds or getattr(slim, "v_width", 8) == 8


def test_neurons_are_kept_in_multiples_of_the_rounding() -> None:
    model = vit()
    prune(model, images(), Budget(macs=0.7), kinds=["neuron"], round_to=16)
    for i in range(2):
        width = model.get_submodule(f"blocks.{i}.mlp.fc1").out_features
        assert width % 16 == 0


def test_a_device_is_refused_because_these_budgets_need_none() -> None:
    model = vit()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"device='cuda:0': budgets macs, params and memory need no device"
    ):
        prune(model, images(), Budget(macs=0.6), device="cuda:0")
    assert same(state(model), before)


def test_an_unreachable_budget_leaves_the_model_as_it_was(analysis: Analysis) -> None:
    model = vit()
    before = state(model)
    with pytest.raises(UnreachableBudget, match=r"blocks\.1\.mlp: 0\.000"):
        prune(model, images(), Budget(macs=0.01), analysis=analysis)
    assert same(state(model), before)


@pytest.mark.parametrize(
    "step",
    [
        "cutting.repair_",
        "cutting.realise_",
        "cutting._check_same",
        "pruning.count_macs",
        "cutting.zero_",
    ],
)
def test_a_failure_at_any_step_restores_the_model_and_its_weights(
    step: str, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    before, modules, x = state(model), dict(model.named_modules()), images()[0]
    with torch.no_grad():
        expected = model(x)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("made up")

    monkeypatch.setattr(f"hwprune.{step}", fail)
    with pytest.raises(MemoryError, match="made up"):
        prune(model, images(), Budget(macs=0.6), analysis=analysis, repair=step != "cutting.zero_")
    assert same(state(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_an_interrupt_in_the_middle_of_the_re_fit_restores_the_model(analysis: Analysis) -> None:
    model = vit()
    before = state(model)

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "repair":
            assert not same(state(model), before)  # the first stage is cut already
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, images(), Budget(macs=0.5), analysis=analysis, progress=interrupt)
    assert same(state(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_mode_is_pruned_like_one_that_is_not(training: bool) -> None:
    model = vit(proj_drop_rate=0.3, drop_path_rate=0.3).train(training)
    report = prune(model, images(), Budget(macs=0.6))
    assert {m.training for m in model.modules()} == {training}
    reference = vit(proj_drop_rate=0.3, drop_path_rate=0.3)
    expected = prune(reference, images(), Budget(macs=0.6))
    assert report.distortion == expected.distortion
    assert same(state(model), state(reference))


def test_a_distilled_model_with_two_heads_is_pruned_in_training_mode_too() -> None:
    model = vit("deit_tiny_distilled_patch16_224").train()
    model.set_distilled_training(True)  # now its output is two sets of logits
    assert prune(model, images(), Budget(macs=0.6)).macs_ratio <= 0.6
    assert isinstance(model(images()[0]), tuple)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_224",
        "vit_pe_core_tiny_patch16_384",
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "deit3_small_patch16_224",
    ],
)
def test_other_vision_transformers_of_timm_are_pruned_to_their_budget(name: str) -> None:
    model = vit(name)
    report = prune(model, images(), Budget(macs=0.8))
    assert report.macs_ratio <= 0.8
    assert 0 < report.distortion["measured"] < 1


def test_a_feature_model_is_judged_by_squared_distance() -> None:
    report = prune(vit(num_classes=0), images(), Budget(macs=0.6))
    assert report.distortion["unit"] == "half squared feature distance"
    assert report.distortion["measured"] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_of_the_model_is_kept(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    report = prune(model, images(), Budget(macs=0.6))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.distortion["measured"] < 0.1


def test_batches_may_come_from_a_generator(analysis: Analysis) -> None:
    def stream() -> Iterator[Tensor]:
        yield from images()

    given, listed = vit(), vit()
    prune(given, stream(), Budget(macs=0.6))  # type: ignore[arg-type]
    prune(listed, images(), Budget(macs=0.6))
    assert same(state(given), state(listed))


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 16, 16)]])
def test_no_images_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        prune(vit(), batches, Budget(macs=0.6))


def test_a_model_that_is_pruned_already_is_refused(analysis: Analysis) -> None:
    model = vit()
    prune(model, images(), Budget(macs=0.8), analysis=analysis)
    before = state(model)
    for again in (prune, lambda *a, **k: analyse(*a[:2])):
        with pytest.raises(ValueError, match="is pruned already"):
            again(model, images(), Budget(macs=0.6))
    assert same(state(model), before)


def test_a_model_a_budget_of_one_left_dense_can_be_pruned_afterwards(analysis: Analysis) -> None:
    model = vit()
    prune(model, images(), Budget(macs=1.0), analysis=analysis)
    assert prune(model, images(), Budget(macs=0.6), analysis=analysis).macs_ratio <= 0.6


def test_a_copy_of_a_pruned_model_computes_the_same(analysis: Analysis) -> None:
    model = vit()
    prune(model, images(), Budget(macs=0.5), analysis=analysis)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(images()[0]), model(images()[0]))


def test_progress_names_the_steps_in_order() -> None:
    seen: list[str] = []
    prune(vit(), images(), Budget(macs=0.6), progress=lambda step, done, total: seen.append(step))
    assert list(dict.fromkeys(seen)) == ["calibrate", "curves", "repair"]


def test_the_report_lists_what_is_kept_of_every_layer(analysis: Analysis) -> None:
    model = vit()
    report = prune(model, images(), Budget(macs=0.5), analysis=analysis)
    rows = {row["layer"]: row["kept"] for row in report.layers}
    assert list(rows) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    width = model.get_submodule("blocks.0.mlp.fc1").out_features
    assert rows["blocks.0.mlp"] == {"neurons": width}
