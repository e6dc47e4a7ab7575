"""How long a piece of work takes, to its last byte on the disk, and how much memory beyond what was there before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]


def measured(prepare: Callable[[], Work]) -> dict[str, float]:
    """`seconds` of the work that `prepare` gives, and peak bytes of anonymous `memory` of both, looked at all 10 ms."""
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work = prepare()
    os.sync()  # what was written before is not this work's
    started = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "memory": peak[0]}


def _anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no RssAnon")
