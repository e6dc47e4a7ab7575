"""The deployment of prefect.yaml, end to end: server, work pool, worker, deploy, run, final state and artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.checkpoints import tiny_llama

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
NAME = "train-and-quantize/train-and-quantize"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Server:
    """Prefect as its users have it: the command line and the API, in a home of its own."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.port, self.folder = str(port), folder
        self.url = f"http://127.0.0.1:{port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = {
            **kept,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.running = []

    def start(self, *command):
        """A command that goes on, in a process group of its own; its output is in a file."""
        log = (self.folder / f"{command[0]}.log").open("w")
        process = subprocess.Popen(
            [*PREFECT, *command], env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        self.running.append(process)
        return process

    def do(self, *command):
        """A command that must succeed; what it printed."""
        done = subprocess.run(
            [*PREFECT, *command],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def ask(self, path, body=None):
        """The API's answer."""
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def wait(self, condition, seconds, what):
        """The first true value of `condition`, or a failure with the logs."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except OSError:  # the server is not up yet
                pass
            time.sleep(0.3)
        logs = "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("*.log")))
        return pytest.fail(f"{what} did not happen in {seconds} s\n{logs}")

    def stop(self):
        """End everything that was started, and what that started."""
        for process in reversed(self.running):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start("server", "start", "--host", "127.0.0.1", "--port", server.port, "--no-ui")
        server.wait(lambda: server.ask("health"), 180, "the server's start")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def deployment(server):
    """The deployment of prefect.yaml, as the API has it, with a worker that waits for its runs."""
    server.do("work-pool", "create", "requant", "--type", "process")
    server.start("worker", "start", "--pool", "requant", "--type", "process")
    server.do("deploy", "--all")
    return server.ask(f"deployments/name/{NAME}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of a tiny model, as JSON."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny_llama(folder / "model")
    rows = [json.dumps({"text": f"Row {i} says that {i} and {i} are {2 * i}. " * 8}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "schema": 1,
        "name": "tiny",
        "source": str(folder / "model"),
        "quantize": [{"format": "bitsandbytes", "bits": 4}],
        "evaluate": {"data": {"path": str(folder / "rows.jsonl")}, "sequence_length": 64},
        "promote": {"alias": "production"},
        "store": str(folder / "store"),
    }


def test_the_deployment_is_what_the_file_says(deployment):
    """One run at a time, on the pool, nightly once somebody switches it on, with the recipe as its form."""
    assert deployment["work_pool_name"] == "requant"
    assert deployment["entrypoint"] == "flows/train_and_quantize.py:train_and_quantize"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (nightly,) = deployment["schedules"]
    assert nightly["active"] is False
    assert nightly["schedule"]["cron"] == "0 2 * * *"
    assert deployment["parameters"]["recipe"]["schema"] == 1
    assert "recipe" in deployment["parameter_openapi_schema"]["properties"]


def test_a_value_out_of_range_is_refused_before_there_is_a_run(server, deployment, recipe):
    wrong = {**recipe, "seed": -1}
    command = [*PREFECT, "deployment", "run", NAME, "--params", json.dumps({"recipe": wrong})]
    done = subprocess.run(
        command, env=server.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert server.ask("flow_runs/filter", {}) == []


def test_a_run_of_the_deployment_completes_and_shows_its_table_and_progress(server, deployment, recipe):
    server.do("deployment", "run", NAME, "--params", json.dumps({"recipe": recipe}))

    def final():
        (run,) = server.ask("flow_runs/filter", {})
        return run if run["state_type"] in FINAL else None

    run = server.wait(final, 300, "the run's end")
    logs = [log["message"] for log in server.ask("logs/filter", {"sort": "TIMESTAMP_ASC"})]
    assert run["state_type"] == "COMPLETED", "\n".join(logs)
    assert run["name"] == "tiny"

    artifacts = server.ask("artifacts/filter", {})
    assert {"table", "progress", "markdown"} <= {artifact["type"] for artifact in artifacts}
    (result,) = [artifact for artifact in artifacts if artifact["key"] == "tiny-result"]
    assert "nf4" in {row["variant"] for row in json.loads(result["data"])}
    assert {artifact["data"] for artifact in artifacts if artifact["type"] == "progress"} == {100}

    store = Path(recipe["store"])
    assert (store / "tiny/nf4/production").resolve() == (store / "tiny/nf4/v0001").resolve()
