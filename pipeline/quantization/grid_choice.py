"""Whether a changed module stays on its stored grid or gets a new one, or whichever loses less of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.formats.rounded import Rounded, split, stack
from pipeline.quantization.awq import clip
from pipeline.quantization.gptq import round_gptq, trace_error
from pipeline.quantization.grids import nearest, onto
from pipeline.targets import AWQTarget, CompressedTensorsTarget, GPTQTarget, Grid

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
    is None or `target` says so. `better` compares tr(ΔW H ΔWᵀ), module by module, the plain squared error where there
    is no gram; the stored grid wins a tie. Modules that are not `stored` get a new grid. Raises what `round_gptq` and
    `fresh` raise.
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


def anew_by_gptq(
    weights: Weights, *, gram: Tensor | None, target: GPTQTarget, dtype: torch.dtype = torch.float16
) -> dict[str, Rounded]:
    """Modules of one input, stacked, by GPTQ, each on a grid of its own; the nearest codes where there is no gram.

    `dtype` is that of the scales.
    """
    if gram is not None:
        return apart(weights, round_gptq(torch.cat([*weights.values()]), gram, target=target, dtype=dtype))
    return {
        name: nearest(
            weight,
            bits=target.code_bits,
            group_size=target.group_size,
            symmetric=target.symmetric,
            mse=target.mse,
            dtype=dtype,
        )
        for name, weight in weights.items()
    }


def anew_by_awq(weights: Weights, *, gram: Tensor, target: AWQTarget) -> dict[str, Rounded]:
    """Modules of one input, stacked, on AWQ's grid: each weight by itself, or, what halves the divergence, by GPTQ.

    The grid spans its group's extremes and 0. AutoAWQ's (`pseudo_quantize_tensor`) leaves the 0 out, which is the same
    for groups of both signs and ruins those of one.
    """
    size, weight = target.group_size, torch.cat([*weights.values()])
    clips = target.rounding == "nearest" if target.clip is None else target.clip
    ranged = clip(weight, gram, group_size=size) if clips else weight
    grid = nearest(ranged, bits=target.bits, group_size=size, symmetric=False)
    return apart(weights, _onto(weight, grid, gram, on_awq_grid(target)) if target.rounding == "gptq" else grid)


def on_awq_grid(target: AWQTarget) -> GPTQTarget:
    """What codes are chosen by on a grid of AWQ's."""
    return GPTQTarget(
        format="gptq", bits=target.bits, group_size=target.group_size, symmetric=False, rounding=target.rounding
    )


def on_symmetric_grid(target: CompressedTensorsTarget) -> GPTQTarget:
    """What codes of compressed-tensors' integers are chosen by."""
    return GPTQTarget(
        format="gptq", bits=target.bits, group_size=target.group_size, damping=target.damping,
        mse=target.mse, rounding=target.rounding, sequential=target.sequential,
    )  # fmt: skip


def _on_stored(
    weights: Weights, stored: Mapping[str, Rounded], gram: Tensor | None, target: GPTQTarget
) -> Iterator[tuple[str, Rounded]]:
    """The modules that have a stored grid, those with the same groups together: their rows are independent."""
    for names in _alike(stored):
        weight, grid = torch.cat([weights[name] for name in names]), stack([stored[name] for name in names])
        found = _onto(weight, grid, gram, target)
        yield from apart({name: weights[name] for name in names}, found).items()


def _onto(weight: Tensor, grid: Rounded, gram: Tensor | None, target: GPTQTarget) -> Rounded:
    """Codes on a grid that is there."""
    if gram is None or not target.calibrated:
        return onto(weight, grid)
    return round_gptq(weight, gram, target=target, fixed=grid)


def apart(weights: Weights, rounded: Rounded) -> dict[str, Rounded]:
    """Modules that were rounded as one."""
    return dict(zip(weights, split(rounded, [len(weight) for weight in weights.values()]), strict=True))


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
