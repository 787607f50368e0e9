"""A function of a module, for K modules of one architecture at once: their tensors are stacked along a first axis."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

Shared = bool | Sequence[bool]


class StackedCall(nn.Module):
    """Calls functions of a model and a batch, mapped over stacked parameters and buffers.

    Args:
        model: the architecture, which is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)  # not on "meta", which would part the weights that two layers share
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tied = len(every) > len({id(tensor) for _, tensor in every})

    def forward(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> tuple[Any, dict[str, Tensor]]:
        result = function(self.model, batch)
        return result, dict(self.model.named_buffers())  # a forward may have put new ones in place

    def map(
        self, function: Callable[[nn.Module, Any], Any], tensors: dict[str, Tensor], batch: Any, shared: Shared
    ) -> tuple[Any, dict[str, Tensor]]:
        """The function of every network.

        Args:
            tensors: parameters and buffers by name, each `(K, ...)`.
            batch: tensors in tuples, lists and dicts, `(K, ...)` where not shared.
            shared: whether all networks get the batch as it is; or that for each entry of a tuple.

        Returns:
            What the function returns, each tensor `(K, ...)`, and the buffers as it left them.

        Raises:
            ValueError: a tensor of the batch without a row for each network.
        """
        networks = len(next(iter(tensors.values())))
        if isinstance(shared, bool):
            _check_rows(networks, None if shared else batch)
            places: int | tuple[int | None, ...] | None = None if shared or batch is None else 0
        else:
            if not isinstance(batch, tuple) or len(batch) != len(shared):
                raise ValueError(f"shared must be one value, or one for each entry of a tuple, got {shared}")
            for own, alike in zip(batch, shared, strict=True):
                _check_rows(networks, None if alike else own)
            places = tuple(None if alike else 0 for alike in shared)

        def one(state: dict[str, Tensor], batch: Any) -> tuple[Any, dict[str, Tensor]]:
            return functional_call(self, state, (function, batch), tie_weights=self.tied)

        state = {f"model.{name}": value for name, value in tensors.items()}
        result, after = vmap(one, (0, places), randomness="different")(state, batch)
        result = tree_map(
            lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, result
        )  # of no part of the stack
        return result, {name: value.detach().contiguous() for name, value in after.items()}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """In this context the models are in evaluation mode; after it each of their parts is in the mode it was in."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def each_tensor(function: Callable[[Any], Any], batch: Any) -> Any:
    """A function of every leaf of tuples, lists and dicts; None stays."""
    if isinstance(batch, dict):
        return {key: each_tensor(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(each_tensor(function, value) for value in batch)
    return None if batch is None else function(batch)


def _check_rows(networks: int, batch: Any) -> None:
    def check(leaf: Any) -> None:
        if not torch.is_tensor(leaf) or leaf.dim() == 0 or len(leaf) != networks:
            raise ValueError(
                f"batch must hold tensors with a row for each of the {networks} networks, or be shared=True, "
                f"got {shape_of(leaf)}"
            )

    each_tensor(check, batch)


def shape_of(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
