"""What each algorithm makes of a layer that the calibration rows have passed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Checkpoint
from pipeline.errors import about
from pipeline.formats.rounded import Rounded
from pipeline.kept import layer_of, unfolded
from pipeline.quantization.awq import scaled, search_scales
from pipeline.quantization.calibration import Passed
from pipeline.quantization.fold_search import find_folds
from pipeline.quantization.folder import Order
from pipeline.quantization.folds import Fold, apply, attainable
from pipeline.quantization.grid_choice import Weights, anew_by_awq, anew_by_gptq, on_awq_grid, settle
from pipeline.quantization.heads import named_dense
from pipeline.quantization.layouts import Layout, awq_config, awq_layout, gptq_config, gptq_layout
from pipeline.quantization.source_grids import SourceGrids
from pipeline.quantization.streamed import Streamed, linears_of
from pipeline.quantization.survival import Survival
from pipeline.shards import DTYPES
from pipeline.targets import AWQTarget, GPTQTarget, grid_of

CLOSE = 1e-3  # how far a layer's output may move for its folds, as a share of the output: float32 moves it by 1e-6


class Rounder(Protocol):
    """Rounds layers for one target."""

    def __call__(self, passed: Passed) -> Mapping[str, Tensor]:
        """The layer's tensors, packed and folded, by the names that they have in a checkpoint."""
        ...

    def replace(self, passed: Passed) -> None:
        """Give the layer the weights that it will have once it is rounded."""
        ...

    def survivors(self) -> Mapping[str, Survival]:
        """Module of the layer → what its training is on the source's grid, where it changed and the source has one."""
        ...

    def config(self, packed: Collection[str]) -> dict[str, Any]:
        """The quantization_config of a folder whose `packed` modules are these, by their names there."""
        ...


class Integers:
    """GPTQ's rounding, or to nearest, on grids of integers: what every layout of them shares.

    `target` is what codes are chosen by, `dtype_of` says of a module of the checkpoint how its scales are stored.
    """

    def __init__(
        self,
        order: Order,
        parent: Checkpoint,
        streamed: Streamed,
        *,
        target: GPTQTarget,
        layout: Layout,
        dtype_of: Callable[[str], torch.dtype],
    ) -> None:
        self._order, self._grid, self._target, self._streamed = order, grid_of(order.target), target, streamed
        self._layout, self._dtype_of = layout, dtype_of
        self._grids = SourceGrids(order, parent)
        self._replaced: dict[str, Rounded] = {}

    def __call__(self, passed: Passed) -> Mapping[str, Tensor]:
        """The packed tensors of each linear module."""
        rounded = self._replaced or dict(self._rounded(passed))
        self._replaced = {}
        return dict(packed(self._streamed, passed, rounded, self._layout))

    def replace(self, passed: Passed) -> None:
        """Give the layer's modules what their codes stand for."""
        self._replaced = dict(self._rounded(passed))
        for name, found in self._replaced.items():
            weight_of(passed, name).copy_(found.dense())

    def survivors(self) -> Mapping[str, Survival]:
        """As asked for."""
        return self._grids.survivors()

    def _rounded(self, passed: Passed) -> Iterator[tuple[str, Rounded]]:
        """Modules of one input together: their rows are independent."""
        target = self._target
        inputs: Mapping[tuple[str, ...], Tensor | None] = passed.grams
        if not target.calibrated:
            inputs = {(name,): None for name in linears_of(passed.module)}
        for together, gram in inputs.items():
            modules = {name: module_of(self._streamed, passed, name) for name in together}
            dtypes = {
                name: self._dtype_of(module) for name, module in modules.items() if module not in self._order.kept
            }
            for dtype in dict.fromkeys(dtypes.values()):
                names = [name for name in dtypes if dtypes[name] == dtype]
                weights = {name: weight_of(passed, name) for name in names}
                stored = _stored(self._grids, self._streamed, passed, weights)
                fresh = partial(anew_by_gptq, gram=gram, target=target, dtype=dtype)
                with about(f"{passed.name}.{names[0]}"):
                    found = settle(weights, stored, gram, grid=self._grid, target=target, fresh=fresh)
                yield from found.items()


class GPTQ(Integers):
    """GPTQ's v1 layout."""

    def __init__(self, order: Order, parent: Checkpoint, streamed: Streamed) -> None:
        assert isinstance(order.target, GPTQTarget)
        super().__init__(
            order,
            parent,
            streamed,
            target=order.target,
            layout=gptq_layout(order.target),
            dtype_of=lambda _: torch.float16,
        )

    def config(self, packed: Collection[str]) -> dict[str, Any]:  # noqa: ARG002 - transformers looks for qweight
        """As gptqmodel writes it."""
        return gptq_config(self._target)


class AWQ:
    """AWQ's scales, folded where that is exact, its clipping and its rounding, in the GEMM layout."""

    def __init__(self, order: Order, parent: Checkpoint, streamed: Streamed) -> None:
        assert isinstance(order.target, AWQTarget)
        self._order, self._target, self._parent, self._streamed = order, order.target, parent, streamed
        self._grids = SourceGrids(order, parent)
        # On a stored grid a weight must stay what it is: whatever scales there are were folded before it was packed.
        fixed = self._grids.modules if self._target.grid != "fresh" else ()
        self._unfolded = unfolded(order.kept) | {layer for module in fixed if (layer := layer_of(module))}
        self._folds: dict[object, tuple[Fold, ...]] = {}
        self._layout = awq_layout(self._target)

    def __call__(self, passed: Passed) -> Mapping[str, Tensor]:
        """qweight, qzeros and scales of each linear module, and what else was scaled, in float32."""
        wanted = {
            name for name in linears_of(passed.module)
            if module_of(self._streamed, passed, name) not in self._order.kept
        }  # fmt: skip
        if not wanted:
            return {}
        before = {name: tensor.detach() for name, tensor in passed.module.named_parameters()}
        tensors, grams = self._scaled(passed, before)
        rounded: dict[str, Rounded] = {}
        for together, gram in grams.items():
            if not (names := [name for name in together if name in wanted]):
                continue
            stored = _stored(self._grids, self._streamed, passed, {name: before[f"{name}.weight"] for name in names})
            weights = {name: tensors[f"{name}.weight"] for name in names}
            fresh, target = partial(anew_by_awq, gram=gram, target=self._target), on_awq_grid(self._target)
            with about(f"{passed.name}.{names[0]}"):
                rounded |= settle(weights, stored, gram, grid=self._target.grid, target=target, fresh=fresh)
        folded = {
            self._streamed.stored(f"{passed.name}.{name}"): tensor
            for name, tensor in tensors.items()
            if tensor is not before[name] and name.removesuffix(".weight") not in rounded
        }
        return {**dict(packed(self._streamed, passed, rounded, self._layout)), **folded}

    def replace(self, passed: Passed) -> None:
        """AWQ takes dense inputs."""
        raise AssertionError(passed.name)

    def survivors(self) -> Mapping[str, Survival]:
        """As asked for."""
        return self._grids.survivors()

    def config(self, packed: Collection[str]) -> dict[str, Any]:
        """As gptqmodel writes it; transformers makes every linear layer that is not named an AWQ layer."""
        dense = named_dense(self._parent, packed, trust_remote_code=self._order.trust_remote_code)
        return awq_config(self._target) | ({"modules_to_not_convert": dense} if dense else {})

    def _scaled(
        self, passed: Passed, before: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
        """The layer's tensors with all scales folded in, and the Gram matrices of what its modules are then given."""
        output = passed.run()
        for folds in self._proposals(passed):
            tensors, grams = self._fold(passed, before, folds)
            with _holding(passed.module, tensors):
                exact = _close(passed.run(), output)
            if exact:
                self._folds[_structure(passed.module)] = folds
                break
        return tensors, grams

    def _proposals(self, passed: Passed) -> Iterator[tuple[Fold, ...]]:
        """The folds of a layer of the same structure, or those found for this one, or else none.

        None at all where a module is kept as it stands by itself: its bytes are those of the scales that it has.
        """
        first = next(iter(linears_of(passed.module)))
        if layer_of(module_of(self._streamed, passed, first)) in self._unfolded:
            yield ()
            return
        if (structure := _structure(passed.module)) in self._folds:
            yield self._folds[structure]
        yield find_folds(passed.module, passed.run)
        yield ()

    def _fold(
        self, passed: Passed, before: Mapping[str, Tensor], folds: tuple[Fold, ...]
    ) -> tuple[dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
        tensors, grams = dict(before), dict(passed.grams)
        for fold in folds:
            modules = [name.removesuffix(".weight") for name in fold.consumers]
            names = next((names for names in grams if set(names) & set(modules)), None)
            if names is None:
                continue
            with about(f"{passed.name}.{modules[0]}"):
                weights = [tensors[f"{name}.weight"] for name in names]
                found = search_scales(weights, grams[names], group_size=self._target.group_size, tie=fold.tied)
            producer = self._parent.tensors[self._streamed.stored(f"{passed.name}.{fold.producer}.weight")]
            scales = attainable(fold, tensors, fold.reduced(found), dtype=DTYPES[producer.dtype])
            tensors |= apply(fold, tensors, scales)
            grams[names] = scaled(grams[names], fold.expanded(scales))
        return tensors, grams


def weight_of(passed: Passed, name: str) -> Tensor:
    """float32 [O, I] of a linear module of the layer."""
    module = passed.module.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.weight.detach()


def packed(
    streamed: Streamed, passed: Passed, rounded: Mapping[str, Rounded], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The packed tensors of modules of the layer, by the names that the checkpoint has for them."""
    for name, found in rounded.items():
        yield from layout.packed(module_of(streamed, passed, name), found).items()


def module_of(streamed: Streamed, passed: Passed, name: str) -> str:
    """What the checkpoint calls a module of the layer."""
    return streamed.stored(f"{passed.name}.{name}.weight").removesuffix(".weight")


def _stored(grids: SourceGrids, streamed: Streamed, passed: Passed, weights: Weights) -> dict[str, Rounded]:
    """What the source has of modules of the layer whose dense weights are `weights`."""
    found = {name: grids.read(module_of(streamed, passed, name), weight) for name, weight in weights.items()}
    return {name: stored for name, stored in found.items() if stored is not None}


def _structure(module: nn.Module) -> object:
    """What two layers share that fold alike."""
    return type(module), tuple((name, tensor.shape) for name, tensor in module.named_parameters())


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other values for its parameters."""
    before = {name: parameter.data for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = before[name]


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= CLOSE * float(expected.norm())
