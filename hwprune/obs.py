"""Optimal brain surgeon on groups of weights: what removing k of them costs, at best.

A linear y = W x with second moment H = E[x xᵀ] loses ½ tr(G Δ H Δᵀ) when Δ is taken from W: after the best
re-fit of the kept weights the loss is a Schur complement, so greedy removal is a sequence of low-rank
updates of C = H⁻¹ (Hassibi and Stork 1993; Frantar and Alistarh, "Optimal Brain Compression", 2022).
G, the output-side metric, makes the loss one on the model's output (Kronecker-factored Gauss-Newton).

Shapes: O outputs, I inputs, U units, E columns a unit owns, R block rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLUSH = 64  # pending rank-1 updates before they are applied as one GEMM


def damped_inverse(moment_II: Tensor, damping: float = 1e-2) -> Tensor:
    """(H + damping * mean(diag H) I)⁻¹ in float64.

    Raises:
        ValueError: H holds NaN or is not positive semi-definite.
    """
    moment = moment_II.double()
    size = moment.shape[-1]
    ridge = damping * moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
    factor, info = torch.linalg.cholesky_ex(moment + ridge[..., None, None] * eye)
    if bool((info != 0).any()) or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            "second moment is not positive definite even with damping: expected finite activations; "
            "check the calibration images for NaN or Inf"
        )
    return torch.cholesky_inverse(factor)


def sqrt_psd(matrix: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Symmetric square root and inverse square root of a PSD matrix [..., N, N], eigenvalues floored.

    Moments come from float32 GEMMs, so eigenvalues under 1e-7 of the largest are noise, of either sign;
    an inverse root that trusted them would blow it up to the size of the signal.

    Args:
        matrix: PSD.
        floor: smallest eigenvalue kept, relative to the largest.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min((values.amax(-1, keepdim=True) * floor).clamp_min(1e-30))
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def eliminate_columns(
    weight_OI: Tensor, inverse_II: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Remove single columns one after the other, each time the one that costs least.

    Args:
        weight_OI: metric-weighted weight G^½ W.
        inverse_II: C = H⁻¹, damped.
        order: [I], a removal order to price instead of the greedy one.

    Returns:
        order [I] (first removed first) and curve [I + 1] float64: tr of the loss after k removals.
    """
    work, inverse = weight_OI.double().clone(), inverse_II.double().clone()
    outputs, inputs = work.shape
    device = work.device
    energy = work.square().sum(0)
    diagonal = inverse.diagonal().clone()
    alive = torch.ones(inputs, dtype=torch.bool, device=device)
    taken = torch.empty(inputs, dtype=torch.long, device=device)
    curve = torch.zeros(inputs + 1, dtype=torch.float64, device=device)
    # Pending updates: C_now = inverse - P Pᵀ and W_now = work - Q Pᵀ.
    pending_P = work.new_zeros(inputs, _FLUSH)
    pending_Q = work.new_zeros(outputs, _FLUSH)
    filled = 0
    infinity = torch.tensor(torch.inf, dtype=work.dtype, device=device)
    for step in range(inputs):
        if order is None:
            cost = torch.where(alive, energy / diagonal.clamp_min(1e-300), infinity)
            unit = int(cost.argmin())
        else:
            unit = int(order[step])
        p_now = pending_P[unit, :filled]
        column_I = inverse[:, unit] - pending_P[:, :filled] @ p_now
        column_O = work[:, unit] - pending_Q[:, :filled] @ p_now
        pivot = diagonal[unit].clamp_min(1e-300).sqrt()
        p_I = column_I / pivot
        q_O = column_O / pivot
        loss = q_O.square().sum()
        curve[step + 1] = curve[step] + loss
        taken[step] = unit
        alive[unit] = False
        overlap_I = work.T @ q_O - pending_P[:, :filled] @ (pending_Q[:, :filled].T @ q_O)
        energy += p_I * (p_I * loss - 2 * overlap_I)
        energy.clamp_min_(0)
        diagonal -= p_I.square()
        pending_P[:, filled], pending_Q[:, filled] = p_I, q_O
        filled += 1
        if filled == _FLUSH:
            inverse -= pending_P @ pending_P.T
            work -= pending_Q @ pending_P.T
            energy, diagonal = work.square().sum(0), inverse.diagonal().clone()
            filled = 0
    return taken, curve


def eliminate_groups(
    weight_OI: Tensor, inverse_II: Tensor, index_UE: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Remove groups of columns (a head's, a channel's in all heads), cheapest group first.

    Args:
        weight_OI: metric-weighted weight.
        inverse_II: damped C = H⁻¹.
        index_UE: columns of each unit; columns no unit owns stay.
        order: [U], a removal order to price instead of the greedy one.

    Returns:
        order [U], curve [U + 1].
    """
    units, each = index_UE.shape
    if each == 1 and units == inverse_II.shape[0]:
        column_order = None if order is None else index_UE[order, 0]
        taken, curve = eliminate_columns(weight_OI, inverse_II, column_order)
        unit_of = torch.empty_like(taken)
        unit_of[index_UE[:, 0]] = torch.arange(units, device=taken.device)
        return unit_of[taken], curve
    work, inverse = weight_OI.double().clone(), inverse_II.double().clone()
    alive = torch.ones(units, dtype=torch.bool)
    taken = torch.empty(units, dtype=torch.long)
    curve = torch.zeros(units + 1, dtype=torch.float64)
    for step in range(units):
        if order is None:
            live = alive.nonzero()[:, 0]
            index = index_UE[live]
            pivots_UEE = inverse[index[:, :, None], index[:, None, :]]
            columns_UEO = work.T[index]
            cost = (columns_UEO * torch.linalg.solve(pivots_UEE, columns_UEO)).sum((1, 2))
            unit = int(live[cost.argmin()])
        else:
            unit = int(order[step])
        own = index_UE[unit]
        solved_EI = torch.linalg.solve(inverse[own][:, own], inverse[own])
        columns_OE = work[:, own]
        loss = (columns_OE @ torch.linalg.solve(inverse[own][:, own], columns_OE.T)).trace()
        work -= columns_OE @ solved_EI
        inverse -= inverse[:, own] @ solved_EI
        # Removed columns must not come back through round-off: pin them to an isolated identity.
        inverse[own] = 0
        inverse[:, own] = 0
        inverse[own, own] = 1
        work[:, own] = 0
        curve[step + 1] = curve[step] + loss.clamp_min(0)
        taken[step] = unit
        alive[unit] = False
    return taken, curve


def eliminate_blocks(
    weight_ROI: Tensor, inverse_II: Tensor, cols: int, *, memory_bytes: int = 1 << 30
) -> tuple[Tensor, Tensor]:
    """Block-OBS: in every block row, remove column blocks one after the other, cheapest first.

    Rows of one block row share a mask, so each needs its own copy of C; block rows are done in batches
    that fit `memory_bytes` (LPViT notes, section 6.2: DeiT-B fc2 needs 24 copies of 3072 x 3072).

    Args:
        weight_ROI: [block rows, rows, inputs], metric-weighted.
        inverse_II: damped C = H⁻¹.
        cols: columns of a block; the last block may be ragged.
        memory_bytes: bound on the copies of C held at once.

    Returns:
        order [R, U] (first removed first) and marginal loss [R, U] of each removal.
    """
    inputs = weight_ROI.shape[-1]
    blocks = -(-inputs // cols)
    padded = blocks * cols
    # float32 above 1024 inputs halves the traffic of a memory-bound loop; damping (1e-3 of the mean
    # diagonal) keeps the condition number within what it can hold.
    dtype = torch.float64 if inputs <= 1024 else torch.float32
    base = torch.eye(padded, dtype=dtype, device=inverse_II.device)
    base[:inputs, :inputs] = inverse_II.to(dtype)
    weight = torch.nn.functional.pad(weight_ROI.to(dtype), (0, padded - inputs))
    batch = max(1, memory_bytes // (padded * padded * base.element_size()))
    orders, losses = [], []
    for part_bOI in weight.split(batch):
        order, loss = _eliminate_blocks_batch(part_bOI.clone(), base, cols)
        orders.append(order)
        losses.append(loss)
    return torch.cat(orders), torch.cat(losses)


def _eliminate_blocks_batch(work: Tensor, base: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """`eliminate_blocks` for block rows that fit in memory together. work: [b, O, I], overwritten.

    What is gone is dropped from the matrices each time an eighth of them has gone, which takes a third of the
    work of carrying it along: the sum of squares of what is left.
    """
    batch, rows, inputs = work.shape
    blocks = inputs // cols
    inverse = base.expand(batch, -1, -1).clone()
    here = torch.arange(blocks, device=work.device).expand(batch, -1)  # of the blocks still carried
    alive = torch.ones(batch, blocks, dtype=torch.bool, device=work.device)
    order = torch.empty(batch, blocks, dtype=torch.long, device=work.device)
    loss = torch.zeros(batch, blocks, dtype=torch.float64, device=work.device)
    each = torch.arange(batch, device=work.device)
    offset = torch.arange(cols, device=work.device)
    for step in range(blocks):
        carried = here.shape[1]
        if blocks - step <= carried - max(1, carried // 8):
            live = alive.nonzero()[:, 1].view(batch, -1)
            here, alive = here.gather(1, live), alive.gather(1, live)
            own_bI = (live[:, :, None] * cols + offset).flatten(1)
            work = work.gather(2, own_bI[:, None, :].expand(-1, rows, -1))
            inverse = inverse.gather(1, own_bI[:, :, None].expand(-1, -1, inverse.shape[2]))
            inverse = inverse.gather(2, own_bI[:, None, :].expand(-1, own_bI.shape[1], -1))
            carried = here.shape[1]
        tiles_bUCUC = inverse.view(batch, carried, cols, carried, cols)
        diagonal_bUCC = tiles_bUCUC.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        factor = torch.linalg.cholesky_ex(diagonal_bUCC)[0]
        columns_bUCO = work.view(batch, rows, carried, cols).permute(0, 2, 3, 1)
        half = torch.linalg.solve_triangular(factor, columns_bUCO, upper=False)
        cost = half.square().sum((2, 3)).double().nan_to_num(torch.inf)
        unit = torch.where(alive, cost, torch.inf).argmin(1)
        order[:, step], loss[:, step] = here[each, unit], cost[each, unit]
        alive[each, unit] = False
        own_bC = unit[:, None] * cols + offset
        rows_bCI = inverse[each[:, None], own_bC]
        solved_bCI = torch.cholesky_solve(rows_bCI, factor[each, unit])
        columns_bOC = work.gather(2, own_bC[:, None, :].expand(-1, rows, -1))
        work.baddbmm_(columns_bOC, solved_bCI, alpha=-1)
        inverse.baddbmm_(rows_bCI.mT, solved_bCI, alpha=-1)
        inverse[each[:, None], own_bC] = 0
        inverse.transpose(1, 2)[each[:, None], own_bC] = 0
        inverse[each[:, None], own_bC, own_bC] = 1
        work.scatter_(2, own_bC[:, None, :].expand(-1, rows, -1), 0)
    return order, loss


def merge_rows(order_RU: Tensor, loss_RU: Tensor) -> tuple[Tensor, Tensor]:
    """Interleave the removal sequences of all block rows into one, cheapest next removal first.

    Returns:
        order [R * U] of flat tile indices (row * U + column) and curve [R * U + 1], monotone.
    """
    import heapq

    rows, units = order_RU.shape
    order, loss = order_RU.tolist(), loss_RU.clamp_min(0).tolist()
    heap = [(loss[r][0], r, 0) for r in range(rows)]
    heapq.heapify(heap)
    taken, total = [], [0.0]
    while heap:
        cost, row, step = heapq.heappop(heap)
        taken.append(row * units + order[row][step])
        total.append(total[-1] + cost)
        if step + 1 < units:
            heapq.heappush(heap, (loss[row][step + 1], row, step + 1))
    return torch.tensor(taken), torch.tensor(total, dtype=torch.float64)
