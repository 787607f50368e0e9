"""Record which tensors live when: the requests that a memory plan is made for, and the real peak.

Every operation of torch that runs inside passes by; a tensor counts from the operation that makes its storage to the
moment when nothing holds that storage any more. Scratch space inside an operation is not seen.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polylib import _checks
from polylib.sequences.memory_requests import Requests


def record_allocations(function: Callable[[], Any]) -> tuple[Any, Requests]:
    """Call a function, and return its result and what was allocated meanwhile; time counts the allocations before.

    What lives on when the function has returned ends at n, the number of all requests. Storages that an operation only
    reads or writes, and did not make, do not count: neither weights, nor memory that numpy owns.
    """
    recorder = _Recorder()
    with recorder:
        result = _checks.function("function", function)()
    count = len(recorder.sizes)
    ends = [count if end is None else end for end in recorder.ends]
    columns = (torch.tensor(column, dtype=torch.int64) for column in (recorder.sizes, range(count), ends))
    return result, Requests(*columns)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.ends: list[int | None] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = _storage(leaf)
                if storage._cdata not in before | self.known:
                    self._begin(storage)
        return result

    def _begin(self, storage: torch.UntypedStorage) -> None:
        key, number = storage._cdata, len(self.sizes)
        self.known.add(key)
        self.sizes.append(storage.nbytes())
        self.ends.append(None)

        def end() -> None:
            self.known.discard(key)
            self.ends[number] = len(self.sizes)

        weakref.finalize(storage, end).atexit = False


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
