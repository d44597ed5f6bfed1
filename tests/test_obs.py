"""Elimination orders and curves against least squares solved from scratch for every prefix."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hwprune.obs import (
    damped_inverse,
    eliminate_blocks,
    eliminate_columns,
    eliminate_groups,
    merge_rows,
    sqrt_psd,
)


def problem(outputs: int, inputs: int, samples: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight [O, I], data [N, I] with correlated columns, and the inverse of dataᵀ data."""
    generator = torch.Generator().manual_seed(inputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data = draw(samples or 4 * inputs, inputs) @ (torch.eye(inputs) + 0.4 * draw(inputs, inputs))
    return draw(outputs, inputs), data, torch.linalg.inv(data.T @ data)


def loss_without(weight: Tensor, data: Tensor, removed: list[int]) -> float:
    """|data Wᵀ - data[kept] W'ᵀ|² with the best W', by QR and not by normal equations."""
    kept = [i for i in range(weight.shape[1]) if i not in set(removed)]
    target = data @ weight.T
    if not kept:
        return float(target.square().sum())
    fitted = torch.linalg.lstsq(data[:, kept], target).solution
    return float((target - data[:, kept] @ fitted).square().sum())


def check_prefixes(
    weight: Tensor, data: Tensor, groups: list[list[int]], order: Tensor, curve: Tensor
) -> None:
    """Every point of the curve is the loss of its prefix of the order, solved from scratch."""
    assert sorted(order.tolist()) == list(range(len(groups)))
    assert curve.shape == (len(groups) + 1,) and float(curve[0]) == 0
    for k in range(1, len(groups) + 1):
        removed = list(itertools.chain.from_iterable(groups[u] for u in order[:k].tolist()))
        assert float(curve[k]) == pytest.approx(loss_without(weight, data, removed), rel=1e-7)


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 9), (1, 6), (12, 4), (3, 1)])
def test_every_prefix_of_a_column_order_costs_what_least_squares_says(
    outputs: int, inputs: int
) -> None:
    weight, data, inverse = problem(outputs, inputs)
    order, curve = eliminate_columns(weight, inverse)
    check_prefixes(weight, data, [[i] for i in range(inputs)], order, curve)


def test_every_step_takes_the_column_that_costs_least_at_that_moment() -> None:
    weight, data, inverse = problem(4, 8)
    order, _ = eliminate_columns(weight, inverse)
    for k in range(8):
        gone = order[:k].tolist()
        cost = {i: loss_without(weight, data, [*gone, i]) for i in range(8) if i not in gone}
        assert int(order[k]) == min(cost, key=cost.__getitem__)


@pytest.mark.parametrize("inputs", [64, 65, 130])
def test_the_curve_is_exact_across_the_flush_of_pending_updates(inputs: int) -> None:
    weight, data, inverse = problem(6, inputs, 2 * inputs)
    order, curve = eliminate_columns(weight, inverse)
    assert sorted(order.tolist()) == list(range(inputs))
    for k in (1, 62, 63, 64, 65, 66, 127, 128, 129, 130):
        if k <= inputs:
            expected = loss_without(weight, data, order[:k].tolist())
            assert float(curve[k]) == pytest.approx(expected, rel=1e-6)


def test_a_step_after_the_flush_is_still_the_cheapest() -> None:
    weight, data, inverse = problem(6, 70, 140)
    order, _ = eliminate_columns(weight, inverse)
    gone = order[:66].tolist()
    cost = {i: loss_without(weight, data, [*gone, i]) for i in range(70) if i not in gone}
    assert int(order[66]) == min(cost, key=cost.__getitem__)


def test_a_column_order_given_is_kept_and_priced() -> None:
    weight, data, inverse = problem(3, 7)
    given = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    order, curve = eliminate_columns(weight, inverse, given)
    assert torch.equal(order, given)
    check_prefixes(weight, data, [[i] for i in range(7)], order, curve)


def test_a_removed_column_is_never_taken_twice_when_the_weight_is_all_zero() -> None:
    _, _, inverse = problem(3, 70)
    order, curve = eliminate_columns(torch.zeros(3, 70), inverse)
    assert sorted(order.tolist()) == list(range(70))
    assert float(curve.abs().max()) == 0


GROUPS = [
    [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    [[0, 3], [1, 4], [2, 5]],  # columns 6 to 8 belong to no unit and stay
    [[8, 0], [7, 1], [6, 2], [5, 3]],
    [[4], [2], [8], [0], [1], [3], [5], [6], [7]],  # single columns, but not in order
]


@pytest.mark.parametrize("groups", GROUPS)
def test_every_prefix_of_a_group_order_costs_what_least_squares_says(
    groups: list[list[int]],
) -> None:
    weight, data, inverse = problem(5, 9)
    order, curve = eliminate_groups(weight, inverse, torch.tensor(groups))
    check_prefixes(weight, data, groups, order, curve)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_first_group_taken_is_the_one_whose_loss_alone_is_least(
    groups: list[list[int]],
) -> None:
    weight, data, inverse = problem(5, 9)
    order, _ = eliminate_groups(weight, inverse, torch.tensor(groups))
    alone = [loss_without(weight, data, own) for own in groups]
    assert int(order[0]) == alone.index(min(alone))


@pytest.mark.parametrize("groups", GROUPS)
def test_a_group_order_given_is_kept_and_priced(groups: list[list[int]]) -> None:
    weight, data, inverse = problem(5, 9)
    given = torch.arange(len(groups)).flip(0)
    order, curve = eliminate_groups(weight, inverse, torch.tensor(groups), given)
    assert torch.equal(order, given)
    check_prefixes(weight, data, groups, order, curve)


@pytest.mark.parametrize(("inputs", "cols"), [(9, 3), (10, 4), (7, 7), (5, 1), (6, 8)])
def test_every_prefix_of_a_block_row_costs_what_least_squares_says(inputs: int, cols: int) -> None:
    weight, data, inverse = problem(6, inputs)
    rows_ROI = weight.view(3, 2, inputs)
    order, loss = eliminate_blocks(rows_ROI, inverse, cols)
    blocks = [list(range(i, min(i + cols, inputs))) for i in range(0, inputs, cols)]
    assert order.shape == loss.shape == (3, len(blocks))
    for r in range(3):
        curve = torch.cat([torch.zeros(1, dtype=torch.float64), loss[r].cumsum(0)])
        check_prefixes(rows_ROI[r], data, blocks, order[r], curve)


def test_the_first_block_of_each_row_is_the_one_whose_loss_alone_is_least() -> None:
    weight, data, inverse = problem(6, 10)
    rows_ROI = weight.view(3, 2, 10)
    order, _ = eliminate_blocks(rows_ROI, inverse, 4)
    for r in range(3):
        alone = [
            loss_without(rows_ROI[r], data, own) for own in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])
        ]
        assert int(order[r, 0]) == alone.index(min(alone))


def test_block_rows_taken_in_several_batches_give_the_same_result() -> None:
    weight, _, inverse = problem(10, 12)
    rows_ROI = weight.view(5, 2, 12)
    together = eliminate_blocks(rows_ROI, inverse, 4)
    apart = eliminate_blocks(rows_ROI, inverse, 4, memory_bytes=2 * 12 * 12 * 8)
    assert torch.equal(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1], rtol=1e-12, atol=0)


def test_a_layer_too_wide_for_float64_copies_still_gets_the_right_losses() -> None:
    # 1040 inputs: more than 1024, where the copies of the inverse are float32.
    weight, data, inverse = problem(2, 1040, 2080)
    order, loss = eliminate_blocks(weight[None], inverse, 520)
    first = list(range(520)) if int(order[0, 0]) == 0 else list(range(520, 1040))
    assert float(loss[0, 0]) == pytest.approx(loss_without(weight, data, first), rel=1e-3)
    total = float((data @ weight.T).square().sum())
    assert float(loss[0].sum()) == pytest.approx(total, rel=1e-3)


def test_merged_rows_are_a_permutation_that_keeps_the_order_of_each_row() -> None:
    order_RU = torch.tensor([[2, 0, 1], [1, 2, 0]])
    loss_RU = torch.tensor([[0.1, 5.0, 0.2], [1.0, 2.0, 3.0]], dtype=torch.float64)
    taken, _ = merge_rows(order_RU, loss_RU)
    flat = taken.tolist()
    assert sorted(flat) == list(range(6))
    assert [t for t in flat if t < 3] == [2, 0, 1]
    assert [t - 3 for t in flat if t >= 3] == [1, 2, 0]


def test_merged_rows_always_take_the_cheapest_next_removal() -> None:
    order_RU = torch.tensor([[0, 1], [0, 1], [1, 0]])
    loss_RU = torch.tensor([[3.0, 1.0], [2.0, 9.0], [4.0, 0.5]], dtype=torch.float64)
    taken, curve = merge_rows(order_RU, loss_RU)
    assert taken.tolist() == [2, 0, 1, 5, 4, 3]
    assert curve.tolist() == [0.0, 2.0, 5.0, 6.0, 10.0, 10.5, 19.5]


def test_a_merged_curve_never_falls_even_where_rounding_made_a_loss_negative() -> None:
    _, curve = merge_rows(torch.tensor([[0, 1]]), torch.tensor([[-1e-9, 1.0]]))
    assert bool((curve.diff() >= 0).all())


def test_the_damped_inverse_is_the_inverse_of_moment_plus_ridge() -> None:
    _, data, _ = problem(1, 6)
    moment = torch.stack([data.T @ data, 3 * torch.eye(6, dtype=torch.float64)])
    ridge = 0.01 * moment.diagonal(dim1=1, dim2=2).mean(1)
    expected = torch.linalg.inv(moment + ridge[:, None, None] * torch.eye(6))
    torch.testing.assert_close(damped_inverse(moment, 0.01), expected, rtol=1e-9, atol=1e-12)


def test_a_rank_one_moment_can_be_inverted_once_it_is_damped() -> None:
    x = torch.randn(5, dtype=torch.float64)
    inverse = damped_inverse(torch.outer(x, x), 1e-3)
    assert bool(torch.isfinite(inverse).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(bad: float) -> None:
    moment = torch.eye(4, dtype=torch.float64)
    moment[1, 1] = bad
    with pytest.raises(ValueError, match=r"expected finite activations; check the calibration"):
        damped_inverse(moment)


def test_a_moment_with_a_negative_direction_is_refused() -> None:
    moment = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive definite"):
        damped_inverse(moment, 1e-3)


def test_the_root_of_a_matrix_squares_to_it_and_its_inverse_root_undoes_it() -> None:
    _, data, _ = problem(1, 6)
    matrix = torch.stack([data.T @ data, (data[:20].T @ data[:20]) / 20])
    root, inverse = sqrt_psd(matrix, floor=1e-12)
    torch.testing.assert_close(root @ root, matrix, rtol=1e-9, atol=1e-9)
    eye = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(root @ inverse, eye, rtol=1e-9, atol=1e-9)


def test_the_inverse_root_of_a_singular_matrix_is_bounded_by_the_floor() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1e-30, -1e-9], dtype=torch.float64))
    _, inverse = sqrt_psd(matrix, floor=1e-6)
    assert float(torch.linalg.matrix_norm(inverse, 2)) == pytest.approx((4e-6) ** -0.5, rel=1e-6)
