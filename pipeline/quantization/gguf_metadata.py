"""What a GGUF file says beside its tensors: hyperparameters and tokenizer, under the keys of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, SpecialVocab
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pipeline.checkpoint import read_json
from pipeline.encoding import load_tokenizer
from pipeline.gguf_vocabulary import Vocabulary, read_vocabulary, steps
from pipeline.gguf_writable import rope_of
from pipeline.targets import GGUFTarget

UNKNOWN_PRE = "default"
# Pre-tokenizers that llama.cpp knows by a name, which stands for how text is split, as transformers' table
# says, and for whether a word that is a token is taken whole (`ignore_merges`): name → the latter (llama-vocab.cpp).
_SPLITS = {"llama-bpe": True, "smaug-bpe": False, "tekken": True, "qwen2": False, "qwen35": False, "gpt-4o": False}
# Those that are GPT-2's own split, after the digits where those stand alone.
_GPT2, _GPT2_DIGITS = "gpt-2", "smollm"


def add_hyperparameters(writer: GGUFWriter, config: Any, target: GGUFTarget) -> None:
    """What a transformers config says, under the keys that transformers itself reads it back from."""
    for key, value in _hyperparameters(config, writer.arch):
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{writer.arch}.{key}", value)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{target.type.upper()}"])


def add_tokenizer(
    writer: GGUFWriter, folder: Path, target: GGUFTarget, *, size: int, trust_remote_code: bool
) -> dict[str, str]:
    """The tokenizer of a folder, for a model of `size` tokens; return what the manifest should say of it.

    Raise UnsupportedFormat for a tokenizer that GGUF has no like of.
    """
    vocabulary = read_vocabulary(folder, size=size, variant=target.variant)
    pre = pre_tokenizer(read_json(folder / "tokenizer.json"), vocabulary)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_add_space_prefix(vocabulary.space_prefix)
    special = SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=size)
    special.add_special_token = _added(folder, trust_remote_code=trust_remote_code)
    special.add_to_gguf(writer, quiet=True)
    if vocabulary.model == "gpt2" and pre == UNKNOWN_PRE:
        return {"tokenizer_pre": pre, "tokenizer": "llama.cpp knows no such pre-tokenizer, and may give other tokens"}
    return {"tokenizer_pre": pre}


def pre_tokenizer(raw: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """llama.cpp's name for how a tokenizer.json splits text before its merges, or `default` where it has none."""
    if vocabulary.model == "llama":
        return UNKNOWN_PRE  # SentencePiece splits nothing, and llama.cpp has no other name for that
    whole = bool(raw["model"].get("ignore_merges"))
    names = {} if whole else {("ByteLevel True",): _GPT2, ("Digits True", "ByteLevel True"): _GPT2_DIGITS}
    names |= {
        (f"Split {GGUF_PRE_TOKENIZER_SPLITS[known]}", "ByteLevel False"): known
        for known, taken in _SPLITS.items()
        if taken == whole
    }
    return names.get(tuple(_signature(step) for step in steps(raw["pre_tokenizer"])), UNKNOWN_PRE)


def _signature(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"Split {step['pattern'].get('Regex')}"
    return f"{kind} {step.get({'ByteLevel': 'use_regex', 'Digits': 'individual_digits'}.get(kind, ''), True)}"


def _hyperparameters(config: Any, architecture: str) -> Iterator[tuple[str, int | float | str]]:
    said = config.to_dict()
    rope = rope_of(said)
    said["rope_theta"] = float(rope["rope_theta"])
    for key, name in GGUF_CONFIG_MAPPING[architecture].items():
        if name is not None:
            yield key, said[name]
    if said.get("head_dim"):  # llama.cpp would divide the embedding's length by the heads
        yield "attention.key_length", said["head_dim"]
        yield "attention.value_length", said["head_dim"]
    if (kind := rope["rope_type"]) in {"linear", "yarn"}:  # Llama 3's is a tensor
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            yield "rope.scaling.original_context_length", int(original)


def _added(folder: Path, *, trust_remote_code: bool) -> dict[str, bool]:
    """Whether the tokenizer begins a text with its first token and ends it with its last, as it does it."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[:1] == [tokenizer.bos_token_id], "eos": ids[-1:] == [tokenizer.eos_token_id]}
