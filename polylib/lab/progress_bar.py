"""Progress that shows itself where the reader looks, and work that stops when nobody waits for it any more."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[float], None]

_listener: ContextVar[Listener | None] = ContextVar("polylib_progress_listener", default=None)


class Superseded(Exception):
    """The reader asked for something newer, so the result of this run is no longer wanted."""


def is_live() -> bool:
    """Whether a person sits at the front end of this kernel.

    A Jupyter front end says with every execution request whether it can ask its user for input. JupyterLab, VS Code and
    Colab can; nbclient, which executes notebooks in batch, can't.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin", False))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within this context `progress` calls `listener(fraction)` instead of drawing a bar.

    The listener may raise `Superseded` to stop the work.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def progress(items: Iterable[Item], label: str = "", total: int | None = None) -> Iterator[Item]:
    """Iterate over `items`, with a progress bar if that takes more than two seconds.

    Under a live `Sweep` the bar is the sweep's own, and the iteration raises `Superseded` when the reader has moved on.
    In batch execution, and where standard error is not a terminal, nothing is drawn.
    """
    listener = _listener.get()
    if total is None and isinstance(items, Sized):
        total = len(items)
    if listener is not None:
        shown = 0.0
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - shown > 0.05:  # 20 messages a second are enough for an eye
                listener(done / total if total else 0.0)
                shown = now
            yield item
        listener(1.0)
        return
    if is_live():
        from tqdm.notebook import tqdm

        yield from tqdm(items, desc=label, total=total, delay=2.0, leave=False)
    else:
        try:
            from tqdm import tqdm
        except ImportError:
            yield from items
        else:
            yield from tqdm(items, desc=label, total=total, delay=2.0, leave=False, disable=None)
