"""Calibration samples from several sources of rows, each with its share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.encoding import calibration_samples
from pipeline.errors import DataError
from pipeline.row_kinds import Row

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of which so many `samples` are wanted; `role` is what the stage's data calls them, `path` where they lie."""

    role: str
    path: str
    rows: Iterable[Row]
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Token ids, a tuple for each sample, and how many of the samples each source gave, by its role and path."""

    samples: tuple[Ids, ...]
    given: tuple[tuple[str, str, int], ...]

    @property
    def notes(self) -> dict[str, Any]:
        """What the manifest says of them: role → file, samples and tokens; the role's digest is in its `data`."""
        length = len(self.samples[0])
        found = {
            role: {"rows": Path(path).name, "samples": count, "tokens": count * length}
            for role, path, count in self.given
        }
        return {"calibration": found}


NOTHING = Mixture(samples=(), given=())


def drawn(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int,
    vocabulary: int | None,
) -> Mixture:
    """Blocks of `length` tokens without padding from every source, one source's spread evenly among the others'.

    Each source is shuffled, joined and cut by itself (`encoding.calibration_samples`), so no sample holds tokens of
    two; the same arguments give the same samples in the same order. A single source may give fewer than is wanted of
    it. Raise DataError where one of several does, where one fills no sample, holds nothing but padding, or gives a
    token that a model of `vocabulary` tokens does not know.
    """
    parts: list[Tensor] = []
    for number, source in enumerate(sources):
        named = f"calibration, {source.path}"
        ids = calibration_samples(
            source.rows, tokenizer, samples=source.samples, length=length, seed=seed + number, named=named
        )
        _check(ids, named, vocabulary=vocabulary, pad=tokenizer.pad_token_id)
        if len(sources) > 1 and len(ids) < source.samples:
            raise DataError(
                f"{named}: the rows fill {len(ids)} samples of {length} tokens, their share is {source.samples}; give "
                "more rows, or lower calibration.samples or their share"
            )
        parts.append(ids)
    mixed = sorted(
        ((place + 0.5) / len(ids), number, tuple(sample))
        for number, ids in enumerate(parts)
        for place, sample in enumerate(ids.tolist())
    )
    given = tuple((source.role, source.path, len(ids)) for source, ids in zip(sources, parts, strict=True))
    return Mixture(samples=tuple(sample for *_, sample in mixed), given=given)


def _check(ids: Tensor, named: str, *, vocabulary: int | None, pad: int | None) -> None:
    """Raise DataError for tokens that the model does not know, or that say nothing."""
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise DataError(
            f"{named}: the tokenizer gives token {int(ids.max())}, the model knows {vocabulary} of them; its tokenizer "
            "files are another model's"
        )
    if pad is not None and bool((ids == pad).all()):
        raise DataError(f"{named}: every token of the rows is padding; give rows of text")
