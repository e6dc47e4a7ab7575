"""A pipe that ends whoever holds it when its other end closes, which its holder's death does.

The forkserver imports this module first: while it imports the others, which takes seconds, it would not look whether
anybody still needs it.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import sys

# How multiprocessing starts a forkserver; the second number is the pipe that closes with the last of its clients.
_FORKSERVER = re.compile(r"from multiprocessing\.forkserver import main; main\(\d+, (\d+),")


def end_with(lifeline: int, *, group: bool = True) -> None:
    """Have the kernel kill this process, with its group, when the other end of `lifeline` closes.

    The signal needs no thread and no turn at the interpreter's lock, so it also ends a child busy in C code.
    PR_SET_PDEATHSIG would not do: it comes when the forkserver ends, which waits for its children.
    """
    owner = -os.getpgrp() if group else os.getpid()
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, owner)
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the kernel was told
        os.kill(owner, signal.SIGKILL)


if _found := _FORKSERVER.match(sys.orig_argv[-1]):
    end_with(int(_found[1]), group=False)
