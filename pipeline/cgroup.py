"""What the kernel says of this process: the cores that it may use, the processes of its cgroup killed for memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def oom_kills(accounts: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> int:
    """The processes of this process's cgroup that were killed for memory so far; 0 where no account is readable.

    Read from memory.events (cgroup v2) or memory.oom_control (v1). A container may see its own cgroup under the name it
    has outside, so the nearest readable folder above is taken where that name does not exist.
    """
    total = 0
    for line in accounts.read_text().splitlines() if accounts.exists() else ():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            total += _oom_kills_near(mounts, place, "memory.events")
        elif "memory" in controllers.split(","):
            total += _oom_kills_near(mounts / "memory", place, "memory.oom_control")
    return total


def _oom_kills_near(mount: Path, place: str, account: str) -> int:
    folder = mount / place.lstrip("/")
    while folder.is_relative_to(mount):
        with contextlib.suppress(OSError):
            lines = (folder / account).read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        folder = folder.parent
    return 0
