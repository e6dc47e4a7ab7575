"""Several processes by `accelerate launch`: what comes back, and that nobody outlives the one who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import progress
from pipeline.errors import RecipeError, StageDied, StageFailed
from pipeline.launcher import Launch
from pipeline.training.launch import launch
from tests.training import small

CALLS = "tests.training.calls:"
TWO = Launch(processes=2)
GONE_SECONDS = 10.0


def test_two_processes_meet_and_the_main_ones_answer_and_events_come_back(tmp_path, capfd):
    events = []
    with progress.shown_by(events.append):
        found = launch(f"{CALLS}meet", {"a": [1, None]}, settings=TWO, folder=tmp_path, cpu=True)
    assert found["request"] == {"a": [1, None]}
    assert (found["count"], found["main"], found["from_main"], found["anywhere"]) == (2, True, 7, [True, True, False])
    assert events == [
        progress.Step(stage="meet", done=1, total=2, unit="rows"),
        progress.Metric(stage="meet", name="loss", value=0.5),
        progress.Message(stage="meet", text="process 0 of 2"),
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_either_process_comes_back_as_what_it_was_and_ends_both(tmp_path, rank):
    with pytest.raises(RecipeError) as caught:
        launch(f"{CALLS}refuse", {"rank": rank}, settings=TWO, folder=tmp_path, cpu=True)
    assert str(caught.value) == "train.lora: r is 0; correct the value"
    assert f"In process {rank + 1}:" in "".join(caught.value.__notes__)


def test_any_other_exception_is_one_sentence_with_the_trace_and_the_output_beside_it(tmp_path):
    with pytest.raises(StageFailed, match="ZeroDivisionError: division by zero; run with --debug") as caught:
        launch(f"{CALLS}divide", {}, settings=TWO, folder=tmp_path, cpu=True)
    assert "in divide" in caught.value.trace
    assert "about to divide" in "".join(caught.value.__notes__)


def test_a_process_that_is_killed_ends_the_others_and_is_named(tmp_path):
    with pytest.raises(StageDied, match="process 2 of 2 ended before it answered"):
        launch(f"{CALLS}die", {}, settings=TWO, folder=tmp_path, cpu=True)


def test_a_launcher_that_cannot_start_is_an_error_with_what_it_said(tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nno_such_key: 1\n")
    with pytest.raises(StageDied, match="the launcher ended") as caught:
        launch(f"{CALLS}meet", {}, settings=Launch(processes=2, config=config), folder=tmp_path, cpu=True)
    assert "no_such_key" in "".join(caught.value.__notes__)


def test_fsdp_without_a_gpu_is_refused_where_accelerate_would_leave_it_out_without_a_word(tmp_path):
    with pytest.raises(RecipeError, match="shards a model \\(FSDP\\) only among GPUs"):
        launch(f"{CALLS}meet", {}, settings=Launch(processes=2, fsdp=True), folder=tmp_path, cpu=True)


def test_a_mean_over_rows_is_one_over_those_of_both_processes(tmp_path):
    """Trainer would take a model's word that it divides by the labels of all processes, and double its gradient."""
    one = small.run(tmp_path / "one", given={"optim": "sgd", "learning_rate": 0.1})
    two = launch(f"{CALLS}train_small", {"folder": str(tmp_path / "two")}, settings=TWO, folder=tmp_path, cpu=True)
    for name, tensor in one.model.state_dict().items():
        assert torch.allclose(torch.tensor(two[name]), tensor, atol=1e-6), name


PARENT = f"""
import sys
from pathlib import Path
from pipeline.launcher import Launch
from pipeline.training.launch import launch
launch("{CALLS}leave_a_note", {{"folder": sys.argv[1]}}, settings=Launch(processes=int(sys.argv[2])),
       folder=Path(sys.argv[1]), cpu=True)
"""


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_every_process_and_the_launcher_end_with_a_parent_that_is_killed(tmp_path):
    """Torch puts each process into a session of its own, where the death of the parent's group does not reach it."""
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), "2"]) as parent:
        notes = [tmp_path / str(rank) for rank in range(2)]
        assert _until(lambda: all(note.exists() and note.read_text() for note in notes), 120)
        pids = {int(pid) for note in notes for pid in note.read_text().split()}
        assert all(_alive(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert _until(lambda: not any(_alive(pid) for pid in pids), GONE_SECONDS)


def test_a_single_process_hangs_on_its_own_lifeline_too(tmp_path):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), "1"]) as parent:
        note = tmp_path / "0"
        assert _until(lambda: note.exists() and note.read_text(), 120)
        pids = [int(pid) for pid in note.read_text().split()]
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert _until(lambda: not any(_alive(pid) for pid in pids), GONE_SECONDS)
