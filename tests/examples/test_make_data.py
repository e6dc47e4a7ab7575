"""make_data.py splits Python's help topics the same way every time."""

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

SCRIPT = Path(__file__).parents[2] / "examples" / "make_data.py"


def make(folder):
    return subprocess.run(
        [sys.executable, SCRIPT, "--folder", folder], check=True, capture_output=True, text=True
    ).stdout


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_tenth_topic_by_name_is_for_evaluation_and_the_rest_for_training(tmp_path):
    make(tmp_path)
    names = sorted(topics)
    assert texts(tmp_path / "eval.jsonl") == [topics[names[i]] for i in range(0, len(names), 10)]
    training = texts(tmp_path / "train.jsonl")
    assert sorted(training + texts(tmp_path / "eval.jsonl")) == sorted(topics.values())


def test_a_second_run_leaves_the_files_as_they_are(tmp_path):
    assert make(tmp_path).count("\n") == 1
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert "unchanged" in make(tmp_path)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}


def test_a_file_that_was_changed_is_made_again(tmp_path):
    make(tmp_path)
    right = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_text("{}")
    assert "written" in make(tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == right
