"""The quantized folder, made from the dense one and what a library wrote.

A library is believed about packed weights and its `quantization_config`, and about nothing else: config, tokenizer and
dense tensors are the parent's own bytes, so that the same weights always give the same files.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline import pairing
from pipeline.bit_budget import packed_bits
from pipeline.catalog import Format, format_to
from pipeline.checkpoint import Checkpoint, copy_companions
from pipeline.errors import NonFinite, ReloadMismatch
from pipeline.formats.components import NOT_FINITE, all_finite
from pipeline.kept import Donor
from pipeline.quantization.activation_scales import scales_of
from pipeline.quantization.copies import Copies
from pipeline.quantization.survival import Survival
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, DTYPES, ShardReader
from pipeline.targets import Target, is_mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One quantized checkpoint to be written, in values that travel to another process.

    `dense` is the parent's folder, `out` the folder to make, `scratch` one for the library's own files: absolute
    paths; whatever is in the last two goes. `calibration` holds token ids, a tuple for each sample, and is empty where
    the format needs none. `kept` maps the modules whose packed bytes are copied to the donor that has them; where
    these are all, `described_by` is the one whose config fits. `grid_of` is the quantized source of the dense weights,
    where it has the target's own layout: modules that changed may stay on its grid.
    """

    dense: Path
    out: Path
    scratch: Path
    target: Target
    calibration: tuple[tuple[int, ...], ...] = ()
    kept: Mapping[str, Donor] = field(default_factory=dict)
    described_by: Donor | None = None
    grid_of: Donor | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def clear(self) -> Checkpoint:
        """Empty `scratch`, remove `out`, open the parent."""
        for folder in (self.out, self.scratch):
            if folder.exists():
                shutil.rmtree(folder)
        self.scratch.mkdir(parents=True)
        return self.open()

    def open(self) -> Checkpoint:
        """The parent; raise CheckpointError where a projector beside it is another's."""
        if pairing.is_projected(self.dense):
            pairing.check(self.dense)
        return Checkpoint.open(self.dense)


def scan(parent: Checkpoint) -> None:
    """Raise NonFinite where a weight is no number: libraries pack a NaN without a word, as a code like any other."""
    with ShardReader(parent) as reader:
        for name in parent.tensors:
            check_finite(name, reader[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What became of the weights: which modules are packed, which weight matrices stayed dense, and how large it is.

    `digests` are those of all its tensors before they went to the disk. `packed_bits_per_weight` counts scales and zero
    points; `bits_per_weight` is over all tensors of the model. `bits` are those of each packed module, where a target
    gives them different ones. `survival` says of changed modules what their training is on the grid of the source,
    where that is known; `notes` what else whoever uses the folder should know.
    """

    packed: tuple[str, ...]
    dense: tuple[str, ...]
    digests: Mapping[str, str]
    packed_bits_per_weight: float
    bits_per_weight: float
    bits: Mapping[str, int] = field(default_factory=dict)
    survival: Mapping[str, Survival] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def write_folder(
    order: Order, parent: Checkpoint, made: Checkpoint, *, quantization: Mapping[str, Any], scaled: bool = False
) -> Written:
    """Write `order.out` from the parent and the library's folder `made`; `quantization` goes into its config.json.

    `scaled` says that the library folded scales into dense tensors too (AWQ): those that it changed are taken from it,
    in the parent's dtype. A projector beside the parent goes along, sealed to the new weights. Raise NonFinite for a
    NaN or infinity among tensors or scales, ReloadMismatch where the library's tensors are not the parent's, some of
    them packed.
    """
    row = format_to(order.target)
    copies = Copies(order.kept, row)
    sources = dict(_sources(parent, made, row.packed_modules(made.tensors), copies, scaled=scaled))
    _check_complete(parent, made, row, set(sources))
    order.out.mkdir(parents=True)
    shapes = {name: (source.dtype, source.shape) for name, source in sources.items()}
    ones = scales_of(order.target, parent, trust_remote_code=order.trust_remote_code)
    shapes |= {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ones.items()}
    with (
        ShardReader(parent) as dense,
        ShardReader(made) as library,
        ShardWriter(order.out, shapes, noted=True) as writer,
    ):
        for name, source in sources.items():
            if source.place != "library":
                writer.write(name, copies[name] if source.place == "donor" else dense[name])
                continue
            tensor = library[name]
            if name in parent.tensors and torch.equal(tensor, dense[name].to(tensor.dtype)):
                tensor = dense[name]  # not scaled after all: the parent's may be of higher precision
            tensor = tensor.to(DTYPES[source.dtype])
            check_finite(name, tensor, "holds NaN or infinity; quantize to more bits or with more calibration rows")
            writer.write(name, tensor)
        for name, tensor in ones.items():
            writer.write(name, tensor)
    return finish(order, parent, quantization=quantization, digests=writer.digests)


def finish(order: Order, parent: Checkpoint, *, quantization: Mapping[str, Any], digests: Mapping[str, str]) -> Written:
    """Write what lies beside the weights in `order.out`, and say what became of them.

    That is config.json, with `quantization` as its quantization_config, the parent's tokenizer and other companions,
    and a projector's seal to the new weights.
    """
    describe(order, parent, {"quantization_config": dict(quantization)})
    if pairing.is_projected(order.out):
        pairing.seal(order.out)
    made = Checkpoint.open(order.out)
    written = _written(parent, made, format_to(order.target), digests)
    return replace(written, bits=packed_bits(made, written.packed)) if is_mixed(order.target) else written


def describe(order: Order, parent: Checkpoint, more: Mapping[str, Any]) -> None:
    """Write the parent's config.json with `more` in it to `order.out`, and what else goes along with weights."""
    text = json.dumps({**parent.config, **more}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (order.out / "config.json").write_text(text, encoding="utf-8")
    copy_companions(parent.path, order.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where a tensor of the folder comes from, and what it is there."""

    place: Literal["parent", "library", "donor"]
    dtype: str
    shape: tuple[int, ...]


def _sources(
    parent: Checkpoint, made: Checkpoint, packed: Mapping[str, tuple[str, ...]], copies: Copies, *, scaled: bool
) -> Iterator[tuple[str, _Source]]:
    """Tensor to write → its source, in the parent's order; a donor's goes before the library's."""
    for name, info in parent.tensors.items():
        module = name.removesuffix(".weight") if name.endswith(".weight") else ""
        for copied in copies.parts.get(module, (name,) if name in copies.shapes else ()):
            dtype, shape = copies.shapes[copied]
            yield copied, _Source(place="donor", dtype=dtype, shape=shape)
        if module in copies.parts or name in copies.shapes:
            continue
        for part in packed.get(module, ()):
            component = made.tensors[module + part]
            # gptqmodel keeps AWQ's scales in the model's dtype, the layout says float16.
            dtype = "F16" if part == ".scales" else component.dtype
            yield module + part, _Source(place="library", dtype=dtype, shape=component.shape)
        if module in packed:
            continue
        scaled_by_library = scaled and name in made.tensors
        if scaled_by_library and made.tensors[name].shape != info.shape:
            found, expected = list(made.tensors[name].shape), list(info.shape)
            raise ReloadMismatch(f"{name}: has shape {found} after quantization, {expected} before; report this")
        yield name, _Source(place="library" if scaled_by_library else "parent", dtype=info.dtype, shape=info.shape)


def _check_complete(parent: Checkpoint, made: Checkpoint, row: Format, taken: set[str]) -> None:
    """Raise ReloadMismatch unless what is left over is a tied copy or a bias of zeros."""
    with ShardReader(made) as library:
        for name in sorted(set(made.tensors) - taken):
            tied = name.endswith("lm_head.weight") and bool(parent.config.get("tie_word_embeddings"))
            if not (tied or (name.endswith(".bias") and not library[name].any())):
                raise ReloadMismatch(
                    f"{name}: was written by the library for {row.title}, but the dense model has no such tensor; this "
                    "architecture cannot be written in this format"
                )


def check_finite(name: str, tensor: Tensor, otherwise: str = NOT_FINITE) -> None:
    """Raise NonFinite, which says `otherwise` of the tensor `name`, where a value is NaN or infinite."""
    if tensor.is_floating_point() and not all_finite(tensor):
        raise NonFinite(f"{name}: {otherwise}")


def _written(parent: Checkpoint, made: Checkpoint, row: Format, digests: Mapping[str, str]) -> Written:
    parts = row.packed_modules(made.tensors)
    matrices = [name.removesuffix(".weight") for name, info in parent.tensors.items()
                if name.endswith(".weight") and len(info.shape) > 1]  # fmt: skip
    weights = sum(math.prod(parent.tensors[f"{module}.weight"].shape) for module in parts)
    nbytes = sum(
        made.tensors[module + part].end - made.tensors[module + part].start
        for module, found in parts.items()
        for part in found
    )
    everything = sum(math.prod(info.shape) for info in parent.tensors.values())
    return Written(
        packed=tuple(parts),
        dense=tuple(module for module in matrices if module not in parts),
        digests=digests,
        packed_bits_per_weight=8 * nbytes / weights if weights else 0.0,
        bits_per_weight=8 * made.nbytes / everything,
    )
