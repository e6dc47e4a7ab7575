"""What the processes of a launched call answer: lines of JSON over a socket, read until all are done or one fails."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
from collections.abc import Callable
from typing import Any

from pipeline import errors, progress
from pipeline.child import LOOK_UP
from pipeline.errors import OutOfMemory, RequantError, StageDied, StageFailed

_EVENTS = {event.__name__: event for event in (progress.Step, progress.Metric, progress.Message)}
_PEER = struct.Struct("3i")  # what SO_PEERCRED gives: process, user, group


class Answers:
    """The connections of a launched call's processes; each makes two, of which one is silent: its lifeline."""

    def __init__(self, listener: socket.socket, processes: int) -> None:
        self._listener, self._processes = listener, processes
        self._unread: dict[socket.socket, bytes] = {}
        self._talking: dict[socket.socket, int] = {}  # rank of each process that has not said its last word
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._done = 0
        self._result: Any = None

    def listen(self, is_alive: Callable[[], bool], kills: Callable[[], int]) -> Any:
        """Emit events until every process is done; the main one's result. Raise the first error of any.

        `is_alive` says whether the launcher still runs, `kills` how many processes the kernel killed for memory.
        """
        while self._done < self._processes:
            alive = is_alive()
            heard = self._selector.select(LOOK_UP)
            for key, _ in heard:
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj, kills)
            if not alive and not heard:
                raise _obituary("the launcher", kills())
        return self._result

    def close(self) -> None:
        """Close every connection: what still runs at their other ends is killed."""
        for connection in self._unread:
            connection.close()
        self._unread.clear()
        self._selector.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        if _PEER.unpack(peer)[1] != os.getuid():
            connection.close()
            return
        self._unread[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket, kills: Callable[[], int]) -> None:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            if connection in self._talking:
                rank = self._talking[connection]
                raise _obituary(f"process {rank + 1} of {self._processes}", kills())
            return
        *lines, self._unread[connection] = (self._unread[connection] + data).split(b"\n")
        for line in lines:
            self._hear(connection, json.loads(line))

    def _hear(self, connection: socket.socket, said: dict[str, Any]) -> None:
        match said["kind"]:
            case "begun":
                self._talking[connection] = said["rank"]
            case "event":
                progress.emit(_EVENTS[said["event"]](**said["fields"]))
            case "error":
                raise _error(said)
            case "done":
                rank = self._talking.pop(connection)
                self._done += 1
                self._result = said["result"] if rank == 0 else self._result


def _error(said: dict[str, Any]) -> RequantError:
    """The error as it was raised in a process, of the tree's own class."""
    kind = getattr(errors, said["class"], StageFailed)
    error: RequantError = kind(said["message"], *([said["trace"]] if kind is StageFailed else []))
    error.add_note(f"In process {said['rank'] + 1}:\n{said['trace']}")
    return error


def _obituary(who: str, kills: int) -> RequantError:
    if kills > 0:
        return OutOfMemory(
            f"train: the system killed {who} for memory (oom_kill rose by {kills}); give it more memory, or lower the "
            "batch size, the sequence length or train.launcher.processes"
        )
    return StageDied(f"train: {who} ended before it answered; run again, what was finished is kept")
