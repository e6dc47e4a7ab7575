"""What a checkpoint becomes: each dense tensor and the group it is made from, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from pipeline import formats
from pipeline.catalog import Format
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, InputError, MissingTensor, UnexpectedTensor
from pipeline.formats import dense
from pipeline.formats.components import FLOATS
from pipeline.formats.scaled_activation import consumer
from pipeline.pieces import Layout, Piece
from pipeline.shards import DTYPE_NAMES, ShardReader, TensorGroup
from pipeline.skeleton import Place, Skeleton, skeleton_of

_LEAST_MASK = 1e3  # 1e4 in float16's time, 1e9 before


@contextmanager
def laid_out(checkpoint: Checkpoint, row: Format, *, dtype: torch.dtype, trust_remote_code: bool) -> Iterator[Layout]:
    """The layout of a checkpoint that becomes dense in `dtype`, whose pieces can be read inside the block.

    Raise CheckpointError where config.json, or a GGUF file's metadata, describe no model.
    """
    if checkpoint.is_gguf:
        # Here, since the gguf package need not be installed for the other formats.
        from pipeline.upcasting.gguf import laid_out as from_gguf

        with from_gguf(checkpoint, dtype=dtype) as layout:
            yield layout
        return
    skeleton = skeleton_of(
        checkpoint.path, dtype=dtype, trust_remote_code=trust_remote_code, stored=len(checkpoint.tensors)
    )
    with ShardReader(checkpoint) as reader:
        yield _lay_out(reader, row, checkpoint, skeleton)


def _lay_out(reader: ShardReader, row: Format, checkpoint: Checkpoint, skeleton: Skeleton) -> Layout:
    """Place every tensor of the checkpoint exactly once; transformers' own loader says what is missing or wrong."""
    pieces: dict[str, Piece] = {}
    dropped: dict[str, str] = {}
    problems: list[InputError] = []
    scales: list[TensorGroup] = []
    name_of: dict[str, str] = {}  # the model's parameter → the tensor that becomes it, or is part of it
    for group in reader.groups(row):
        name = group.dense_name
        place = skeleton.place(name)
        try:
            if name in pieces:
                raise UnexpectedTensor(f"{name}: is stored both dense and as {row.title}; remove one of them")
            if place is not None:
                pieces[name] = _piece(group, place, row, checkpoint)
                name_of[place.parameter] = name
            elif reason := _reason_to_drop(group, row, skeleton):
                dropped[name] = reason
            elif _scales_an_activation(group, row):
                scales.append(group)
            else:
                raise UnexpectedTensor(
                    f"{name}: {checkpoint.model_type or 'the architecture'} has no place for it; config.json does not "
                    "describe these weights"
                )
        except InputError as error:
            problems.append(error)
    for group in scales:
        try:
            name = _consumer(group, skeleton, name_of)
            divisor = dense.dequantize(group).flatten()
            if bool((divisor == 1).all()):  # so the weight is still what its codes say
                dropped[group.dense_name] = "scales of ones, which change nothing"
                continue
            pieces[name] = replace(pieces[name], divided_by=divisor)
            dropped[group.dense_name] = f"divided out of {name}"
        except InputError as error:
            problems.append(error)
    # A module that is malformed would be reported as missing too.
    problems = problems or list(skeleton.problems(pieces.values()))
    made = tuple(pieces.values())
    return Layout(pieces=made, dropped=dropped, problems=tuple(problems), described=checkpoint.path)


def _scales_an_activation(group: TensorGroup, row: Format) -> bool:
    return row.name.startswith("awq") and not group.packed and group.dense_name.endswith(".scales")


def _consumer(group: TensorGroup, skeleton: Skeleton, name_of: Mapping[str, str]) -> str:
    """The tensor that an activation's scales are divided out of; raise an InputError where there is none."""
    weight = f"{consumer(skeleton.model, group.dense_name, count=dense.dequantize(group).numel())}.weight"
    if weight not in name_of:
        raise MissingTensor(f"{weight}: is in no shard; the checkpoint is incomplete, download it again")
    return name_of[weight]


def _piece(group: TensorGroup, place: Place, row: Format, checkpoint: Checkpoint) -> Piece:
    if group.packed:
        assert checkpoint.quantization is not None
        shape = formats.load(row).dense_shape(group, checkpoint.quantization)
        piece = Piece(name=group.dense_name, group=group, dtype=place.dtype, shape=shape)
        return replace(piece, shape=shape[::-1], finish=torch.t) if place.transposed else piece
    stored = dense.dequantize(group).dtype
    if stored != place.dtype and not (stored in (*FLOATS, torch.float64) and place.dtype.is_floating_point):
        raise CheckpointError(
            f"{group.dense_name}: is {DTYPE_NAMES.get(stored, stored)} and not packed in any way that {row.title} "
            f"knows, expected {DTYPE_NAMES[place.dtype]}; fix quantization_config in config.json"
        )
    return Piece(name=group.dense_name, group=group, dtype=place.dtype, shape=dense.dense_shape(group))


def _reason_to_drop(group: TensorGroup, row: Format, skeleton: Skeleton) -> str:
    """Why a tensor that the architecture has no place for may go, or nothing."""
    if skeleton.ignores(group.dense_name):
        return "the architecture ignores it"
    if group.packed:
        return ""
    if _is_causal_mask(group):
        return "a causal mask, which the architecture makes by itself"
    if group.dense_name.endswith(row.leftovers):
        return "belongs to quantized activations, which a dense model has none of"
    # Older GPTQ tools give every packed module a bias of zeros.
    if group.dense_name.endswith(".bias") and not dense.dequantize(group).any():
        return "a bias of zeros that the architecture does not have"
    return ""


def _is_causal_mask(group: TensorGroup) -> bool:
    """Whether it is what older versions of GPT-2 and its kin kept of their attention masks.

    That is `bias`, a lower triangle of ones [1, 1, N, N], and `masked_bias`, the large negative number for the rest.
    """
    if not group.dense_name.endswith(("attn.bias", "attention.bias", "attn.masked_bias", "attention.masked_bias")):
        return False
    tensor = dense.dequantize(group)
    if group.dense_name.endswith(".masked_bias"):
        return tensor.numel() == 1 and float(tensor) <= -_LEAST_MASK
    square = tensor.ndim == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]  # noqa: PLR2004 - a causal mask's dimensions
    return square and torch.equal(tensor != 0, torch.ones_like(tensor, dtype=torch.bool).tril())
