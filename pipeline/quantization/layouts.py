"""The layouts that rounded weights are packed in, each read again at once, and what a config says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ReloadMismatch
from pipeline.formats import awq, gptq
from pipeline.formats.rounded import Rounded
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup
from pipeline.targets import AWQTarget, GPTQTarget

# Who made it, as loaders read it: gptqmodel refuses asymmetric v1 zero points by a writer that it does not know,
# because AutoGPTQ's were wrong; they are packed here as by gptqmodel since that version.
QUANTIZERS = ["requant:1", "gptqmodel:0.9.0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a format packs what `Rounded` holds, and reads it in a folder whose config says `quantization`."""

    pack: Callable[[Rounded], Mapping[str, Tensor]]
    dequantize: Callable[[TensorGroup, Quantization], Tensor]
    quantization: Quantization

    def packed(self, module: str, rounded: Rounded) -> dict[str, Tensor]:
        """The tensors of a module, by their names; raise ReloadMismatch where its reader finds other weights."""
        parts = self.pack(rounded)
        group = TensorGroup(module=module, dense_name=f"{module}.weight", tensors=parts, packed=True)
        found = self.dequantize(group, self.quantization)
        if not torch.equal(found, rounded.dense().to(found.dtype)):
            raise ReloadMismatch(f"{module}: its packed tensors do not give its rounded weights back; report this")
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def gptq_layout(target: GPTQTarget) -> Layout:
    """GPTQ's v1 layout."""
    quantization = Quantization.parse(gptq_config(target))
    return Layout(pack=gptq.pack, dequantize=gptq.dequantize, quantization=quantization)


def awq_layout(target: AWQTarget) -> Layout:
    """AWQ's GEMM layout."""
    return Layout(pack=awq.pack, dequantize=awq.dequantize, quantization=Quantization.parse(awq_config(target)))


def gptq_config(target: GPTQTarget) -> dict[str, Any]:
    """The quantization_config of a GPTQ folder, as gptqmodel writes it."""
    return {
        "bits": target.code_bits, "checkpoint_format": "gptq", "desc_act": target.desc_act, "format": "gptq",
        "group_size": target.group_size, "lm_head": False, "meta": {"quantizer": QUANTIZERS},
        "pack_dtype": "int32", "quant_method": "gptq", "sym": target.symmetric,
    }  # fmt: skip


def awq_config(target: AWQTarget) -> dict[str, Any]:
    """The quantization_config of an AWQ folder, as gptqmodel writes it."""
    return {
        "bits": target.bits, "checkpoint_format": "gemm", "desc_act": False, "format": "gemm",
        "group_size": target.group_size, "lm_head": False, "meta": {"quantizer": QUANTIZERS},
        "pack_dtype": "int32", "quant_method": "awq", "version": "gemm", "zero_point": True,
    }  # fmt: skip
