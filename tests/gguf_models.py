"""Small GGUF models that tests write with the gguf package, quantized blocks and tokenizer included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from tests.checkpoints import BOS, EOS, PAD, tiny_tokenizer

Shapes = Mapping[str, tuple[int, ...]]
CAN_QUANTIZE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "BF16", "F16", "F32")
VOCAB = 256


def blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Bytes [..., row bytes] of `kind`, whose values are finite and small; floats for F32 and F16."""
    dtype = GGMLQuantizationType[kind]
    if kind in CAN_QUANTIZE:
        return quantize((rng.standard_normal(shape) * 0.05).astype(np.float32), dtype)
    weights, size = GGML_QUANT_SIZES[dtype]
    rows = int(np.prod(shape[:-1]))
    raw = rng.integers(0, 256, (rows, shape[-1] // weights, size), dtype=np.uint8)
    for _ in range(100):  # random bytes hold random float16 scales: draw those anew that make a block large
        with np.errstate(all="ignore"):
            values = dequantize(raw.reshape(rows, -1), dtype).reshape(rows, -1, weights)
        bad = ~(np.abs(values).max(axis=-1) < 100)
        if not bad.any():
            break
        raw[bad] = rng.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    architecture: str,
    numbers: Mapping[str, Any],
    shapes: Shapes,
    *,
    kinds: tuple[str, ...] = ("Q8_0",),
    tokenizer: bool = True,
    values: Mapping[str, np.ndarray] | None = None,
    split: int = 0,
    seed: int = 0,
) -> Path:
    """Write a model and return its first file.

    `numbers` are metadata under the architecture's prefix; matrices take the `kinds` in turn, except those whose rows
    do not divide into blocks; the rest is float32 near 1. `values` are kept as they are. `split` is tensors in a file.
    """
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture, split_max_tensors=split, use_temp_file=False)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in numbers.items():
        add[type(value)](f"{architecture}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer)
    turn = 0
    for name, shape in shapes.items():
        kind = "F32"
        if len(shape) > 1 and "norm" not in name and "ssm" not in name and "conv" not in name:
            kind, turn = kinds[turn % len(kinds)], turn + 1
            kind = kind if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0 else "F32"
        if values and name in values:
            writer.add_tensor(name, values[name])
        elif kind == "F32":
            data = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
            writer.add_tensor(name, -np.abs(data) if name.endswith("ssm_a") else data)
        elif kind == "F16":
            writer.add_tensor(name, blocks(rng, shape, kind))
        else:
            writer.add_tensor(name, blocks(rng, shape, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"[unused{i}]" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in {PAD, BOS, EOS} else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in _merges()])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _merges() -> list[tuple[str, str]]:
    from tests.checkpoints import _MERGES

    return _MERGES


LLAMA = {
    "context_length": 512, "embedding_length": 256, "feed_forward_length": 512, "block_count": 2,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 64, "rope.freq_base": 10000.0, "vocab_size": VOCAB,
}  # fmt: skip


def decoder(
    *, head: int = 64, norms: tuple[str, ...] = ("attn_norm", "ffn_norm"), tied: bool = False, qk_norms: bool = False,
    biases: tuple[str, ...] = (), without: tuple[str, ...] = (), more: Shapes | None = None, layers: int = 2,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The tensors of a decoder with a gated feed-forward, under llama.cpp's names; `more` are each layer's own."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, 256), "output_norm.weight": (256,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, 256)}
    shapes |= {"output_norm.bias": (256,)} if "attn_norm" in biases else {}
    layer = (
        {
            "attn_q": (4 * head, 256),
            "attn_k": (2 * head, 256),
            "attn_v": (2 * head, 256),
            "attn_output": (256, 4 * head),
            "ffn_gate": (512, 256),
            "ffn_up": (512, 256),
            "ffn_down": (256, 512),
        }
        | dict.fromkeys(norms, (256,))
        | (dict.fromkeys(("attn_q_norm", "attn_k_norm"), (head,)) if qk_norms else {})
    )
    layer = {name: shape for name, shape in layer.items() if name not in without} | dict(more or {})
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.{name}.bias": layer[name][:1] for name in biases}
    return shapes


DENSE_MLP = ("ffn_gate", "ffn_up", "ffn_down")


def experts(inner: int, *, count: int = 4) -> dict[str, tuple[int, ...]]:
    """A layer's router and experts."""
    return {
        "ffn_gate_inp": (count, 256), "ffn_gate_exps": (count, inner, 256), "ffn_up_exps": (count, inner, 256),
        "ffn_down_exps": (count, 256, inner),
    }  # fmt: skip


def gpt2() -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-2 of two layers."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, 64), "position_embd.weight": (1024, 64)}
    shapes |= {"output.weight": (VOCAB, 64), "output_norm.weight": (64,), "output_norm.bias": (64,)}
    layer = {
        "attn_norm": (64,), "ffn_norm": (64,), "attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64),
        "ffn_down": (64, 256),
    }  # fmt: skip
    for i in range(2):
        for name, shape in layer.items():
            shapes |= {f"blk.{i}.{name}.weight": shape, f"blk.{i}.{name}.bias": shape[:1]}
    return shapes


def lfm2() -> dict[str, tuple[int, ...]]:
    """The tensors of an LFM2 of a convolution and an attention layer."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, 256), "token_embd_norm.weight": (256,)}
    common = {
        "attn_norm": (256,),
        "ffn_norm": (256,),
        "ffn_gate": (512, 256),
        "ffn_up": (512, 256),
        "ffn_down": (256, 512),
    }
    own = [
        {"shortconv.in_proj": (768, 256), "shortconv.out_proj": (256, 256), "shortconv.conv": (256, 3)},
        {
            "attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
            "attn_q_norm": (64,), "attn_k_norm": (64,),
        },
    ]  # fmt: skip
    for i, layer in enumerate(own):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in (common | layer).items()}
    return shapes


QWEN35MOE = {
    "context_length": 512, "embedding_length": 256, "block_count": 5, "nextn_predict_layers": 1,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e4, "rope.dimension_sections": [4, 2, 2, 0],
    "rope.dimension_count": 16, "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.state_size": 32,
    "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 128, "expert_feed_forward_length": 256,
    "expert_shared_feed_forward_length": 256, "expert_count": 4, "expert_used_count": 2,
}  # fmt: skip


def qwen35moe() -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen3.5-MoE: three linear attention layers, a full one, and a layer that predicts further."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, 256), "output_norm.weight": (256,)}
    shapes |= {"output.weight": (VOCAB, 256), "blk.4.nextn.eh_proj.weight": (256, 512)}
    common = experts(256) | {
        "attn_norm": (256,), "post_attention_norm": (256,), "ffn_gate_inp_shexp": (256,), "ffn_gate_shexp": (256, 256),
        "ffn_up_shexp": (256, 256), "ffn_down_shexp": (256, 256),
    }  # fmt: skip
    linear = {
        "attn_qkv": (256, 256), "attn_gate": (128, 256), "ssm_alpha": (4, 256), "ssm_beta": (4, 256),
        "ssm_conv1d": (256, 4), "ssm_norm": (32,), "ssm_out": (256, 128),
    }  # fmt: skip
    full = {
        "attn_q": (512, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
        "attn_q_norm": (64,), "attn_k_norm": (64,),
    }  # fmt: skip
    for i in range(4):
        own = full if i == 3 else linear
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in (common | own).items()}
        shapes |= {} if i == 3 else {f"blk.{i}.ssm_a": (4,), f"blk.{i}.ssm_dt.bias": (4,)}
    return shapes


def tiny_llama_gguf(path: Path, *, tied: bool = False, **options: Any) -> Path:
    """A llama of two layers in one file, or several."""
    return write(path, "llama", LLAMA, decoder(tied=tied), **options)
