"""Rows are read as they are written, and every wrong one is named by its line."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys

import pytest

from pipeline.errors import DataError, MissingLibrary
from pipeline.rows import Completion, Conversation, Message, Text, check_rows, lacks_chat_template, read_rows
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


def test_csv_cells_may_hold_commas_line_breaks_and_long_documents(tmp_path):
    long = "x" * 200_000
    rows = data(tmp_path / "a.csv", f'\ufeffprompt,completion\n"a, ""b""\nc",yes\nd,{long}\n')
    assert [(row.prompt, row.completion) for row in read_rows(rows)] == [('a, "b"\nc', "yes"), ("d", long)]


def test_parquet_rows_are_read_with_nested_messages(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"messages": TURNS}, {"messages": TURNS}]), tmp_path / "a.parquet")
    rows = list(read_rows(Data(path=str(tmp_path / "a.parquet"))))
    assert [row.messages[1].content for row in rows] == ["4", "4"]
    assert rows[1].place.endswith("row 2")


def test_parquet_without_pyarrow_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without_pyarrow(name, *rest, **options):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(MissingLibrary, match=r"pip install 'requant\[parquet\]'"):
        list(read_rows(Data(path=str(tmp_path / "a.parquet"))))


def test_a_text_file_is_one_document(tmp_path):
    rows = data(tmp_path / "a.txt", "one\n\ntwo\n")
    assert [row.text for row in read_rows(rows)] == ["one\n\ntwo\n"]


def test_empty_lines_do_not_shift_the_line_numbers(tmp_path):
    rows = data(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"line 3: text is a number, expected text"):
        list(read_rows(rows))


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"text": "a"}\nnot json\n', {}, r"line 2: is not JSON \(Expecting value\)"),
        ('{"text": "a"}\n{"txt": "b"}\n', {}, r"line 2: has no field text, found txt; every row needs it"),
        ('["a"]\n', {}, r"line 1: holds a list, expected an object"),
        ('{"body": "a"}\n', {}, r"line 1: has the fields body, expected messages, prompt and completion, or text"),
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


def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 3: has more cells than the header"):
        list(read_rows(data(tmp_path / "a.csv", "text\na\nb,c\n")))


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"no such file"):
        list(read_rows(Data(path=str(tmp_path / "b.jsonl"))))
    with pytest.raises(DataError, match=r"is a folder"):
        list(read_rows(Data(path=str(tmp_path))))
    with pytest.raises(DataError, match=r"suffix \.json is unknown; the known ones are \.jsonl, \.csv"):
        list(read_rows(Data(path=str(tmp_path / "a.json"))))


def test_bytes_that_are_no_utf8_or_no_parquet_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"not UTF-8"):
        list(read_rows(Data(path=str(tmp_path / "a.jsonl"))))
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        list(read_rows(Data(path=str(tmp_path / "a.parquet"))))


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
        "sys.exit(bool({'torch', 'transformers', 'peft', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
