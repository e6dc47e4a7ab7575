"""flows.temporary_server: a server for one run comes up, is quiet, keeps history, and goes with its parent."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from flows import temporary_server as under_test

RUN = """
import json, os
from flows.temporary_server import quiet_environment, temporary_server
os.environ.update(quiet_environment())
with temporary_server():
    from prefect import flow, get_run_logger, task
    from prefect.settings import PREFECT_API_URL
    url = PREFECT_API_URL.value()
    @task
    def one(i):
        get_run_logger().info("task %s of NAME", i)
        return i
    @flow(name="NAME")
    def several():
        get_run_logger().info("flow NAME")
        return [one(i) for i in range(5)]
    result = several()
print(json.dumps({"url": url, "result": result, "afterwards": PREFECT_API_URL.value()}))
"""

HISTORY = """
import asyncio, collections, json, os
from flows.temporary_server import quiet_environment, temporary_server
os.environ.update(quiet_environment())
async def read():
    from prefect.client.orchestration import get_client
    async with get_client() as client:
        return {
            "flows": sorted(flow.name for flow in await client.read_flows()),
            "runs": sorted(run.state_name for run in await client.read_flow_runs()),
            "tasks": dict(collections.Counter(run.state_name for run in await client.read_task_runs())),
            "logs": sorted(log.message for log in await client.read_logs()),
        }
with temporary_server():
    print(json.dumps(asyncio.run(read())))
"""

HOLD = """
from pathlib import Path
import sys, time
from flows.temporary_server import temporary_server
with temporary_server():
    Path(sys.argv[1]).touch()
    time.sleep(600)
"""

FAIL = """
import os
from flows.temporary_server import quiet_environment, temporary_server
os.environ.update(quiet_environment())
try:
    with temporary_server():
        print("it came up")
except Exception as error:
    print(type(error).__name__, error)
    print(*error.__notes__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment without any Prefect setting but a fresh home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}


@pytest.fixture(scope="module")
def two_runs(environment):
    """What two runs printed that were the first of their Prefect home, at the same time."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN.replace("NAME", name)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("first", "second")
    ]  # fmt: skip
    return [run.communicate(timeout=300) for run in runs]


def _marked(mark):
    """Every live process with `mark` in its environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended, or is somebody else's; a zombie's is empty
            continue
    return found


def _locks():
    return Path("/proc/locks").read_text().splitlines()


def _until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_runs_that_start_at_once_on_a_new_database_both_finish(two_runs):
    """Each prints its own document and nothing else, on standard error too."""
    for output, errors in two_runs:
        assert errors == ""
        assert json.loads(output)["result"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_each_has_a_port_of_its_own_on_this_machine_and_the_setting_ends_with_the_block(two_runs):
    first, second = (json.loads(output) for output, _ in two_runs)
    assert first["url"].startswith("http://127.0.0.1:")
    assert first["url"] != second["url"]
    assert first["afterwards"] is None


@pytest.mark.slow
def test_states_and_logs_of_finished_runs_are_in_the_next_ones_history(two_runs, environment):
    done = subprocess.run(
        [sys.executable, "-c", HISTORY], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    history = json.loads(done.stdout)
    assert history["flows"] == ["first", "second"]
    assert history["runs"] == ["Completed", "Completed"]
    assert history["tasks"] == {"Completed": 10}
    for name in ("first", "second"):
        assert {f"flow {name}", *(f"task {i} of {name}" for i in range(5))} <= set(history["logs"])


@pytest.mark.slow
def test_the_server_waits_while_another_starts_and_goes_with_a_parent_that_was_killed(two_runs, environment, tmp_path):
    """The first half is what makes two first runs at once safe whatever their timing."""
    mark, up = f"mark-{uuid.uuid4().hex}", tmp_path / "up"
    with Path(environment["PREFECT_HOME"], "requant-server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = f":{os.fstat(lock.fileno()).st_ino} "
        parent = subprocess.Popen([sys.executable, "-c", HOLD, up], env={**environment, "REQUANT_TEST_MARK": mark})
        try:
            # The kernel marks who waits for a lock with an arrow.
            _until(lambda: any("->" in line and waiter in line for line in _locks()) or up.exists(), 60)
            assert not up.exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            _until(up.exists, 60)
            assert len(_marked(mark)) == 2
            parent.kill()
            parent.wait()
            _until(lambda: not _marked(mark), 10)
        finally:
            for pid in _marked(mark):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_server_that_cannot_start_is_one_sentence_with_its_last_lines_beside_it(environment):
    broken = {**environment, "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////no/such/folder/prefect.db"}
    done = subprocess.run(
        [sys.executable, "-c", FAIL], env=broken, capture_output=True, text=True, timeout=120, check=True
    )
    sentence, *notes = done.stdout.splitlines()
    assert sentence.startswith("WorkError Prefect's temporary server ended with exit code ")
    assert sentence.endswith("or PREFECT_API_URL to a server that runs")
    assert "unable to open database file" in "\n".join(notes)


def test_where_a_server_is_named_none_is_started(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    monkeypatch.setattr(under_test.subprocess, "Popen", lambda *_, **__: pytest.fail("started a server"))
    with under_test.temporary_server():
        assert os.environ["PREFECT_API_URL"] == "http://prefect.example/api"


def test_telemetry_and_console_are_off_unless_the_user_set_them(monkeypatch):
    for name in under_test.QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "DEBUG")
    assert under_test.quiet_environment() == {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    assert under_test.SERVER["DO_NOT_TRACK"] == "1"
    assert under_test.SERVER["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
