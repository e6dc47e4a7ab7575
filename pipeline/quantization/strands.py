"""Forward passes over batches that wait for each other at every layer, so that each layer is in memory once.

What happens between layers (embeddings, masks, positions, residuals of the architecture's own) is the model's own code:
each batch runs it on a thread of its own, of which one runs at a time. A layer's call stops its thread until the layer
has been computed for that batch, and nothing is assumed about which layer comes next or what it is given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

Compute = Callable[["Call"], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a batch calls a layer with."""

    batch: int
    layer: str
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class _Ended(BaseException):
    """Ends a thread whose model is not run to its end."""


class Strands:
    """The forward passes of `model` over `batches`, stopped at `layers` (name → module); a context manager.

    `batches` are keyword arguments of the model's forward, a mapping for each. While the block lasts the layers' own
    forward is replaced; `compute` runs the real one.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        self._layers = layers
        self._forwards = {name: module.forward for name, module in layers.items()}
        self._strands = [_Strand(model, given, i) for i, given in enumerate(batches)]

    def __enter__(self) -> Self:
        for name, module in self._layers.items():
            module.forward = _stopped(name)
        try:
            for strand in self._strands:
                strand.begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for strand in self._strands:
            strand.end()
        for module in self._layers.values():
            del module.forward  # the class's own is seen again

    @property
    def waiting(self) -> str | None:
        """The layer that the batches wait for, or None when all have ended."""
        names = {strand.call.layer if strand.call else None for strand in self._strands}
        assert len(names) == 1, f"batches of one length wait for different layers: {names}"
        return names.pop()

    @property
    def outputs(self) -> list[Any]:
        """What the model gave for each batch, once all have ended."""
        return [strand.output for strand in self._strands]

    def compute(self, call: Call) -> Any:
        """What the layer gives for a call."""
        with torch.no_grad():
            return self._forwards[call.layer](*call.arguments, **call.named)

    def calls(self) -> list[Call]:
        """Every batch's call of the layer that they wait for."""
        return [strand.call for strand in self._strands if strand.call]

    def advance(self, compute: Compute | None = None) -> None:
        """Answer each batch by `compute`, by default the layer's own, and let it run to its next layer."""
        for strand in self._strands:
            if strand.call:
                strand.resume((compute or self.compute)(strand.call))


_current = threading.local()


def _stopped(name: str) -> Callable[..., Any]:
    def forward(*arguments: Any, **named: Any) -> Any:
        strand: _Strand = _current.strand
        return strand.visit(name, arguments, named)

    return forward


class _Strand:
    """One forward pass on a thread that runs only between two layers."""

    def __init__(self, model: nn.Module, given: Mapping[str, torch.Tensor], batch: int) -> None:
        self._model, self._given, self._batch = model, given, batch
        self.call: Call | None = None
        self.output: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._ending = False
        self._to_thread, self._to_owner = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"batch {batch}", daemon=True)

    def begin(self) -> None:
        """Run to the first layer."""
        self._thread.start()
        self._wait()

    def resume(self, answer: Any) -> None:
        """Run on with what the layer gave, to the next one or the end."""
        self._answer, self.call = answer, None
        del answer
        self._to_thread.release()
        self._wait()

    def end(self) -> None:
        """Leave the pass where it is."""
        if self._thread.is_alive():
            self._ending = True
            self._to_thread.release()
        if self._thread.ident is not None:
            self._thread.join()
        self.call = None

    def visit(self, layer: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Called by the model, on this thread: wait for the answer."""
        self.call = Call(batch=self._batch, layer=layer, arguments=arguments, named=named)
        del arguments, named
        self._to_owner.release()
        self._to_thread.acquire()
        if self._ending:
            raise _Ended
        answer, self._answer = self._answer, None
        return answer

    def _wait(self) -> None:
        self._to_owner.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _current.strand = self
        try:
            with torch.no_grad():  # torch keeps this for each thread
                self.output = self._model(**self._given)
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            self._error = error
        self._to_owner.release()
