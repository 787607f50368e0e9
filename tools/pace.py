"""The unit of time: *t* is what ten million additions in a Python loop take on this machine."""

import os
import time

ADDITIONS = 10_000_000
NOISE = 1.5  # a limit may be passed by half again before it counts: other processes share the machine


def measure() -> float:
    """Seconds of one *t*, now."""
    start, total = time.perf_counter(), 0
    for _ in range(ADDITIONS):
        total += 1  # noqa: SIM113 - the addition is what is timed
    return time.perf_counter() - start


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
