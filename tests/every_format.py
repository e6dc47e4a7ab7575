"""A good tiny checkpoint in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.synthetic import NF4, PACKERS, TINY, Packer, write
from tests.gguf_models import LLAMA, decoder
from tests.gguf_models import write as write_gguf

MODEL, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


def _random(random_: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=random_, dtype=torch.uint8)


def _scales(random_: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=random_) / 256 + 1 / 512


def _int32(random_: torch.Generator, rows: int, columns: int) -> Tensor:
    return _random(random_, rows, 4 * columns).view(torch.int32)


def _fp4(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    state = {"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [outputs, inputs]}
    return {
        "weight": _random(random_, outputs * inputs // 2, 1),
        "weight.absmax": _scales(random_, outputs * inputs // 64),
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__fp4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _gemv(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "qweight": _int32(random_, outputs, inputs // 8),
        "qzeros": _int32(random_, outputs, 1),
        "scales": _scales(random_, outputs, 8).half(),
    }


def _gemv_fast(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "qweight": _random(random_, outputs // 4, 2 * inputs).view(torch.int16),
        "qzeros": -_scales(random_, 8, outputs).half(),
        "scales": _scales(random_, 8, outputs).half(),
    }


def _finite_fp8(random_: torch.Generator, *shape: int) -> Tensor:
    codes = _random(random_, *shape)
    codes[(codes & 0x7F) == 0x7F] = 0  # e4m3's two NaNs
    return codes.view(torch.float8_e4m3fn)


def _nvfp4(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "weight_packed": _random(random_, outputs, inputs // 2),
        "weight_scale": _scales(random_, outputs, inputs // 16).mul(64).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([64.0]),
    }


def _channel_fp8(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {"weight": _finite_fp8(random_, outputs, inputs), "weight_scale": _scales(random_, outputs, 1).bfloat16()}


def _modelopt(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    parts = _nvfp4(random_, outputs, inputs)
    return {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": torch.tensor(1 / 64),
    }


def _hqq(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    groups = outputs * inputs // 64
    return {
        "W_q": _random(random_, groups // 2, 64),
        "scale": _scales(random_, groups, 1).half(),
        "zero": torch.full((groups, 1), 8.0).half(),
        "shape": torch.tensor([outputs, inputs]),
        "group_size": torch.tensor(64, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }


def _torchao(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "_weight_qdata": _random(random_, outputs, inputs).view(torch.int8),
        "_weight_scale": _scales(random_, outputs, inputs // 64),
        "_weight_zero_point": torch.zeros(outputs, inputs // 64, dtype=torch.int8),
    }


def _dense(random_: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {"weight": _scales(random_, outputs, inputs).bfloat16()}


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*norm"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


_AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
_WEIGHTS_2D = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MORE: dict[str, Packer] = {
    "dense": (_dense, {}),
    "fp4": (_fp4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "gemv": (_gemv, {**_AWQ, "version": "gemv"}),
    "gemv_fast": (_gemv_fast, {**_AWQ, "version": "gemv_fast"}),
    "auto-round": (
        PACKERS["gptq"][0],
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True,
         "packing_format": "auto_round:auto_gptq", "extra_config": {"model.*k_proj": {"group_size": 128}}},
    ),
    "nvfp4": (_nvfp4, _compressed("nvfp4-pack-quantized", **_WEIGHTS_2D)),
    "float-quantized": (
        _channel_fp8,
        _compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"),
    ),
    "modelopt": (_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
    "hqq": (_hqq, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}},
                   "skip_modules": ["lm_head"]}),
    "torchao": (_torchao, {"quant_method": "torchao", "quant_type": "int8wo"}),
}  # fmt: skip
# A row of the catalog → the checkpoints that stand for it.
STANDING_FOR: dict[str, tuple[str, ...]] = {
    "dense": ("dense",), "bnb-4bit": ("nf4", "fp4"), "bnb-int8": ("int8",),
    "gptq": ("gptq", "gptq desc_act", "gptq 3 bits"), "awq": ("awq",), "awq-gemv": ("gemv",),
    "awq-gemv-fast": ("gemv_fast",), "auto-round": ("auto-round",),
    "compressed-tensors": ("compressed-tensors int4", "nvfp4", "float-quantized"), "fp8": ("fp8",),
    "modelopt": ("modelopt",), "mxfp4": ("mxfp4",), "hqq": ("hqq",), "torchao": ("torchao",), "gguf": ("gguf",),
}  # fmt: skip
KINDS = ("Q4_K", "Q6_K", "Q8_0", "F16", "IQ4_XS", "Q4_0")


def good(folder: Path, name: str) -> Path:
    """Write the checkpoint `name` to `folder` and return what to name it by: the folder, or a GGUF file in it."""
    if name == "gguf":
        folder.mkdir(parents=True)
        return write_gguf(folder / "model.gguf", "llama", LLAMA | {"block_count": 1}, decoder(layers=1), kinds=KINDS)
    if name == "mxfp4":
        return _gpt_oss(folder)
    write(folder, name, TINY, {**PACKERS, **MORE})
    if name == "torchao":
        _describe(folder)
    return folder


def _describe(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    text = json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": {"block_size": [1, 64]}})
    names = [name.removesuffix("._weight_qdata") + ".weight" for name in tensors if name.endswith("._weight_qdata")]
    save_file(tensors, folder / MODEL, metadata={"format": "pt", **dict.fromkeys(names, text)})


def _gpt_oss(folder: Path) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=128, hidden_size=64,
        intermediate_size=32, head_dim=16, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors, random_ = load_file(folder / MODEL), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = _random(random_, count, outputs, inputs // 32, 16)
        tensors[f"{name}_scales"] = _random(random_, count, outputs, inputs // 32) % 40 + 100
    save_file(tensors, folder / MODEL, {"format": "pt"})
    said = json.loads((folder / CONFIG).read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / CONFIG).write_text(json.dumps(said))
    return folder
