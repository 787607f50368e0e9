"""The saved tensors of one layer, as rows of tokens: which go to the host, and how all of them come back.

For `TokenwiseOffload`. Autograd hands over what it saves by hooks. An operation may save a tensor that has no name yet,
such as the output of the attention, so each is put into a box, and what becomes of it is decided once the layer has
run. A storage is kept once, however many of its views are saved.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Box:
    """In autograd's place of one saved tensor: which storage it is a view of, and how."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor  # until the layer has run: an operation may save what has no name yet
        self.key = 0
        self.view = tensor.shape, tensor.stride(), tensor.storage_offset()


class _Storage:
    """A storage that the layer saved: of which piece, the how-manieth there, and what is on the host of it."""

    def __init__(self, tensor: Tensor, piece: str, number: int) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.piece, self.number, self.rows = piece, number, 0
        self.host: Tensor | None = None
        self.shape: tuple[int, int, int] | None = None


class KeptRows:
    """All that one forward pass of a layer keeps, and how it comes back.

    Args:
        layer: a `TokenwiseLayer`.
        x: its input, `(batch, tokens, width)`, alone in its storage.
        rows: the number of tokens that are swapped whole.
        host: the device that receives them.
        pin: use page-locked memory, if the layer is on a GPU.
    """

    def __init__(self, layer: Any, x: Tensor, rows: int, host: torch.device, pin: bool) -> None:
        self.layer, self.rows = layer, rows
        self.batch, self.tokens = x.shape[:2]
        self.device, self.host, self.pin = x.device, host, pin and x.is_cuda
        weights = (*layer.parameters(), *layer.buffers())
        self.weights = {_key(tensor) for tensor in weights}
        self.versions = [(tensor, tensor._version) for tensor in weights]
        self.storages: dict[int, _Storage] = {}
        self.boxes: list[_Box] = []
        self.counts = dict.fromkeys(("before", "attend", "after"), 0)
        self.missing = 0  # boxes that the backward pass has still to open
        self.whole: dict[int, Tensor] = {}
        self.autocast = x.device.type, torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type)
        self.host_bytes = self.device_bytes = 0
        self.x = self.add(x, "x", 0)
        self.needs_grad = {"x": x.requires_grad}

    def saving(self, piece: str) -> AbstractContextManager[Any]:
        """Catch what autograd saves while one piece of the layer runs."""

        def pack(tensor: Tensor) -> Any:
            if _key(tensor) in self.weights:
                return tensor, tensor._version
            box = _Box(tensor)
            box.key = self.add(tensor, piece, self.counts[piece])
            self.counts[piece] += 1
            self.boxes.append(box)
            return box

        return saved_tensors_hooks(pack, self.open)

    def add(self, tensor: Tensor, piece: str, number: int) -> int:
        key = _key(tensor)
        if key not in self.storages:
            self.storages[key] = _Storage(tensor, piece, number)
        return key

    def send(self, attended: Tensor) -> None:
        """The layer has run: copy to the host what is wanted there, and let go of the rest."""
        self.attended, used = _key(attended), {box.key for box in self.boxes}
        self.needs_grad["attended"] = attended.requires_grad
        for key, own in self.storages.items():
            assert own.tensor is not None
            whole = key in (self.x, self.attended)
            own.shape = self._rows_of(own.tensor) if own.piece != "attend" or whole else None
            if own.shape is not None and (whole or key in used):
                own.rows = self.tokens if whole else self.rows
                rows = own.tensor.as_strided(own.shape, _strides(own.shape), 0)
                own.host = self._on_host(rows[:, : own.rows])
                self.host_bytes += own.host.nbytes
            if own.shape is not None or key not in used:
                own.tensor = None
            else:
                self.device_bytes += own.tensor.untyped_storage().nbytes()
        for box in self.boxes:
            box.tensor = None

    def _rows_of(self, tensor: Tensor) -> tuple[int, int, int] | None:
        """The storage of a tensor as (batch, tokens, rest), or None if it is none of rows of tokens."""
        places = self.batch * self.tokens
        rest, more = divmod(tensor.untyped_storage().nbytes() // tensor.element_size(), places)
        if not rest or more:
            return None
        sizes, steps = tensor.shape, tensor.stride()
        if sizes[:1] == (places,) and (places == 1 or steps[0] == rest):
            return self.batch, self.tokens, rest
        for axis in range(1, tensor.dim()):  # such as 1, or 2 behind the heads
            known = sizes[0] == self.batch and sizes[axis] == self.tokens
            along = self.tokens == 1 or steps[axis] == rest
            if known and along and (self.batch == 1 or steps[0] == self.tokens * rest):
                return self.batch, self.tokens, rest
        return None

    def _on_host(self, rows: Tensor) -> Tensor:
        if self.host.type == "cpu" and not self.pin and rows.numel():  # memory of numpy: another pool than torch's
            host = torch.from_numpy(np.empty(rows.nbytes, np.uint8)).view(rows.dtype).view(rows.shape)
        else:
            host = torch.empty(rows.shape, dtype=rows.dtype, device=self.host, pin_memory=self.pin)
        return host.copy_(rows, non_blocking=self.pin)

    def open(self, box: Any) -> Tensor:
        """The saved tensor, as autograd asks for it."""
        if isinstance(box, tuple):
            _unchanged(*box)
            return box[0]
        if box.tensor is not None:  # a backward pass inside the layer
            return box.tensor
        own = self.storages[box.key]
        if not self.missing:
            self.missing = len(self.boxes)
        if own.shape is not None and not self.whole:
            self._bring_back()
        source = own.tensor if own.shape is None else self.whole[box.key]
        assert source is not None
        self.missing -= 1
        if not self.missing:
            self.whole = {}  # the last one has been opened
        return source.as_strided(*box.view)

    def _bring_back(self) -> None:
        for key, own in self.storages.items():
            if own.host is not None and own.shape is not None:
                whole = torch.empty(own.shape, dtype=own.host.dtype, device=self.device)
                whole[:, : own.rows].copy_(own.host, non_blocking=self.pin)
                self.whole[key] = whole
        if self.rows < self.tokens:
            for weight, version in self.versions:
                _unchanged(weight, version)
            self._recompute()

    @torch.enable_grad()
    def _recompute(self) -> None:
        """The rows of the other tokens, piece by piece, from the layer's input and the output of its attention."""
        x, attended = (
            self.whole[key][:, self.rows :].clone(memory_format=torch.contiguous_format).requires_grad_(needed)
            for key, needed in zip((self.x, self.attended), self.needs_grad.values(), strict=True)
        )
        kind, dtype, enabled = self.autocast
        wanted = self.whole.keys() - {self.x, self.attended}
        places = {(own.piece, own.number): key for key, own in self.storages.items() if key in wanted}
        with torch.autocast(kind, dtype, enabled):
            with saved_tensors_hooks(self._fill("before", places), _never):
                inputs = self.layer.before(x)
            for number, tensor in enumerate(inputs):
                self._rows(places, "inputs", number, tensor)
            del inputs
            with suppress(_Enough), saved_tensors_hooks(self._fill("after", places), _never):
                self.layer.after(x, attended)

    def _fill(self, piece: str, places: dict[tuple[str, int], int]) -> Callable[[Tensor], None]:
        """A hook that takes the missing rows as they are computed. It stops the layer when no more is needed."""
        numbers = itertools.count()

        def pack(tensor: Tensor) -> None:
            if _key(tensor) not in self.weights:
                number = next(numbers)
                self._rows(places, piece, number, tensor)
                if piece == "after" and number + 1 == self.counts[piece]:
                    raise _Enough

        return pack

    def _rows(self, places: dict[tuple[str, int], int], piece: str, number: int, tensor: Tensor) -> None:
        if (piece, number) in places:
            missing = self.whole[places[piece, number]][:, self.rows :]
            if tensor.untyped_storage().nbytes() != missing.nbytes:
                raise RuntimeError(f"layer must treat every token alone, got {tuple(tensor.shape)} for {missing.shape}")
            shape = tuple(missing.shape)
            missing.copy_(tensor.detach().as_strided(shape, _strides(shape), 0))


class _Enough(Exception):
    """All that is wanted has been computed."""


def _never(_: Any) -> Any:
    raise AssertionError("no gradient is taken through what is recomputed")


def _unchanged(weight: Tensor, version: int) -> None:
    """Raise if a weight was changed in place: torch itself looks only at what no hook has kept."""
    if weight._version != version:
        shape = tuple(weight.shape)
        raise RuntimeError(f"weights of layer must not change between forward and backward, got a changed one, {shape}")


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _strides(shape: Sequence[int]) -> tuple[int, int, int]:
    return shape[1] * shape[2], shape[2], 1


def alone(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and with nothing else in its storage."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
