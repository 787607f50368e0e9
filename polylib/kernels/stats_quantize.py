r"""StatsQ: quantise each row with a step computed from its mean magnitude, $y = s\,(k + \frac12)/n$.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.

Shapes: w and y (..., I); every row of length I has its own scale. With b bits and $n = 2^{b-1}$,

$$s = \frac2I \sum_c |w_c|, \qquad k = \mathrm{clamp}(\mathrm{round}(n\,w/s - \tfrac12),\, -n,\, n - 1).$$

There are $2^b$ levels at half-integers and none at zero; they lie $s/n$ apart. One bit gives $\pm s/2$, the sign of w
times its mean magnitude. Rounding is half to even. The paper clamps w/s to $[-1, 1 - 10^{-6}]$ instead of the code k,
which is the same, except that for one bit -1 would round to -2, and that $1 - 10^{-6}$ is 1 in half precision. A row of
zeros gives zeros.
Kernels: float32, bfloat16 or float16, arithmetic in float32. Reference: any floating dtype, half precisions computed in
float32.

The gradient of w is that of y, for every entry, and nothing flows through s: backward has no kernel and saves nothing.

Forward reads w once and writes y once: a row waits in registers while its sum is taken. PyTorch's operations one after
the other pass over memory 25 times. A row of more than 16,384 entries would not fit; then one kernel sums blocks, each
sum is added up in a fixed order, and a second kernel quantises: three passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    check_tensors,
    choose_backend,
    load,
    on_device,
    round_half_even,
    store,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost
from polylib.kernels.fake_quantize import code_range

# --- the definition ---------------------------------------------------------------------------------------------------


def stats_codes(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes k (..., I), whole numbers from -2**(b-1) to 2**(b-1) - 1, and the scale s (..., 1).

    Both are detached, floating, and in at least float32. The levels are s * (k + 0.5) / 2**(b-1).
    """
    code_range(bits)
    wide, n = widened(w).detach(), 2 ** (bits - 1)
    scale = 2 * wide.abs().mean(-1, keepdim=True)
    v = wide / torch.where(scale == 0, torch.inf, scale)
    return (n * v - 0.5).round().clamp(-n, n - 1), scale


def stats_quantize_reference(w: Tensor, bits: int) -> Tensor:
    """Return each row of w (..., I) on its levels in plain PyTorch, in the dtype of w; the gradient passes unchanged.

    Any floating dtype and device; works under `torch.func`. PyTorch itself checks the arguments.

    On a CPU it moves 100 bytes an entry of float32. One loop would move 8 while a row stays in the
    cache; `torch.compile` fuses most of the steps.
    """
    codes, scale = stats_codes(w, bits)
    wide = widened(w)
    return (scale * ((codes + 0.5) / 2 ** (bits - 1)) + (wide - wide.detach())).to(w.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 2048  # entries of a tile: sixteen a thread with four warps
_WIDEST = 16384  # of the rows that are held in registers: thirty-two a thread with sixteen warps


@triton.jit
def _level(wide, s, n):
    """The level of each entry: the scale s of its row has the shape (ROWS, 1)."""
    v = tl.div_rn(wide, tl.broadcast_to(tl.where(s == 0, float("inf"), s), wide.shape))
    u = n * v - 0.5
    code = round_half_even(tl.where(u < -n, -n, tl.where(u > n - 1, n - 1, u)))  # keeps what is not a number
    return s * ((code + 0.5) / n)


@triton.jit(do_not_specialize=["rows", "n"])
def _row_kernel(w, y, rows, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # excerpt: begin
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at, ok = row * WIDTH + column, (row < rows) & (column < WIDTH)
    wide = load(w + at, ok)
    s = 2 * (tl.sum(tl.abs(wide), axis=1) / WIDTH)[:, None]
    store(y + at, _level(wide, s, n), ok)
    # excerpt: end


@triton.jit
def _block_of_row(WIDTH, BLOCK: tl.constexpr):
    """This program's row, and the columns of its block of that row."""
    blocks = tl.cdiv(WIDTH, BLOCK)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _sum_kernel(w, sums, WIDTH, BLOCK: tl.constexpr):
    row, column = _block_of_row(WIDTH, BLOCK)
    wide = load(w + row * WIDTH + column, column < WIDTH)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), tl.sum(tl.abs(wide), axis=1))


@triton.jit(do_not_specialize=["n"])
def _level_kernel(w, scale, y, WIDTH, n, BLOCK: tl.constexpr):
    row, column = _block_of_row(WIDTH, BLOCK)
    at, ok = row * WIDTH + column, column < WIDTH
    wide = load(w + at, ok)
    s = tl.load(scale + row + tl.arange(0, 1))[:, None]
    store(y + at, _level(wide, s, n), ok)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::stats_quantize", mutates_args=())
def _forward(w: Tensor, bits: int) -> Tensor:
    """Return y, contiguous; w is (rows, I) with any strides."""
    w = w.contiguous()
    y, n = torch.empty_like(w), float(2 ** (bits - 1))
    rows, width = w.shape
    if rows == 0:
        return y
    with on_device(w):
        if width <= _WIDEST:
            columns = triton.next_power_of_2(width)
            height = max(1, _BLOCK // columns)
            warps = max(4, min(16, columns // 512))
            _row_kernel[(triton.cdiv(rows, height),)](
                w, y, rows, n, WIDTH=width, ROWS=height, COLUMNS=columns, num_warps=warps
            )
        else:
            blocks = triton.cdiv(width, _BLOCK)
            sums = w.new_empty(rows, blocks, dtype=torch.float32)
            _sum_kernel[(rows * blocks,)](w, sums, width, BLOCK=_BLOCK)
            _level_kernel[(rows * blocks,)](w, 2 * (sums.sum(1) / width), y, width, n, BLOCK=_BLOCK)
    return y


@_forward.register_fake
def _(w, bits):
    return w.new_empty(w.shape)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return grad, None


_forward.register_autograd(_gradients)


# --- the public function ----------------------------------------------------------------------------------------------


def stats_quantize(w: Tensor, bits: int, *, backend: str = "auto") -> Tensor:
    """Return each row of w on the levels `s * (k + 0.5) / 2**(bits - 1)`, where s is twice its mean magnitude.

    Args:
        w: (..., I), any strides, finite; each row along the last dimension has its own scale.
        bits: 1 to 16. One bit gives plus or minus the mean magnitude.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist.

    Returns:
        The shape and dtype of w; half precisions are computed in float32 and rounded once. The gradient of the result
        passes to w unchanged. A row of zeros gives zeros.

    Raises:
        ValueError: bits outside 1 to 16, I of zero, an unknown backend.
        TypeError: not a floating-point tensor, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.
    """
    check_tensors({"w": w})
    code_range(bits)
    if w.dim() == 0 or w.shape[-1] == 0:
        raise ValueError(f"w must have shape (..., I) with I >= 1, got {tuple(w.shape)}")
    if choose_backend(backend, w) == "reference":
        return stats_quantize_reference(w, bits)
    return _forward(w.reshape(-1, w.shape[-1]), bits).view(w.shape)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, width: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops: w read once and y written once; backward moves nothing.

    Flops of one entry: 11 (a magnitude, a sum, a division, a product, a difference, two bounds, two additions that
    round, half a step, a product). direction: "forward" or "backward". Raises ValueError for another direction.
    """
    counts = {"forward": (2 * rows * width, 11 * rows * width), "backward": (0, 0)}
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)
