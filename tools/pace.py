"""The unit of time: *t* is what ten million additions in a Python loop take on this machine."""

import os
import subprocess
import sys
import time

ADDITIONS = 10_000_000
# What is beyond its limit is named. Beyond half again, the room for noise, it runs once more alone, since other
# processes share the machine; the check fails if it takes as long then.
BROKEN = 1.5


def additions() -> float:
    """Seconds that the loop takes, now."""
    start, total = time.perf_counter(), 0
    for _ in range(ADDITIONS):
        total += 1  # noqa: SIM113 - the addition is what is timed
    return time.perf_counter() - start


def measure(busy: int = 1) -> float:
    """Seconds of one *t* while so many processes are busy: two that share a core are slower than one alone."""
    if busy == 1:
        return additions()
    command = [sys.executable, "-c", "from tools.pace import additions; print(additions())"]
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) for _ in range(busy)]
    return max(float(process.communicate()[0]) for process in others)


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
