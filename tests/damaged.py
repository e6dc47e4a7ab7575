"""Ways to damage a checkpoint at random, each of which can be repeated from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.every_format import CONFIG, INDEX, MODEL
from tests.gguf_models import LLAMA, decoder, write

Change = Callable[[random.Random, Path], str]

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 5, 7, 16, 2**31, 10**9, 10**12, 2**63, 10**18, 10**25, 10**400, -(10**9), 0.5,
    1e308, float("nan"), float("inf"), "", "x", "4", "128", "1e9", "auto", "None", "\ud800", "\0", "a\nb", "../x",
    [], [0], [1], [-1, -1], ["x"], [None], [[]], [[1, 2], [3]], [10**12, 10**12], {}, {"": None}, {"a": {"b": [1]}},
    {"type": "x"}, ".", "..", "a" * 5000,
)  # fmt: skip
ARCHITECTURES = (
    ("mixtral", "MixtralForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("gpt_oss", "GptOssForCausalLM"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"), ("mamba", "MambaForCausalLM"), ("bert", "BertModel"), ("t5", "T5Model"),
    ("qwen3_next", "Qwen3NextForCausalLM"), ("llava", "LlavaForConditionalGeneration"), ("clip", "CLIPModel"),
    ("gemma3", "Gemma3ForConditionalGeneration"), ("llama", "PreTrainedModel"), ("llama", "LlamaModel"),
    ("llama", "LlamaForSequenceClassification"), ("whisper", "WhisperForConditionalGeneration"), ("llama", "x.y"),
)  # fmt: skip
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, 64, 255, 2**31, 2**32 - 1, 100_000, 0.0, -1.0, 1e30, float("nan"), float("inf"), "", "x", "linear",
    "yarn", "longrope", [1], [0, 2], [4, 4], [1.5], ["a"],
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16",
          "U32", "U64", "C64", "F4", "F6_E2M3", "X", None)  # fmt: skip


def _junk(choose: random.Random) -> Any:
    value = choose.choice(JUNK)
    if choose.random() < 0.05:
        for _ in range(choose.choice((3, 50, 900))):
            value = [value] if choose.random() < 0.5 else {"a": value}
    return value


def _edit_json(choose: random.Random, value: Any, path: str = "") -> str:
    """Change one place of a JSON object, at any depth; say which."""
    places: list[tuple[Any, Any, str]] = []

    def collect(node: Any, where: str) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(pairs):
            places.append((node, key, f"{where}.{key}"))
            collect(child, f"{where}.{key}")

    collect(value, path)
    if not places:
        return "nothing"
    node, key, where = choose.choice(places)
    kind = choose.randrange(4)
    if kind == 0:
        del node[key]
        return f"{where} deleted"
    if kind == 1 and isinstance(node, dict):
        name = choose.choice((str(key) + "x", "", ".", "a.b", *map(str, node)))
        node[name] = node.pop(key)
        return f"{where} renamed {name!r}"
    if kind == 2 and isinstance(node[key], int):
        factor = choose.choice((0, -1, 2, 3, 1000, 10**9))
        node[key] = node[key] * factor + choose.choice((-1, 0, 1))
        return f"{where} = {node[key]}"
    node[key] = _junk(choose)
    return f"{where} = {str(node[key])[:60]!r}"


def _in_config(choose: random.Random, folder: Path) -> str:
    config = json.loads((folder / CONFIG).read_text())
    inner = config.get("quantization_config")
    within = isinstance(inner, dict) and inner and choose.random() < 0.7
    done = _edit_json(choose, inner if within else config, "quantization_config" if within else "")
    (folder / CONFIG).write_text(json.dumps(config))
    return f"config {done}"


def _with_added_key(choose: random.Random, folder: Path) -> str:
    """A key that tools have written at some time, with junk in it."""
    config = json.loads((folder / CONFIG).read_text())
    inner = config.get("quantization_config")
    keys = (
        "dynamic", "checkpoint_format", "pack_dtype", "version", "format", "backend", "ignore",
        "modules_to_not_convert",
        "llm_int8_skip_modules", "weight_block_size", "extra_config", "packing_format", "data_type", "act_bits",
        "config_groups", "sparsity_config", "transform_config", "quantization_status", "quant_config", "w_bit", "sym",
        "q_group_size", "quant_algo", "desc_act", "bits", "group_size", "rotation_config",
    )  # fmt: skip
    outer = ("rope_scaling", "rope_parameters", "layer_types", "auto_map", "text_config", "num_experts", "pad_token_id",
             "architectures", "model_type", "sliding_window", "max_position_embeddings", "mlp_bias", "hidden_act",
             "dtype", "compression_config", "num_local_experts")  # fmt: skip
    target, key = (inner, choose.choice(keys)) if isinstance(inner, dict) else (config, choose.choice(outer))
    if choose.random() < 0.3:
        target, key = config, choose.choice(outer)
    assert target is not None
    value = _junk(choose)
    target[key] = {choose.choice(("+:.*", "-:.*", "(", "model", "")): value} if choose.random() < 0.3 else value
    if key in {"model_type", "architectures"} and choose.random() < 0.7:
        name, kind = choose.choice(ARCHITECTURES)
        config |= {"model_type": name, "architectures": [kind]}
    (folder / CONFIG).write_text(json.dumps(config))
    return f"config key {key} = {str(target[key])[:60]!r}"


def _bytes_of(path: Path) -> tuple[int, bytearray]:
    raw = bytearray(path.read_bytes())
    return 8 + int.from_bytes(raw[:8], "little"), raw


def _repacked(folder: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    (folder / MODEL).write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _in_header(choose: random.Random, folder: Path) -> str:
    start, raw = _bytes_of(folder / MODEL)
    header = json.loads(raw[8:start])
    if choose.random() < 0.5:
        done = _edit_json(choose, header)
    else:
        name = choose.choice([name for name in header if name != "__metadata__"])
        key = choose.choice(("dtype", "shape", "data_offsets"))
        if key == "dtype":
            header[name][key] = choose.choice(DTYPES)
        elif key == "shape":
            shape = list(header[name][key])
            header[name][key] = choose.choice(
                (
                    [*shape, 1],
                    [1, *shape],
                    shape[::-1],
                    shape[:-1],
                    [],
                    [0],
                    [0, *shape],
                    [n * 2 for n in shape],
                    [2**62] * 3,
                )
            )
        else:
            header[name][key] = [choose.choice((-1, 0, 1, 8, 2**40, 2**64)), choose.choice((-1, 0, 1, 8, 2**40))]
        done = f"{name} {key} = {header[name][key]}"
    _repacked(folder, header, raw[start:])
    return f"header {done}"


def _in_tensors(choose: random.Random, folder: Path) -> str:
    """Rewrite one tensor as a valid file would hold it: another dtype, rank, length, name or none at all."""
    with safe_open(folder / MODEL, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / MODEL)
    name = choose.choice(list(tensors))
    tensor, kind = tensors.pop(name), choose.randrange(8)
    made: dict[str, Tensor] = {}
    if kind == 0:
        new = choose.choice((f"{name}.", f".{name}", "", name.replace(".", "..", 1), name.upper(), f"{name}.x.weight",
                             name.rpartition(".")[0], "weight", ".qweight", "_blocks", "model.layers.-1.x",
                             name.replace("0", "99999999999999"), choose.choice(list(tensors))))  # fmt: skip
        made, done = {new: tensor}, f"renamed {new!r}"
    elif kind == 1:
        done = "removed"
    elif kind == 2:
        dtype = choose.choice((torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                               torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
                               torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16, torch.complex64))  # fmt: skip
        made, done = {name: tensor.float().to(dtype)}, f"as {dtype}"
    elif kind == 3:
        shapes: list[tuple[int, ...]] = [(-1,), (1, -1), (-1, 1), (*tensor.shape, 1), tuple(tensor.shape[::-1])]
        made, done = {name: tensor.reshape(choose.choice(shapes))}, "reshaped"
    elif kind == 4 and tensor.ndim:
        side = choose.randrange(tensor.ndim)
        length = choose.choice((0, 1, max(0, tensor.shape[side] - 1), tensor.shape[side] // 2))
        made, done = {name: tensor.narrow(side, 0, min(length, tensor.shape[side])).clone()}, f"cut to {length}"
    elif kind == 5 and tensor.ndim:
        made, done = {name: torch.cat([tensor, tensor], choose.randrange(tensor.ndim))}, "doubled"
    elif kind == 6:
        made, done = {name: torch.empty(choose.choice(((0,), (0, 0), (4, 0), (0, 4))), dtype=tensor.dtype)}, "emptied"
    else:
        raw = tensor.contiguous().flatten().view(torch.uint8).clone()
        _scramble(choose, raw if raw.numel() else torch.zeros(1))
        made, done = {name: raw.view(tensor.dtype).view(tensor.shape)}, "scrambled"
    save_file(tensors | made, folder / MODEL, metadata=metadata)
    return f"tensor {name} {done}"


def _scramble(choose: random.Random, raw: Tensor) -> None:
    value = choose.choice((0xFF, 0x00, 0x7F, 0x80, 0x7C))
    if choose.random() < 0.5:
        raw.fill_(value)
        return
    for _ in range(choose.choice((1, 4, 100))):
        raw[choose.randrange(raw.numel())] = choose.choice((value, choose.randrange(256)))


def _in_bytes(choose: random.Random, folder: Path) -> str:
    path = folder / choose.choice((MODEL, MODEL, CONFIG))
    raw = bytearray(path.read_bytes())
    kind = choose.randrange(4)
    if kind == 0:
        del raw[choose.randrange(len(raw)) :]
    elif kind == 1:
        raw += bytes(choose.randrange(1, 100))
    else:
        end = 200 if kind == 2 else len(raw)
        for _ in range(choose.choice((1, 10))):
            raw[choose.randrange(min(end, len(raw)))] = choose.randrange(256)
    path.write_bytes(raw)
    return f"{path.name} bytes, kind {kind}"


def _in_index(choose: random.Random, folder: Path) -> str:
    with safe_open(folder / MODEL, framework="pt") as file:
        index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(file.keys(), MODEL)}
    done = _edit_json(choose, index)
    (folder / INDEX).write_text(json.dumps(index if choose.random() < 0.9 else _junk(choose)))
    return f"index {done}"


def _in_gguf(choose: random.Random, folder: Path) -> str:
    path = folder / "model.gguf"
    raw = bytearray(path.read_bytes())
    kind = choose.randrange(6)
    end = raw.rfind(b"blk.0") + 100  # the header, roughly
    if kind == 0:
        del raw[choose.randrange(len(raw)) :]
    elif kind == 1:
        text = choose.choice(
            (b"llama", b"blk.0", b"token_embd", b"block_count", b"gpt2", b"weight", b"rope", b"attention")
        )
        at = choose.choice([i for i in range(end) if raw.startswith(text, i)] or [0])
        raw[at : at + len(text)] = bytes(choose.randrange(256) for _ in text)
    elif kind == 2:
        key = choose.choice(tuple(LLAMA))
        at = raw.find(key.encode()) + len(key) + 4  # its value, a uint32 or float32
        raw[at : at + 4] = choose.choice((bytes(4), b"\xff" * 4, b"\0\0\0\x80", choose.randbytes(4), b"\3\0\0\0"))
    else:
        start = (0, 24, max(0, end - 3000))[kind - 3]
        for _ in range(choose.choice((1, 1, 10))):
            raw[choose.randrange(start, 64 if kind == 3 else end)] = choose.choice((0, 1, 255, choose.randrange(256)))
    path.write_bytes(raw)
    return f"gguf kind {kind}"


def _in_metadata(choose: random.Random, folder: Path) -> str:
    """Write a GGUF file anew, with other metadata, another architecture, and tensors that only some have."""
    numbers: dict[str, Any] = {**LLAMA, "block_count": 1}
    keys = (
        *LLAMA,
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "expert_count",
        "attention.key_length",
        "attention.value_length",
        "expert_used_count",
        "attention.sliding_window",
    )
    done = {key: choose.choice(NUMBERS) for key in choose.sample(keys, choose.choice((1, 1, 2, 4)))}
    shapes = dict(decoder(layers=1))
    for _ in range(choose.choice((0, 0, 1, 2))):
        name = choose.choice((*_ROPE, *shapes))
        shapes[name] = choose.choice(((32,), (1,), (0,), (256, 256), (2, 256, 256), (128, 32), (), (256,)))
    name = choose.choice(
        ("llama", "llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "phi3", "gpt2", "mamba", "lfm2", "x")
    )
    write(folder / "model.gguf", name, numbers | done, shapes)
    return f"gguf {name} {done} {shapes if len(shapes) > 13 else ''}"


CHANGES: tuple[Change, ...] = (
    _in_config, _in_config, _with_added_key, _with_added_key, _in_header, _in_tensors, _in_tensors, _in_tensors,
    _in_bytes, _in_index,
)  # fmt: skip


def damage(source: Path, choose: random.Random) -> list[str]:
    """Change one to three things about a checkpoint that `good` wrote; say which."""
    folder = source if source.is_dir() else source.parent
    changes = CHANGES if source.is_dir() else (_in_gguf, _in_metadata)
    done: list[str] = []
    for change in choose.choices(changes, k=choose.choice((1, 1, 2, 3))):
        try:
            done.append(change(choose, folder))
        except Exception:  # what an earlier change broke cannot be changed again
            if not done:
                raise
    return done
