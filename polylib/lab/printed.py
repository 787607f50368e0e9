"""What a piece of work prints, kept apart from what other threads print meanwhile."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LIMIT = 20_000  # characters; of a longer text the end is kept

Piece = tuple[str, str]  # "stdout" or "stderr", and a text


class Printed:
    """The texts that were printed, in their order."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._length = 0

    def add(self, stream: str, text: str) -> None:
        if self._pieces and self._pieces[-1][0] == stream:
            text = self._pieces.pop()[1] + text
        if len(text) > 2 * LIMIT:
            text = text[-LIMIT:]
        self._pieces.append((stream, text))

    def pieces(self) -> list[Piece]:
        """The last texts, as many characters as the limit allows."""
        left, found = LIMIT, []
        for stream, text in reversed(self._pieces.copy()):
            if left > 0 and text:
                found.append((stream, text if len(text) <= left else f"[...]\n{text[-left:]}"))
                left -= len(text)
        return found[::-1]


class _Stream:
    """Stands for `sys.stdout` or `sys.stderr`, and hands on what threads print that nobody listens to."""

    def __init__(self, name: str, plain: Any) -> None:
        self._name, self._plain = name, plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def write(self, text: str) -> int:
        printed = _by_thread.get(threading.get_ident())
        if printed is None:
            return self._plain.write(text)
        printed.add(self._name, str(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


_by_thread: dict[int, Printed] = {}
_guard = threading.Lock()


@contextmanager
def captured() -> Iterator[Printed]:
    """Within this context what this thread prints, warnings too, goes to the object that it gives."""
    printed, thread = Printed(), threading.get_ident()
    with _guard:
        before = _by_thread.get(thread)
        _by_thread[thread] = printed
        for name in ("stdout", "stderr"):
            if not isinstance(getattr(sys, name), _Stream):
                setattr(sys, name, _Stream(name, getattr(sys, name)))
    try:
        yield printed
    finally:
        with _guard:
            if before is None:
                del _by_thread[thread]
            else:
                _by_thread[thread] = before
            for name in () if _by_thread else ("stdout", "stderr"):
                if isinstance(stream := getattr(sys, name), _Stream):
                    setattr(sys, name, stream._plain)


@contextmanager
def warning_anew() -> Iterator[None]:
    """Within this context each warning is told again, also one that was told before, and where this thread is
    `captured` it is printed. For one thread at a time, since Python has one list of warnings for all."""
    with warnings.catch_warnings():
        if threading.get_ident() in _by_thread:
            warnings.showwarning = _print
        yield


def _print(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))
