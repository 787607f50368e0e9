"""The runs of a grid: in this process while they are few and short, else in parallel."""

import itertools
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from joblib import Parallel, cpu_count, delayed, wrap_non_picklable_objects
from joblib.parallel import get_active_backend

from polylib.lab.fingerprint import Fingerprint, fingerprint
from polylib.lab.progress_bar import listening, progress
from polylib.lab.results import Outcome, Point, computed
from polylib.lab.surroundings import held, settings

SHORT = 4.0  # seconds: about what it takes until other processes have imported torch


class Done(NamedTuple):
    """A run that is done: the number of its call, its outcome, and the function as it was before and after."""

    number: int
    outcome: Outcome
    before: Fingerprint
    after: Fingerprint


class _Returned(NamedTuple):
    """What another process returns. Without an outcome the function could not be had there, or was not the same."""

    number: int
    outcome: Outcome | None
    after: Fingerprint | None
    told: list[tuple[str, type[Warning], str, int]]


def run_all(run: Callable[..., Any], calls: Sequence[Point], code: Fingerprint) -> Iterator[Done]:
    """`run(**call)` for each call, in the order in which they finish.

    Where `joblib.parallel_config` names nothing, the first runs happen here and are timed; the rest follows them if it
    would be over before other processes have started, and goes to as many processes as there are cores otherwise.
    What can't be read for certain, can't be sent, or is not the same there, as a module of the reader that has changed
    since that process imported it, runs here. So it does where joblib would use threads, which share random state.

    Args:
        code: the fingerprint of `run`.
    """
    return iter(progress(_all(run, calls, code), "sweep", total=len(calls)))


def _all(run: Callable[..., Any], calls: Sequence[Point], code: Fingerprint) -> Iterator[Done]:
    backend, jobs = get_active_backend()
    usual = type(backend).__name__ in ("LokyBackend", "SequentialBackend") and jobs in (None, 1)
    alone = getattr(backend, "uses_threads", False) or (usual and (jobs == 1 or cpu_count() == 1))
    alone = alone or not calls or code.unread is not None or not _packed(run, calls[0])
    done, before, begun = 0, code, time.perf_counter()
    while done < len(calls) and (usual or alone):
        spent = time.perf_counter() - begun
        if not alone and done and (len(calls) - done) * spent / done > SHORT:
            break
        finished = _here(run, done, calls[done], before)
        before = finished.after
        yield finished
        done += 1
    if done < len(calls):
        jobs = min(cpu_count(), len(calls) - done) if usual else jobs
        yield from _elsewhere(run, range(done, len(calls)), calls, before, backend, jobs)


def _packed(run: Callable[..., Any], call: Point) -> bytes:
    """A run for another process; empty for what can't be sent."""
    try:
        return pickle.dumps(wrap_non_picklable_objects((run, call), keep_wrapper=False))
    except Exception:  # whatever objects raise that can't be pickled
        return b""


def _here(run: Callable[..., Any], number: int, call: Point, before: Fingerprint) -> Done:
    with listening(lambda fraction: None):  # the bar over the grid is enough
        outcome = computed(run, call)
    return Done(number, outcome, before, fingerprint(run))


def _elsewhere(
    run: Callable[..., Any], numbers: range, calls: Sequence[Point], code: Fingerprint, backend: Any, jobs: int | None
) -> Iterator[Done]:
    streams = getattr(backend, "supports_return_generator", False)
    # Where results don't stream, as in Ray's backend, few are asked for at a time: what is finished is kept.
    part = len(numbers) if streams else 2 * max(1, backend.effective_n_jobs(jobs if jobs is not None else -1))
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if streams else "list", batch_size=1)
    of_notebook = settings()
    parts = (
        parallel(delayed(_there)(number, _packed(run, calls[number]), code.code, of_notebook) for number in some)
        for some in (numbers[start : start + part] for start in range(0, len(numbers), part))
    )
    known: dict[Any, Any] = {}
    for number, outcome, after, told in itertools.chain.from_iterable(parts):
        for text, category, file, line in told:
            warnings.warn_explicit(text, category, file, line, registry=known)
        if outcome is None or after is None:
            yield _here(run, number, calls[number], code)
        else:
            yield Done(number, outcome, code, after)


def _there(number: int, sent: bytes, code: str, of_notebook: dict[str, Any]) -> _Returned:
    """A run in another process, if the function is the same there, in the same settings."""
    with held(of_notebook), listening(lambda fraction: None), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run, call = pickle.loads(sent)
        except Exception:  # of what only the process of the notebook has
            return _Returned(number, None, None, [])
        if fingerprint(run).code != code:
            return _Returned(number, None, None, [])
        outcome = computed(run, call)
        each = dict.fromkeys((str(one.message), one.category, one.filename, one.lineno) for one in told)
        return _Returned(number, outcome, fingerprint(run), list(each))
