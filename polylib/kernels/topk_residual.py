r"""The largest entries of a difference, block by block, with the state of error feedback updated; and their sum.

Source: Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
Feedback", arXiv 2106.05203; blocks in place of the whole vector make the message one of fixed size, found in one pass.

Shapes: gradient and state (N,), in blocks of B entries, L = ceil(N / B) of them, the last one shorter where N asks for
it; message: values (L, k) and indices (L, k), int32, counted from the beginning of the vector. With
$\delta = \nabla - g$ and $T_b$ the k entries of block b that are largest in magnitude, of equal ones the first,

$$\text{values}_{b\cdot} = \delta_{T_b},\qquad g_{T_b} \leftarrow g_{T_b} + \text{values}_{b\cdot};\qquad
  \text{and of R such messages:}\quad s \leftarrow s + \sum_{r=1}^R w_r \sum_{i\in T^r} \text{values}^r_i\,e_i.$$

Where a block has fewer than k entries the message is filled up with value 0 at index -1. Indices ascend in each block.
The values are rounded to the dtype of the message before they are added to the state, so that both sides add the same.
A NaN counts as larger than all else. Kernels: all tensors but the indices in float32, bfloat16 or float16, blocks of
64 to 4096 entries, arithmetic in float32. Reference: any floating dtype and size of block.

Eager PyTorch subtracts, takes magnitudes, selects, gathers and scatters, some 40 bytes an entry and more. Here a
program has the magnitudes of a block in registers, as integers, and bisects them bit by bit: at most 31 counts, which
cost no memory, until k are left above a threshold, or equal ones. What lies above it, and of what equals it as many as
are wanting, is written side by side. Gradient and state are read once, and once more where something is sent; of the
state only that is written. The counts, and not the memory, may be what takes the time.

A sum of messages touches what they name and nothing else. A program adds one block, one message after the other in the
order of the ranks, rounded to the dtype of the sum: the result is the same on every rank and in every run, without
atomics. An index outside of the block whose message it stands in adds nothing, as -1 does.

Nothing is saved and nothing is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    check_shape,
    check_tensors,
    choose_backend,
    load,
    narrow,
    on_device,
    store,
    tl,
    triton,
    wide,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definitions --------------------------------------------------------------------------------------------------


def topk_residual_reference(
    gradient: Tensor, state: Tensor, k: int, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the message and change state in plain PyTorch."""
    N = gradient.numel()
    difference = widened(gradient) - widened(state)
    padded = torch.nn.functional.pad(difference, (0, -N % block)).view(-1, block)
    place = torch.arange(padded.numel(), device=gradient.device).view(-1, block)
    size = padded.abs().masked_fill(place >= N, -1.0)
    chosen = size.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    indices = place.gather(1, chosen)
    exists = indices < N
    values = torch.where(exists, padded.gather(1, chosen), 0.0).to(dtype)
    at = indices[exists]
    state[at] = (widened(state[at]) + widened(values[exists])).to(state.dtype)
    return values, torch.where(exists, indices, -1).int()


def topk_decompress_reference(total: Tensor, values: Tensor, indices: Tensor, weights: Tensor, block: int) -> None:
    """Change total (N,) in plain PyTorch, one message after the other."""
    first = torch.arange(values.shape[1], device=total.device)[:, None] * block
    last = (first + block).clamp(max=total.numel())
    for value, index, weight in zip(values, indices, weights, strict=True):
        inside = (index >= first) & (index < last)
        at = index[inside]
        total[at] = (widened(total[at]) + weight * widened(value[inside])).to(total.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _sizes(gradient, state, at, ok):
    """The magnitudes of the difference as integers, which have the order of the numbers; all NaNs are equal."""
    difference = load(gradient + at, ok) - load(state + at, ok)
    return tl.where(difference == difference, tl.abs(difference).to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit(do_not_specialize=["N", "k"])
def _residual_kernel(gradient, state, values, indices, N, k, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    at = program * BLOCK + inner
    if (program + 1) * BLOCK <= N:
        size = _sizes(gradient, state, at, None)
    else:
        size = tl.where(at < N, _sizes(gradient, state, at, at < N), -1)
    # excerpt: begin
    kth, place, count = 0, 1 << 30, k + 1
    while (place > 0) & (count != k):  # until k entries are left, or equal ones that no bit tells apart
        above = tl.sum((size >= kth + place).to(tl.int32), axis=0)
        if above >= k:
            kth, count = kth + place, above
        place = place // 2
    above, equal = (size > kth).to(tl.int32), (size == kth).to(tl.int32)
    wanting = k - tl.sum(above, axis=0)
    both = tl.cumsum(above + equal * 65536, axis=0)  # two counts in one: no block has 65,536 entries
    chosen = (above > 0) | ((equal > 0) & (both // 65536 <= wanting))
    slot = both % 65536 + tl.minimum(both // 65536, wanting) - 1
    # Read once more, but only what is sent: to keep the block in registers would leave room for fewer warps.
    g = load(state + at, chosen)
    sent = narrow(load(gradient + at, chosen) - g, values.dtype.element_ty)
    store(state + at, g + wide(sent), chosen)
    # excerpt: end
    values += program * k
    indices += program * k
    tl.store(values + slot, sent, mask=chosen)
    tl.store(indices + slot, at.to(tl.int32), mask=chosen)
    if program * BLOCK + k > N:  # the last block has fewer entries than are sent
        empty = (inner >= N - program * BLOCK) & (inner < k)
        tl.store(values + inner, narrow(tl.zeros((BLOCK,), tl.float32), values.dtype.element_ty), mask=empty)
        tl.store(indices + inner, tl.full((BLOCK,), -1, tl.int32), mask=empty)


@triton.jit(do_not_specialize=["N", "ranks", "blocks", "k"])
def _decompress_kernel(total, values, indices, weights, N, ranks, blocks, k, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    start = program * BLOCK
    end = tl.minimum(start + BLOCK, N)
    for rank in range(ranks):
        weight = tl.load(weights + rank)
        message = (rank * blocks.to(tl.int64) + program) * k
        index = tl.load(indices + message + slot, mask=slot < k, other=-1)
        value = weight * load(values + message + slot, slot < k)
        inside = (index >= start) & (index < end)
        store(total + index, load(total + index, inside) + value, inside)
        tl.debug_barrier()  # the next message may name the same entry in another thread


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::topk_residual", mutates_args=("state",))
def _residual(gradient: Tensor, state: Tensor, k: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Change contiguous state (N,); gradient (N,) is contiguous."""
    N = gradient.numel()
    blocks = -(-N // block)
    values = gradient.new_empty(blocks, k, dtype=dtype)
    indices = gradient.new_empty(blocks, k, dtype=torch.int32)
    if blocks:
        with on_device(gradient):
            _residual_kernel[(blocks,)](
                gradient, state, values, indices, N, k, BLOCK=block, num_warps=max(block // 256, 1)
            )
    return values, indices


@_residual.register_fake
def _(gradient, state, k, block, dtype):
    blocks = -(-gradient.numel() // block)
    return gradient.new_empty(blocks, k, dtype=dtype), gradient.new_empty(blocks, k, dtype=torch.int32)


@torch.library.custom_op("polylib::topk_decompress", mutates_args=("total",))
def _decompress(total: Tensor, values: Tensor, indices: Tensor, weights: Tensor, block: int) -> None:
    """Change contiguous total (N,); the messages (R, L, k) and weights (R,) float32 are contiguous."""
    ranks, blocks, k = values.shape
    if ranks and blocks:
        slots = triton.next_power_of_2(k)
        with on_device(total):
            _decompress_kernel[(blocks,)](
                total, values, indices, weights, total.numel(), ranks, blocks, k, BLOCK=block, SLOTS=slots,
                num_warps=min(max(slots // 128, 1), 8), num_stages=1,
            )  # fmt: skip


@_decompress.register_fake
def _(total, values, indices, weights, block):
    return None


# --- the public functions ---------------------------------------------------------------------------------------------

_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # what the kernels have


@torch.no_grad()
def topk_residual_(
    gradient: Tensor,
    state: Tensor,
    k: int,
    block: int = 1024,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of `gradient - state` in each block, and add them to `state`, in place.

    Args:
        gradient: (N,), any strides.
        state: (N,), contiguous, what the receivers know of the gradient; changed.
        k: entries of a block that are sent, from 1 to `block`.
        block: entries of a block. The kernels have powers of two from 64 to 4096.
        dtype: of the values that are sent; that of gradient by default.
        backend: "auto" runs the Triton kernel for CUDA tensors of float32, bfloat16 or float16 and such a block, and
            the reference elsewhere; "triton" and "reference" insist.

    Returns:
        values: (L, k), L = ceil(N / block).
        indices: (L, k), int32, in the whole vector; -1, with value 0, where a block has fewer than k entries.

    Raises:
        ValueError: shapes or devices that don't fit, a state that is not contiguous, more than 2^31 - 1 entries, k or
            block outside its range, an unknown backend.
        TypeError: not a floating-point tensor or dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2106.05203.
    """
    for name, tensor in (("gradient", gradient), ("state", state)):
        _check_vector(name, tensor, gradient)
    check_shape("state", state, tuple(gradient.shape), "that of gradient")
    _check_contiguous("state", state)
    block = _checks.integer("block", block, least=1)
    k = _checks.integer("k", k, least=1, most=block)
    dtype = gradient.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point dtype, got {dtype!r}")
    if _backend(backend, block, gradient, state, gradient.new_empty(0, dtype=dtype)) == "triton":
        return _residual(gradient.contiguous(), state, k, block, dtype)
    return topk_residual_reference(gradient, state, k, block, dtype)


@torch.no_grad()
def topk_decompress_(
    total: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    block: int = 1024,
    *,
    backend: str = "auto",
) -> None:
    """Add the messages of R ranks to `total`, in place and in the order of the ranks.

    Args:
        total: (N,), contiguous; changed, and rounded to its dtype after each message.
        values, indices: (R, L, k), the messages of `topk_residual_` with the same block.
        weights: (R,), what the values of each rank are multiplied by; 1 / R by default, the mean.
        block, backend: as in `topk_residual_`.

    Raises:
        ValueError: shapes or devices that don't fit, a total that is not contiguous, a block outside its range, an
            unknown backend.
        TypeError: not floating-point tensors, or indices that are not int32.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    _check_vector("total", total, total)
    _check_contiguous("total", total)
    block = _checks.integer("block", block, least=1)
    check_tensors({"values": values})
    blocks = -(-total.numel() // block)
    fits = values.dim() == 3 and values.shape[1] == blocks and 1 <= values.shape[2] <= block
    _checks.shape("values", values, f"(R, {blocks}, k), k from 1 to {block}", fits)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int32:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a tensor of torch.int32, got {given}")
    check_shape("indices", indices, tuple(values.shape), "that of values")
    ranks = len(values)
    if weights is None:
        weights = torch.full((ranks,), 1 / max(ranks, 1), device=total.device, dtype=widened(total).dtype)
    check_tensors({"weights": weights})
    check_shape("weights", weights, (ranks,), "(R,)")
    for name, tensor in (("values", values), ("indices", indices), ("weights", weights)):
        if tensor.device != total.device:
            raise ValueError(f"{name} must be on the device of total, {total.device}, got {tensor.device}")
    if _backend(backend, block, total, values) == "triton":
        _decompress(total, values.contiguous(), indices.contiguous(), weights.float().contiguous(), block)
    else:
        topk_decompress_reference(total, values, indices, weights, block)


def _check_vector(name: str, tensor: Tensor, other: Tensor) -> None:
    check_tensors({name: tensor})
    _checks.shape(name, tensor, "(N,)", tensor.dim() == 1)
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of gradient, {other.device}, got {tensor.device}")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name} must have fewer than 2^31 entries, got {tensor.numel()}")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, since it is changed in place; got strides {tensor.stride()}")


def _backend(backend: str, block: int, *tensors: Tensor) -> str:
    """The backend that suits all tensors and the block."""
    chosen = {choose_backend(backend, tensor) for tensor in tensors}
    if backend == "triton" and block not in _BLOCKS:
        raise ValueError(f'block must be one of {_BLOCKS} for backend="triton", got {block}')
    return "triton" if chosen == {"triton"} and block in _BLOCKS else "reference"


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(N: int, k: int, block: int, dtype: torch.dtype, *, ranks: int = 0) -> Cost:
    """Return the least bytes and flops of a message, or, with `ranks`, of the sum of so many messages.

    All tensors are in `dtype`, and indices take 4 bytes. A message: gradient and state read, what was sent written with
    its indices and added to the state. A sum: the messages read, and what they name read and written, if no two name
    the same.
    """
    sent = N // block * k + min(N % block, k)
    if ranks:
        return Cost(ranks * (sent * (3 * dtype.itemsize + 4) + 4), 2 * ranks * sent)
    return Cost((2 * N + 2 * sent) * dtype.itemsize + 4 * sent, N)
