"""A tokenizer.json as GGUF keeps it: tokens with their kinds, and merges or scores.

Read without torch or tokenizers, so that the plan can refuse a tokenizer that llama.cpp has no like of. Two kinds are
written: byte-level BPE (`gpt2`) and SentencePiece's BPE with bytes to fall back on (`llama`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint import read_json
from pipeline.errors import CheckpointError, UnsupportedFormat

# llama.h `enum llama_token_attr`, as gguf's TokenType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # SentencePiece's


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of a model by id, as many as its embedding has rows, and the kind of each.

    `scores` are SentencePiece's, in whose order tokens are joined, and empty for byte-level BPE. `space_prefix` says
    whether a space goes before a text.
    """

    model: Literal["gpt2", "llama"]
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    space_prefix: bool


def check_vocabulary(folder: Path, *, variant: str) -> None:
    """Raise UnsupportedFormat where a folder's tokenizer cannot be written to a GGUF file."""
    raw = _read(folder, variant)
    with _understood(folder):
        _kind(raw, variant)


def read_vocabulary(folder: Path, *, size: int, variant: str) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.json, filled up with unused tokens to `size`.

    Raise UnsupportedFormat for a tokenizer of another kind, or one with more tokens than the model has.
    """
    raw = _read(folder, variant)
    with _understood(folder):
        return _vocabulary(raw, size, variant)


def _vocabulary(raw: Mapping[str, Any], size: int, variant: str) -> Vocabulary:
    kind = _kind(raw, variant)
    added = {int(token["id"]): token for token in raw.get("added_tokens") or ()}
    texts = {int(i): text for text, i in raw["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    if max(texts, default=0) >= size:
        raise UnsupportedFormat(
            f"{variant}: the tokenizer has a token {max(texts)}, but the model's embedding {size} rows; llama.cpp "
            "wants a row for each, resize the embedding"
        )
    unknown = raw["model"].get("unk_token")
    kinds = [_kind_of(texts.get(i), added.get(i), unknown=unknown, bytewise=kind == "gpt2") for i in range(size)]
    tokens = tuple(texts.get(i, f"[PAD{i}]") for i in range(size))
    scores = tuple(_scores(tokens, raw["model"]["merges"])) if kind == "llama" else ()
    return Vocabulary(model=kind, tokens=tokens, kinds=tuple(kinds), scores=scores, space_prefix=_space_prefix(raw))


def steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of tokenizer.json, one after another."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers") or part.get("pretokenizers") or () for step in steps(inner)]


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """Raise CheckpointError where tokenizer.json is not laid out as tokenizers writes it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/tokenizer.json: is not what tokenizers writes ({error!r}); download it again"
        ) from error


def _read(folder: Path, variant: str) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedFormat(
            f"{variant}: {folder} has no tokenizer.json, from which a GGUF file's tokenizer is made; write one with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return read_json(path)


def _kind(raw: Mapping[str, Any], variant: str) -> Literal["gpt2", "llama"]:
    model, normalizer, before = raw.get("model") or {}, steps(raw.get("normalizer")), steps(raw.get("pre_tokenizer"))
    if model.get("type") != "BPE":
        raise _no_like(variant, f"its model is {model.get('type')}")
    bytewise = [step for step in before if step["type"] == "ByteLevel"]
    # llama.cpp takes text as it is; composed letters (NFC), which most text has, it leaves to the user.
    others = [step["type"] for step in normalizer if step["type"] != "NFC"]
    if bytewise and others:
        raise _no_like(variant, f"it normalizes text ({others[0]})")
    if bytewise and any(step.get("add_prefix_space") for step in bytewise):
        raise _no_like(variant, "it puts a space before every text")
    if bytewise:
        return "gpt2"
    if model.get("byte_fallback") and all(map(_about_spaces, [*normalizer, *before])):
        return "llama"
    raise _no_like(variant, "it is neither byte-level nor SentencePiece's")


def _about_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a step does no more than SentencePiece does: spaces as ▁, one of them before a text."""
    match step["type"]:
        case "Prepend":
            return bool(step["prepend"] == SPACE)
        case "Replace":
            return bool(step["content"] == SPACE and step["pattern"] == {"String": " "})
        case "Split":
            return bool(step["pattern"] == {"String": " "})
        case kind:
            return bool(kind == "Metaspace")


def _no_like(variant: str, why: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{variant}: llama.cpp has no tokenizer like the model's in GGUF ({why}), only byte-level BPE and "
        "SentencePiece's BPE; quantize to bitsandbytes, GPTQ or AWQ"
    )


def _kind_of(text: str | None, added: Mapping[str, Any] | None, *, unknown: str | None, bytewise: bool) -> int:
    if text is None:
        return UNUSED
    if not bytewise and text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if not bytewise and len(text) == 6 and text.startswith("<0x") else NORMAL  # noqa: PLR2004 - <0xFF>


def _scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> Iterator[float]:
    """Each token's score: minus the rank of the first merge that makes it, as SentencePiece's BPE numbers them.

    llama.cpp joins the two neighbours whose token has the highest score, tokenizers those whose merge comes first.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    for token in tokens:
        yield -float(ranks.get(token, len(merges)))


def _space_prefix(raw: Mapping[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in steps(raw.get("normalizer"))):
        return True
    before = steps(raw.get("pre_tokenizer"))
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in before)
