"""Checkpoints of any size with random packed weights, as each format lies on disk: for speed, and for tests to damage.

Nothing is quantized: the codes and scales are random bits in the format's own layout, so that half a billion weights
take seconds. What the codes stand for does not matter to how fast they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Components = Mapping[str, Tensor]
# What packs a layer [O, I], and the quantization_config.
Packer = tuple[Callable[[torch.Generator, int, int], Components], dict[str, Any]]
# What NF4's sixteen codes stand for (QLoRA, appendix E); other libraries take them from a table of their own.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Llama's sides."""

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layer of one decoder layer → [O, I]."""
        hidden, wide, narrow = self.hidden, self.intermediate, self.hidden // 4
        return {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """Weights in all."""
        linear = sum(math.prod(shape) for shape in self.linears.values())
        return self.layers * (linear + 2 * self.hidden) + self.hidden + 2 * self.vocabulary * self.hidden


TINY = Size(hidden=128, intermediate=256, vocabulary=256, layers=1)
TWO_BILLION = Size(hidden=4096, intermediate=11008, vocabulary=16384, layers=10)
HUNDRED_MILLION = Size(hidden=1024, intermediate=2816, vocabulary=4096, layers=8)
HALF_BILLION = Size(hidden=2048, intermediate=5632, vocabulary=16384, layers=10)


def write(folder: Path, name: str, size: Size, packers: Mapping[str, Packer] | None = None) -> int:
    """Write a Llama of `size` in the format `name` of `packers` (PACKERS) to a new folder; return its parameters."""
    folder.mkdir(parents=True)
    pack, quantization = (packers or PACKERS)[name]
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": _dense(random, size.vocabulary, size.hidden),
        "lm_head.weight": _dense(random, size.vocabulary, size.hidden),
        "model.norm.weight": torch.ones(size.hidden, dtype=torch.bfloat16),
    }
    for layer in range(size.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(size.hidden, dtype=torch.bfloat16)
        for linear, (outputs, inputs) in size.linears.items():
            packed = pack(random, outputs, inputs)
            tensors |= {f"model.layers.{layer}.{linear}.{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers, "vocab_size": size.vocabulary,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": size.hidden // 8, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, **({"quantization_config": dict(quantization)} if quantization else {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size.parameters


def _dense(random: torch.Generator, *shape: int) -> Tensor:
    return (torch.randint(-128, 128, shape, generator=random, dtype=torch.int8) / 4096).bfloat16()


def _bytes(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def _words(random: torch.Generator, rows: int, columns: int) -> Tensor:
    return _bytes(random, rows, 4 * columns).view(torch.int32)


def _scales(random: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=random) / 256 + 1 / 512


def _nf4(random: torch.Generator, outputs: int, inputs: int) -> Components:
    """With double quantization: blocks of 64, and 256 of them to a nested one."""
    blocks = outputs * inputs // 64
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [outputs, inputs],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02,
    }  # fmt: skip
    return {
        "weight": _bytes(random, outputs * inputs // 2, 1),
        "weight.absmax": _bytes(random, blocks),
        "weight.quant_map": torch.tensor(NF4),
        "weight.nested_absmax": _scales(random, -(-blocks // 256)),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _int8(random: torch.Generator, outputs: int, inputs: int) -> Components:
    return {
        "weight": _bytes(random, outputs, inputs).view(torch.int8),
        "SCB": _scales(random, outputs),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _gptq(bits: int, *, ordered: bool) -> Callable[[torch.Generator, int, int], Components]:
    def pack(random: torch.Generator, outputs: int, inputs: int) -> Components:
        groups = inputs // 128
        order = torch.arange(inputs) // 128
        return {
            "qweight": _words(random, inputs * bits // 32, outputs),
            "qzeros": _zeros(groups, outputs, bits),
            "scales": _scales(random, groups, outputs).half(),
            "g_idx": (order[torch.randperm(inputs, generator=random)] if ordered else order).int(),
        }

    return pack


def _zeros(groups: int, outputs: int, bits: int) -> Tensor:
    """The zero points of a symmetric grid, 2 ** (bits - 1), less one as v1 stores them: int32 [G, O * bits / 32]."""
    stream = sum((2 ** (bits - 1) - 1) << (bits * i) for i in range(32))
    raw = stream.to_bytes(4 * bits, "little") * (outputs // 32)
    return torch.frombuffer(bytearray(raw), dtype=torch.int32).repeat(groups, 1)


def _awq(random: torch.Generator, outputs: int, inputs: int) -> Components:
    return {
        "qweight": _words(random, inputs, outputs // 8),
        "qzeros": _words(random, inputs // 128, outputs // 8),
        "scales": _scales(random, inputs // 128, outputs).half(),
    }


def _fp8(random: torch.Generator, outputs: int, inputs: int) -> Components:
    codes = _bytes(random, outputs, inputs)
    codes[(codes & 0x7F) == 0x7F] = 0  # noqa: PLR2004 - e4m3's two NaNs
    blocks = (-(-outputs // 128), -(-inputs // 128))
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": _scales(random, *blocks)}


def _int4(random: torch.Generator, outputs: int, inputs: int) -> Components:
    return {
        "weight_packed": _words(random, outputs, inputs // 8),
        "weight_scale": _scales(random, outputs, inputs // 128).bfloat16(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }


_INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
    }}},
}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "group_size": 128, "checkpoint_format": "gptq", "sym": True}
PACKERS: dict[str, Packer] = {
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                   "bnb_4bit_use_double_quant": True}),
    "int8": (_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": (_gptq(4, ordered=False), {**_GPTQ, "bits": 4, "desc_act": False}),
    "gptq desc_act": (_gptq(4, ordered=True), {**_GPTQ, "bits": 4, "desc_act": True}),
    "gptq 3 bits": (_gptq(3, ordered=False), {**_GPTQ, "bits": 3, "desc_act": False}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
    "fp8": (_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "compressed-tensors int4": (_int4, _INT4),
}  # fmt: skip

# Beside PACKERS, whose formats the readers are tried on: nothing is packed here.
DENSE: dict[str, Packer] = {"dense": (lambda random, outputs, inputs: {"weight": _dense(random, outputs, inputs)}, {})}


def truth(name: str, parts: Components) -> Tensor:
    """What a layer's components stand for, float32 [O, I], by the plainest formula: slow, and nothing shared."""
    if name == "nf4":
        outer = parts["weight.nested_absmax"].repeat_interleave(256)[: parts["weight.absmax"].numel()]
        scales = parts["weight.nested_quant_map"][parts["weight.absmax"].long()] * outer + 0.02
        packed = parts["weight"].flatten().long()
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()
        raw = bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist())
        return (parts["weight.quant_map"][codes] * scales.repeat_interleave(64)).view(json.loads(raw)["shape"])
    if name == "int8":
        return parts["weight"].float() * parts["SCB"][:, None] / 127
    if name == "fp8":
        scales = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return parts["weight"].float() * scales[: parts["weight"].shape[0], : parts["weight"].shape[1]]
    if name == "compressed-tensors int4":
        codes = _fields(parts["weight_packed"], 4) - 8
        return codes * parts["weight_scale"].float().repeat_interleave(128, 1)
    if name == "awq":
        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        codes, zeros = (
            _fields(parts[part], 4).view(parts[part].shape[0], -1, 8)[:, :, order].flatten(1)
            for part in ("qweight", "qzeros")
        )
        return ((codes - zeros.repeat_interleave(128, 0)) * parts["scales"].float().repeat_interleave(128, 0)).T
    bits = 3 if "3" in name else 4
    codes, group = _fields(parts["qweight"].T, bits), parts["g_idx"].long()
    # v1 subtracts one from each word's every field at once; 3-bit fields straddle words and are subtracted one by one.
    ones = 0 if bits == 3 else 0x11111111  # noqa: PLR2004 - three bits, as the text says
    zeros = _fields((parts["qzeros"].long() + ones).to(torch.int32), bits)
    zeros = (zeros + 1) % 8 if bits == 3 else zeros  # noqa: PLR2004 - likewise
    return (codes - zeros.T[:, group]) * parts["scales"].float().T[:, group]


def _fields(words: Tensor, bits: int) -> Tensor:
    """The codes of int32 words [R, W], one bit at a time: [R, 32 W / bits]."""
    stream = (words.unsqueeze(-1).long() >> torch.arange(32)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)
