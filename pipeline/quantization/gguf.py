"""One GGUF file for llama.cpp, from dense weights that stream in: GGUF's names, its order of rows, its blocks.

Which tensor is which, and in what order its rows lie, is asked of transformers' own reader, in the other direction.
What was written is read back before it is handed over: as the same tensors, config and tokens.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_bytes
from pipeline.encoding import load_tokenizer
from pipeline.errors import ReloadMismatch, UnexpectedTensor, about
from pipeline.formats import gguf as layout
from pipeline.gguf_headers import BLOCKS
from pipeline.gguf_places import naming_of, undone
from pipeline.gguf_rebuild import llama3_factors
from pipeline.gguf_writable import ARCHITECTURES, check_config, rope_of
from pipeline.quantization.folder import Order, Written, check_finite, describe
from pipeline.quantization.gguf_metadata import add_hyperparameters, add_tokenizer
from pipeline.shards import ShardReader
from pipeline.skeleton import Skeleton, skeleton_of
from pipeline.targets import GGUFTarget
from pipeline.upcasting.agreement import TEXT
from pipeline.upcasting.gguf import laid_out

EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
# What of a config the logits depend on, and a GGUF file must therefore give back.
_COMPUTED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "vocab_size", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor of the file: `source` is the parent's, its rows as `finish` has them; `dtype` its ggml type."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    finish: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        weights, size = BLOCKS[self.dtype]
        return math.prod(self.shape) // weights * size


def write(order: Order) -> Written:
    """Round `order.dense` to `order.target` on the CPU and write `order.out`: one GGUF file, config and tokenizer.

    The same weights give the same bytes; memory is bounded by the largest tensor. Raise UnsupportedFormat where GGUF
    has no place for something, NonFinite for a weight that is no number, ReloadMismatch where the file reads back as
    another model; `order.out` is gone then.
    """
    assert isinstance(order.target, GGUFTarget)
    parent = order.clear()
    config = transformers.AutoConfig.from_pretrained(parent.folder, trust_remote_code=order.trust_remote_code)
    check_config({**config.to_dict(), "architectures": config.architectures}, variant=order.target.variant)
    order.out.mkdir(parents=True)
    try:
        path = order.out / f"model-{order.target.type.upper()}.gguf"
        tensors, digests, notes = _write_file(path, order, order.target, parent, config)
        notes = {**_read_back(path, order, parent, config), **notes}
        if said := notes.get("tokenizer"):
            progress.message("quantize", f"{order.target.variant}: {said}")
        describe(order, parent, {})
        return _written(tensors, Checkpoint.open(order.out), digests, notes)
    except BaseException:
        shutil.rmtree(order.out)
        raise


def _write_file(
    path: Path, order: Order, target: GGUFTarget, parent: Checkpoint, config: Any
) -> tuple[Mapping[str, _Tensor], Mapping[str, str], Mapping[str, str]]:
    """Write the file; return its tensors by name, in order, their digests, and what to say of its tokenizer."""
    architecture = ARCHITECTURES[parent.model_type].name
    tensors = _tensors(parent, architecture, target, trust_remote_code=order.trust_remote_code)
    extra = _frequencies(config)
    with closing(GGUFWriter(path, architecture)) as writer:
        add_hyperparameters(writer, config, target)
        notes = add_tokenizer(
            writer, parent.folder, target, size=config.vocab_size, trust_remote_code=order.trust_remote_code
        )
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for name, tensor in tensors.items():
            kind = GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests: dict[str, str] = {}
        for name, values in extra.items():
            digests[name] = digest_bytes("F32", values.shape, values.data)
            writer.write_tensor_data(values)
        for done, (name, tensor) in enumerate(tensors.items()):
            progress.step("quantize", done=done, total=len(tensors), unit=f"{target.variant} tensors")
            values = _stored(parent, tensor)
            digests[name] = digest_bytes(tensor.dtype, tensor.shape, values.data)
            writer.write_tensor_data(values)
    progress.step("quantize", done=len(tensors), total=len(tensors), unit=f"{target.variant} tensors")
    return tensors, digests, notes


def _tensors(
    parent: Checkpoint, architecture: str, target: GGUFTarget, *, trust_remote_code: bool
) -> dict[str, _Tensor]:
    """GGUF name → tensor, in the order in which gguf lists an architecture's."""
    skeleton = skeleton_of(
        parent.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(parent.tensors)
    )
    naming = naming_of(skeleton.model, architecture)
    names, found = naming.names(), dict[str, _Tensor]()
    for source, info in parent.tensors.items():
        if (parameter := _parameter(skeleton, source, info.shape)) is None:
            continue
        name = names.get(parameter)
        place = naming.place(name, info.shape) if name else None
        if name is None or place is None or place.target != parameter or place.parts:
            raise UnexpectedTensor(f"{source}: GGUF has no place for it in a {architecture}; quantize to bitsandbytes")
        found[name] = _Tensor(source=source, shape=info.shape, dtype="F32", finish=place.finish)
    if HEAD in found and EMBEDDING in found and _tied(parent, found, skeleton):
        del found[HEAD]
    head = HEAD if HEAD in found else EMBEDDING
    return {
        name: replace(found[name], dtype=_type(found[name].shape, target, head=name == head))
        for name in sorted(found, key=partial(_position, architecture))
    }


def _parameter(skeleton: Skeleton, source: str, shape: tuple[int, ...]) -> str | None:
    """The model's own name of a stored tensor; None for one that the architecture has no use for."""
    place = skeleton.place(source)
    if place is None and skeleton.ignores(source):
        return None
    if place is None or tuple(skeleton.parameters[place.parameter].shape) != shape:
        raise UnexpectedTensor(f"{source}: config.json describes no such tensor; the two do not belong together")
    return place.parameter


def _tied(parent: Checkpoint, found: Mapping[str, _Tensor], skeleton: Skeleton) -> bool:
    """Whether the head that is stored is the embedding, which a file without a head says."""
    if not skeleton.model.config.tie_word_embeddings:
        return False
    with ShardReader(parent) as reader:
        return torch.equal(reader[found[HEAD].source], reader[found[EMBEDDING].source])


def _type(shape: tuple[int, ...], target: GGUFTarget, *, head: bool) -> str:
    """What llama.cpp's own quantize makes of a tensor without K types (llama-quant.cpp, `llama_tensor_get_type`).

    One dimension stays float32. The head, or the embedding where that is the head, is Q6_K there, and Q8_0 where rows
    do not divide into Q6_K's blocks of 256: it is always Q8_0 here, as the gguf package does not write Q6_K.
    """
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if head else target.type.upper()


def _position(architecture: str, name: str) -> tuple[int, int]:
    """Where gguf's list for an architecture has a tensor, the layers' behind the others and one after another."""
    stem = name.rpartition(".")[0]
    block = re.match(r"blk\.(\d+)\.", stem)
    kinds = MODEL_TENSORS[next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)]
    listed = [TENSOR_NAMES[kind].replace("{bid}", block[1] if block else "") for kind in kinds]
    return (int(block[1]) if block else -1, listed.index(stem))


def _frequencies(config: Any) -> dict[str, Any]:
    """Llama 3's scaling of positions, which llama.cpp keeps as a tensor."""
    if rope_of(config.to_dict())["rope_type"] != "llama3":
        return {}
    return {FREQUENCIES: llama3_factors(config).numpy()}


def _stored(parent: Checkpoint, tensor: _Tensor) -> Any:
    """The tensor as the file has it, in numpy. The parent's shard is mapped for it alone."""
    with ShardReader(parent) as reader, about(tensor.source):
        weight = reader[tensor.source]
        check_finite(tensor.source, weight)
        weight = weight.to(torch.float32, copy=True)
    if tensor.finish is not None:
        weight = undone(tensor.finish, weight)
    return (weight if tensor.dtype == "F32" else layout.pack(weight, tensor.dtype)).numpy()


def _read_back(path: Path, order: Order, parent: Checkpoint, config: Any) -> dict[str, str]:
    """What the manifest should say of the tokenizer; raise ReloadMismatch where the file is another model's.

    The file is alone in its folder yet: nothing but its own metadata is read.
    """
    variant = order.target.variant
    with laid_out(Checkpoint.open(path), dtype=torch.float32) as found:
        if found.problems:
            raise ReloadMismatch(f"{variant}: the file does not read back ({found.problems[0]}); report this")
        read = transformers.AutoConfig.from_pretrained(found.described)
        _check_config(variant, config, read, tied=not any(piece.name == "lm_head.weight" for piece in found.pieces))
        theirs = load_tokenizer(found.described, trust_remote_code=False)
    ours = load_tokenizer(parent.folder, trust_remote_code=order.trust_remote_code)
    if ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]:
        return {}
    return {"tokenizer": "transformers reads other tokens from the file than the tokenizer beside it gives"}


def _check_config(variant: str, config: Any, read: Any, *, tied: bool) -> None:
    """Raise ReloadMismatch where what was read back computes otherwise."""
    wanted, found = config.to_dict(), read.to_dict()
    for key in _COMPUTED:
        if key in wanted and key in found and wanted[key] != found[key]:
            raise ReloadMismatch(f"{variant}: {key} {wanted[key]} reads back as {found[key]}; report this")
    numbers = [(wanted["rms_norm_eps"], found["rms_norm_eps"]), *_rope_numbers(wanted, found)]
    same = all(math.isclose(ours, theirs, rel_tol=1e-6) for ours, theirs in numbers)  # float32 in the file
    if rope_of(wanted)["rope_type"] != rope_of(found)["rope_type"] or not same:
        raise ReloadMismatch(f"{variant}: rms_norm_eps or rope_parameters read back as {numbers}; report this")
    if read.tie_word_embeddings != tied:
        raise ReloadMismatch(f"{variant}: tied embeddings read back as {read.tie_word_embeddings}; report this")


def _rope_numbers(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[float, float]]:
    ours, theirs = rope_of(wanted), rope_of(found)
    return [(ours[key], theirs.get(key, math.nan)) for key in ("rope_theta", "factor") if ours.get(key) is not None]


def _written(
    tensors: Mapping[str, _Tensor], made: Checkpoint, digests: Mapping[str, str], notes: Mapping[str, str]
) -> Written:
    matrices = [tensor for tensor in tensors.values() if tensor.dtype != "F32"]
    weights = sum(math.prod(tensor.shape) for tensor in matrices)
    everything = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return Written(
        packed=tuple(tensor.source.removesuffix(".weight") for tensor in matrices),
        dense=(),
        packed_bits_per_weight=8 * sum(tensor.nbytes for tensor in matrices) / weights,
        bits_per_weight=8 * made.nbytes / everything,
        digests=digests,
        notes=notes,
    )
