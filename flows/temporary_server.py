"""A Prefect API server for one run, for whom none is set up.

It is Prefect's own application in a process of ours. Prefect's own temporary server outlives a parent that was killed,
guesses at free ports, and shows its log. This one keeps its history in the user's own Prefect database: a server on a
fresh copy of an empty one is not faster (of 7 s of processor time to start, 6.5 s are imports; making a database costs
10 s more, once), and `prefect server start` shows the runs afterwards. Two servers on one SQLite file share it by its
write-ahead log; two that make it at once do not (a migration fails), so starting takes a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from pipeline.errors import WorkError
from pipeline.lifeline import end_with

# Seconds for a server to come up: making the database takes 10 to 20 s, more on a busy machine, and two may queue.
START_SECONDS = 180.0
# Seconds for it to finish its requests when it is told to stop.
STOP_SECONDS = 5.0
# Seconds for the run's last logs and events to reach it.
DELIVERY_SECONDS = 10.0
TAIL_LINES = 20

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The command line shows its own progress and errors; the run's logs reach the API all the same.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}
SERVER = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # half a second, for block types that no flow here uses
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    # Task runs arrive as events. One at a time (the default) the server falls behind and loses the last when it stops;
    # in batches it takes them off its queue at once, and writes what is left when it is told to stop.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # What Prefect tells its own temporary server: only the services that a single run needs.
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


def quiet_environment() -> dict[str, str]:
    """The variables that keep Prefect from printing and reporting, for os.environ before its import.

    Those that the user has set are left out.
    """
    return {name: value for name, value in QUIET.items() if name not in os.environ}


@contextlib.contextmanager
def temporary_server() -> Iterator[None]:
    """Point Prefect at a server of this run's own, unless PREFECT_API_URL (variable or profile) names one.

    It listens on a free port of 127.0.0.1, without telemetry, and ends with the block, or with this process however
    that ends. What it prints is shown only if it fails to start, as a WorkError within START_SECONDS.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    with tempfile.TemporaryFile() as log, _server_process(log) as (process, port):
        # 2 s of imports, while the server does its own.
        from prefect.settings import PREFECT_API_URL, temporary_settings

        if PREFECT_API_URL.value():
            process.kill()
            yield
            return
        _wait_until_healthy(process, port, log)
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            try:
                yield
            finally:
                _deliver()


def serve(listener: int, lifeline: int) -> None:
    """The server's process: serve on the socket `listener` until told to stop or the other end of `lifeline` closes."""
    end_with(lifeline)
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import PREFECT_HOME

    class OneAtATime(uvicorn.Server):
        """A server whose start, migrations included, waits for that of any other on the same Prefect home."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            home = PREFECT_HOME.value()
            home.mkdir(parents=True, exist_ok=True)
            with (home / "requant-server.lock").open("w") as lock:
                await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
                await super().startup(sockets)

    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on", timeout_graceful_shutdown=3)
    OneAtATime(config).run(sockets=[socket.socket(fileno=listener)])


@contextlib.contextmanager
def _server_process(log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that serves on a port of ours; in its own session, since after Ctrl-C a run has its state to report."""
    ours, theirs = os.pipe()[::-1]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # The same modules as here, and none from the current folder.
        start = f"import sys; sys.path[:] = {[folder for folder in sys.path if folder]!r}; "
        start += f"from flows.temporary_server import serve; serve({listener.fileno()}, {theirs})"
        process = subprocess.Popen(
            [sys.executable, "-c", start], env={**os.environ, **SERVER}, pass_fds=[listener.fileno(), theirs],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
    try:
        yield process, port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        os.close(ours)  # the kernel kills for it what is left
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    """Ask once: the port has listened from the start, so the request waits in its queue until the server takes it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    begun = time.monotonic()
    try:
        connection.request("GET", "/api/health")
        status = connection.getresponse().status
        found = "" if status == http.HTTPStatus.OK else f"answered {status}"
    except (OSError, http.client.HTTPException):
        process.kill()
        ended = process.wait()
        seconds = time.monotonic() - begun
        found = "did not come up" if seconds >= START_SECONDS else f"ended with exit code {ended}"
    finally:
        connection.close()
    if found:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
        said = lines[-1].strip() if lines else "nothing"
        error = WorkError(
            f"Prefect's temporary server {found} after {time.monotonic() - begun:.0f} s (it said: {said}); "
            "set PREFECT_HOME to a fresh folder, or PREFECT_API_URL to a server that runs"
        )
        error.add_note("\n".join(["The server's last lines:", *lines]))
        raise error


def _deliver() -> None:
    """Send what the run's threads still hold: they would go on trying after the server is gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DELIVERY_SECONDS, at_exit=False)
