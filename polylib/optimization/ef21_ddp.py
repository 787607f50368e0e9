"""EF21 as a communication hook of DistributedDataParallel: compressed gradients between real processes.

    state = EF21State(model, TopK(0.01))
    model.register_comm_hook(state, ef21_hook)

Each rank sends the values and the indices of a fixed number of entries in place of its gradient. All ranks add what
all have sent in the same order, so that all hold the same estimate of the mean gradient. The estimates belong to the
training: they go into a checkpoint, of every rank its own. With `BlockTopK` the choice and the sum are one kernel each
on a GPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.topk_residual import topk_decompress_, topk_residual_
from polylib.optimization.compressors import BlockTopK, TopK, decode_


class EF21State:
    """What a rank keeps for `ef21_hook`: for each parameter its own g_i and the server's g, and the bytes it has sent.

    The estimates are kept by parameter, since DistributedDataParallel arranges its buckets anew after the first step.
    Scaled losses (`GradScaler`) do not fit: a gradient that is not finite stays in the estimates, and a change of the
    scale is a change of all gradients.

    Attributes:
        step: how many steps the hook has seen.
        bytes_sent: what this rank has contributed to the exchanges so far.
        bytes_dense: what it would have been with whole gradients.

    Args:
        model: the `DistributedDataParallel` module, or what it wraps, on the device that it trains on.
        compressor: chooses what is sent of each parameter's gradient.
        process_group: of the ranks; by default all of them.
        weight: w_i of this rank (EF21-W). All ranks give one, with the sum 1, or none does.
        warmup_steps: so many steps exchange whole gradients, from which the estimates then start. Without any, they
            start at zero.

    Raises:
        TypeError: a compressor that has nothing to send but the whole vector.
        ValueError: weights that are not positive with the sum 1 over the ranks, or given by some of them only.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: TopK | BlockTopK,
        process_group: dist.ProcessGroup | None = None,
        *,
        weight: float | None = None,
        warmup_steps: int = 0,
    ) -> None:
        if not isinstance(compressor, TopK | BlockTopK):
            raise TypeError(f"compressor must be a TopK or a BlockTopK, got {compressor!r}")
        self.warmup_steps = _checks.integer("warmup_steps", warmup_steps, least=0)
        if weight is not None:
            weight = _checks.number("weight", weight, above=0, most=1)
        self.compressor, self.group = compressor, process_group
        self.ranks, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        wrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.names = {parameter: name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        self.own: dict[str, Tensor] = {}
        self.server: dict[str, Tensor] = {}
        self.step = self.bytes_sent = self.bytes_dense = 0
        if not self.names:
            raise ValueError("model must have a parameter that is trained, got none")
        device = next(iter(self.names)).device
        # Every rank takes part in this exchange, whatever it was given, so that none waits for another forever.
        given = torch.tensor([torch.nan if weight is None else weight], dtype=torch.float64, device=device)
        self.weights = self._gather(given)[:, 0].tolist()
        if all(value != value for value in self.weights):
            self.weights = [1 / self.ranks] * self.ranks
        if not abs(sum(self.weights) - 1) < 1e-6:
            raise ValueError(f"weight must be given by all ranks, with the sum 1, or by none, got {self.weights}")
        self.shares = torch.tensor(self.weights, dtype=torch.float64, device=device)
        self.scale = 1 / (self.ranks * self.weights[self.rank])

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that a restart needs on this rank. Another rank's differs."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _COUNTED}
        for name in _ESTIMATES:
            kept[name] = {key: value.clone() for key, value in getattr(self, name).items()}
        return kept

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Go on from `state_dict` of the same rank.

        Raises:
            ValueError: it is that of another rank, number of ranks or set of weights, or of another model.
        """
        for name in _FIXED:
            if kept[name] != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(self, name)!r} as in this process, got {kept[name]!r}")
        known = {name: parameter for parameter, name in self.names.items()}
        sizes = {name: parameter.numel() for name, parameter in known.items()}
        for name in _ESTIMATES:
            found = {key: value.numel() for key, value in kept[name].items()}
            if found not in ({}, sizes):  # there are none before the first step
                raise ValueError(f"{name} must hold the model's parameters with sizes {sizes}, got {found}")
        for name in _ESTIMATES:
            setattr(self, name, {key: value.to(known[key]).clone() for key, value in kept[name].items()})
        self.step, self.bytes_sent, self.bytes_dense = (kept[name] for name in _COUNTED[:3])

    def _gather(self, sent: Tensor) -> Tensor:
        """What all ranks send, `(ranks, ...)`."""
        everything = sent.new_empty(self.ranks, *sent.shape)
        dist.all_gather(list(everything), sent, group=self.group)
        return everything


_FIXED = ("rank", "ranks", "weights")
_COUNTED = ("step", "bytes_sent", "bytes_dense", *_FIXED)
_ESTIMATES = ("own", "server")


def ef21_hook(state: EF21State, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replace the gradients of a bucket by the server's estimate g, which is the same on all ranks.

    A bucket holds the gradients of this rank alone: the averaging is the hook's.
    """
    names = [state.names[parameter] for parameter in bucket.parameters()]
    gradients = [gradient.detach().flatten() for gradient in bucket.gradients()]
    for name, gradient in zip(names, gradients, strict=True):
        if name not in state.own:
            state.own[name], state.server[name] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state.bytes_dense += sum(gradient.nbytes for gradient in gradients)
    if state.step < state.warmup_steps:
        _exchange_all(state, names, gradients)
    else:
        _exchange_chosen(state, names, gradients)
    for name, gradient in zip(names, bucket.gradients(), strict=True):
        gradient.copy_(state.server[name].view_as(gradient))
    state.step += bucket.is_last()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _exchange_all(state: EF21State, names: list[str], gradients: list[Tensor]) -> None:
    """Whole gradients: g is their mean, and every g_i is exact."""
    total = torch.cat(gradients)
    state.bytes_sent += total.nbytes
    dist.all_reduce(total, group=state.group)
    means = (total / state.ranks).split([gradient.numel() for gradient in gradients])
    for name, gradient, mean in zip(names, gradients, means, strict=True):
        state.own[name].copy_(gradient * state.scale)
        state.server[name].copy_(mean)


def _exchange_chosen(state: EF21State, names: list[str], gradients: list[Tensor]) -> None:
    """The chosen entries of all parameters in two exchanges, one of values and one of indices."""
    sent = [_choose(state, name, gradient * state.scale) for name, gradient in zip(names, gradients, strict=True)]
    values, indices = (torch.cat(part) for part in zip(*sent, strict=True))
    state.bytes_sent += values.nbytes + indices.nbytes
    sizes = [len(part) for part, _ in sent]
    all_values, all_indices = state._gather(values).split(sizes, 1), state._gather(indices).split(sizes, 1)
    for name, from_ranks, at in zip(names, all_values, all_indices, strict=True):
        _add_up(state, name, from_ranks, at)


def _choose(state: EF21State, name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What is sent of a parameter's gradient, values and indices `(k,)`; it is added to this rank's estimate."""
    compressor, own = state.compressor, state.own[name]
    if isinstance(compressor, BlockTopK):
        values, indices = topk_residual_(gradient, own, compressor.k, compressor.block)
        return values.flatten(), indices.flatten()
    values, indices = compressor.encode(gradient - own)
    decode_(own, values, indices)
    return values, indices


def _add_up(state: EF21State, name: str, values: Tensor, indices: Tensor) -> None:
    """Add what all ranks have sent, `(ranks, k)`, to the server's estimate, in the order of the ranks."""
    compressor, server = state.compressor, state.server[name]
    if isinstance(compressor, BlockTopK):
        message = (state.ranks, -1, compressor.k)
        values, indices = values.reshape(message), indices.reshape(message)
        topk_decompress_(server, values, indices, state.shares, compressor.block)
        return
    for weight, value, index in zip(state.weights, values, indices, strict=True):
        decode_(server, weight * value, index)
