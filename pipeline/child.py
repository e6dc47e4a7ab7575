"""One call in a fresh process, whose memory goes back to the system when it ends.

The process comes from multiprocessing's forkserver, which has torch, transformers and the model's own modules imported
already: a child then costs a fork instead of seconds of imports. multiprocessing.Process would import the parent's
__main__ again in the child, which for a console script is the command line and all it imports; so the forkserver is
asked directly. Children end with their parent, however that ends. Linux only: the lifeline and the memory accounts are
the kernel's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import IO, Any

from pipeline import progress
from pipeline.call import Call, pickled
from pipeline.cgroup import oom_kills
from pipeline.errors import OutOfMemory, RequantError, StageDied, StageFailed

# What every stage imports. With these alone a child still pays 2.5 s of lazy imports: name concrete model modules too.
PRELOAD = ("torch", "transformers")
# Seconds between looks up while a child works: a thread that is told to stop from outside hears it only in Python code.
LOOK_UP = 1.0
# Seconds that a child which has answered, or was killed, may take to leave.
GRACE = 10.0
# Bytes of the child's output that an error carries.
TAIL = 8192

# How torch's threads wait for each other, unless the user says otherwise. OpenMP's own choice is to spin, which on two
# virtual cores that share one makes two threads slower than one: 26 GFLOPS against 65, in a 1024x256x768 product.
WAITING: Mapping[str, str] = types.MappingProxyType({"OMP_WAIT_POLICY": "PASSIVE"})

_NOTHING: Mapping[str, str] = types.MappingProxyType({})


class _Forkserver:
    """multiprocessing's forkserver, started once; what its imports print is kept for the error that may follow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._output: IO[bytes] | None = None

    def start(self, modules: Sequence[str]) -> None:
        """Start it with `modules` imported; one that runs, here or above this process, is left as it is."""
        with self._lock:
            if self._output is None and forkserver.get_inherited_fds() is None:
                self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this process
                forkserver.set_forkserver_preload(["pipeline.lifeline", *modules])
                with _clean_start(self._output.fileno()):
                    forkserver.ensure_running()

    def tail(self) -> bytes:
        """The last bytes that it printed."""
        if self._output is None:
            return b""
        end = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), TAIL, max(0, end - TAIL))


_forkserver = _Forkserver()


def warm(preload: Sequence[str] = ()) -> None:
    """Start the forkserver, with torch, transformers and the named modules imported; one that runs is left as it is.

    The call returns at once; the imports go on behind it. A module that is not installed is passed over.
    """
    _forkserver.start([*PRELOAD, *preload])


def run(
    function: str, /, *arguments: Any, preload: Sequence[str] = (), environment: Mapping[str, str] = _NOTHING
) -> Any:
    """The result of `module:function` called with `arguments` in a fresh process.

    The child has this process's working folder, sys.path and environment, with `environment` on top, before anything of
    the call is imported; a variable that torch or transformers read while the forkserver imported them comes too late.
    `preload` counts only for the call that starts the forkserver; a child's own calls use the same one. Progress events
    of the child are emitted here. What it prints goes nowhere, so that standard output stays the caller's; the last
    8 KiB are a note on any error.

    Arguments, result and events are pickled. Raises the child's own RequantError; StageFailed for any other exception
    and for what cannot be pickled; OutOfMemory where the process was killed and this cgroup's oom_kill count rose;
    StageDied where it ended without an answer otherwise. Any exception here kills the child and what it started.
    """
    call = Call(
        function=function,
        arguments=pickled(arguments, what=f"{function}: its arguments"),
        environment={**os.environ, **environment},
    )
    warm(preload)
    kills = oom_kills()
    child = _Child(function)
    try:
        child.tell(call)
        kind, value = child.listen()
        child.end(GRACE)
        if kind == "result":
            return value
        error = value if kind == "error" else _obituary(function, child.exit_code, oom_kills() - kills)
        output = child.tail if child.started else _forkserver.tail()
        if output:
            error.add_note(f"The last output of {function}:\n{output.decode(errors='replace').strip()}")
        raise error
    finally:
        child.end(0)


def _obituary(function: str, exit_code: int | None, kills: int) -> RequantError:
    """What to say of a child that ended without an answer."""
    if exit_code == -signal.SIGKILL and kills > 0:
        return OutOfMemory(
            f"{function}: the system killed its process for memory (oom_kill rose by {kills}); "
            "give it more memory, or lower the batch size or the sequence length"
        )
    if exit_code is None:
        how = "left no exit code"
    elif exit_code < 0:
        how = f"was ended by {signal.Signals(-exit_code).name}"
    else:
        how = f"ended with exit code {exit_code}"
    return StageDied(f"{function}: its process {how} before it answered; run again, what was finished is kept")


class _Child:
    """The parent's side of a child process: its answers, the tail of its output, its end."""

    def __init__(self, function: str) -> None:
        self._function = function
        self.tail = b""
        self.exit_code: int | None = None
        self._answers, answers = Pipe(duplex=False)
        self._output, output = Pipe(duplex=False)
        os.set_blocking(self._output.fileno(), False)
        with answers, output:
            try:
                # `status` brings the child's process id and later its exit code.
                self._status, self._lifeline = forkserver.connect_to_new_process([answers.fileno(), output.fileno()])
            except OSError as error:
                raise StageDied(f"{function}: no process could be started for it ({error}); run again") from error
        self._pid = 0
        self._ended = False

    @property
    def started(self) -> bool:
        """Whether the forkserver has forked it."""
        return self._pid != 0

    def tell(self, call: Call) -> None:
        """Send the call, after the circumstances that multiprocessing's own child code sets up."""
        circumstances = {"sys_path": sys.path, "dir": str(Path.cwd())}
        message = pickle.dumps(circumstances) + pickle.dumps(call)
        with contextlib.suppress(BrokenPipeError), open(self._lifeline, "wb", closefd=False) as told:
            told.write(message)

    def listen(self) -> tuple[str, Any]:
        """Emit events until there is a `result`, an `error`, or the child has `died`."""
        sources: list[Any] = [self._answers, self._output, self._status]
        while True:
            ready = wait(sources, timeout=LOOK_UP)
            if self._output in ready and not self._drain():
                sources.remove(self._output)
            if self._answers in ready:
                try:
                    kind, value = self._receive()
                except (EOFError, OSError):
                    return "died", None
                if kind != "event":
                    return kind, value
                progress.emit(value)
            elif self._status in ready and not self._hear_status():
                return "died", None

    def end(self, grace: float) -> None:
        """Wait up to `grace` seconds, then kill the child and all it started. A second call does nothing."""
        if self._ended:
            return
        self._ended = True
        try:
            self._wait(grace)
        finally:
            os.close(self._lifeline)  # the kernel kills the group for it, as far as the group still holds the other end
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            self._wait(GRACE)
            self._drain()
            os.close(self._status)
            self._answers.close()
            self._output.close()

    def _wait(self, seconds: float) -> None:
        """Wait for the exit code, for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and wait([self._status], timeout=left):
            if not self._hear_status():
                return

    def _hear_status(self) -> bool:
        """Note the process id or the exit code; false once there is no more to come."""
        data = os.read(self._status, forkserver.SIGNED_STRUCT.size)
        if len(data) < forkserver.SIGNED_STRUCT.size:
            return False
        (number,) = forkserver.SIGNED_STRUCT.unpack(data)
        if not self._pid:
            self._pid = number
            return True
        self.exit_code = number
        return False

    def _receive(self) -> tuple[str, Any]:
        message = self._answers.recv_bytes()
        try:
            kind, value = pickle.loads(message)  # noqa: S301 - our own child's, through a pipe that nobody else holds
        except Exception as error:  # noqa: BLE001 - unpickling runs any class's own code
            found = f"{type(error).__name__}: {error}"
            sentence = f"{self._function}: its answer cannot be read here ({found}); return plain values"
            return "error", StageFailed(sentence, traceback.format_exc())
        return kind, value

    def _drain(self) -> bool:
        """Keep the tail of what the child printed; false once nobody can print any more."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output.fileno(), 65536):
                self.tail = (self.tail + data)[-TAIL:]
            return False
        return True


@contextlib.contextmanager
def _clean_start(output: int) -> Iterator[None]:
    """What the forkserver would take from this process and must not, put aside while it starts.

    Started by `python -c`, it would import from the current folder; and what the imports print would land on our
    standard output and error. For these milliseconds the output of other threads goes to `output` too.
    """
    before, ours = dict(os.environ), {number: os.dup(number) for number in (1, 2)}
    os.environ.update({**WAITING, **before, "PYTHONSAFEPATH": "1"})
    for number in ours:
        os.dup2(output, number)
    try:
        yield
    finally:
        for number, kept in ours.items():
            os.dup2(kept, number)
            os.close(kept)
        for name in ("PYTHONSAFEPATH", *WAITING):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
