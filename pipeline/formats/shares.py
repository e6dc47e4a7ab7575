"""Work on a long tensor, shared out among the cores in stretches that each thread takes through its own cache."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pipeline.cgroup import cores

# Elements at a time: 128 KiB of floats stay in a core's cache. From 32,768 on torch itself would start threads for each
# operation, which wait for one another; a multiple of 64 below that.
TILE = 511 * 64


def share_out(work: Callable[[int, int], None], *, count: int, step: int) -> None:
    """Call `work(start, stop)` for stretches that make up 0 .. count, one a core, of whole steps but for the last.

    The calls run at once, so each writes to places of its own. The first error ends it.
    """
    steps = -(-count // step)
    share = max(1, -(-steps // cores())) * step
    starts = range(0, count, share)
    if len(starts) == 1:
        work(0, count)
    elif starts:
        with ThreadPoolExecutor(max_workers=len(starts), thread_name_prefix="pack") as pool:
            list(pool.map(lambda start: work(start, min(start + share, count)), starts))
