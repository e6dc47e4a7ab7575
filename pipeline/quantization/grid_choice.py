"""Whether a changed module stays on its stored grid or gets a new one, or whichever loses less of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.formats.rounded import Rounded, split, stack
from pipeline.quantization.awq import clip, round_awq
from pipeline.quantization.gptq import round_gptq, trace_error
from pipeline.quantization.grids import nearest, onto
from pipeline.targets import AWQTarget, GPTQTarget, Grid

Weights = Mapping[str, Tensor]


def settle(
    weights: Weights,
    stored: Mapping[str, Rounded],
    gram: Tensor | None,
    *,
    grid: Grid,
    target: GPTQTarget,
    fresh: Callable[[Weights], Mapping[str, Rounded]],
) -> dict[str, Rounded]:
    """Float32 `weights` [O, I] of modules with one input, rounded: on their `stored` grids, or on new ones by `fresh`.

    On a stored grid the codes are GPTQ's by `target`, for the float32 `gram` [I, I] of the input; the nearest where it
    is None. `better` compares tr(ΔW H ΔWᵀ), module by module, the plain squared error where there is no gram; the
    stored grid wins a tie. Modules that are not `stored` get a new grid. Raises what `round_gptq` and `fresh` raise.
    """
    anew = {name: weight for name, weight in weights.items() if grid != "keep" or name not in stored}
    found = dict(fresh(anew)) if anew else {}
    if grid == "fresh":
        return found
    for name, kept in _on_stored(weights, stored, gram, target):
        new = found.get(name)
        if new is None or _error(kept, weights[name], gram) <= _error(new, weights[name], gram):
            found[name] = kept
    return found


def anew_by_gptq(weights: Weights, *, gram: Tensor | None, target: GPTQTarget) -> dict[str, Rounded]:
    """Modules of one input, stacked, by GPTQ, each on a grid of its own; the nearest codes where there is no gram."""
    if gram is not None:
        found = round_gptq(torch.cat([*weights.values()]), gram, target=target)
        return dict(zip(weights, split(found, [len(weight) for weight in weights.values()]), strict=True))
    return {
        name: nearest(
            weight, bits=target.bits, group_size=target.group_size, symmetric=target.symmetric, mse=target.mse
        )
        for name, weight in weights.items()
    }


def anew_by_awq(weights: Weights, *, gram: Tensor, target: AWQTarget) -> dict[str, Rounded]:
    """Modules of one input, clipped where that is asked for, and rounded to nearest."""
    size = target.group_size
    clipped = {name: clip(weight, gram, group_size=size) if target.clip else weight for name, weight in weights.items()}
    return {name: round_awq(weight, group_size=size) for name, weight in clipped.items()}


def on_awq_grid(target: AWQTarget) -> GPTQTarget:
    """What GPTQ rounds by on a stored grid of AWQ's."""
    return GPTQTarget(format="gptq", bits=target.bits, group_size=target.group_size, symmetric=False)


def _on_stored(
    weights: Weights, stored: Mapping[str, Rounded], gram: Tensor | None, target: GPTQTarget
) -> Iterator[tuple[str, Rounded]]:
    """The modules that have a stored grid, those with the same groups together: their rows are independent."""
    for names in _alike(stored):
        weight, grid = torch.cat([weights[name] for name in names]), stack([stored[name] for name in names])
        found = onto(weight, grid) if gram is None else round_gptq(weight, gram, target=target, fixed=grid)
        yield from zip(names, split(found, [len(weights[name]) for name in names]), strict=True)


def _alike(stored: Mapping[str, Rounded]) -> list[list[str]]:
    """The modules whose inputs are grouped alike."""
    found: list[list[str]] = []
    for name, grid in stored.items():
        for names in found:
            if torch.equal(stored[names[0]].groups, grid.groups):
                names.append(name)
                break
        else:
            found.append([name])
    return found


def _error(rounded: Rounded, weight: Tensor, gram: Tensor | None) -> float:
    delta = rounded.dense().sub_(weight)
    return float(delta.square().sum(dtype=torch.float64)) if gram is None else trace_error(delta, gram)
