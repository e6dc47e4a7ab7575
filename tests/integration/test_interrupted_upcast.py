"""An upcast that a full disk, Ctrl-C or SIGKILL ended leaves only whole shards, and the next run goes on from them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from benchmarks.synthetic import Size, write
from flows import cli
from pipeline import progress
from pipeline.errors import NoSpace
from pipeline.jobs import Job
from pipeline.stages import upcast
from tests.every_format import good
from tests.integration.test_bad_input import digests, in_process, sentence
from tests.integration.test_kill import GONE_SECONDS, alive

SHARD_BYTES = 80_000  # two matrices: the tiny model becomes half a dozen files
__all__ = ["in_process"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return good(tmp_path_factory.mktemp("source") / "gptq", "gptq")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What a run that nothing ended writes."""
    return digests(run(source, tmp_path_factory.mktemp("whole")))


def run(source: Path, workspace: Path) -> Path:
    options = {"dtype": "bfloat16", "max_shard_bytes": SHARD_BYTES}
    (output,) = upcast.run(Job(inputs={"source": source}, options=options, workspace=workspace))
    return output.folder


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards under their final names, and which file each is: an inode alone may have been given out again."""
    stats = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def interrupted(source: Path, workspace: Path) -> dict[str, tuple[int, int]]:
    """Run until two thirds are done, then press Ctrl-C; return the finished shards."""

    def press(event):
        if event.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress.shown_by(press):
        run(source, workspace)
    finished = shards(workspace / "out")
    assert finished
    assert not list(workspace.rglob("*.part"))
    return finished


def test_a_disk_that_is_full_halfway_leaves_whole_shards_and_a_rerun_ends_the_same(
    source, whole, tmp_path, monkeypatch
):
    write_at, left = os.pwrite, [300_000]

    def pwrite(file, data, position):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_at(file, data, position)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        with pytest.raises(NoSpace, match="No space left on device"):
            run(source, tmp_path)
    finished = shards(tmp_path / "out")
    assert not list(tmp_path.rglob("*.part"))
    assert digests(tmp_path / "out").items() <= whole.items(), "what is there is whole"
    assert digests(run(source, tmp_path)) == whole
    assert finished.items() <= shards(tmp_path / "out").items()


def test_a_limit_on_file_sizes_is_one_sentence(source, tmp_path):
    """In 512 KiB fits what else a process writes, but not the model in 32 bits."""
    command = f'ulimit -f 512; exec "{sys.executable}" -m flows upcast "{source}" "{tmp_path}/dense" --dtype float32'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large" in sentence(done.stderr)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_the_finished_shards_and_a_rerun_ends_the_same(source, whole, tmp_path):
    finished = interrupted(source, tmp_path)
    assert digests(run(source, tmp_path)) == whole
    assert finished.items() <= shards(tmp_path / "out").items(), "finished shards are kept, not written again"


def test_shards_of_a_source_that_has_changed_since_are_written_again(source, whole, tmp_path):
    finished = interrupted(source, tmp_path)
    kept = (source / "config.json").stat()
    os.utime(source / "config.json", ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
    assert digests(run(source, tmp_path)) == whole
    assert not finished.items() & shards(tmp_path / "out").items()


@pytest.mark.usefixtures("in_process")
def test_a_second_run_into_the_same_folder_is_told_to_wait(source, tmp_path, capsys):
    (tmp_path / ".dense.work").mkdir()
    handle = os.open(tmp_path / ".dense.work", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert cli.run(["upcast", str(source), str(tmp_path / "dense")]) == 2
    finally:
        os.close(handle)
    assert "another run is writing it" in sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [".dense.work"], "the other run's folder stays"


@pytest.mark.usefixtures("in_process")
def test_sigkill_keeps_the_finished_shards_and_a_rerun_ends_the_same(tmp_path):
    source, mark = tmp_path / "source", uuid.uuid4().hex
    write(source, "gptq", Size(hidden=1024, intermediate=2816, vocabulary=8192, layers=6))
    command = ["upcast", str(source), str(tmp_path / "dense"), "--max-shard-size", "12MB"]
    running = subprocess.Popen(
        [sys.executable, "-m", "flows", *command], env={**os.environ, "REQUANT_TEST_MARK": mark},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    work = tmp_path / ".dense.work" / "out"
    while not (finished := shards(work)) and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert finished
    deadline = time.monotonic() + GONE_SECONDS
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(mark) == []
    assert not (tmp_path / "dense").exists(), "nothing half-done is under the name that was asked for"
    assert cli.run(command) == 0
    assert finished.items() <= shards(tmp_path / "dense").items(), "finished shards are kept, not written again"
    assert not (tmp_path / ".dense.work").exists()
    assert cli.run([*command[:2], str(tmp_path / "again"), *command[3:]]) == 0
    assert digests(tmp_path / "dense") == digests(tmp_path / "again")
