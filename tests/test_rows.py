"""Rows are read as they are written, and every wrong one is named by its line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.errors import DataError
from pipeline.rows import (
    Completion,
    Conversation,
    Labelled,
    Message,
    Pair,
    Tagged,
    Text,
    check_rows,
    lacks_chat_template,
    read_rows,
)
from pipeline.sections import Data

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def data(path, content, **options):
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return Data(path=str(path), **options)


def test_jsonl_rows_of_each_kind_are_told_apart_by_the_first_rows_fields(tmp_path):
    text = data(tmp_path / "text.jsonl", [{"text": "a"}, {"text": "b", "more": 1}])
    chat = data(tmp_path / "chat.jsonl", [{"messages": TURNS}])
    pair = data(tmp_path / "pair.jsonl", [{"prompt": "2+2?", "completion": "4", "text": "unused"}])
    assert list(read_rows(text)) == [
        Text(place=f"{tmp_path}/text.jsonl line 1", text="a"),
        Text(place=f"{tmp_path}/text.jsonl line 2", text="b"),
    ]
    turns = (Message(role="user", content="2+2?"), Message(role="assistant", content="4"))
    assert list(read_rows(chat)) == [Conversation(place=f"{tmp_path}/chat.jsonl line 1", messages=turns)]
    expected = Completion(place=f"{tmp_path}/pair.jsonl line 1", prompt="2+2?", completion="4")
    assert list(read_rows(pair)) == [expected]
    assert [check_rows(each, limit=None) for each in (text, chat, pair)] == ["text", "messages", "prompt_completion"]


def test_a_stated_format_and_field_are_taken_at_their_word(tmp_path):
    rows = data(tmp_path / "a.jsonl", [{"messages": TURNS, "body": "hello"}], format="text", field="body")
    assert [row.text for row in read_rows(rows)] == ["hello"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', {}, r"line 2: has no field text, found txt; every row needs it"),
        ('{"body": "a"}\n', {}, r"line 1: has the fields body, expected messages, .*, tokens and tags, or text"),
        ('{"text": null}\n', {}, r"line 1: text is null, expected text"),
        ("", {}, r"holds no rows; name a file with at least one"),
        ("\n\n", {"format": "text"}, r"holds no rows"),
        ('{"messages": []}\n', {}, r"line 1: messages is empty"),
        ('{"messages": "hi"}\n', {}, r"line 1: messages is text, expected a list"),
        ('{"messages": ["hi"]}\n', {}, r"line 1, message 1: is text, expected an object with role and content"),
        ('{"messages": [{"role": "user", "content": "q"}]}\n', {}, r"line 1: no turn is the assistant's"),
        ('{"messages": [{"role": "bot", "content": "q"}]}\n', {}, r"message 1: role is 'bot', expected one of system"),
        ('{"messages": [{"role": "user"}]}\n', {}, r"line 1, message 1: has no field content, found role"),
        ('{"prompt": "q", "completion": ""}\n', {}, r"line 1: completion is empty"),
        ('{"prompt": ["q"], "completion": "a"}\n', {}, r"line 1: prompt is a list, expected text"),
        ('{"text": "a"}\n', {"format": "messages"}, r"line 1: has no field messages, found text"),
    ],
)
def test_a_wrong_row_is_named_with_what_was_found(tmp_path, content, options, said):
    rows = data(tmp_path / "a.jsonl", content, **options)
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(rows))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_labelled_rows_are_classification_unless_the_first_label_is_a_float(tmp_path):
    for label, kind in (
        ("good", "classification"),
        (3, "classification"),
        (True, "classification"),
        (3.0, "regression"),
    ):
        rows = data(tmp_path / "a.jsonl", [{"text": "a", "label": label}])
        [row] = read_rows(rows)
        assert (row.label, type(row.label)) == (label, type(label))
        assert check_rows(rows, limit=None) == kind
    unlabelled = data(tmp_path / "b.jsonl", [{"text": "a", "stars": 3}])
    assert list(read_rows(unlabelled)) == [Text(place=f"{tmp_path}/b.jsonl line 1", text="a")]


def test_text_and_label_may_have_fields_of_other_names(tmp_path):
    rows = data(tmp_path / "a.jsonl", [{"review": "fine", "stars": 4}], field="review", label="stars")
    assert list(read_rows(rows)) == [Labelled(place=f"{tmp_path}/a.jsonl line 1", text="fine", label=4)]


def test_cells_of_a_csv_are_label_names_and_for_regression_numbers(tmp_path):
    rows = data(tmp_path / "a.csv", "text,label\na,1\nb,2.5\n")
    assert [row.label for row in read_rows(rows)] == ["1", "2.5"]
    assert [row.label for row in read_rows(rows.model_copy(update={"format": "regression"}))] == [1.0, 2.5]


def test_regression_takes_whole_numbers_as_floats(tmp_path):
    rows = data(tmp_path / "a.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 2}])
    assert [(row.label, type(row.label)) for row in read_rows(rows)] == [(0.5, float), (2.0, float)]


def test_tagged_rows_and_pairs_are_told_by_their_fields(tmp_path):
    tagged = data(
        tmp_path / "t.jsonl", [{"tokens": ["Ada", "sings"], "tags": ["PER", "O"]}, {"tokens": ["b"], "tags": ["O"]}]
    )
    assert next(read_rows(tagged)) == Tagged(
        place=f"{tmp_path}/t.jsonl line 1", tokens=("Ada", "sings"), tags=("PER", "O")
    )
    numbered = data(tmp_path / "n.jsonl", [{"tokens": ["Ada"], "tags": [7]}])
    assert next(read_rows(numbered)).tags == ("7",)
    pairs = data(
        tmp_path / "p.jsonl",
        [{"anchor": "a", "positive": "b", "negative": "c"}, {"anchor": "a", "positive": "b", "negative": None}],
    )
    place = f"{tmp_path}/p.jsonl line"
    assert list(read_rows(pairs)) == [
        Pair(place=f"{place} 1", anchor="a", positive="b", negative="c"),
        Pair(place=f"{place} 2", anchor="a", positive="b", negative=None),
    ]
    cells = data(tmp_path / "p.csv", "anchor,positive,negative\na,b,\n")
    assert next(read_rows(cells)).negative is None
    assert [check_rows(each, limit=None) for each in (tagged, pairs)] == ["tagged", "pairs"]


def test_alpaca_rows_become_prompts_in_the_words_that_alpaca_was_trained_with(tmp_path):
    rows = data(
        tmp_path / "a.jsonl",
        [{"instruction": "Add {these}.", "input": "2, 2", "output": "4"}, {"instruction": "Greet.", "output": "Hi"}],
    )
    asked, greeted = read_rows(rows)
    assert asked.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n2, 2\n\n### Response:"
    )
    assert asked.completion == "4"
    assert greeted.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nGreet.\n\n### Response:"
    )
    assert check_rows(rows, limit=None) == "prompt_completion"


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"text": "a", "label": null}\n', {}, r"line 1: label is null, expected text, a whole number or true/false"),
        ('{"text": "a", "label": ["x"]}\n', {}, r"line 1: label is a list, expected text"),
        ('{"text": "a", "label": ""}\n', {}, r"line 1: label is empty; fill it"),
        ('{"text": " ", "label": "x"}\n', {}, r"line 1: text is empty; fill it"),
        ('{"text": "a"}\n', {"format": "classification"}, r"line 1: has no field label, found text"),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": 1.5}\n',
            {},
            r"line 2: label is the number 1.5, .*regression",
        ),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n',
            {},
            r"line 2: its label is text, where .*line 1 has",
        ),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', {}, r"line 2: its label is true or false, where"),
        ('{"text": "a", "label": 0.5}\n{"text": "b", "label": "1"}\n', {}, r"line 2: its label is text, where"),
        (
            '{"text": "a", "label": 0.5}\n{"text": "b", "label": true}\n',
            {},
            r"line 2: label is true or false, expected a fi",
        ),
        ('{"text": "a", "label": NaN}\n', {}, r"line 1: label is nan, expected a finite number"),
        (
            '{"text": "a", "label": "two"}\n',
            {"format": "regression"},
            r"line 1: label is 'two', expected a finite number",
        ),
        (
            f'{{"text": "a", "label": {10**400}}}\n',
            {"format": "regression"},
            r"line 1: label is a number, expected a fin",
        ),
        ('{"tokens": ["a", "b"], "tags": ["X"]}\n', {}, r"line 1: has 2 tokens but 1 tags; give each token one"),
        ('{"tokens": "a b", "tags": "X Y"}\n', {}, r"line 1: tokens is text, expected a list; CSV has none"),
        ('{"tokens": [], "tags": []}\n', {}, r"line 1: tokens is empty"),
        ('{"tokens": ["a", ""], "tags": ["X", "X"]}\n', {}, r"line 1: token 2 is '', expected text that is not empty"),
        (
            '{"tokens": ["a", "b"], "tags": ["X", 1]}\n',
            {},
            r"line 1: tag 2 is 1, expected text, or whole numbers through",
        ),
        ('{"tokens": ["a"], "tags": [null]}\n', {}, r"line 1: tag 1 is None"),
        (
            '{"tokens": ["a"], "tags": ["X"]}\n{"tokens": ["a"], "tags": [1]}\n',
            {},
            r"line 2: its label is a number, where .*line 1 has text",
        ),
        ('{"anchor": "a", "positive": ""}\n', {}, r"line 1: positive is empty"),
        ('{"anchor": "a", "positive": "b", "negative": ["c"]}\n', {}, r"line 1: negative is a list, expected text"),
        ('{"instruction": "", "output": "b"}\n', {}, r"line 1: instruction is empty"),
        ('{"instruction": "a", "output": ""}\n', {}, r"line 1: output is empty"),
        ('{"instruction": "a", "input": 3, "output": "b"}\n', {}, r"line 1: input is a number, expected text"),
    ],
)
def test_a_wrong_labelled_row_is_named_with_what_was_found(tmp_path, content, options, said):
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(data(tmp_path / "a.jsonl", content, **options)))
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_kinds_of_rows_is_refused_by_the_first_row_that_differs(tmp_path):
    data(tmp_path / "a.jsonl", [{"text": "a"}])
    data(tmp_path / "b.jsonl", [{"messages": TURNS}])
    with pytest.raises(
        DataError, match=r"b.jsonl line 1: is messages, where .*a.jsonl line 1 is text; keep rows of one"
    ):
        list(read_rows(Data(path=str(tmp_path))))


def test_the_rows_of_a_folder_are_those_of_its_files_in_order(tmp_path):
    data(tmp_path / "b.jsonl", [{"text": "3"}])
    data(tmp_path / "a.jsonl", [{"text": "1"}, {"text": "2"}])
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.txt").write_text("4")
    (tmp_path / "empty.jsonl").write_text("")
    assert [row.text for row in read_rows(Data(path=str(tmp_path)))] == ["1", "2", "3", "4"]


def test_a_limited_check_of_a_part_looks_at_rows_of_every_part(tmp_path):
    rows = data(tmp_path / "a.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(20)) + "broken\n", held_out=0.01)
    held_out = rows.model_copy(update={"part": "held_out"})
    assert check_rows(held_out, limit=20) == "text"
    with pytest.raises(DataError, match="line 21"):
        check_rows(held_out, limit=21)


def test_a_limited_check_looks_at_the_first_rows_only(tmp_path):
    rows = data(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert check_rows(rows, limit=2) == "text"
    with pytest.raises(DataError, match="line 3"):
        check_rows(rows, limit=3)


def test_a_chat_template_is_found_wherever_transformers_keeps_one(tmp_path):
    assert lacks_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert lacks_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert not lacks_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert not lacks_chat_template(tmp_path)


def test_reading_rows_imports_neither_torch_nor_transformers():
    code = (
        "import sys, pipeline.rows, pipeline.argument_names\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'pyarrow', 'fsspec', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
