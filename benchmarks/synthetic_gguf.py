"""GGUF files of any size with random blocks: a Llama under llama.cpp's names, with a tokenizer of made-up words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from synthetic import Size
from torch import Tensor

KINDS = {"gguf Q4_K": "Q4_K", "gguf Q8_0": "Q8_0"}
# Where a block's float16 scales lie, in bytes: random bits there would be NaN now and then.
SCALES = {"Q4_K": (0, 2), "Q8_0": (0,)}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
# llama.cpp reorders the rows of queries and keys; the others are as the model has them.
PLAIN = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write(folder: Path, name: str, size: Size) -> int:
    """Write a Llama of `size`, all of its matrices in the type of KINDS that `name` names; return its parameters."""
    folder.mkdir(parents=True)
    random, kind = np.random.default_rng(0), KINDS[name]
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.intermediate)
    writer.add_block_count(size.layers)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "1", *(f"w{i}" for i in range(1, size.vocabulary - 1))])
    writer.add_token_types([1] * size.vocabulary)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    matrices = {"token_embd": (size.vocabulary, size.hidden), "output": (size.vocabulary, size.hidden)}
    norms = ["output_norm"]
    for layer in range(size.layers):
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
        matrices |= {f"blk.{layer}.{NAMES[linear]}": shape for linear, shape in size.linears.items()}
    for norm in norms:
        writer.add_tensor(f"{norm}.weight", np.ones(size.hidden, np.float32))
    for matrix, shape in matrices.items():
        dtype = GGMLQuantizationType[kind]
        writer.add_tensor(f"{matrix}.weight", _blocks(random, shape, kind), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size.parameters


def _blocks(random: np.random.Generator, shape: tuple[int, int], kind: str) -> np.ndarray:
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (shape[0], shape[1] // weights, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, :, at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


def truth(path: Path) -> dict[str, Tensor]:
    """The weights of the first layer's plain matrices under the model's names, as the gguf package dequantizes them."""
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    found = {}
    for linear in PLAIN:
        tensor = stored[f"blk.0.{NAMES[linear]}.weight"]
        found[f"model.layers.0.{linear}.weight"] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    return found
