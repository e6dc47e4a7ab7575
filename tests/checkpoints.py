"""Small checkpoints that tests build: a random Llama with a tokenizer that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# UTF-8 never holds these bytes, which leaves room for three special tokens in a vocabulary of 256.
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_MERGES = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a"), ("o", "n"), ("r", "e"), ("Ġt", "he")]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<s>assistant\n{% generation %}{{ message['content'] }}</s>{% endgeneration %}\n"
    "{% else %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_llama(
    folder: Path,
    *,
    hidden: int = 128,
    layers: int = 2,
    vocab: int = 256,
    intermediate: int = 256,
    tied: bool = False,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Path:
    """A random LlamaForCausalLM with tokenizer and generation config, saved in `folder`; `vocab` is at least 256."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(max_new_tokens=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 255 tokens that encodes every UTF-8 text; pad, bos and eos are 0, 1 and 2."""
    characters = _byte_characters()
    alphabet = [characters[byte] for byte in range(256) if byte not in _NEVER_IN_UTF8]
    tokens = [PAD, BOS, EOS, *alphabet, *(left + right for left, right in _MERGES)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def with_chat_template(folder: Path) -> Path:
    """Give the tokenizer in `folder` a chat template that marks what the assistant says; return `folder`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _byte_characters() -> dict[int, str]:
    """Byte → the printable character that byte-level BPE writes it as (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
