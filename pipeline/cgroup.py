"""What the kernel says of this process: its cores, the memory it may have, its cgroup's processes killed for memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

ACCOUNTS, MOUNTS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def oom_kills(accounts: Path = ACCOUNTS, mounts: Path = MOUNTS) -> int:
    """The processes of this process's cgroup that were killed for memory so far; 0 where no account is readable.

    Read from memory.events (cgroup v2) or memory.oom_control (v1).
    """
    counts = _near("memory.events", "memory.oom_control", accounts, mounts)
    return sum(_number(text, "oom_kill") for text in counts)


def memory_left(accounts: Path = ACCOUNTS, mounts: Path = MOUNTS) -> int:
    """Bytes that processes may still have: those that the machine has left, or the cgroup's limit where that is less.

    What the cgroup's processes have is memory.stat's `anon` (v2) or `total_rss` (v1): the system takes back the rest.
    """
    left: int = psutil.virtual_memory().available
    limits = _near("memory.max", "memory.limit_in_bytes", accounts, mounts)
    for limit, stat in zip(limits, _near("memory.stat", "memory.stat", accounts, mounts), strict=False):
        if limit.strip().isdigit():
            left = min(left, int(limit) - _number(stat, "anon") - _number(stat, "total_rss"))
    return max(left, 0)


def _near(name: str, name_v1: str, accounts: Path, mounts: Path) -> Iterator[str]:
    """What the file of that name says of this process's cgroup, in either version of cgroups.

    A container may see its own cgroup under the name it has outside, so the nearest readable folder above is taken
    where that name does not exist.
    """
    for line in accounts.read_text().splitlines() if accounts.exists() else ():
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, account = (mounts / "memory", name_v1) if controllers else (mounts, name)
        folder = mount / place.lstrip("/")
        while folder.is_relative_to(mount):
            with contextlib.suppress(OSError):
                yield (folder / account).read_text()
                break
            folder = folder.parent


def _number(text: str, name: str) -> int:
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))
