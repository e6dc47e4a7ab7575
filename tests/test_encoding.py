"""Rows become ids and labels: packed, masked, never cut."""

from __future__ import annotations

import pytest
import torch

from pipeline import progress
from pipeline.encoding import IGNORED, calibration_samples, encode, encode_row, load_tokenizer, padded
from pipeline.errors import CheckpointError, DataError
from pipeline.rows import Completion, Conversation, Labelled, Message, Pair, Tagged, Text
from tests.checkpoints import CHAT_TEMPLATE, tiny_tokenizer

EOS = 2
# The same template without the tag: what the assistant says is then found by comparing prefixes.
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(params=[CHAT_TEMPLATE, UNMARKED], ids=["marked", "unmarked"])
def chatting(request, tokenizer):
    tokenizer.chat_template = request.param
    return tokenizer


def text(content):
    return Text(place="a.jsonl line 1", text=content)


def chat(*turns):
    return Conversation(
        place="a.jsonl line 7", messages=tuple(Message(role=role, content=content) for role, content in turns)
    )


def learned(tokenizer, sequence):
    """What the labels say, as text."""
    return tokenizer.decode([label for label in sequence.labels if label != IGNORED])


def test_documents_are_joined_with_eos_between_and_cut_into_blocks(tokenizer):
    a, b = tokenizer("bcdfg")["input_ids"], tokenizer("jklm")["input_ids"]
    stream = [*a, EOS, *b]
    blocks = encode([text("bcdfg"), text(""), text("jklm")], tokenizer, sequence_length=4).items
    assert [block.input_ids for block in blocks] == [stream[0:4], stream[4:8], stream[8:10]]
    assert all(block.labels == block.input_ids for block in blocks)


def test_a_last_block_of_one_token_is_dropped_and_a_document_of_one_token_refused(tokenizer):
    blocks = encode([text("bcdfgjklm")], tokenizer, sequence_length=8).items
    assert [len(block.input_ids) for block in blocks] == [8]
    with pytest.raises(DataError, match="fewer than two tokens"):
        encode([text("b")], tokenizer, sequence_length=8)
    with pytest.raises(DataError, match="no rows"):
        encode([], tokenizer, sequence_length=8)


def test_more_documents_than_the_tokenizer_takes_at_once_keep_their_order(tokenizer):
    rows = [text(f"{i}.") for i in range(600)]
    [block] = encode(rows, tokenizer, sequence_length=10_000).items
    assert tokenizer.decode(block.input_ids) == "</s>".join(f"{i}." for i in range(600))


def test_only_the_completion_and_its_end_are_learned(tokenizer):
    row = Completion(place="line 1", prompt="2+2=", completion=" 4")
    [sequence] = encode([row], tokenizer, sequence_length=64).items
    prompt, answer = tokenizer("2+2=")["input_ids"], tokenizer(" 4")["input_ids"]
    assert sequence.input_ids == [*prompt, *answer, EOS]
    assert sequence.labels == [IGNORED] * len(prompt) + [*answer, EOS]


def test_only_the_assistants_turns_are_learned(chatting):
    row = chat(("system", "be brief"), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6"))
    [sequence] = encode([row], chatting, sequence_length=256).items
    whole = chatting.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in row.messages], tokenize=False
    )
    assert chatting.decode(sequence.input_ids) == whole
    assert learned(chatting, sequence).replace("\n", "") == "4</s>6</s>"
    assert sequence.judged == len([label for label in sequence.labels if label != IGNORED])


def test_a_token_that_straddles_the_border_is_learned(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    [sequence] = encode([chat(("user", "q"), ("assistant", "the"))], tokenizer, sequence_length=256).items
    # " the" is one token of this tokenizer, and the space belongs to the prompt.
    assert learned(tokenizer, sequence) == " the</s>"


def test_a_template_that_is_not_prefix_stable_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% if loop.last %}last {% endif %}{{ m['content'] }}\n{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 7: the chat template renders message 2 differently"):
        encode([chat(("user", "a"), ("assistant", "b"), ("user", "c"))], tokenizer, sequence_length=256)


def test_a_conversation_that_the_template_refuses_or_cannot_have_is_named(tokenizer):
    row = chat(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"line 7: messages need a chat template, which the tokenizer lacks"):
        encode([row], tokenizer, sequence_length=256)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 7: the chat template refuses it \(roles must alternate\)"):
        encode([row], tokenizer, sequence_length=256)


def test_a_row_longer_than_the_limit_is_refused_and_never_cut(chatting):
    row = chat(("user", "why?"), ("assistant", "b" * 100))
    tokens = len(encode_row(row, chatting).input_ids)
    assert len(encode([row], chatting, sequence_length=tokens).items[0].input_ids) == tokens
    with pytest.raises(
        DataError, match=rf"line 7: has {tokens} tokens, the limit is {tokens - 1}; 1 of 1 rows are lon"
    ):
        encode([row], chatting, sequence_length=tokens - 1)
    pair = Completion(place="b.csv line 3", prompt="b" * 20, completion="c")
    with pytest.raises(DataError, match=r"b.csv line 3: has 22 tokens, the limit is 8"):
        encode([pair], chatting, sequence_length=8)


def completion(place, tokens):
    """A completion of as many tokens, its end among them; the tokenizer knows consonants one by one."""
    return Completion(place=place, prompt="b", completion="c" * (tokens - 2))


def test_all_rows_that_are_too_long_are_counted_and_the_longest_is_named(tokenizer):
    rows = [completion(f"line {i}", tokens) for i, tokens in enumerate((8, 30, 9, 40, 33), start=1)]
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer, sequence_length=16)
    assert str(caught.value) == (
        "line 4: has 40 tokens, the limit is 16; 3 of 5 rows are longer; raise sequence_length, shorten them, or set "
        "too_long to drop"
    )


def test_rows_that_are_too_long_are_dropped_where_that_is_asked_for_and_it_is_said(tokenizer):
    rows = [completion(f"line {i}", tokens) for i, tokens in enumerate((8, 30, 9, 40, 16), start=1)]
    events = []
    with progress.shown_by(events.append):
        encoded = encode(rows, tokenizer, sequence_length=16, too_long="drop")
    assert [len(sequence.input_ids) for sequence in encoded.items] == [8, 9, 16]
    assert (encoded.dropped, encoded.longest) == (2, 40)
    assert [event.text for event in events] == [
        "drops rows: 2 of 5 rows are longer than 16 tokens; the longest, line 4, has 40"
    ]
    with pytest.raises(DataError, match=r"1 of 1 rows are longer; raise sequence_length, shorten them$"):
        encode(rows[1:2], tokenizer, sequence_length=16, too_long="drop")


def test_nothing_is_said_where_every_row_fits(tokenizer):
    events = []
    with progress.shown_by(events.append):
        encoded = encode([completion("line 1", 8)], tokenizer, sequence_length=8, too_long="drop")
    assert (len(encoded.items), encoded.dropped, encoded.longest, events) == (1, 0, 8, [])


def test_packed_rows_share_sequences_and_their_positions_begin_anew(tokenizer):
    rows = [completion(f"line {i}", tokens) for i, tokens in enumerate((5, 9, 3), start=1)]
    alone = encode(rows, tokenizer, sequence_length=12).items
    first, second = encode(rows, tokenizer, sequence_length=12, packing=True).items
    assert first.input_ids == alone[0].input_ids
    assert first.position_ids == [*range(5)]
    assert second.input_ids == alone[1].input_ids + alone[2].input_ids
    assert second.position_ids == [*range(9), *range(3)]
    assert second.labels == alone[1].labels + alone[2].labels


def test_the_first_token_of_a_packed_row_is_not_predicted_from_another_rows_end(tokenizer):
    rows = [
        Completion(place="line 1", prompt="", completion="bcd"),
        Completion(place="line 2", prompt="", completion="f"),
    ]
    assert encode(rows, tokenizer, sequence_length=8).items[0].labels[0] != IGNORED
    [packed] = encode(rows, tokenizer, sequence_length=8, packing=True).items
    assert [i for i, label in enumerate(packed.labels) if label == IGNORED] == [0, 4]


def test_documents_are_joined_whether_or_not_rows_are_packed(tokenizer):
    rows = [text("bcdfg"), text("jklm")]
    assert encode(rows, tokenizer, sequence_length=4, packing=True) == encode(rows, tokenizer, sequence_length=4)


def test_padding_is_masked_and_beside_packed_rows_a_row_of_its_own(tokenizer):
    rows = [completion("line 1", 5), completion("line 2", 4), completion("line 3", 7)]
    plain = padded(encode(rows, tokenizer, sequence_length=9).items, pad_token=0)
    assert plain.keys() == {"input_ids", "attention_mask", "labels"}
    assert plain["attention_mask"].sum(1).tolist() == [5, 4, 7]
    both = padded(encode(rows, tokenizer, sequence_length=9, packing=True).items, pad_token=0)
    assert both.keys() == {"input_ids", "position_ids", "labels"}
    assert both["position_ids"].tolist() == [[*range(5), *range(4)], [*range(7), *range(2)]]
    assert both["input_ids"][1, 7:].tolist() == [0, 0]
    assert both["labels"][1, 7:].tolist() == [IGNORED, IGNORED]
    assert {tensor.dtype for tensor in (*plain.values(), *both.values())} == {torch.int64}


@pytest.mark.parametrize("row", [
    Labelled(place="line 1", text="a", label="x"),
    Tagged(place="line 1", tokens=("a",), tags=("x",)),
    Pair(place="line 1", anchor="a", positive="b", negative=None),
])  # fmt: skip
def test_a_language_model_does_not_learn_from_labels(tokenizer, row):
    with pytest.raises(
        DataError, match=r"line 1: is (classification|tagged|pairs), which a language model does not le"
    ):
        encode([row], tokenizer, sequence_length=8)


def test_calibration_reads_the_texts_of_labelled_rows(tokenizer):
    rows = [
        Labelled(place="", text="bc", label=1), Tagged(place="", tokens=("df", "gh"), tags=("x", "y")),
        Pair(place="", anchor="jk", positive="lm", negative=None),
        Pair(place="", anchor="np", positive="qr", negative="st"),
    ]  # fmt: skip
    for row, texts in zip(rows, (["bc"], ["df gh"], ["jk", "lm"], ["np", "qr", "st"]), strict=True):
        expected = "</s>".join(texts)
        tokens = len(tokenizer(expected)["input_ids"])
        assert tokenizer.decode(calibration_samples([row], tokenizer, samples=1, length=tokens, seed=0)[0]) == expected


def test_a_row_without_anything_to_learn_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(DataError, match="no token of it is learned from"):
        encode([chat(("user", "a"), ("assistant", "b"))], tokenizer, sequence_length=64)


def test_a_beginning_token_of_the_tokenizers_own_is_kept_and_its_end_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    [block] = encode([text("bc"), text("df")], tokenizer, sequence_length=64).items
    assert tokenizer.decode(block.input_ids) == "<s>bc</s><s>df"


def test_a_tokenizer_without_an_end_token_is_refused_where_one_is_needed(tokenizer):
    tokenizer.eos_token = None
    assert len(encode([text("bcd")], tokenizer, sequence_length=8).items) == 1
    with pytest.raises(CheckpointError, match="names no eos_token"):
        encode([text("bcd"), text("jkl")], tokenizer, sequence_length=8)


def test_calibration_samples_are_full_blocks_chosen_by_the_seed(tokenizer):
    rows = [text(chr(98 + i % 20) * 40) for i in range(50)]
    samples = calibration_samples(rows, tokenizer, samples=8, length=16, seed=3)
    assert samples.shape == (8, 16)
    assert samples.dtype == torch.int64
    assert not (samples == tokenizer.pad_token_id).any()
    assert torch.equal(samples, calibration_samples(iter(rows), tokenizer, samples=8, length=16, seed=3))
    assert not torch.equal(samples, calibration_samples(rows, tokenizer, samples=8, length=16, seed=4))


def test_calibration_takes_what_there_is_and_refuses_less_than_one_sample(tokenizer):
    rows = [text("bcdfgjklmn" * 4)]
    assert calibration_samples(rows, tokenizer, samples=8, length=16, seed=0).shape == (2, 16)
    with pytest.raises(DataError, match="have 40 tokens, fewer than one sample of 41"):
        calibration_samples(rows, tokenizer, samples=8, length=41, seed=0)


def test_calibration_reads_conversations_and_completions_too(chatting):
    rows = [chat(("user", "why?"), ("assistant", "because"))] * 4
    assert calibration_samples(rows, chatting, samples=2, length=16, seed=0).shape == (2, 16)
    pairs = [Completion(place="", prompt="2+2=", completion="4")] * 4
    assert calibration_samples(pairs, chatting, samples=2, length=8, seed=0).shape == (2, 8)


def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="its tokenizer does not load") as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert "\n" not in str(caught.value)


def test_labelled_rows_and_tagged_words_calibrate_on_their_text(tokenizer):
    texts = [f"row {i} says something" for i in range(20)]
    rows = [Text(place="", text=text) for text in texts]
    labelled = [Labelled(place="", text=text, label="good") for text in texts]
    tagged = [Tagged(place="", tokens=tuple(text.split()), tags=("A",) * 4) for text in texts]
    samples = calibration_samples(rows, tokenizer, samples=4, length=16, seed=0)
    assert torch.equal(calibration_samples(labelled, tokenizer, samples=4, length=16, seed=0), samples)
    assert torch.equal(calibration_samples(tagged, tokenizer, samples=4, length=16, seed=0), samples)


def test_pairs_calibrate_on_their_anchors_and_positives(tokenizer):
    pair = Pair(place="", anchor="three", positive="four", negative=None)
    samples = calibration_samples([pair] * 9, tokenizer, samples=1, length=24, seed=0)
    said = tokenizer.decode(samples[0])
    assert "three</s>four</s>three" in said
