"""AWQ (arXiv 2306.00978): scales that make room for inputs that matter, narrower ranges where they pay, and rounding.

The layer y = W x is the same as y = (W diag(s)) (x / s). Rounding W diag(s) instead of W loses less where s is large;
x / s costs nothing where it folds into what makes x (`folds.py`). AutoAWQ compares candidates by running the layer.
Here they are compared by the Gram matrix H = X^T X of the layer's inputs, float32 [I, I]: the squared error of the
output over all tokens is tr(D H D^T) for a change D of the weight. Everything is float32, on the tensors' own device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

ALPHAS = 20  # as AutoAWQ
SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 to 0.5, as AutoAWQ
SMALLEST = 2.0**-24  # float16's smallest value: a scale is never 0
ROWS_AT_ONCE = 2**20  # weights in a chunk of rows: a few copies of it stay in a processor's cache


def scaled(gram: Tensor, scales: Tensor) -> Tensor:
    """The Gram matrix of the inputs x / s: float32 [I, I], for `scales` s [I]."""
    return gram / scales[:, None] / scales[None, :]


def search_scales(
    weights: Sequence[Tensor],
    gram: Tensor,
    *,
    group_size: int,
    bits: int = 4,
    rows: int = 256,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The s, float32 [I], with which rounding W diag(s) changes the outputs of all `weights` [O, I] least in sum.

    Tried are x ** a and x ** a / w ** (1 - a) for 20 a from 0 to 0.95, x the root mean square of each input, w the mean
    share that its weights have of their group's largest; s = 1 is the first of them, so the search never loses. At most
    `rows` evenly spaced outputs of each weight are compared, of which a candidate costs 2 * rows * I ** 2 operations.
    `tie` makes equal what must be: it takes a value for each input [I] and gives those that share a scale their mean
    (`folds.Fold.tied`). Every s is finite and positive, and the geometric mean of least and largest is 1.
    """
    size = _size(gram.shape[0], group_size)
    tie = tie or (lambda values: values)
    picked = [weight[_spaced(len(weight), rows, weight.device)] for weight in weights]
    counts = torch.cat(
        [torch.full((len(few),), len(all_) / len(few)) for few, all_ in zip(picked, weights, strict=True)]
    )
    sample, counts = torch.cat(picked), counts.to(gram.device)
    best, least = torch.ones_like(gram[0]), math.inf
    for scales in _candidates(_root_mean_square(tie(gram.diagonal())), tie(_shares(weights, size))):
        change = _nearest(sample * scales, size, bits).div_(scales).sub_(sample)
        error = float((_row_errors(change, gram) * counts).sum())
        if error < least:
            best, least = scales, error
    return best


def clip(weight: Tensor, gram: Tensor, *, group_size: int, bits: int = 4, sweeps: int = 1) -> Tensor:
    """Float32 `weight` [O, I] with each row's groups clamped where that makes rounding better.

    Group after group, the range is taken that leaves the least error of the row's output by `gram` [I, I], given how
    the row's other groups are rounded: the range as it is, or one of 1.0 to 0.5 of it, or of its largest magnitude. So
    every step lowers the error or leaves it, and no row loses. AutoAWQ (`_compute_best_clip`) looks at each group by
    itself, which can do worse than nothing. Costs 2 * O * I ** 2 operations for each of `sweeps`, and 40 * O * I * g.
    """
    size = _size(weight.shape[1], group_size)
    out = torch.empty_like(weight)
    for rows in _chunks(*weight.shape):
        part, found = weight[rows], weight[rows].clone()
        change = _nearest(part, size, bits).sub_(part)
        for start in [*range(0, len(gram), size)] * sweeps:
            group = slice(start, start + size)
            block = gram[group, group]
            # What the other groups' changes add to this one's output, for each of its inputs.
            others = change @ gram[:, group] - change[:, group] @ block
            found[:, group], change[:, group] = _clipped(part[:, group], block, others, bits)
        out[rows] = found
    return out


def _clipped(weight: Tensor, block: Tensor, others: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One group of R rows, [R, g], clamped to its best range; and what rounding changes then."""
    best, change = weight, torch.zeros_like(weight)
    least = torch.full_like(weight[:, :1], math.inf)
    for low, high in _ranges(weight):
        clamped = weight.clamp(low, high)
        changed = _nearest(clamped, weight.shape[1], bits).sub_(weight)
        error = (changed @ block).add_(others, alpha=2).mul_(changed).sum(1, keepdim=True)
        better = error < least
        best, change = torch.where(better, clamped, best), torch.where(better, changed, change)
        least = torch.where(better, error, least)
    return best, change


def _ranges(weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Lowest and highest values [R, 1] to try for a group [R, g], the first as they are."""
    low, high = weight.amin(1, keepdim=True).clamp_(max=0), weight.amax(1, keepdim=True).clamp_(min=0)
    largest = torch.maximum(-low, high)
    for shrink in SHRINKS:
        yield low * shrink, high * shrink
    for shrink in SHRINKS[1:]:
        yield -largest * shrink, largest * shrink


def _candidates(rms: Tensor, share: Tensor) -> Iterator[Tensor]:
    for step in range(ALPHAS):
        alpha = step / ALPHAS
        plain = rms**alpha
        for scales in (plain, plain / (share ** (1 - alpha) + 1e-4)):
            even = scales / (scales.max() * scales.min()).sqrt()
            if bool(even.isfinite().all() & (even > 0).all()):
                yield even


def _root_mean_square(diagonal: Tensor) -> Tensor:
    """Of each input, over their mean; an input that was always 0 counts as the smallest of the others."""
    live = diagonal > 0
    if not bool(live.any()):
        return torch.ones_like(diagonal)
    smallest = diagonal[live].min()
    return (diagonal.clamp(min=smallest) / diagonal[live].mean()).sqrt()


def _shares(weights: Sequence[Tensor], size: int) -> Tensor:
    """[I]: the mean over all rows of |w| / the largest |w| of its group."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        for rows in _chunks(*weight.shape):
            grouped = _grouped(weight[rows].abs(), size)
            total += grouped.div_(grouped.amax(2, keepdim=True).clamp_(min=SMALLEST)).sum(0).flatten()
    return total / sum(len(weight) for weight in weights)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """[R, I] → [R, G, g]."""
    return weight.reshape(len(weight), -1, size)


def _nearest(weight: Tensor, size: int, bits: int) -> Tensor:
    """`weight` [R, I] as its nearest codes give it back."""
    return _nearest_grouped(_grouped(weight, size), bits).flatten(1)


def _nearest_grouped(grouped: Tensor, bits: int) -> Tensor:
    scales, zeros = _grid(grouped, bits)
    return _codes(grouped, scales, zeros, bits).sub_(zeros).mul_(scales)


def _grid(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales that float16 holds, and zero points, both float32 [R, G, 1], of `grouped` [R, G, g]."""
    top = (1 << bits) - 1
    low, high = grouped.amin(2, keepdim=True).clamp_(max=0), grouped.amax(2, keepdim=True).clamp_(min=0)
    scales = ((high - low) / top).half().float().clamp_(min=SMALLEST)
    return scales, low.div_(scales).round_().neg_().clamp_(0, top)


def _codes(grouped: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes as float32 [R, G, g]."""
    return (grouped / scales).round_().add_(zeros).clamp_(0, (1 << bits) - 1)


def _row_errors(change: Tensor, gram: Tensor) -> Tensor:
    """float64 [R]: the squared change of each output over all tokens."""
    return (change @ gram).mul_(change).sum(1, dtype=torch.float64)


def _spaced(count: int, rows: int, device: torch.device) -> Tensor:
    """At most `rows` indices below `count`, evenly spaced."""
    few = min(count, rows)
    return torch.arange(few, device=device) * count // few


def _chunks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, ROWS_AT_ONCE // inputs)
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _size(inputs: int, group_size: int) -> int:
    size = inputs if group_size == -1 else group_size
    assert inputs % size == 0, f"{inputs} inputs, groups of {size}"
    return size
