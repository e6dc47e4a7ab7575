"""Training in two processes over gloo: one process's weights to rounding, the same bytes after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline import progress
from pipeline.errors import RecipeError
from pipeline.sections import Data
from pipeline.stages import train
from pipeline.training.memory import MicroBatch, known_micro_batch
from pipeline.training.resume import MARKER
from tests.checkpoints import tiny_llama
from tests.training.runs import contents, rows, trained, training_job

LORA = {"r": 4, "target_modules": "all-linear"}  # no dropout: each process draws its own
TWO = {"processes": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, intermediate=96, dtype="float32")


def launched(base, workspace, launcher=None, **options):
    [output] = train.run(training_job(base, workspace, launcher=launcher or TWO, use_cpu=True, **options))
    return output


def tensors(output):
    [path] = output.folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_come_to_one_processs_weights_with_twice_the_rows(base, tmp_path, method):
    options = {"method": method, "lora": LORA, "learning_rate": 1e-3}
    one = trained(base, tmp_path / "one", per_device_train_batch_size=4, use_cpu=True, **options)
    events = []
    with progress.shown_by(events.append):
        two = launched(base, tmp_path / "two", **options)
    assert (two.variant, sorted(contents(two.folder))) == (one.variant, sorted(contents(one.folder)))
    before = load_file(base / "model.safetensors")
    for name, tensor in tensors(one).items():
        assert torch.allclose(tensors(two)[name], tensor, atol=2e-5), name
    if method == "full":
        assert not all(torch.allclose(tensors(two)[name], before[name], atol=2e-5) for name in before)
    for name in ("steps", "tokens", "trainable_parameters"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=0.01)
    assert two.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], abs=1e-4)
    assert [event.done for event in events if isinstance(event, progress.Step)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "tokens_per_second"} <= {
        event.name for event in events if isinstance(event, progress.Metric)
    }


LONG = {"max_steps": 60, "save_steps": 4}  # so many that the processes are not through before they are killed
PARENT = """
import sys
from pathlib import Path
from pipeline import progress
from tests.stages.test_launched import LONG, LORA, launched

def say(event):
    if isinstance(event, progress.Step):
        print(event.done, flush=True)
        if event.done == 5:
            sys.stdin.read()  # to be killed here

with progress.shown_by(say):
    launched(Path(sys.argv[1]), Path(sys.argv[2]), lora=LORA, **LONG)
"""


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_to_the_same_bytes(base, tmp_path):
    whole = launched(base, tmp_path / "whole", lora=LORA, **LONG)
    work = tmp_path / "killed"
    command = [sys.executable, "-c", PARENT, str(base), str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        lines = []
        while len(lines) < 5 and (line := parent.stdout.readline()):
            lines.append(line)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert len(lines) == 5
    for marker in (work / "checkpoints").glob(f"checkpoint-*/{MARKER}"):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= contents(marker.parent).keys()
    events = []
    with progress.shown_by(events.append):
        resumed = launched(base, work, lora=LORA, **LONG)
    steps = [event.done for event in events if isinstance(event, progress.Step)]
    assert 4 < steps[0] < steps[-1] == 60
    assert any(
        event.text.startswith("resumes from checkpoint-") for event in events if isinstance(event, progress.Message)
    )
    assert contents(resumed.folder) == contents(whole.folder)


@pytest.mark.slow
def test_out_of_memory_in_one_process_starts_all_of_them_again_with_fewer_rows(base, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANT_TEST_MOST_ROWS", "1")
    events = []
    with progress.shown_by(events.append):
        job = training_job(base, tmp_path, lora=LORA, launcher=TWO, use_cpu=True)
        [output] = train.run_launched("tests.training.calls:short_of_memory", job)
    assert output.metrics["steps"] == 6
    assert known_micro_batch(tmp_path / "checkpoints") == MicroBatch(size=1, accumulation=2)
    assert "all start again with 1 row at a time, 2 times an update" in str(events)


def test_an_error_of_the_recipe_is_the_same_sentence_from_several_processes(base, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.lora: .*nowhere.* not found"):
        launched(base, tmp_path, lora={"target_modules": ["nowhere"]}, data=rows(tmp_path / "rows.jsonl"))


@pytest.mark.slow
def test_two_processes_share_the_features_and_come_to_one_processs_projector(base, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(
        "".join(f'{{"text": "row {i} is {"odd" if i % 2 else "even"}", "label": {i % 2}}}\n' for i in range(40))
    )
    found = []
    for processes, size in ((1, 8), (2, 4)):
        workspace = tmp_path / str(processes)
        job = training_job(
            base, workspace, method="projector", data=Data(path=str(path)), launcher={"processes": processes},
            per_device_train_batch_size=size, max_steps=10, use_cpu=True,
        )  # fmt: skip
        job.options.update(engine="features", projector={"kind": "linear"})
        [output] = train.run(job)
        found.append(tensors(output))
    one, two = found
    assert all(torch.allclose(two[name], one[name], atol=2e-5) for name in one)
