"""What a row is: a document, a conversation, a prompt with its completion, a labelled or tagged text, or a pair.

`place` says where a row stands in its file, for errors; it is no part of what the row says.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.sections import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document."""

    place: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns, at least one of them the assistant's."""

    place: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and what should follow it."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A text and its label: text, a whole number or true/false for classification, a float for regression."""

    place: str
    text: str
    label: str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """Words and the tag of each."""

    place: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two texts that belong together, and perhaps one that does not belong to the first."""

    place: str
    anchor: str
    positive: str
    negative: str | None


Row = Text | Conversation | Completion | Labelled | Tagged | Pair


def kind_of(row: Row) -> Kind:
    """The kind of a row; what was alpaca has become a prompt with its completion."""
    if isinstance(row, Labelled):
        return "regression" if isinstance(row.label, float) else "classification"
    return _KINDS[type(row)]


def texts_of(row: Row) -> list[str]:
    """The plain texts of a row that is no conversation and no prompt, each a document where only text matters."""
    match row:
        case Text() | Labelled():
            return [row.text]
        case Tagged():
            return [" ".join(row.tokens)]
        case Pair():
            return [text for text in (row.anchor, row.positive, row.negative) if text is not None]
        case _:
            raise AssertionError(row)


_KINDS: dict[type[Row], Kind] = {
    Text: "text",
    Conversation: "messages",
    Completion: "prompt_completion",
    Tagged: "tagged",
    Pair: "pairs",
}
