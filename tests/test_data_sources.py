"""Rows are found wherever they lie: in a file, below a folder, by a glob."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data_sources import localised, located
from pipeline.errors import DataError
from pipeline.sections import Data


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.csv", "below/c.TXT", "below/.hidden.txt", ".git/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(path: str, root: Path) -> list[str]:
    found = located(Data(path=path))
    assert all(each.is_absolute() for each in found)
    return [each.relative_to(root).as_posix() for each in found]


def test_a_file_is_itself_however_it_is_named(tree, monkeypatch):
    assert names("b.jsonl", tree) == names(str(tree / "b.jsonl"), tree) == ["b.jsonl"]
    monkeypatch.setenv("HOME", str(tree))
    assert names("~/b.jsonl", tree) == ["b.jsonl"]


def test_a_link_to_a_file_without_a_suffix_is_known_by_its_own(tree):
    (tree / "blob").write_text('{"text": "a"}')
    (tree / "link.jsonl").symlink_to(tree / "blob")
    assert names("link.jsonl", tree) == ["link.jsonl"]


def test_a_folder_is_every_file_of_a_known_suffix_below_it_but_hidden_ones(tree):
    assert names(".", tree) == names(str(tree), tree) == ["a.csv", "b.jsonl", "below/c.TXT"]


def test_a_glob_is_the_files_that_match_sorted(tree):
    assert names("*[ab].*", tree) == ["a.csv", "b.jsonl"]
    assert names(f"{tree}/**/*.TXT", tree) == ["below/c.TXT"]


def test_a_glob_works_in_a_folder_whose_name_has_brackets(tree, monkeypatch):
    (tree / "run[1]").mkdir()
    (tree / "run[1]" / "a.jsonl").write_text("x")
    monkeypatch.chdir(tree / "run[1]")
    assert names("*.jsonl", tree) == ["run[1]/a.jsonl"]
    assert names(str(tree / "run[1]"), tree) == ["run[1]/a.jsonl"]


def test_what_a_child_process_is_sent_does_not_depend_on_the_working_folder(tree, monkeypatch):
    for path, files in (("b.jsonl", ["b.jsonl"]), ("below", ["below/c.TXT"]), ("*.csv", ["a.csv"])):
        sent = localised(Data(path=path, held_out=0.1))
        assert sent.held_out == 0.1
        monkeypatch.chdir("/")
        assert names(sent.path, tree) == files
        monkeypatch.chdir(tree)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.jsonl", r"none.jsonl: no such file or folder; name a JSONL, CSV, Parquet or text file"),
        ("below/none", r"below/none: no such file or folder"),
        ("./none/at", r"no such file or folder"),
        ("one/two/three", r"no such file or folder"),
        ("elsewhere/train.jsonl", r"no such file or folder"),
        ("", r"data.path is empty"),
        ("nothing-*.jsonl", r"nothing-\*.jsonl: no file of rows is there; the known suffixes are .jsonl"),
        (".git", r".git: no file of rows is there"),
        ("*.md", r"notes.md: suffix .md is unknown"),
        ("notes.md", r"notes.md: suffix .md is unknown"),
        ("x" * 300 + "/a.jsonl", r"File name too long; name a readable file"),
    ],
)
def test_what_is_not_there_is_named_in_one_sentence(tree, path, said):
    (tree / ".git" / "d.txt").unlink()
    with pytest.raises(DataError, match=said):
        located(Data(path=path))


def test_a_folder_that_cannot_be_listed_is_refused_and_not_passed_over(tree, monkeypatch):
    real = __import__("os").scandir

    def scandir(path):
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DataError, match=r"below: Permission denied; name a readable folder"):
        located(Data(path="."))
