"""The runs of a grid: in this process while they are few and short, else in parallel."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from joblib import Parallel, cpu_count, delayed
from joblib.parallel import get_active_backend

from polylib.lab.progress_bar import listening, progress
from polylib.lab.results import Outcome, Point, computed

SHORT = 4.0  # seconds: about what it takes until other processes have imported torch


def run_all(run: Callable[..., Any], calls: Sequence[Point]) -> Iterator[tuple[int, Outcome]]:
    """The outcome of `run(**call)` for each call, with the call's number, in the order in which they finish.

    Where `joblib.parallel_config` names nothing, the first runs happen here and are timed; the rest follows them if it
    would be over before other processes have started, and goes to as many processes as there are cores otherwise.
    """
    return iter(progress(_outcomes(run, calls), "sweep", total=len(calls)))


def _outcomes(run: Callable[..., Any], calls: Sequence[Point]) -> Iterator[tuple[int, Outcome]]:
    backend, jobs = get_active_backend()
    done = 0
    if type(backend).__name__ in ("LokyBackend", "SequentialBackend") and jobs in (None, 1):
        alone = type(backend).__name__ == "SequentialBackend" or jobs == 1 or cpu_count() == 1
        begun = time.perf_counter()
        while done < len(calls):
            spent = time.perf_counter() - begun
            if not alone and done and (len(calls) - done) * spent / done > SHORT:
                break
            yield _numbered(run, done, calls[done])
            done += 1
        jobs = min(cpu_count(), len(calls) - done)
    if done < len(calls):
        yield from _in_parallel(run, range(done, len(calls)), calls, backend, jobs)


def _in_parallel(
    run: Callable[..., Any], numbers: range, calls: Sequence[Point], backend: Any, jobs: int | None
) -> Iterator[tuple[int, Outcome]]:
    streams = getattr(backend, "supports_return_generator", False)
    # Where results don't stream, as in Ray's backend, few are asked for at a time: what is finished is kept.
    part = len(numbers) if streams else 2 * max(1, backend.effective_n_jobs(jobs if jobs is not None else -1))
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if streams else "list", batch_size=1)
    parts = (
        parallel(delayed(_numbered)(run, number, calls[number]) for number in some)
        for some in (numbers[start : start + part] for start in range(0, len(numbers), part))
    )
    yield from itertools.chain.from_iterable(parts)


def _numbered(run: Callable[..., Any], number: int, call: Point) -> tuple[int, Outcome]:
    with listening(lambda fraction: None):  # the bar over the grid is enough
        return number, computed(run, call)
