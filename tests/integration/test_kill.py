"""SIGKILL at any moment: nothing lives on, nothing half-done is left, and the next run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.upkeep import verify
from tests.checkpoints import tiny_llama

STAGES = ("upcast", "train", "merge", "quantize", "evaluate")
GONE_SECONDS = 10.0  # the promise: nothing lives longer than this after its parent was killed

RECIPE = """
name: bot
source: {root}/model
train:
  method: lora
  data: {root}/train.jsonl
  sequence_length: 64
  arguments: {{max_steps: 12, save_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-3}}
quantize: [{{format: bitsandbytes, type: nf4}}, {{format: bitsandbytes, bits: 8}}]
evaluate: {{data: {root}/eval.jsonl, sequence_length: 32}}
promote: {{alias: production}}
store: {store}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    tiny_llama(folder / "model")
    for name in ("train", "eval"):
        rows = [json.dumps({"text": f"{name} row {i}: " + "word " * 30}) for i in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def start(root: Path, store: str, mark: str) -> subprocess.Popen[str]:
    recipe = root / f"{store}.yaml"
    recipe.write_text(RECIPE.format(root=root, store=root / store))
    environment = {
        **os.environ,
        "REQUANT_TEST_MARK": mark,
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(root / "prefect"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "run", str(recipe)], env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def alive(mark: str) -> list[str]:
    """The command lines of the processes that carry the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"REQUANT_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]  # a zombie has no command line


def digests(store: Store) -> dict[str, str]:
    return {artifact.reference: artifact.manifest.digest for artifact in store.artifacts()}


@pytest.mark.slow
def test_killed_in_each_stage_a_run_ends_whole_and_goes_on_without_repeating_a_stage(root):
    store = Store.open(str(root / "killed"))
    committed: dict[str, str] = {}
    for stage in STAGES:
        mark = uuid.uuid4().hex
        run = start(root, "killed", mark)
        assert run.stderr is not None
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith((f"{stage}: ", f"{stage} ")):
                break
        else:
            pytest.fail(f"{stage} never said that it works: {''.join(said)}")
        run.send_signal(signal.SIGKILL)
        run.wait()
        deadline = time.monotonic() + GONE_SECONDS
        while alive(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert alive(mark) == []
        for artifact in store.artifacts():
            verify(artifact)
        assert committed.items() <= digests(store).items(), "a committed version stays as it was"
        committed = digests(store)
    last = start(root, "killed", uuid.uuid4().hex)
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert all(reference.endswith("@v0001") for reference in digests(store)), "no committed stage was repeated"
    assert list((store.private / "work").iterdir()) == []

    whole = start(root, "whole", uuid.uuid4().hex)
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    uninterrupted = digests(Store.open(str(root / "whole")))
    assert digests(store) == uninterrupted, "a killed run ends with the same bytes as one that was left alone"


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_says_how_to_go_on(root):
    mark = uuid.uuid4().hex
    run = start(root, "interrupted", mark)
    assert run.stderr is not None
    assert next((line for line in run.stderr if line.startswith("train: ")), None)
    run.send_signal(signal.SIGINT)
    said = run.stderr.read()
    assert run.wait() != 0
    assert "Traceback" not in said
    deadline = time.monotonic() + GONE_SECONDS
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(mark) == []
