"""Gram matrices: what rounding asks of the calibration rows.

For a linear layer with inputs X, H = XᵀX says what an error ΔW of its weights does to its outputs: tr(ΔW·H·ΔWᵀ) is the
sum of the squares of ΔW·x over all inputs x. Layers that are given the same tensor share H.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.errors import NonFinite, StageFailed

_PARTS, _PART = 4, 256  # a product is computed in so many parts of at least so many columns: those above the diagonal


class Grams:
    """The Gram matrices of the inputs of a layer's linear modules (name → module)."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._found: dict[str, Tensor] = {}
        self._first: dict[str, str] = {}  # module → the first that is given the same tensor
        self._seen: dict[tuple[object, ...], tuple[str, Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Add every input that the modules are given in the block."""
        hooks = [
            module.register_forward_pre_hook(lambda _module, given, name=name: self._hear(name, given[0]))
            for name, module in self._linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def finish(self, layer: str) -> dict[tuple[str, ...], Tensor]:
        """Modules that share an input → float32 [I, I], in the order in which they ran.

        Raise StageFailed for a module that never ran, NonFinite for inputs that are no numbers.
        """
        for name in self._linears:
            if name not in self._first:
                raise StageFailed(
                    f"{layer}.{name}: never ran on the calibration rows, so nothing is known of its inputs; give other "
                    "or more rows, or quantize to bitsandbytes"
                )
        groups: dict[str, list[str]] = {}
        for name, first in self._first.items():
            groups.setdefault(first, []).append(name)
        for first, gram in self._found.items():
            if not bool(torch.isfinite(gram.diagonal()).all()):
                raise NonFinite(
                    f"{layer}.{first}: its inputs hold NaN or infinity on the calibration rows; the model is broken "
                    "from here on, or overflows"
                )
            gram.triu_().add_(gram.triu(1).T)
        return {tuple(names): self._found[first] for first, names in groups.items()}

    def forget(self) -> None:
        """What was given so far belongs to a batch that is over."""
        self._seen.clear()

    def _hear(self, name: str, given: Tensor) -> None:
        # Kept until the batch is over, so that no other tensor can lie in its place.
        key = (given.data_ptr(), tuple(given.shape), given.stride(), given._version)  # noqa: SLF001 - counts writes in place
        first, _ = self._seen.setdefault(key, (name, given))
        if self._first.setdefault(name, first) == name:
            self._add(name, given.detach().reshape(-1, given.shape[-1]).float())

    def _add(self, name: str, given: Tensor) -> None:
        width = given.shape[1]
        if name not in self._found:
            self._found[name] = torch.zeros(width, width, device=given.device)
        gram, step = self._found[name], max(_PART, -(-width // _PARTS))
        for start in range(0, width, step):
            gram[start : start + step, start:].addmm_(given[:, start : start + step].T, given[:, start:])
