"""The child's side of a call in a fresh process: take on the caller's circumstances, call, answer."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from pipeline import progress
from pipeline.errors import RequantError, StageFailed
from pipeline.lifeline import end_with


class _Inherited(forkserver.ForkServer):
    """The forkserver that made this process, which multiprocessing would start anew for it: seconds of imports."""

    def ensure_running(self) -> None:
        """It runs as long as this process does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the child does. `arguments` are pickled apart, so that they load in the environment meant for them."""

    function: str
    arguments: bytes
    environment: Mapping[str, str]

    def _bootstrap(self, lifeline: int) -> int:
        """Call and answer; the name and the argument, a pipe that closes with the parent, are multiprocessing's."""
        os.setsid()
        end_with(lifeline)
        inherited = forkserver.get_inherited_fds()
        assert inherited is not None
        answers, output = inherited
        # The module's functions are methods of this one object.
        forkserver._forkserver.__class__ = _Inherited  # noqa: SLF001 - there is no other way
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        faulthandler.enable(2)
        os.environ.clear()
        os.environ.update(self.environment)
        with Connection(answers, readable=False) as connection:
            _answer(self, connection)
        return 0


def pickled(value: Any, *, what: str) -> bytes:
    """The bytes of `value`; raise StageFailed, naming it as `what`, where it cannot be pickled."""
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickling runs any class's own code
        found = f"{type(error).__name__}: {error}"
        sentence = f"{what} cannot cross between processes ({found}); pass plain values"
        raise StageFailed(sentence, traceback.format_exc()) from error


def _answer(call: Call, answers: Connection) -> None:
    """Call the function and send what came of it, its events before."""
    # A worker that the child forks and that outlives it would keep the parent waiting for the pipe's end.
    os.register_at_fork(after_in_child=answers.close)
    sending = threading.Lock()

    def send(event: progress.Event) -> None:
        message = pickled(("event", event), what=f"{call.function}: its event {type(event).__name__}")
        with sending:
            answers.send_bytes(message)

    try:
        with progress.shown_by(send):
            module, _, name = call.function.partition(":")
            function = getattr(importlib.import_module(module), name)
            value = function(*pickle.loads(call.arguments))  # noqa: S301 - our own parent's, through a private pipe
        answer = pickled(("result", value), what=f"{call.function}: its result {type(value).__name__}")
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        answer = pickled(("error", _for_parent(call.function, error)), what=call.function)
    sys.stdout.flush()  # before the answer: after it nobody listens
    sys.stderr.flush()
    with sending:
        answers.send_bytes(answer)


def _for_parent(function: str, error: BaseException) -> RequantError:
    """The error as the parent raises it: a RequantError as it is, any other as StageFailed with its traceback."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, RequantError):
        error.add_note(f"In the process of {function}:\n{trace}")
        with contextlib.suppress(StageFailed):
            pickled(error, what=function)
            return error
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return StageFailed(f"{function}: {found}; run with --debug to see where", trace)
