"""Bits within a budget: which module gets how many, so that the whole of a mixed target loses least (`bits: auto`).

Sizes are those of the packed tensors on disk, known from shapes alone; what each choice loses comes from whoever
rounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.kept import Donor, Kept, packable
from pipeline.sizes import WORD, Sizes
from pipeline.targets import GPTQTarget, Target, is_mixed

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A module in so many `bits`: bytes on disk, and what it costs the outputs."""

    bits: int
    nbytes: int
    error: float


def packed_bytes(shape: Shape, *, bits: int, group_size: int) -> int:
    """Bytes of a GPTQ module [O, I]: codes, zero points, float16 scales and the group of each input (int32)."""
    outputs, inputs = shape
    groups = 1 if group_size == -1 else inputs // group_size
    return (inputs * outputs * bits + groups * outputs * (bits + 16) + WORD * inputs) // 8


def allowed_bytes(target: GPTQTarget, weights: int) -> int:
    """Bytes that the budget of a mixed target leaves for so many packed weights."""
    assert target.bits_per_weight is not None
    return int(Fraction(str(target.bits_per_weight)) * weights / 8)


def check_budget(sizes: Sizes, target: Target) -> None:
    """Raise UnsupportedFormat, naming the least possible, where a budget is below every module's fewest bits."""
    if not is_mixed(target):
        return
    wanted = packable(target, sizes.shapes)
    shapes = [shape for name, shape in sizes.linears.items() if name in wanted]
    weights = sum(rows * columns for rows, columns in shapes)
    least = sum(_bytes(shape, target, min(target.candidates)) for shape in shapes)
    if least > allowed_bytes(target, weights):
        needed = -(-80000 * least // weights) / 10000
        raise UnsupportedFormat(
            f"{target.variant}: bits_per_weight {target.bits_per_weight} is less than {min(target.candidates)} bits "
            f"take with their scales, zero points and group indices; give at least {needed}"
        )


def affordable(target: Target, kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> Kept:
    """`kept` without the donors, the last first, whose modules leave too little of a budget for those to be rounded.

    Where all is kept it comes from one donor, whose config says which bits its modules have.
    """
    if not is_mixed(target) or not kept.modules:
        return kept
    linears = {name: shape for name, shape in Sizes(shapes=dict(shapes)).linears.items() if name in kept.wanted}
    allowed = allowed_bytes(target, sum(rows * columns for rows, columns in linears.values()))
    bits = kept_bits(kept.modules)
    while kept.modules:
        of_one = len(kept.counted) == 1 or not kept.described_by
        taken = {name: bits[name] if name in kept.modules else min(target.candidates) for name in linears}
        if of_one and sum(_bytes(shape, target, taken[name]) for name, shape in linears.items()) <= allowed:
            break
        *_, last = kept.counted
        left = {name: donor for name, donor in kept.modules.items() if donor.reference != last}
        kept = replace(kept, modules=left)
    return kept


def allocate(choices: Mapping[str, Sequence[Choice]], allowed: int) -> dict[str, int]:
    """Module → its bits, with about the least sum of errors whose bytes are at most `allowed`.

    Each module starts at its smallest choice; then whichever step up saves most error for its bytes is taken, as long
    as one fits. Steps lead along the lower convex hull of a module's choices, which is the optimum of the relaxed
    problem; where the next one does not fit, any that does. What is left over is less than any step that would help.
    """
    taken = {module: min(found, key=lambda choice: choice.nbytes) for module, found in choices.items()}
    left = allowed - sum(choice.nbytes for choice in taken.values())
    assert left >= 0, "check_budget refuses it"
    steps = [step for module in sorted(choices) if (step := _steepest(module, taken[module], choices[module]))]
    heapq.heapify(steps)
    while steps:
        _, module, bits = heapq.heappop(steps)
        after = next(choice for choice in choices[module] if choice.bits == bits)
        if after.nbytes - taken[module].nbytes <= left:
            left -= after.nbytes - taken[module].nbytes
            taken[module] = after
        fitting = [choice for choice in choices[module] if choice.nbytes - taken[module].nbytes <= left]
        if step := _steepest(module, taken[module], fitting):
            heapq.heappush(steps, step)
    return {module: choice.bits for module, choice in taken.items()}


def kept_bits(modules: Mapping[str, Donor]) -> dict[str, int]:
    """Kept module → the bits of its codes, from the headers of its donor."""
    opened = {donor.folder: Checkpoint.open(donor.folder) for donor in modules.values()}
    found: dict[str, int] = {}
    for module, donor in modules.items():
        found |= packed_bits(opened[donor.folder], (module,))
    return found


def packed_bits(packed: Checkpoint, modules: Iterable[str]) -> dict[str, int]:
    """Packed GPTQ module → the bits of its codes, from the headers of qweight [I * b / 32, O] and g_idx [I]."""
    shapes = {module: [packed.tensors[f"{module}.{part}"].shape[0] for part in ("qweight", "g_idx")]
              for module in modules}  # fmt: skip
    return {module: words * WORD // inputs for module, (words, inputs) in shapes.items()}


def _steepest(module: str, now: Choice, choices: Sequence[Choice]) -> tuple[float, str, int] | None:
    """The step up that saves most error a byte: minus that, the module, and the bits after it."""
    steps = [
        ((choice.error - now.error) / (choice.nbytes - now.nbytes), module, choice.bits)
        for choice in choices
        if choice.nbytes > now.nbytes and choice.error < now.error
    ]
    return min(steps, default=None)


def _bytes(shape: Shape, target: GPTQTarget, bits: int) -> int:
    return packed_bytes(shape, bits=bits, group_size=target.group_size)
