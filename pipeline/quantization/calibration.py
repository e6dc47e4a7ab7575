"""The calibration pass: dense activations through the model, layer after layer, each layer from the disk once.

What a layer's rounding needs is known when the last batch has passed it; then its weights leave the memory. Peak memory
is one layer, its Gram matrices and the activations of all batches, which lie in files where they exceed `IN_MEMORY`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline import tensor_file
from pipeline.digests import digest_value
from pipeline.quantization.grams import Grams
from pipeline.quantization.strands import Call, Strands
from pipeline.quantization.streamed import Streamed, linears_of

BATCH_TOKENS = 4096  # given to a layer at once
IN_MEMORY = 2 << 30  # bytes of activations from which they lie in files


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the layers so far made of the batches: float32 [B, L, D] each, after `done` layers.

    `tupled` says that layers give a tuple; `beside` is the digest of what else the next layer is given, from which it
    is known whether these are enough to go on with.
    """

    done: int
    hidden: tuple[Tensor, ...]
    tupled: bool
    beside: str

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        said = json.dumps({"done": self.done, "tupled": self.tupled, "beside": self.beside})
        tensor_file.save(path, {str(i): tensor for i, tensor in enumerate(self.hidden)}, metadata={"state": said})

    @staticmethod
    def load(path: Path) -> State:
        """What `save` wrote, mapped into memory."""
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["state"])
            hidden = tuple(file.get_tensor(str(i)) for i in range(len(file.keys())))
        return State(hidden=hidden, **said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A layer that every batch has passed; its weights are loaded until the next one is asked for.

    `grams` maps the linear modules that share an input, by their names in the layer, to float32 [I, I]. `run` computes
    the layer's output for the first sample with the weights that it has at the moment. `state` is where the pass is.
    """

    index: int
    name: str
    module: nn.Module
    grams: Mapping[tuple[str, ...], Tensor]
    run: Callable[[], Tensor]
    state: Callable[[], State]


def batches_of(samples: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Samples of one length as the model's arguments, the first by itself: it is what folds are tried on."""
    ids = torch.tensor(samples, dtype=torch.int64)
    size = max(1, BATCH_TOKENS // ids.shape[1])
    return [{"input_ids": part} for part in (ids[:1], *torch.split(ids[1:], size)) if len(part)]


class Pass:
    """One pass of all samples through a model's layers.

    `spill` is the folder for activations that are too large for memory. With `replace` (sequential calibration) it is
    called for each layer before the layer's outputs are computed, and may give its modules other weights: what follows
    is then calibrated on what these give. `state` is where an earlier pass of the same samples was left. `asked` names
    the layers that are wanted, all where it is None: the others are run, those after the last not even that.
    """

    def __init__(
        self,
        streamed: Streamed,
        samples: Sequence[Sequence[int]],
        *,
        spill: Path,
        replace: Callable[[Passed], None] | None = None,
        state: State | None = None,
        asked: frozenset[str] | None = None,
    ) -> None:
        self._streamed, self._spill, self._replace, self._state = streamed, spill, replace, state
        self._asked = frozenset(streamed.layers) if asked is None else asked
        self._batches = [
            {name: tensor.to(streamed.device) for name, tensor in batch.items()} for batch in batches_of(samples)
        ]

    def __iter__(self) -> Generator[Passed]:
        """Every layer that is not passed yet, in the model's own order; close it where it is left early."""
        with Strands(self._streamed.model, self._streamed.layers, self._batches) as strands:
            left = set(self._asked) - set(skipped := self._skip(strands))
            done = len(skipped)
            while left and (name := strands.waiting) is not None:
                with self._streamed.loaded(name) as module:
                    if name in left:
                        yield self._through(strands, module, done)
                    else:
                        strands.advance()
                left.discard(name)
                done += 1

    def fits(self) -> bool:
        """Whether the state is enough to go on with: what a layer is given beside hidden states comes from no layer."""
        if self._state is None or not self._state.done:
            return True
        with Strands(self._streamed.model, self._streamed.layers, self._batches[:1]) as strands:
            self._skip(strands)
            return _beside(strands.calls()) == self._state.beside

    def _skip(self, strands: Strands) -> list[str]:
        """Answer for the layers that were passed before; return their names."""
        skipped: list[str] = []
        if self._state is None:
            return skipped
        state = self._state
        for index in range(state.done):
            skipped.append(strands.waiting or "")
            last = index == state.done - 1

            def answer(call: Call, last: bool = last) -> Any:  # noqa: FBT001 - bound here
                found = state.hidden[call.batch].to(hidden_of(call).device) if last else hidden_of(call)
                return (found,) if state.tupled else found

            strands.advance(answer)
        return skipped

    def _through(self, strands: Strands, module: nn.Module, index: int) -> Passed:
        """Let every batch pass the layer that they wait for."""
        calls = strands.calls()
        first, name = calls[0], calls[0].layer
        in_files = sum(hidden_of(call).nbytes for call in calls) > IN_MEMORY
        del calls
        outputs: dict[int, Any] = {}
        grams = Grams(linears_of(module))

        def computed(call: Call) -> Any:
            found = strands.compute(call)
            outputs[call.batch] = _in_file(found, self._spill) if in_files else found
            return outputs[call.batch]

        def listened(call: Call) -> Any:
            with grams.listening():
                return computed(call)

        def state() -> State:
            hidden = tuple(tensor_of(outputs[i]).cpu() for i in sorted(outputs))
            tupled = isinstance(outputs[0], tuple)
            return State(done=index + 1, hidden=hidden, tupled=tupled, beside=_beside(strands.calls()[:1]))

        if self._replace is None:
            strands.advance(listened)
        else:
            for call in strands.calls():
                with grams.listening():
                    strands.compute(call)
        passed = Passed(
            index=index, name=name, module=module, grams=grams.finish(name), state=state,
            run=lambda: tensor_of(strands.compute(first)),
        )  # fmt: skip
        if self._replace is not None:
            self._replace(passed)
            strands.advance(computed)
        return passed


def unasked(streamed: Streamed, *, done: int = 0) -> Iterator[Passed]:
    """Every layer but the first `done` with its weights alone, for what asks nothing of the calibration rows."""

    def nothing() -> Any:
        raise AssertionError("no batch has passed")

    for index, name in list(enumerate(streamed.layers))[done:]:
        with streamed.loaded(name) as module:
            yield Passed(index=index, name=name, module=module, grams={}, run=nothing, state=nothing)


def tensor_of(output: Any) -> Tensor:
    """The hidden states of a layer's output, which older architectures give as the first of several."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def hidden_of(call: Call) -> Tensor:
    """The hidden states that a layer is called with: its first tensor."""
    return next(value for value in (*call.arguments, *call.named.values()) if isinstance(value, Tensor))


def _beside(calls: Sequence[Call]) -> str:
    """The digest of the tensors that calls hold beside the hidden states."""
    found = []
    for call in calls:
        values = [*call.arguments, *(call.named[key] for key in sorted(call.named))]
        flat = [item for value in values for item in (value if isinstance(value, tuple | list) else (value,))]
        tensors = [item for item in flat if isinstance(item, Tensor) and item is not hidden_of(call)]
        found.append([[list(item.shape), item.double().sum().item()] for item in tensors])
    return digest_value(found)


def _in_file(output: Any, folder: Path) -> Any:
    """The same values in a file without a name: the system may write them out, and frees them with the tensor."""
    hidden = tensor_of(output)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        mapped = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
    mapped = mapped.view(hidden.shape).copy_(hidden)
    return (mapped, *output[1:]) if isinstance(output, tuple) else mapped
