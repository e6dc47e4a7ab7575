"""GPTQ: a weight is rounded column by column, and each column's error is made up for in the columns that follow.

The algorithm is that of arXiv 2210.17323. It is computed in the form that arXiv 2307.13304 proves equal to it (LDLQ,
theorem 6): with H = Fᵀ D F, F unit lower triangular and D diagonal, column i is rounded to
`w_i + sum over j < i of F_ij (w_j - q_j)`. That takes one Cholesky factor, where GPTQ inverts H between two, and it
compares with the original weights throughout, so that nothing but differences is kept.

The most active inputs are rounded first, for nothing makes up for what the last ones lose. Without desc_act each group
stays together, since its inputs lie one after another in memory: groups in the order of their most active input, and
the inputs of each among themselves (arXiv 2505.14638; gptqmodel does so too). On the layers of a small Llama that took
9 to 23 % off the error which the inputs' own order leaves; desc_act took 24 %.

A group's grid is found when its first column is reached, on the weights as they were compensated by then:
`W_g + F_gg⁻¹ F_gs (W_s - Q_s)` with s the columns before. gptqmodel and the first implementation leave out what was
rounded within the same 128 columns; here nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import NonFinite, NotPositiveDefinite
from pipeline.formats.components import all_finite
from pipeline.formats.rounded import Rounded
from pipeline.quantization.grids import consecutive, divisors, find_grid
from pipeline.targets import GPTQTarget

BLOCK = 128  # columns whose errors reach the later ones together, as one matrix product
STRIP = 32  # columns of a block that look back one by one; beyond them a block, too, is left to a matrix product
ROWS_AT_ONCE = 1024


def round_gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    target: GPTQTarget,
    dtype: torch.dtype = torch.float16,
    fixed: Rounded | None = None,
) -> Rounded:
    """float32 `weight` [O, I] on a grid of the target's options, with the least tr(ΔW H ΔWᵀ) that GPTQ finds.

    `gram` is H = XᵀX, float32 [I, I], of the inputs. Rows are independent: linears with one input may be stacked.
    `dtype` is that of the scales as they will be stored. `fixed` gives a grid to stay on: its scales, zero points and
    groups, with new codes. An input that was never active (a zero on the diagonal) is rounded to nearest. Takes O·I² +
    I³/3 multiply-adds, and memory for two copies of `gram` and one of `weight`. Raise NonFinite for a NaN or infinity
    in either, NotPositiveDefinite where even the whole mean diagonal, added to it, does not make `gram` positive
    definite.
    """
    return next(round_each(weight, gram, targets=(target,), dtype=dtype, fixed=fixed))


def round_each(
    weight: Tensor,
    gram: Tensor,
    *,
    targets: Sequence[GPTQTarget],
    dtype: torch.dtype = torch.float16,
    fixed: Rounded | None = None,
) -> Iterator[Rounded]:
    """What `round_gptq` gives for each of `targets`, which differ in their bits alone: `gram` is factored once."""
    inputs, target = weight.shape[1], targets[0]
    assert all(other.at(target.code_bits) == target for other in targets)
    if not all_finite(weight):
        raise NonFinite("the weights hold NaN or infinity; train again with a lower learning rate")
    if not all_finite(gram):
        raise NonFinite("the activations of the calibration rows hold NaN or infinity; calibrate with other rows")
    whole = target.desc_act or target.group_size == -1 or fixed is not None  # a grid that is there bears any order
    order = _order(gram.diagonal(), inputs if whole else target.group_size)
    factor = _factor(gram, order, damping=target.damping)
    for one in targets:
        yield _on_factor(weight, order, factor, one, dtype, fixed)


def trace_error(delta: Tensor, gram: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) of `delta` = ΔW, float32 [O, I]: the squared error of the outputs, summed over the rows of X."""
    total = torch.zeros((), dtype=torch.float64, device=delta.device)
    for start in range(0, delta.shape[0], ROWS_AT_ONCE):
        part = delta[start : start + ROWS_AT_ONCE]
        total += (part @ gram).mul_(part).sum(dtype=torch.float64)
    return float(total)


def _on_factor(
    weight: Tensor, order: Tensor, factor: Tensor, target: GPTQTarget, dtype: torch.dtype, fixed: Rounded | None
) -> Rounded:
    """`weight` [O, I] rounded in `order`, given F of its inputs in that order."""
    grid = _known_grid(weight, order, target, dtype, fixed)
    work = _Work(
        weight=weight.index_select(1, order).T.contiguous(),
        factor=factor,
        codes=torch.empty(weight.shape[1], weight.shape[0], dtype=torch.uint8, device=weight.device),
        groups=grid.groups.index_select(0, order),
        scales=divisors(grid.scales.T).contiguous(),
        zeros=grid.zeros.T.float().contiguous(),
        top=2**target.code_bits - 1,
        dtype=dtype,
    )
    dynamic = fixed is None and target.group_size != -1 and not target.static_groups
    _round(work, target if dynamic else None)
    return Rounded(
        bits=target.code_bits,
        codes=work.codes.index_select(0, torch.argsort(order)).T.contiguous(),
        scales=grid.scales if fixed else work.scales.T.to(dtype).contiguous(),
        zeros=work.zeros.T.to(torch.uint8).contiguous(),
        groups=grid.groups,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The columns in the order of rounding, I of them, and the grids of their groups; float32 where nothing is said.

    `weight` [I, O]: what a rounded column lost, w - q, takes its place. `factor` [I, I]: F. `codes` uint8 [I, O].
    `groups` int32 [I]. `scales`, `zeros` [G, O]: filled as the groups are reached, where they are not known before;
    scales have values of `dtype`.
    """

    weight: Tensor
    factor: Tensor
    codes: Tensor
    groups: Tensor
    scales: Tensor
    zeros: Tensor
    top: int
    dtype: torch.dtype


def _order(diagonal: Tensor, size: int) -> Tensor:
    """The inputs in the order of rounding, int64 [I]: groups of `size` by their most active, each by its activity."""
    grouped = diagonal.view(-1, size)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    inside += torch.arange(0, diagonal.numel(), size, device=diagonal.device).unsqueeze(1)
    return inside[torch.argsort(grouped.amax(1), descending=True, stable=True)].flatten()


def _known_grid(
    weight: Tensor, order: Tensor, target: GPTQTarget, dtype: torch.dtype, fixed: Rounded | None
) -> Rounded:
    """The grid as far as it is known before the first column: all of it, or the groups alone, with scales to come."""
    outputs, inputs = weight.shape
    if fixed is not None:
        assert fixed.bits == target.code_bits
        return fixed
    if target.group_size == -1 or target.static_groups:
        scales, zeros = find_grid(
            weight, bits=target.code_bits, group_size=target.group_size, symmetric=target.symmetric, mse=target.mse,
            dtype=dtype,
        )  # fmt: skip
    else:
        assert inputs % target.group_size == 0, "check_target refuses it"
        scales = torch.zeros(outputs, inputs // target.group_size, dtype=dtype, device=weight.device)
        zeros = torch.zeros_like(scales, dtype=torch.uint8)
    groups = consecutive(inputs, scales.shape[1], weight.device)
    if target.desc_act and not target.static_groups:
        groups = groups.index_select(0, torch.argsort(order))  # in the order of rounding they are consecutive
    return Rounded(bits=target.code_bits, codes=weight, scales=scales, zeros=zeros, groups=groups)


def _factor(gram: Tensor, order: Tensor, *, damping: float) -> Tensor:
    """F, unit lower triangular float32 [I, I]: H = Fᵀ D F for H = `gram` in `order`, damped until that exists."""
    backwards = order.flip(0)  # LAPACK factors H as U ᵀU; turned around, that is FᵀF
    turned = gram.index_select(0, backwards).index_select(1, backwards)
    diagonal = turned.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.sum(dtype=torch.float64)) / max(1, int((~dead).sum())) or 1.0
    undamped = diagonal.masked_fill(dead, mean)
    share = damping
    while True:
        torch.add(undamped, share * mean, out=diagonal)
        upper, failed = torch.linalg.cholesky_ex(turned, upper=True)
        if not failed and all_finite(upper):
            break
        if share >= 1:
            raise NotPositiveDefinite(
                "the Gram matrix of the activations is not positive definite, even with its mean diagonal added to "
                "it; calibrate with more rows, or with other ones"
            )
        share = min(1.0, 10 * share)
    del turned, diagonal
    factor: Tensor = upper.flip((0, 1))
    return factor.div_(factor.diagonal().clone().unsqueeze(1))


def _round(work: _Work, found: GPTQTarget | None) -> None:
    """Round every column; `found` says how grids are found on the way, None that all are there."""
    inputs, weight, factor = work.weight.shape[0], work.weight, work.factor
    strip = min(STRIP, found.group_size) if found else STRIP
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        owed = factor[start:stop, :start] @ weight[:start]
        for first in range(start, stop, strip):
            last = min(first + strip, stop)
            if found and first % found.group_size == 0:
                _find(work, owed[first - start :], first, found)
            _round_strip(work, owed[first - start : last - start], slice(first, last))
            owed[last - start :].addmm_(factor[last:stop, first:last], weight[first:last])


def _find(work: _Work, owed: Tensor, first: int, target: GPTQTarget) -> None:
    """Find the grid of the group that begins at column `first`, on its weights as they are compensated by now."""
    size = target.group_size
    end = first + size
    owed = owed[:size] if size <= BLOCK else work.factor[first:end, :first] @ work.weight[:first]
    own, identity = work.factor[first:end, first:end], torch.eye(size, device=owed.device)
    # The inverse times `owed` takes a third of the time that solving for it takes.
    inverse = torch.linalg.solve_triangular(own, identity, upper=False, unitriangular=True)
    moved = torch.addmm(work.weight[first:end], inverse, owed)
    scales, zeros = find_grid(
        moved.T, bits=target.code_bits, group_size=-1, symmetric=target.symmetric, mse=target.mse, dtype=work.dtype
    )
    group = int(work.groups[first])
    work.scales[group], work.zeros[group] = scales[:, 0], zeros[:, 0]


def _round_strip(work: _Work, owed: Tensor, strip: slice) -> None:
    """Round the columns of `strip`; `owed` [S, O] is what the columns before it lost, to be made up for in each."""
    weight, groups = work.weight[strip], work.groups[strip]
    levels, grids = weight + owed, groups.tolist()
    # With zeros for the columns to come, every one is a product with the whole strip: slices would cost more.
    turned, factor = weight.T, work.factor[strip, strip].tril(-1)
    present = {group: (scale, -zero, work.top - zero)
               for group in set(grids) for scale, zero in [(work.scales[group], work.zeros[group])]}  # fmt: skip
    # Five operations a column: for small models what they cost beside the arithmetic is what rounding costs.
    for level, lost, back, group in zip(levels.unbind(), weight.unbind(), factor.unbind(), grids, strict=True):
        scale, lowest, highest = present[group]
        level.addmv_(turned, back).div_(scale).round_().clamp_(lowest, highest)
        lost.addcmul_(level, scale, value=-1)
    work.codes[strip] = levels.add_(work.zeros.index_select(0, groups))
