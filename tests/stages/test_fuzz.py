"""Whatever is wrong with a checkpoint, upcast ends with finite weights or with one sentence."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.catalog import FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import RequantError
from pipeline.inspection import inspect
from pipeline.jobs import Job
from pipeline.stages import upcast
from tests.damaged import damage
from tests.every_format import STANDING_FOR, good

EXAMPLES = int(os.environ.get("REQUANT_FUZZ_EXAMPLES", "12"))
SEED = int(os.environ.get("REQUANT_FUZZ_SEED", "0"))
HANG_SECONDS = 300  # an example takes a twentieth of a second, and the first that asks gptqmodel imports it
MOST_GROWTH = 400 << 20  # bytes
NAMES = tuple(name for row in FORMATS for name in STANDING_FOR[row])


class Hung(BaseException):
    """Not an Exception: nothing on the way up takes it for an error of its own."""


def stop(*_):
    raise Hung


@contextlib.contextmanager
def in_one_sentence():
    """Let an error end the block that is one line of a bearable length."""
    try:
        yield
    except RequantError as error:
        said = str(error)
        if "\n" in said or not 0 < len(said) < 2000:
            raise AssertionError(said) from error


def run(source: Path, workspace: Path) -> None:
    """Upcast and inspect; let through what is no RequantError of one line."""
    with in_one_sentence():
        inspect(Checkpoint.open(source))
    output = None
    with in_one_sentence():
        job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=workspace)
        (output,) = upcast.run(job)
    for name, tensor in load_file(output.folder / "model.safetensors").items() if output else ():
        assert torch.isfinite(tensor.float()).all(), name


def largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(scope="module", params=NAMES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "source"
    source = good(folder, request.param)
    assert format_of(Checkpoint.open(source).quantization).name in FORMATS
    (output,) = upcast.run(Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=folder.parent / "w"))
    assert output.metrics["tensors"] > 0
    assert inspect(Checkpoint.open(source)).problems == ()
    return source


def test_every_format_has_a_checkpoint_to_damage():
    assert STANDING_FOR.keys() == FORMATS.keys()


def test_a_damaged_checkpoint_ends_in_finite_weights_or_in_one_sentence(source, tmp_path):
    folder = source if source.is_dir() else source.parent
    before, previous = largest(), signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(EXAMPLES):
            copy, seed = tmp_path / "source", f"{SEED}/{folder.parent.name}/{number}"
            shutil.copytree(folder, copy)
            done = damage(copy if source.is_dir() else copy / source.name, random.Random(seed))
            signal.alarm(HANG_SECONDS)
            try:
                run(copy if source.is_dir() else copy / source.name, tmp_path / "work")
            except BaseException as error:
                error.add_note(f"example {seed}: {'; '.join(done)}")
                raise
            finally:
                signal.alarm(0)
            shutil.rmtree(copy)
            shutil.rmtree(tmp_path / "work", ignore_errors=True)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert largest() - before < MOST_GROWTH
