"""Where in a layer a scale folds exactly, found by experiment.

Nothing is looked up by architecture: modules that run are recorded with the tensors that they read and make, a fold is
proposed wherever the shapes allow one, applied with random scales, and the layer run again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.quantization.folds import Fold, apply

# What an exact fold leaves, of the change that scaling the inputs alone makes: float32 leaves 1e-6 to 1e-4, even where
# the residual stream is thousands of times larger than what the layer adds; a wrong fold leaves 0.1 to 2.
LEFT_BY_ROUNDING = 0.01
# Powers of two from 2 ** -12 to 2 ** 12 are exact, and push values against any clamp that lies on the way.
WIDE = 12


@torch.no_grad()
def find_folds(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[Fold, ...]:
    """Every place in `layer` where scales fold exactly, at most one for each tensor that linear layers read.

    `run` passes a sample through the layer, in float32 and evaluation mode, and returns its output; it is called twice
    for the record, once for each tensor that linear layers read, and once or twice for each proposal. A producer is the
    norm whose output the tensor is, or else the latest linear layer with which the experiment succeeds. Modules that
    run twice and weights that two modules share are left alone. The layer is as before when this returns. Each fold
    holds by itself, and any of them together.
    """
    calls, reference = _record(layer, run)
    assert torch.allclose(run(), reference), "the layer gives something else each time; run it without a cache"
    once = _used_once(layer, calls)
    widths = _head_widths(layer)
    found = []
    for inputs, readers in _readers(calls).items():
        if not all(call.name in once for call in readers):
            continue
        names = tuple(_join(call.name, weight) for call in readers for weight in call.weights(inputs.width))
        before = [call for call in calls[: calls.index(readers[0])] if call.name in once]
        experiment = _Experiment(layer, run, reference, names, inputs.width)
        proposals = _proposals(inputs, names, before[::-1], widths)
        found += list(itertools.islice(filter(experiment.holds, proposals), 1))
    return tuple(found)


class _Place(NamedTuple):
    """Where the values of a tensor lie: the same for a view of another shape, unless its last side is another."""

    storage: int
    offset: int
    values: int
    version: int  # a write in place makes other values of them
    width: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """A module with parameters of its own that ran, the places that it read, and the one that it made, if one."""

    name: str
    module: nn.Module
    reads: frozenset[_Place]
    made: _Place | None

    def weights(self, width: int) -> list[str]:
        """Its parameters that multiply inputs of this width, which lie along their last side."""
        own = self.module.named_parameters(recurse=False)
        return [name for name, weight in own if weight.ndim > 1 and weight.shape[-1] == width]


def _record(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[list[_Call], Tensor]:
    """What ran, in the order in which it ended, and what `run` returned."""
    calls: list[_Call] = []
    held: list[Any] = []  # a tensor that is freed gives its storage to the next
    names = {module: name for name, module in layer.named_modules()}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.numel()]
        held.append((given, output))
        made = _place(output) if isinstance(output, Tensor) and output.numel() else None
        calls.append(_Call(name=names[module], module=module, reads=frozenset(map(_place, given)), made=made))

    having = [module for module in names if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in having]
    try:
        return calls, run().clone()
    finally:
        for handle in hooks:
            handle.remove()


def _place(tensor: Tensor) -> _Place:
    return _Place(
        storage=tensor.untyped_storage().data_ptr(),
        offset=int(tensor.storage_offset()),
        values=tensor.numel(),
        version=0 if tensor.is_inference() else tensor._version,  # noqa: SLF001 - it has no other name
        width=tensor.shape[-1] if tensor.ndim else 1,
    )


def _used_once(layer: nn.Module, calls: list[_Call]) -> set[str]:
    """Modules that ran once and share no parameter."""
    runs = Counter(call.name for call in calls)
    uses = Counter(id(weight) for module in layer.modules() for weight in module.parameters(recurse=False))
    return {
        call.name
        for call in calls
        if runs[call.name] == 1 and all(uses[id(weight)] == 1 for weight in call.module.parameters(recurse=False))
    }


def _readers(calls: list[_Call]) -> dict[_Place, list[_Call]]:
    """Place that a linear layer reads → all modules with a weight for it, in the order in which they ran."""
    places = [place for call in calls if isinstance(call.module, nn.Linear) for place in sorted(call.reads)]
    return {
        place: [call for call in calls if place in call.reads and call.weights(place.width)]
        for place in dict.fromkeys(places)
    }


def _head_widths(layer: nn.Module) -> set[int]:
    """Whatever a module of the layer, or its config, calls a head's width or a count of heads."""
    holders = [holder for module in layer.modules() for holder in (module, getattr(module, "config", None)) if holder]
    return {
        value
        for holder in holders
        for name, value in vars(holder).items()
        if "head" in name and isinstance(value, int) and value > 0
    }


def _proposals(inputs: _Place, consumers: tuple[str, ...], before: Sequence[_Call], widths: set[int]) -> Iterator[Fold]:
    """Norms whose output this is, then the linear layers `before`, latest first, in every order of heads that fits."""
    width = inputs.width
    for call in before:
        weight = getattr(call.module, "weight", None)
        if call.made == inputs and isinstance(weight, Tensor) and weight.shape == (width,):
            for kind in ("norm", "one_plus"):
                yield Fold(producer=call.name, consumers=consumers, kind=kind, inputs=width, width=width, stride=width)
    for call in before:
        if isinstance(call.module, nn.Linear):
            for heads in dict.fromkeys(_orders(call.module.out_features, width, widths)):
                yield Fold(producer=call.name, consumers=consumers, kind="linear", inputs=width, **heads._asdict())


class _Heads(NamedTuple):
    width: int
    repeats: int
    start: int
    stride: int


def _orders(outputs: int, inputs: int, widths: Iterable[int]) -> Iterator[_Heads]:
    """Where the channels of `inputs` may lie among a linear layer's `outputs` rows.

    Row by row; the last or first rows of a fused layer (gate_up_proj); with queries in groups, in layers of their own
    or fused, the values behind queries and keys of all heads (qkv_proj) or of each group (GPT-NeoX, Falcon, DeepSeek's
    kv_b_proj).
    """
    if outputs >= inputs:
        yield from (_Heads(inputs, 1, start, inputs) for start in dict.fromkeys((outputs - inputs, 0)))
    if outputs == inputs:
        return
    for width in sorted(
        {found for each in widths for found in (each, inputs // each) if found and inputs % found == 0}
    ):
        heads = inputs // width
        for repeats in (count for count in range(1, heads + 1) if heads % count == 0):
            groups = heads // repeats
            alone, fused = outputs == groups * width, outputs == inputs + 2 * groups * width
            if alone or fused or (repeats == 1 and outputs > inputs):
                stride, rest = divmod(outputs, groups)
                yield from [_Heads(width, repeats, stride - width, stride)] if not rest else []
                yield _Heads(width, repeats, outputs - groups * width, width)


class _Experiment:
    """Runs the layer with other weights and compares; every weight is restored to the bit."""

    def __init__(
        self, layer: nn.Module, run: Callable[[], Tensor], reference: Tensor, consumers: Iterable[str], inputs: int
    ) -> None:
        self._weights = dict(layer.named_parameters())
        self._run, self._reference = run, reference
        self._disturbed = self._change({name: self._weights[name] * self._random(inputs) for name in consumers})

    def holds(self, fold: Fold) -> bool:
        """Whether the layer's output stays the same with random scales; through linear layers, with huge ones too."""
        scales = self._random(fold.inputs // fold.repeats)
        if not self._same(apply(fold, self._weights, scales)):
            return False
        if fold.kind != "linear":
            return True
        # The random values lie between 0.5 and 2, so these powers of two lie between 2 ** -WIDE and 2 ** WIDE.
        return self._same(apply(fold, self._weights, (scales.log2() * WIDE).round().exp2()))

    def _same(self, changed: Mapping[str, Tensor]) -> bool:
        return self._disturbed > 0 and self._change(changed) <= LEFT_BY_ROUNDING * self._disturbed

    def _change(self, changed: Mapping[str, Tensor]) -> float:
        """The norm of what `changed` weights do to the output; NaN where that is no number, which is never small."""
        before = {name: self._weights[name].clone() for name in changed}
        try:
            for name, tensor in changed.items():
                self._weights[name].copy_(tensor)
            return float((self._run() - self._reference).double().norm())
        finally:
            for name, tensor in before.items():
                self._weights[name].copy_(tensor)

    def _random(self, count: int) -> Tensor:
        """float32 [count] from 0.5 to 2, the same each time."""
        device = self._reference.device
        values = torch.rand(count, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).exp2_()
        return values.to(device)


def _join(module: str, weight: str) -> str:
    return f"{module}.{weight}" if module else weight
