"""Labelled rows become ids and targets; no label, no word and no text is lost on the way."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.encoding import IGNORED
from pipeline.errors import CheckpointError, DataError
from pipeline.labelled import (
    Example,
    classes_of,
    encode_labelled,
    encode_pairs,
    encode_tagged,
    padded_examples,
    padded_ids,
)
from pipeline.rows import Labelled, Pair, Tagged, Text
from tests.checkpoints import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def word_pieces():
    """A tokenizer like BERT's: words are split at spaces and punctuation, each text begins and ends with a token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        "ada",
        "##ing",
        ",",
        ".",
    ]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def labelled(*labels):
    return [Labelled(place=f"line {i}", text=f"row {i}", label=label) for i, label in enumerate(labels, start=1)]


def test_classes_are_sorted_and_whole_numbers_by_their_value():
    assert classes_of(labelled("b", "a", "b")) == ("a", "b")
    assert classes_of(labelled(10, 9, -1)) == ("-1", "9", "10")
    assert classes_of(labelled("10", "9")) == ("9", "10")
    assert classes_of(labelled("10", "9", "x")) == ("10", "9", "x")
    assert classes_of(labelled(*[True, False])) == ("False", "True")
    assert classes_of([Tagged(place="", tokens=("a", "b"), tags=("O", "B-X"))]) == ("B-X", "O")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (labelled("a", "a"), "the training rows hold only the label a; a classifier needs at least two"),
        ([], "the training rows hold no label"),
        (labelled(0.5), "line 1: is regression, which has no classes"),
        ([Text(place="line 1", text="a")], "line 1: is text, which has no classes"),
    ],
)
def test_less_than_two_classes_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        classes_of(rows)


def test_a_text_is_encoded_as_any_user_would_and_its_target_is_its_classs_number(word_pieces):
    encoded = encode_labelled(labelled(7, 3), word_pieces, classes=("3", "7"), sequence_length=16, too_long="refuse")
    assert [example.target for example in encoded.items] == [1, 0]
    assert encoded.items[0].input_ids == word_pieces("row 1")["input_ids"]
    assert encoded.items[0].input_ids[0] == 2
    assert encoded.items[0].input_ids[-1] == 3


def test_a_regressions_target_is_the_figure(tokenizer):
    encoded = encode_labelled(labelled(0.5, -2.0), tokenizer, classes=None, sequence_length=16, too_long="refuse")
    assert [example.target for example in encoded.items] == [0.5, -2.0]
    with pytest.raises(DataError, match=r"line 1: label is 'x', expected a number; set data.format to regression"):
        encode_labelled(labelled("x"), tokenizer, classes=None, sequence_length=16, too_long="refuse")


def test_more_texts_than_the_tokenizer_takes_at_once_keep_their_order(tokenizer):
    rows = labelled(*range(600))
    classes = tuple(str(i) for i in range(600))
    encoded = encode_labelled(rows, tokenizer, classes=classes, sequence_length=16, too_long="refuse")
    assert [(tokenizer.decode(example.input_ids), example.target) for example in encoded.items] == [
        (row.text, row.label) for row in rows
    ]


def test_an_unknown_label_is_named_with_the_known_ones(tokenizer):
    with pytest.raises(DataError, match=r"line 2: label 'meh' is not among the known ones \(bad, good\)"):
        encode_labelled(
            labelled("good", "meh"), tokenizer, classes=("bad", "good"), sequence_length=16, too_long="refuse"
        )
    with pytest.raises(DataError, match=r"line 1: label 'B' is not among the known ones \(O, A\)"):
        rows = [Tagged(place="line 1", tokens=("b",), tags=("B",))]
        encode_tagged(rows, tokenizer, classes=("O", "A"), sequence_length=16, too_long="refuse")
    with pytest.raises(DataError, match=r"\(0, 1, .*, 19, …\)"):
        classes = tuple(str(i) for i in range(99))
        encode_labelled(labelled(-5), tokenizer, classes=classes, sequence_length=16, too_long="refuse")


def test_a_text_without_tokens_of_its_own_is_refused(word_pieces, tokenizer):
    for text in (" ", "\u200b"):
        row = Labelled(place="line 3", text=text, label="a")
        with pytest.raises(DataError, match="line 3: its text has no tokens"):
            encode_labelled([row], word_pieces, classes=("a", "b"), sequence_length=16, too_long="refuse")
    pair = Pair(place="line 4", anchor="a", positive="b", negative="\u200b")
    with pytest.raises(DataError, match="line 4: its text has no tokens"):
        encode_pairs([pair], word_pieces, sequence_length=16, too_long="refuse")


def test_rows_that_are_too_long_are_refused_or_dropped_and_never_cut(tokenizer):
    short, long = (Labelled(place=f"line {n}", text="b" * n, label=n % 2) for n in (5, 20))
    given = {"classes": ("0", "1"), "sequence_length": 8}
    with pytest.raises(DataError, match=r"line 20: has 20 tokens, the limit is 8; 1 of 2 rows are longer"):
        encode_labelled([short, long], tokenizer, too_long="refuse", **given)
    encoded = encode_labelled([short, long], tokenizer, too_long="drop", **given)
    assert ([len(example.input_ids) for example in encoded.items], encoded.dropped, encoded.longest) == ([5], 1, 20)
    tagged = [Tagged(place="line 2", tokens=("b" * 20,), tags=("0",))]
    with pytest.raises(DataError, match=r"line 2: has 20 tokens, the limit is 8"):
        encode_tagged(tagged, tokenizer, too_long="refuse", **given)
    pair = Pair(place="line 9", anchor="b", positive="c", negative="d" * 9)
    with pytest.raises(DataError, match=r"line 9: has 9 tokens, the limit is 8"):
        encode_pairs([pair], tokenizer, sequence_length=8, too_long="refuse")


def test_rows_of_another_kind_and_no_rows_are_refused(tokenizer):
    given = {"sequence_length": 8, "too_long": "refuse"}
    with pytest.raises(DataError, match=r"line 1: is text, expected labelled rows; set data.format"):
        encode_labelled([Text(place="line 1", text="a")], tokenizer, classes=("a", "b"), **given)
    with pytest.raises(DataError, match=r"line 1: is classification, expected pair rows"):
        encode_pairs(labelled("a"), tokenizer, **given)
    with pytest.raises(DataError, match="holds no rows"):
        encode_tagged([], tokenizer, classes=("a", "b"), **given)


def test_the_first_subword_of_a_word_carries_its_tag(tokenizer):
    row = Tagged(place="line 1", tokens=("the", "bcd", "(é)", "the"), tags=("O", "A", "B", "O"))
    [sequence] = encode_tagged([row], tokenizer, classes=("A", "B", "O"), sequence_length=64, too_long="refuse").items
    assert sequence.input_ids == tokenizer("the bcd (é) the")["input_ids"]
    pieces = [tokenizer.decode([token]) for token in sequence.input_ids]
    named = [(piece, label) for piece, label in zip(pieces, sequence.labels, strict=True) if label != IGNORED]
    # A space is a token of its own in this tokenizer where it has no merge with what follows; it belongs to no word.
    assert named == [("t", 2), ("b", 0), ("(", 1), (" the", 2)]


def test_the_tags_are_where_transformers_word_ids_have_them(word_pieces):
    """For a tokenizer that splits at spaces anyway, joined words and words given one by one are the same."""
    row = Tagged(place="line 1", tokens=("Ada", "sing,ing", ".", "été"), tags=("A", "O", "O", "B"))
    [sequence] = encode_tagged([row], word_pieces, classes=("A", "B", "O"), sequence_length=64, too_long="refuse").items
    encoded = word_pieces(list(row.tokens), is_split_into_words=True)
    words = encoded.word_ids()
    firsts = [i for i, word in enumerate(words) if word is not None and word not in words[:i]]
    assert sequence.input_ids == encoded["input_ids"]
    assert [i for i, label in enumerate(sequence.labels) if label != IGNORED] == firsts
    assert [sequence.labels[i] for i in firsts] == [0, 2, 2, 1]


def test_a_word_that_becomes_no_token_is_refused(word_pieces):
    given = {"classes": ("A", "B"), "sequence_length": 64, "too_long": "refuse"}
    for tokens, number in ((("ada", "\u200b", "b"), 2), (("ada", "\u200b"), 2), (("\u200b", "b"), 1)):
        row = Tagged(place="line 5", tokens=tokens, tags=("A",) * len(tokens))
        with pytest.raises(DataError, match=rf"line 5: token {number}, '.u200b', becomes no token of the model's"):
            encode_tagged([row], word_pieces, **given)


def test_a_tokenizer_that_knows_no_offsets_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    row = Tagged(place="line 1", tokens=("a",), tags=("A",))
    with pytest.raises(CheckpointError, match="does not say which letters a token stands for"):
        encode_tagged([row], tokenizer, classes=("A", "B"), sequence_length=64, too_long="refuse")


def test_the_texts_of_a_pair_are_encoded_each_by_itself(tokenizer):
    rows = [
        Pair(place="line 1", anchor="bc", positive="df", negative=None),
        Pair(place="line 2", anchor="gh", positive="jk", negative="lm"),
    ]
    encoded = encode_pairs(rows, tokenizer, sequence_length=8, too_long="refuse")
    texts = [[pair.anchor, pair.positive, pair.negative] for pair in encoded.items]
    assert [[ids and tokenizer.decode(ids) for ids in row] for row in texts] == [["bc", "df", None], ["gh", "jk", "lm"]]


def test_padding_is_on_the_right_and_masked_and_labels_have_the_losss_type():
    batch = [Example(input_ids=[5, 6, 7], target=1), Example(input_ids=[8], target=0)]
    found = padded_examples(batch, pad_token=9)
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["labels"].tolist() == [1, 0]
    assert found["labels"].dtype == torch.int64
    figures = padded_examples([Example(input_ids=[5], target=0.5)], pad_token=9, length=3)
    assert figures["input_ids"].tolist() == [[5, 9, 9]]
    assert figures["labels"].dtype == torch.float32
    assert padded_ids([[1], [2, 3]], pad_token=0)["input_ids"].tolist() == [[1, 0], [2, 3]]
