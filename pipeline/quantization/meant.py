"""The model that a quantized folder stands for: its weights as this project's readers have them, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.catalog import Format, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.evaluation.load import device
from pipeline.evaluation.rounding import activations_of, rounding
from pipeline.formats.components import ALL
from pipeline.pieces import Layout, Piece
from pipeline.quantization.strands import Strands
from pipeline.quantization.streamed import Streamed
from pipeline.skeleton import Place, Skeleton, skeleton_of
from pipeline.upcasting.layout import laid_out
from pipeline.upcasting.stream import compute


class Meant:
    """The weights of a quantized folder by the model's own names, dequantized when they are asked for.

    `packed` are the modules whose weights are packed, `multiplied` those of them that multiply their inputs (a GGUF
    file packs the embedding, too), `classes` the class that each module has in the dense model, `activations` what the
    format's kernels round inputs to. Where a format `loads_dense`, no module becomes one of a library. `joined` are
    parameters that transformers makes of several tensors, all of them dense. Raise UnsupportedFormat where a packed
    module is only a part of a parameter.
    """

    def __init__(
        self, checkpoint: Checkpoint, row: Format, layout: Layout, skeleton: Skeleton, *, trusted: bool
    ) -> None:
        self._checkpoint, self._row, self._trusted = checkpoint, row, trusted
        self.classes = {name: type(module) for name, module in skeleton.model.named_modules()}
        self.activations = activations_of(checkpoint)
        self._tied = dict(getattr(skeleton.model, "all_tied_weights_keys", None) or {})
        self._pieces: dict[str, tuple[Piece, Place]] = {}
        parts: dict[str, list[tuple[Piece, Place]]] = {}
        for piece in layout.pieces:
            place = skeleton.place(piece.name)
            assert place is not None, f"{piece.name}: is in the layout"
            parts.setdefault(place.parameter, []).append((piece, place))
        for parameter, found in parts.items():
            first, place = found[0]
            if len(found) == 1 and first.shape == tuple(skeleton.parameters[parameter].shape):
                self._pieces[parameter] = first, place
            elif any(piece.group.packed for piece, _ in found):
                raise UnsupportedFormat(
                    f"{first.name}: is packed, but only a part of {parameter} as transformers knows it, which it does "
                    "not reload; quantize to bitsandbytes"
                )
        self.joined = frozenset(skeleton.parameters) - self._pieces.keys() - self._tied.keys()
        self.packed = tuple(
            parameter.rpartition(".")[0] for parameter, (piece, _) in self._pieces.items() if piece.group.packed
        )
        self.multiplied = tuple(name for name in self.packed if issubclass(self.classes[name], nn.Linear | Conv1D))
        self.loads_dense = checkpoint.is_gguf

    def inputs(self, module: str) -> int:
        """How many inputs a packed module has."""
        piece, place = self._pieces[f"{module}.weight"]
        return piece.shape[0 if place.transposed else 1]

    def weight(self, module: str) -> Tensor:
        """float32 [O, I] of a packed module."""
        parameter = f"{module}.weight"
        found = self._read(parameter)
        return found.T if self._pieces[parameter][1].transposed else found

    def bias(self, module: str) -> Tensor | None:
        """float32 [O] of a packed module that has one."""
        return self._read(f"{module}.bias") if f"{module}.bias" in self._pieces else None

    def answer(
        self, given: Mapping[str, Tensor], joined: Mapping[str, Tensor], *, computes: torch.dtype | None = None
    ) -> Tensor:
        """What the model says, as `answer_of` has it, computed in float32 with one layer in memory.

        `joined` are the parameters of that name. With `computes` every module's output is rounded to that dtype, and
        the inputs of packed ones as the format's kernels round them.
        """

        def read(parameter: str) -> Tensor:
            return joined[parameter].float() if parameter in joined else self._read(parameter)

        stored = {name: name for name in (*self._pieces, *joined)}
        streamed = Streamed(self._checkpoint, read, device=device(), trust_remote_code=self._trusted, stored=stored)
        for alias in self._tied.keys() & self._pieces.keys():  # stored though tied: it may differ, and is then its own
            owner, _, leaf = alias.rpartition(".")
            parameter = nn.Parameter(read(alias).to(device()), requires_grad=False)
            setattr(streamed.model.get_submodule(owner), leaf, parameter)
        with _computing_in(streamed.model, computes), self._rounding(streamed.model, computes):
            return answer_of(_run(streamed, given))

    @contextmanager
    def _rounding(self, model: Any, computes: torch.dtype | None) -> Iterator[None]:
        modules = [model.get_submodule(name) for name in self.packed if computes is not None]
        with rounding(modules, self.activations):
            yield

    def _read(self, parameter: str) -> Tensor:
        piece, _ = self._pieces[parameter]
        return compute(piece, self._row, self._checkpoint.quantization, ALL)


@contextmanager
def meant_by(folder: Path, *, trust_remote_code: bool) -> Iterator[Meant]:
    """What a quantized folder stands for, readable inside the block.

    Raise an InputError where its tensors are not what its config.json and its architecture say.
    """
    checkpoint = Checkpoint.open(folder)
    row = format_of(checkpoint.quantization)
    skeleton = skeleton_of(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(checkpoint.tensors)
    )
    with laid_out(checkpoint, row, dtype=torch.float32, trust_remote_code=trust_remote_code) as layout:
        if layout.problems:
            raise layout.problems[0]
        yield Meant(checkpoint, row, layout, skeleton, trusted=trust_remote_code)


def answer_of(output: Any) -> Tensor:
    """float32 [N, V] on the CPU of what a model gave for one row: logits, or else its last hidden state."""
    found = getattr(output, "logits", None)
    if found is None:
        found = getattr(output, "last_hidden_state", None)
    found = output[0] if found is None else found
    answer: Tensor = found.detach().float().cpu()
    return answer.reshape(-1, answer.shape[-1])


def _run(streamed: Streamed, given: Mapping[str, Tensor]) -> Any:
    batch = {name: tensor.to(streamed.device) for name, tensor in given.items()}
    with Strands(streamed.model, streamed.layers, [batch]) as strands:
        while (layer := strands.waiting) is not None:
            with streamed.loaded(layer):
                strands.advance()
        return strands.outputs[0]


@contextmanager
def _computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Have every module that holds no other round what it gives to `dtype`."""

    def hook(_: Any, __: Any, found: Any) -> Any:
        return found.to(dtype).float() if isinstance(found, Tensor) and found.is_floating_point() else found

    leaves = [module for module in model.modules() if dtype is not None and not list(module.children())]
    handles = [module.register_forward_hook(hook) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
