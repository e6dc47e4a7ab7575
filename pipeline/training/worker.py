"""One of the processes of a launched call: `python -m pipeline.training.worker NAME CALL`, started by accelerate.

NAME is the socket that the caller listens at, CALL the JSON file that says what to do (launch.py).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import progress
from pipeline.errors import RequantError
from pipeline.lifeline import end_with


def main(name: str, call: str) -> int:
    """Do what the call says and answer; the exit status."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # the lifeline kills this group, which must not be the caller's
    lifeline, talk = _connected(name), _connected(name)
    # Of its own: a signal also comes where a connection that is written to has room again.
    end_with(lifeline.fileno())
    rank = int(os.environ.get("RANK", "0"))
    sending = threading.Lock()

    def say(**what: Any) -> None:
        line = json.dumps(what).encode() + b"\n"
        with sending:
            talk.sendall(line)

    def show(event: progress.Event) -> None:
        if rank == 0:
            say(kind="event", event=type(event).__name__, fields=asdict(event))

    say(kind="begun", rank=rank)
    try:
        with progress.shown_by(show):
            result = _called(json.loads(Path(call).read_text(encoding="utf-8")))
        say(kind="done", result=result if rank == 0 else None)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller is told
        say(kind="error", rank=rank, trace="".join(traceback.format_exception(error)), **_described(error))
        return 1
    return 0


def _called(call: dict[str, Any]) -> Any:
    module, _, name = call["function"].partition(":")
    return getattr(importlib.import_module(module), name)(call["request"])


def _described(error: BaseException) -> dict[str, str]:
    if isinstance(error, RequantError):
        return {"class": type(error).__name__, "message": str(error)}
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return {"class": "StageFailed", "message": f"train: {found}; run with --debug to see where"}


def _connected(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(f"\0{name}")
    return connection


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
