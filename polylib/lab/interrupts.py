"""Work on other threads that ends when the reader interrupts the kernel.

Python raises KeyboardInterrupt on its main thread only, and a kernel that executes no cell ignores the signal.
"""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_threads: set[int] = set()
_guard = threading.Lock()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this context `stop_all` raises KeyboardInterrupt on this thread."""
    thread = threading.get_ident()
    with _guard:
        _threads.add(thread)
    try:
        yield
    finally:
        with _guard:
            _threads.discard(thread)
            _raise(thread, None)  # one that came too late


def stop_all() -> None:
    """Raise KeyboardInterrupt in all work that is `stoppable`, as soon as it executes Python code again."""
    with _guard:
        for thread in _threads:
            _raise(thread, KeyboardInterrupt)


def stop_all_when_interrupted(kernel: Any) -> None:
    """From now on interrupting an idle kernel calls `stop_all`. For its main thread."""
    if threading.current_thread() is threading.main_thread():
        # Not here: while a kernel handles a message, it has another handler, and puts the former one back.
        kernel.io_loop.add_callback(signal.signal, signal.SIGINT, lambda *_: stop_all())


def _raise(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
