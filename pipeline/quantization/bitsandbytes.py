"""NF4, FP4 and int8, written in bitsandbytes' layout without bitsandbytes: dense weights stream in, codes stream out.

No model is loaded. Which modules transformers would quantize is asked of its own functions, on a model without weights;
what they are packed into is `pipeline.formats`' arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import progress
from pipeline.catalog import format_to
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ReloadMismatch, about
from pipeline.formats import bnb_4bit_pack, bnb_int8
from pipeline.formats.bnb_4bit_pack import Shapes
from pipeline.quantization.copies import Copies
from pipeline.quantization.folder import Order, Written, check_finite, finish
from pipeline.quantization.heads import kept_dense
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, DTYPES, ShardReader
from pipeline.skeleton import skeleton_of
from pipeline.targets import BitsAndBytesTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """A module to be packed: its tensor in the parent, the dtype that it is quantized from, and whether it lies [I, O].

    `name` is the module's name on disk, the parent's own.
    """

    name: str
    dtype: torch.dtype
    transposed: bool

    def weight(self, stored: Tensor) -> Tensor:
        """[O, I], as transformers would load it."""
        loaded = stored.to(self.dtype)
        return loaded.T if self.transposed else loaded


def write(order: Order) -> Written:
    """Quantize `order.dense` on the CPU and write `order.out`: the bytes that bitsandbytes would give there.

    4 bits: blocks of 64 weights, bfloat16 for computing. int8: one scale for each row, outlier threshold 6.0. Nothing
    is calibrated, and memory is bounded by the largest tensor. Raise NonFinite for a weight that is no number,
    ReloadMismatch where transformers would not find the packed weights; `order.out` is gone then.
    """
    assert isinstance(order.target, BitsAndBytesTarget)
    parent = order.clear()
    spared = kept_dense(parent, trust_remote_code=order.trust_remote_code)
    modules = _modules(parent, spared, trust_remote_code=order.trust_remote_code)
    order.out.mkdir(parents=True)
    try:
        digests = _write_weights(order, order.target, parent, modules, Copies(order.kept, format_to(order.target)))
        return finish(order, parent, quantization=_config(order.target, spared).to_dict(), digests=digests)
    except BaseException:
        shutil.rmtree(order.out)
        raise


def _write_weights(
    order: Order, target: BitsAndBytesTarget, parent: Checkpoint, modules: Mapping[str, _Module], copies: Copies
) -> Mapping[str, str]:
    """Every tensor of the parent in its order, packed, copied or as it is; return the digest of each."""
    with ShardWriter(order.out, _shapes(target, parent, modules, copies), noted=True) as writer:
        for name in _counted(parent.tensors, f"{target.variant} tensors"):
            if copied := copies.parts.get(name.removesuffix(".weight")):
                for part in copied:
                    writer.write(part, copies[part])
                continue
            stored = _stored(parent, name)
            if name not in modules:
                check_finite(name, stored)
                writer.write(name, stored)
                continue
            with about(name):
                parts = _pack(target, modules[name].weight(stored))
            for part, tensor in parts.items():
                writer.write(f"{modules[name].name}.{part}", tensor)
    return writer.digests


def _stored(parent: Checkpoint, name: str) -> Tensor:
    """A tensor of the parent. Its file is mapped for it alone: what was read of the others is memory of no process."""
    with ShardReader(parent) as reader:
        return reader[name]


def _shapes(
    target: BitsAndBytesTarget, parent: Checkpoint, modules: Mapping[str, _Module], copies: Copies
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor to write → its dtype and shape; double quantization reads the weights once more for it."""
    reads = target.bits == 4 and target.double_quant is not False  # noqa: PLR2004 - four bits
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in _counted(parent.tensors, f"{target.variant} tensors, scales") if reads else parent.tensors:
        info = parent.tensors[name]
        if copied := copies.parts.get(name.removesuffix(".weight")):
            shapes |= {part: copies.shapes[part] for part in copied}
            continue
        if name not in modules:
            shapes[name] = (info.dtype, info.shape)
            continue
        module = modules[name]
        stored = _stored(parent, name) if reads else torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        with about(name):
            found = _packed_shapes(target, module.weight(stored))
        shapes |= {f"{module.name}.{part}": (DTYPE_NAMES[dtype], shape) for part, (dtype, shape) in found.items()}
    return shapes


def _pack(target: BitsAndBytesTarget, weight: Tensor) -> dict[str, Tensor]:
    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return bnb_int8.pack(weight)
    return bnb_4bit_pack.pack(weight, kind=target.type or "nf4", double_quant=target.double_quant is not False)


def _packed_shapes(target: BitsAndBytesTarget, weight: Tensor) -> Shapes:
    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return bnb_int8.shapes(tuple(weight.shape))
    return bnb_4bit_pack.shapes(weight, kind=target.type or "nf4", double_quant=target.double_quant is not False)


def _counted(names: Collection[str], unit: str) -> Iterator[str]:
    """Each name; what was done with it is behind once the next is asked for."""
    for done, name in enumerate(names):
        progress.step("quantize", done=done, total=len(names), unit=unit)
        yield name
    progress.step("quantize", done=len(names), total=len(names), unit=unit)


def _modules(parent: Checkpoint, spared: list[str] | None, *, trust_remote_code: bool) -> dict[str, _Module]:
    """The parent's tensors that become packed modules: those of the modules that transformers would quantize.

    `spared` are those that the config will name, or None for transformers' own rule (`kept_dense`).
    """
    skeleton = skeleton_of(
        parent.folder,
        dtype=_dtype(parent, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
        stored=len(parent.tensors),
    )
    wanted = _quantized(skeleton.model, spared)
    found: dict[str, _Module] = {}
    for name, info in parent.tensors.items():
        place = skeleton.place(name)
        module, _, last = place.parameter.rpartition(".") if place else ("", "", "")
        if place is None or last != "weight" or module not in wanted:
            continue
        if not name.endswith(".weight") or tuple(skeleton.parameters[place.parameter].shape) != info.shape:
            raise ReloadMismatch(
                f"{name}: is only a part of {module} as transformers knows it, which cannot be packed in parts; "
                "this architecture cannot be quantized to bitsandbytes"
            )
        found[name] = _Module(name=name.removesuffix(".weight"), dtype=place.dtype, transposed=place.transposed)
    return found


def _quantized(model: Any, spared: list[str] | None) -> set[str]:
    """The modules that transformers' `replace_with_bnb_linear` would replace (integrations/bitsandbytes.py)."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, spared, model._keep_in_fp32_modules)  # noqa: SLF001 - what its quantizers pass
    return {
        name
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def _dtype(parent: Checkpoint, *, trust_remote_code: bool) -> torch.dtype:
    """The dtype that transformers loads the parent in: its config's, or else that of its first floating tensor."""
    import transformers

    named = transformers.AutoConfig.from_pretrained(parent.folder, trust_remote_code=trust_remote_code).dtype
    if isinstance(named, torch.dtype):
        return named
    floating = (dtype for info in parent.tensors.values() if (dtype := DTYPES[info.dtype]).is_floating_point)
    return next(floating, torch.float32)


def _config(target: BitsAndBytesTarget, dense: list[str] | None) -> Any:
    """The config of a target, which keeps the modules `dense` as they are.

    None names no `llm_int8_skip_modules`: naming some would end transformers' own rule, by which the output head and
    whatever is tied to the embedding stay dense, when writing and when loading.
    """
    from transformers import BitsAndBytesConfig

    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=dense)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=dense,
        bnb_4bit_quant_type=target.type or "nf4",
        bnb_4bit_use_double_quant=target.double_quant is not False,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
