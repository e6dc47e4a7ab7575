"""Files are read as they are written, and every wrong line is named."""

from __future__ import annotations

import builtins

import pytest

from pipeline.data_files import read_fields
from pipeline.errors import DataError, MissingLibrary


def read(path, content=None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (place.removeprefix(str(path)).strip(), dict(fields)) for place, fields in read_fields(path, text_field="text")
    ]


def test_each_line_of_jsonl_is_a_row_and_empty_lines_do_not_shift_the_numbers(tmp_path):
    rows = read(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": 3}\n')
    assert rows == [("line 1", {"text": "a"}), ("line 3", {"text": 3})]


def test_csv_cells_may_hold_commas_line_breaks_and_long_documents(tmp_path):
    long = "x" * 200_000
    rows = read(tmp_path / "a.csv", f'\ufeffprompt,completion\n"a, ""b""\nc",yes\nd,{long}\n')
    assert [tuple(fields.values()) for _, fields in rows] == [('a, "b"\nc', "yes"), ("d", long)]


def test_a_row_of_csv_with_more_cells_than_the_header_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 3: has more cells than the header"):
        read(tmp_path / "a.csv", "text\na\nb,c\n")


def test_parquet_rows_keep_their_lists_and_objects(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}, {"messages": turns[:1]}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("row 1", {"messages": turns}), ("row 2", {"messages": turns[:1]})]


def test_parquet_without_pyarrow_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *rest, **options):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(MissingLibrary, match=r"pip install 'requant\[parquet\]'"):
        read(tmp_path / "a.parquet", b"")


def test_a_text_file_is_one_document_in_the_field_that_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_fields(tmp_path / "a.txt", text_field="body")) == [
        (str(tmp_path / "a.txt"), {"body": "one\n\ntwo\n"})
    ]
    assert read(tmp_path / "b.txt", " \n") == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"line 2: is not JSON \(Expecting value\); write one JSON object"),
        ("a.jsonl", b'["a"]\n', r"line 1: holds a list, expected an object"),
        ("a.jsonl", b"[" * 100_000, r"line 1: is not JSON \(maximum recursion"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"is not UTF-8 text after line 0; convert it"),
        ("a.csv", b'text\na\n"b\nc\n', r"is not CSV after line 2 \(unexpected end of data\); quote the cell"),
        ("a.parquet", b"PAR1 not really PAR1", r"cannot be read as Parquet after row 0"),
        ("a.json", b"[]", r"suffix .json is unknown; the known ones are .jsonl, .csv"),
        ("rows", b"", r"suffix \(none\) is unknown"),
    ],
)
def test_bytes_that_are_not_what_the_suffix_says_are_refused(tmp_path, name, content, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named_with_the_systems_reason(tmp_path):
    # A process's memory may be opened, even by root, and reading its first byte fails.
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"a.jsonl: Input/output error; name a readable file"):
        read(tmp_path / "a.jsonl")
