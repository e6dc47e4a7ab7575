"""What lies elsewhere is copied once, again only when it changed there, and refused in one sentence."""

from __future__ import annotations

import builtins
import json
import sys
import uuid

import fsspec
import pytest

from pipeline import progress
from pipeline.data_sources import localised, located
from pipeline.errors import DataError, MissingLibrary
from pipeline.remote_data import fetched_hub, load_split
from pipeline.rows import read_rows
from pipeline.sections import Data

COMMITS = {None: "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def bucket():
    """A folder of fsspec's memory, whose name no other test has."""
    return f"memory://{uuid.uuid4()}"


def put(url, *texts):
    with fsspec.open(url, "w") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(url, **options):
    return [row.text for row in read_rows(Data(path=url, **options))]


def test_a_file_behind_a_url_is_downloaded_once_and_again_when_it_changed(bucket, monkeypatch):
    put(f"{bucket}/a.jsonl", "one")
    system = type(fsspec.filesystem("memory"))
    taken = []
    real = system.get_file
    monkeypatch.setattr(system, "get_file", lambda self, name, to: (taken.append(name), real(self, name, to)))
    assert read(f"{bucket}/a.jsonl") == read(f"{bucket}/a.jsonl") == ["one"]
    assert len(taken) == 1
    put(f"{bucket}/a.jsonl", "two")
    assert read(f"{bucket}/a.jsonl") == ["two"]
    assert len(taken) == 2


def test_a_folder_and_a_glob_behind_a_url_are_their_files_in_order(bucket):
    for name, text in (
        ("b/c.jsonl", "2"),
        ("b/a.jsonl", "1"),
        ("d.jsonl", "3"),
        ("notes.md", "x"),
        (".hidden.txt", "x"),
    ):
        put(f"{bucket}/{name}", text)
    assert read(bucket) == ["1", "2", "3"]
    assert read(f"{bucket}/b/*.jsonl") == ["1", "2"]
    with pytest.raises(DataError, match=r"notes.md: suffix .md is unknown"):
        read(f"{bucket}/*.md")


def test_a_local_file_has_a_url_too(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert read(f"file://{tmp_path}/a.txt") == ["hello"]


def test_what_a_child_process_is_sent_needs_no_network(bucket, cache):
    put(f"{bucket}/a.jsonl", "one")
    sent = localised(Data(path=f"{bucket}/a.jsonl", held_out=0.1))
    assert sent.path.startswith(str(cache))
    assert sent.held_out == 0.1
    fsspec.filesystem("memory").rm(f"{bucket}/a.jsonl")
    assert len(located(sent)) == 1


def test_a_refusal_of_the_other_side_is_passed_on(bucket, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    with pytest.raises(
        DataError, match=r"a.jsonl: cannot be read \(Access Denied\); check the name and the credentials"
    ):
        read(f"{bucket}/a.jsonl")


def test_a_download_that_breaks_leaves_nothing_behind(bucket, cache, monkeypatch):
    put(f"{bucket}/a.jsonl", "one")
    put(f"{bucket}/b.jsonl", "two")
    system = type(fsspec.filesystem("memory"))
    real = system.get_file

    def breaking(self, name, to):
        if name.endswith("b.jsonl"):
            raise TimeoutError("the line went dead")
        return real(self, name, to)

    with monkeypatch.context() as patched:
        patched.setattr(system, "get_file", breaking)
        with pytest.raises(DataError, match=r"b.jsonl did not arrive \(the line went dead\); try again"):
            read(bucket)
    assert list((cache / "requant" / "data" / "url").iterdir()) == []
    assert read(bucket) == ["one", "two"]


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("nowhere://a.jsonl", DataError, r"nowhere:// is not a scheme that fsspec knows"),
        ("memory://none.jsonl", DataError, r"memory://none.jsonl: no such file or folder; check the name"),
        ("memory://none/*.jsonl", DataError, r"no file of rows is there; the known suffixes are"),
        ("gs://a/b.jsonl", MissingLibrary, r"the library for gs:// is not installed; install it \(.*gcsfs"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_in_one_sentence(url, error, said):
    with pytest.raises(error, match=said):
        read(url)


def test_s3_without_its_library_names_the_extra_that_brings_it(monkeypatch):
    real = builtins.__import__

    def without_s3fs(name, *rest, **options):
        if name.partition(".")[0] == "s3fs":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_s3fs)
    for registered in ("s3", "s3a"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, registered, raising=False)
    with pytest.raises(MissingLibrary, match=r"s3://.*is not installed; run pip install 'requant\[s3\]'"):
        read("s3://bucket/a.jsonl")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that answers for org/name with a folder's rows; gives what was asked of `load_dataset`."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            f'{{"text": "{split} 1", "label": 0}}\n{{"text": "{split} 2", "label": 1}}\n'
        )
    real, asked = datasets.load_dataset, []

    def load_dataset(path, *, name, revision, split):
        asked.append((path, name, revision, split))
        return real(str(folder), name=name, split=split)

    def dataset_info(self, dataset, *, revision, timeout):
        return type("Info", (), {"sha": COMMITS[revision]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return asked


def test_load_dataset_reads_a_folder_as_it_reads_the_hub(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "data" / "validation.csv").write_text("text,label\nc,3\n")
    load_split(str(tmp_path / "data"), config=None, revision=None, split="validation", to=tmp_path / "rows.parquet")
    [row] = read_rows(Data(path=str(tmp_path / "rows.parquet")))
    assert (row.text, row.label) == ("c", 3)


def test_a_hub_dataset_is_materialised_once_for_each_commit_and_split(hub, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read("org/name") == read("org/name") == ["train 1", "train 2"]
    assert read("org/name", split="test") == ["test 1", "test 2"]
    assert read("org/name@v2") == ["train 1", "train 2"]
    commit = COMMITS[None]
    assert hub == [
        ("org/name", None, commit, "train"), ("org/name", None, commit, "test"), ("org/name", None, "b" * 40, "train")
    ]  # fmt: skip
    [path] = located(Data(path="org/name"))
    assert path == cache / "requant" / "data" / "hub" / "org--name" / commit / "default" / "train" / "rows.parquet"


def test_a_split_may_be_a_slice_and_a_dataset_may_have_configurations(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read("org/name", split="train[:1]") == ["train 1"]
    assert read("org/name:default@v2", split="train+test") == ["train 1", "train 2", "test 1", "test 2"]
    assert hub[1] == ("org/name", "default", "b" * 40, "train+test")


def test_without_the_hub_the_last_known_commit_is_taken_and_said(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read("org/name") == ["train 1", "train 2"]

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    events = []
    with progress.shown_by(events.append):
        assert read("org/name") == ["train 1", "train 2"]
    assert [event.text for event in events] == [
        "the hub cannot be asked for org/name; takes its commit aaaaaaaaaaaa, as last time"
    ]
    with pytest.raises(DataError, match=r"org/name@v2: no such file, and the hub cannot be asked .*no route to host"):
        read("org/name@v2")


def test_a_commit_given_in_full_needs_no_question(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("asked"))
    assert read(f"org/name@{'c' * 40}") == ["train 1", "train 2"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(hub, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r'org/name: its split dev cannot be loaded \(Unknown split "dev". Should be one of'
    ):
        read("org/name", split="dev")
    assert not list(cache.rglob("*.parquet"))


def test_an_unknown_dataset_is_refused_offline_and_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"org/none: no such file, and the hub cannot be asked .*offline mode"):
        read("org/none")


def test_the_hub_without_its_library_names_the_extra_that_brings_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_datasets(name, *rest, **options):
        if name.partition(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(
        MissingLibrary, match=r"org/name: hub datasets need datasets; run pip install 'requant\[data\]'"
    ):
        fetched_hub(f"org/name@{'c' * 40}", split="train")
