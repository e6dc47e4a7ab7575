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
    *, hidden: int = 256, inner: int = 512, layers: int = 2, heads: int = 4, kv: int = 2, head: int = 64,
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm"), tied: bool = False,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The tensors of a decoder with a gated feed-forward, under llama.cpp's names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, hidden)
    for i in range(layers):
        layer = {
            "attn_q": (heads * head, hidden), "attn_k": (kv * head, hidden), "attn_v": (kv * head, hidden),
            "attn_output": (hidden, heads * head), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.{name}.weight": (hidden,) for name in norms}
    return shapes


def tiny_llama_gguf(path: Path, **options: Any) -> Path:
    """A llama of two layers in one file, or several."""
    tied = options.pop("tied", False)
    return write(path, "llama", LLAMA, decoder(tied=tied), **options)
