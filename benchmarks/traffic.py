"""Count the bytes that an op's kernels move, and those of the same formula in eager PyTorch.

`python -m benchmarks.traffic [op ...]` prints JSON: for each op, case and dtype the bytes an element that kernels ask
for (`requested`), those of distinct addresses in each kernel (`distinct`: what is read again comes from a cache at
best), the least that the op's `cost` allows, and what the operations of PyTorch read and write one after the other.

The kernels run in Triton's interpreter at small sizes, and every load and store is counted entry by entry.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


class Kernels:
    """While this is open, the loads and stores of kernels are counted."""

    def __enter__(self) -> Kernels:
        self.requested = self.distinct = 0
        self.seen: dict[str, list[np.ndarray]] = {}
        self.original = (Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__)
        load, store, execute = self.original

        def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.note("load", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note("store", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        def executed(executor: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(executor, *args, **kwargs)
            self.distinct += sum(len(np.unique(np.concatenate(parts))) for parts in self.seen.values())
            self.seen.clear()
            return result

        Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
        interpreter.GridExecutor.__call__ = executed
        return self

    def __exit__(self, *_error: object) -> None:
        Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__ = self.original

    def note(self, way: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at, ok = np.broadcast_arrays(pointers.data, mask.data)
        first = at[ok.astype(bool)].astype(np.int64).ravel()  # the interpreter has masks of zeros and ones, too
        self.requested += size * len(first)
        # Half-open bytes, one number each, so that accesses of different sizes can be compared.
        self.seen.setdefault(way, []).append(np.unique((first[:, None] + np.arange(size)).ravel()))


VIEWS = ("view", "detach", "expand", "permute", "transpose", "t.", "unsqueeze", "squeeze", "slice", "select")
ALSO = ("as_strided", "unbind", "split", "alias", "_unsafe_view", "empty")


class Operations(TorchDispatchMode):
    """While this is open, the bytes that PyTorch's operations read and write are counted; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2]
        if not any(name.startswith(view) for view in VIEWS + ALSO):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes for t in tensors)
        return out


def count_eager(work: Callable[[], object]) -> int:
    with Operations() as operations:
        work()
    return operations.bytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic")
    parser.add_argument("ops", nargs="+")
    args = parser.parse_args(arguments)
    records = []
    for op in args.ops:
        for launch in importlib.import_module(f"benchmarks.ops.{op}").launches(small=True):
            with torch.no_grad(), Kernels() as kernels:
                launch.run()
            eager = count_eager(launch.eager())
            records.append(
                {
                    "op": op,
                    "case": launch.label,
                    "dtype": str(launch.dtype).removeprefix("torch."),
                    "requested": kernels.requested / launch.elements,
                    "distinct": kernels.distinct / launch.elements,
                    "least": launch.least.bytes / launch.elements,
                    "eager": eager / launch.elements,
                }
            )
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
