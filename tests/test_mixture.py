"""Calibration samples from several sources: each its share, in an order that the seed decides."""

from __future__ import annotations

import pytest

from pipeline.errors import DataError
from pipeline.mixture import Source, drawn
from pipeline.row_kinds import Completion, Conversation, Message, Text
from tests.checkpoints import tiny_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def source(letter, samples, *, rows=50, role="calibration", long=40):
    return Source(
        role=role, path=f"{letter}.jsonl", samples=samples,
        rows=[Text(place=f"{letter}.jsonl line {i}", text=letter * long) for i in range(rows)],
    )  # fmt: skip


def mixed(tokenizer, *sources, seed=3, vocabulary=None):
    return drawn(sources, tokenizer, length=LENGTH, seed=seed, vocabulary=vocabulary)


def said(tokenizer, found):
    """The letter that each sample is made of, and nothing besides."""
    letters = [set(tokenizer.decode(sample).replace("</s>", "")) for sample in found.samples]
    assert all(len(one) == 1 for one in letters), "a sample holds tokens of two sources"
    return "".join(letter for one in letters for letter in one)


def test_each_source_gives_its_share_spread_evenly_among_the_others(tokenizer):
    found = mixed(tokenizer, source("b", 6), source("g", 2))
    assert said(tokenizer, found) == "bbgbbbgb"
    assert all(len(sample) == LENGTH for sample in found.samples)
    assert not any(tokenizer.pad_token_id in sample for sample in found.samples)


def test_the_same_seed_draws_the_same_samples_in_the_same_order_and_another_others(tokenizer):
    texts = [Text(place="", text=chr(98 + i % 20) * 40) for i in range(50)]

    def draw(seed):
        sources = [Source(role=role, path="p", rows=iter(texts), samples=4) for role in ("a", "b")]
        return mixed(tokenizer, *sources, seed=seed).samples

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert set(draw(3)[::2]) != set(draw(3)[1::2]), "the same rows listed twice are drawn from twice"


def test_conversations_go_through_the_template_and_mix_with_documents(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    try:
        turns = (Message(role="user", content="why?"), Message(role="assistant", content="because"))
        chats = Source(role="a", path="chats", samples=1, rows=[Conversation(place="", messages=turns)] * 4)
        pairs = Source(
            role="b", path="pairs", samples=1, rows=[Completion(place="", prompt="2+2=", completion="4")] * 4
        )
        found = [tokenizer.decode(sample) for sample in mixed(tokenizer, chats, pairs, source("g", 1)).samples]
    finally:
        tokenizer.chat_template = None
    assert "<user>" in found[0] or "<assistant>" in found[0]
    assert "2+2=4</s>" in found[1]
    assert set(found[2]) == {"g"}


def test_the_notes_say_what_each_source_gave(tokenizer):
    found = mixed(tokenizer, source("b", 3, role="calibration_1"), source("g", 1, role="calibration_2"))
    assert found.notes == {
        "calibration": {
            "calibration_1": {"rows": "b.jsonl", "samples": 3, "tokens": 48},
            "calibration_2": {"rows": "g.jsonl", "samples": 1, "tokens": 16},
        }
    }


def test_a_single_source_gives_what_there_is_and_the_notes_count_that(tokenizer):
    found = mixed(tokenizer, source("b", 8, rows=1))
    assert len(found.samples) == 2
    assert found.notes["calibration"]["calibration"] == {"rows": "b.jsonl", "samples": 2, "tokens": 32}


@pytest.mark.parametrize(
    ("sources", "vocabulary", "error"),
    [
        ((source("b", 6), source("g", 3, rows=1)), None,
         r"calibration, g.jsonl: the rows fill 2 samples of 16 tokens, their share is 3; give more rows, or lower"),
        ((source("b", 6), source("g", 3, rows=1, long=5)), None,
         r"calibration, g.jsonl: the rows have 5 tokens, fewer than one sample of 16"),
        ((source("b", 6), source("<pad>", 1)), None, r"calibration, <pad>.jsonl: every token of the rows is padding"),
        ((source("b", 6), source("g", 1)), 40, r"calibration, b.jsonl: the tokenizer gives token \d+.* knows 40"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_do_is_named_in_one_sentence(tokenizer, sources, vocabulary, error):
    with pytest.raises(DataError, match=error):
        mixed(tokenizer, *sources, vocabulary=vocabulary)
