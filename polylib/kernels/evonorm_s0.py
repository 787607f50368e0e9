r"""EvoNorm-S0, a normalisation and an activation in one: $y = \gamma \, x\,\sigma(v x) / s + \beta$.

Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", arXiv 2004.02967.

$\sigma$ is the logistic function, $s = \sqrt{\mathrm{var}(x) + \varepsilon}$ over a group: the pixels of C/G
neighbouring channels of one sample, with the biased variance. Shapes: x and y (N, C, H, W); $\gamma$ (weight), $\beta$
(bias) and v (C,). A group has D = C/G channels of P = HW pixels, M = DP values.
Kernels: float32, bfloat16, float16, one dtype for all, float32 arithmetic; x contiguous or channels_last, and y like x.
Reference: any floating dtype.

With $q = \gamma\,\partial L/\partial y$, $\sigma = \sigma(vx)$, $u = x\sigma$ and $\mu$ the mean of the group, the
gradients are

$$\nabla x = \frac qs\,[\sigma + vx\,\sigma(1-\sigma)] - \frac{x-\mu}{M s^3} \sum_{\rm group} q\,u, \quad
  \nabla v = \sum \frac qs\, x^2 \sigma(1-\sigma), \quad
  \nabla\gamma = \sum \frac{\partial L}{\partial y}\,\frac us, \quad \nabla\beta = \sum\frac{\partial L}{\partial y}.$$

What is saved for backward: x, and $\mu$ and $1/s$ of each group in float32. Everything else is recomputed from x: a
logistic function costs less than the memory traffic of its result. One program works on one group.

- forward reads x and writes y. A group that fits in one tile (4,096 values) is read once; a larger one is read again
  for the output, when most of it is still in the L2 cache. The variance is merged from tile to tile by the formula of
  Chan, Golub and LeVeque, which loses no digits where the mean is large. Eager PyTorch passes over x about 17 times.
- backward reads x and the gradient, twice if the group is larger than a tile, and writes the gradient of x. The sum
  over the group is $s \sum_c \gamma_c \nabla\gamma_c$ of this group, so that it costs no reduction of its own. The
  gradients of the parameters are sums over samples: each program writes the three sums of its channels, and one more
  sum adds the samples in a fixed order. No atomics, hence the same bits every time.

At (256, 256, 56, 56) in bfloat16 x is 411 MB: forward moves at least 822 MB, backward 1.23 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib.kernels._common import (
    autocast,
    check_shape,
    check_tensors,
    choose_backend,
    no_double_backward,
    on_device,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def evonorm_s0_reference(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Return `weight * x * sigmoid(v * x) / std(x) + bias` in plain PyTorch, the deviation taken over each group.

    x (N, C, H, W), weight, bias and v (C,). Any floating dtype and device; differentiable any number of times; works
    under `torch.func`.
    """
    wide, weight, bias, v = (widened(t) for t in (x, weight, bias, v))
    grouped = wide.unflatten(1, (groups, -1))
    std = (grouped.var((2, 3, 4), correction=0, keepdim=True) + eps).sqrt()
    weight, bias, v = (t.view(-1, 1, 1) for t in (weight, bias, v))
    gated = wide * torch.sigmoid(v * wide)
    return ((gated.unflatten(1, (groups, -1)) / std).flatten(1, 2) * weight + bias).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# A tile is (BLOCK_D channels, BLOCK_P pixels); stride_d and stride_p are (P, 1) for contiguous tensors and (1, C) for
# channels_last ones. One of them is 1, which the compiler sees, so that neighbouring threads read neighbouring values.

_TILE = 4096


def _blocks(channels: int, pixels: int, channels_last: bool) -> dict[str, int | bool]:
    """The tile for a group, filled first along the axis that is contiguous in memory."""
    first, second = (channels, pixels) if channels_last else (pixels, channels)
    long = min(triton.next_power_of_2(first), _TILE)
    short = min(triton.next_power_of_2(second), _TILE // long)
    block_d, block_p = (long, short) if channels_last else (short, long)
    return {
        "BLOCK_D": block_d,
        "BLOCK_P": block_p,
        "ONE_TILE": channels <= block_d and pixels <= block_p,
        "num_warps": max(1, min(8, long * short // 512)),
    }


@triton.jit
def _place(channels, pixels, D, P, stride_d, stride_p):
    """Where the values of a tile lie in their group, and which of them exist."""
    offsets = channels.to(tl.int64)[:, None] * stride_d + pixels.to(tl.int64)[None, :] * stride_p
    return offsets, (channels < D)[:, None] & (pixels < P)[None, :]


@triton.jit
def _merge(tile, ok, size, count, mean, m2):
    """Add a tile with `size` valid values to the running count, mean and sum of squared deviations."""
    tile_mean = tl.sum(tl.sum(tile, axis=1), axis=0) / size
    centred = tl.where(ok, tile - tile_mean, 0.0)
    total, delta = count + size, tile_mean - mean
    m2 += tl.sum(tl.sum(centred * centred, axis=1), axis=0) + delta * delta * (count * size / total)
    return total, mean + delta * (size / total), m2


@triton.jit
def _channel_parameter(values, channel, ok):
    return tl.load(values + channel, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _forward_kernel(
    x, weight, bias, v, y, mean_out, rstd_out,
    C, D, P, stride_d, stride_p, eps,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    group = pid % (C // D)
    base = (pid // (C // D)).to(tl.int64) * C * P + group.to(tl.int64) * D * stride_d
    ds, ps = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    count, mean, m2 = 0.0, 0.0, 0.0
    for d in range(0, D, BLOCK_D):
        for p in range(0, P, BLOCK_P):
            offsets, ok = _place(d + ds, p + ps, D, P, stride_d, stride_p)
            tile = tl.load(x + base + offsets, mask=ok, other=0.0).to(tl.float32)
            size = (tl.minimum(D - d, BLOCK_D) * tl.minimum(P - p, BLOCK_P)).to(tl.float32)
            count, mean, m2 = _merge(tile, ok, size, count, mean, m2)
            if ONE_TILE:
                rstd = 1.0 / tl.sqrt(m2 / count + eps)
                channel = group * D + ds
                out = tile * tl.sigmoid(_channel_parameter(v, channel, ds < D) * tile) * rstd
                out = out * _channel_parameter(weight, channel, ds < D) + _channel_parameter(bias, channel, ds < D)
                tl.store(y + base + offsets, out.to(y.dtype.element_ty), mask=ok)
    rstd = 1.0 / tl.sqrt(m2 / count + eps)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)
    if not ONE_TILE:
        for d in range(0, D, BLOCK_D):
            d_ok, channel = d + ds < D, group * D + d + ds
            gamma, beta = _channel_parameter(weight, channel, d_ok), _channel_parameter(bias, channel, d_ok)
            slope = _channel_parameter(v, channel, d_ok)
            for p in range(0, P, BLOCK_P):
                offsets, ok = _place(d + ds, p + ps, D, P, stride_d, stride_p)
                tile = tl.load(x + base + offsets, mask=ok, other=0.0).to(tl.float32)
                out = tile * tl.sigmoid(slope * tile) * rstd * gamma + beta
                tl.store(y + base + offsets, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _grad_of_tile(tile, grad, gate, slope, gamma, mean, rstd, pull):
    """The gradient of x; `pull` is the sum of q u over the group, over M s^3."""
    local = gamma * grad * rstd * (gate + slope * tile * gate * (1.0 - gate))
    return local - (tile - mean) * pull


@triton.jit
def _backward_kernel(
    grad, x, weight, v, means, rstds, grad_x, partial,
    C, D, P, stride_d, stride_p, partial_stride,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, ONE_TILE: tl.constexpr, NEED_X: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    group, sample = pid % (C // D), (pid // (C // D)).to(tl.int64)
    base = sample * C * P + group.to(tl.int64) * D * stride_d
    ds, ps = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    mean, rstd = tl.load(means + pid), tl.load(rstds + pid)
    scale = rstd * rstd / (tl.cast(D, tl.float32) * P)  # the sum of q u is s times that of gamma grad_gamma
    pull = 0.0
    for d in range(0, D, BLOCK_D):
        d_ok, channel = d + ds < D, group * D + d + ds
        gamma, slope = _channel_parameter(weight, channel, d_ok), _channel_parameter(v, channel, d_ok)
        sum_beta = tl.zeros((BLOCK_D,), tl.float32)
        sum_gamma = tl.zeros((BLOCK_D,), tl.float32)
        sum_v = tl.zeros((BLOCK_D,), tl.float32)
        for p in range(0, P, BLOCK_P):
            offsets, ok = _place(d + ds, p + ps, D, P, stride_d, stride_p)
            tile = tl.load(x + base + offsets, mask=ok, other=0.0).to(tl.float32)
            g = tl.load(grad + base + offsets, mask=ok, other=0.0).to(tl.float32)
            gate = tl.sigmoid(slope * tile)
            sum_beta += tl.sum(g, axis=1)
            sum_gamma += tl.sum(g * tile * gate * rstd, axis=1)
            sum_v += tl.sum(g * gamma * rstd * tile * tile * gate * (1.0 - gate), axis=1)
            if ONE_TILE and NEED_X:
                own = tl.sum(gamma * tl.sum(g * tile * gate * rstd, axis=1)[:, None], axis=0) * scale
                out = _grad_of_tile(tile, g, gate, slope, gamma, mean, rstd, own[None, :])
                tl.store(grad_x + base + offsets, out.to(grad_x.dtype.element_ty), mask=ok)
        target = partial + sample * C + channel
        tl.store(target, sum_gamma, mask=d_ok)
        tl.store(target + partial_stride, sum_beta, mask=d_ok)
        tl.store(target + 2 * partial_stride, sum_v, mask=d_ok)
        pull += tl.sum(tl.sum(gamma * sum_gamma[:, None], axis=1), axis=0) * scale
    if NEED_X and not ONE_TILE:
        for d in range(0, D, BLOCK_D):
            d_ok, channel = d + ds < D, group * D + d + ds
            gamma, slope = _channel_parameter(weight, channel, d_ok), _channel_parameter(v, channel, d_ok)
            for p in range(0, P, BLOCK_P):
                offsets, ok = _place(d + ds, p + ps, D, P, stride_d, stride_p)
                tile = tl.load(x + base + offsets, mask=ok, other=0.0).to(tl.float32)
                g = tl.load(grad + base + offsets, mask=ok, other=0.0).to(tl.float32)
                out = _grad_of_tile(tile, g, tl.sigmoid(slope * tile), slope, gamma, mean, rstd, pull)
                tl.store(grad_x + base + offsets, out.to(grad_x.dtype.element_ty), mask=ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _geometry(x: Tensor, groups: int) -> tuple[tuple[int, ...], dict[str, int | bool]]:
    """The sizes and strides, and the tile, that both kernels take for a dense x."""
    _, C, H, W = x.shape
    channels_last = not x.is_contiguous()
    strides = (1, C) if channels_last else (H * W, 1)
    return (C, C // groups, H * W, *strides), _blocks(C // groups, H * W, channels_last)


@torch.library.custom_op("polylib::evonorm_s0", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the mean and one over the deviation of each group (N, G), which backward needs."""
    x = _dense(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        sizes, blocks = _geometry(x, groups)
        with on_device(x):
            _forward_kernel[(x.shape[0] * groups,)](
                x, weight.contiguous(), bias.contiguous(), v.contiguous(), y, mean, rstd, *sizes, eps, **blocks
            )
    return y, mean, rstd


@_forward.register_fake
def _(x, weight, bias, v, groups, eps):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(_dense(x)), mean, rstd


@torch.library.custom_op("polylib::evonorm_s0_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, v: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (empty unless `need_x`) and of weight, bias and v (3, C)."""
    x = _dense(x)
    groups, C = mean.shape[1], x.shape[1]
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    if x.numel() == 0:
        return grad_x, x.new_zeros(3, C)
    grad = grad.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    partial = x.new_empty(3, x.shape[0], C, dtype=torch.float32)
    sizes, blocks = _geometry(x, groups)
    with on_device(x):
        _backward_kernel[(x.shape[0] * groups,)](
            grad, x, weight.contiguous(), v.contiguous(), mean, rstd, grad_x if need_x else None, partial,
            *sizes, x.shape[0] * C, NEED_X=need_x, **blocks,
        )  # fmt: skip
    return grad_x, partial.sum(1).to(x.dtype)


@_backward.register_fake
def _(grad, x, weight, v, mean, rstd, need_x):
    return torch.empty_like(_dense(x)) if need_x else x.new_empty(0), x.new_empty(3, x.shape[1])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, v, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, v, mean, rstd)


def _gradients(ctx: Any, grad: Tensor | None, _grad_mean: None, _grad_rstd: None) -> tuple:
    if grad is None:
        return (None,) * 6
    need = ctx.needs_input_grad[:4]
    grad_x, (grad_weight, grad_bias, grad_v) = _backward(grad, *ctx.saved_tensors, need[0])
    all_grads = (grad_x, grad_weight, grad_bias, grad_v)
    return (*(t if needed else None for t, needed in zip(all_grads, need, strict=True)), None, None)


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("evonorm_s0"))


# --- the public function ----------------------------------------------------------------------------------------------


def evonorm_s0(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Return `weight * x * sigmoid(v * x) / std(x) + bias`, the deviation taken over each group of channels.

    Args:
        x: (N, C, H, W), contiguous or channels_last; other strides are copied first.
        weight, bias, v: (C,).
        groups: how many groups the channels form; divides C.
        eps: added to the variance; positive.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        (N, C, H, W) in the dtype of x, or in autocast's dtype under `torch.autocast`.

    Raises:
        ValueError: a shape that does not fit, groups that do not divide C, an eps that is not positive, tensors on
            different devices, an unknown backend.
        TypeError: not a floating-point tensor, tensors of different dtypes, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", arXiv 2004.02967.
    """
    args = autocast(x, weight, bias, v)
    tensors = dict(zip(("x", "weight", "bias", "v"), args, strict=True))
    check_tensors(tensors)
    x = args[0]
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (N, C, H, W) with C >= 1, got {tuple(x.shape)}")
    for name in ("weight", "bias", "v"):
        check_shape(name, tensors[name], (x.shape[1],), "(C,)")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the C = {x.shape[1]} channels of x, got {groups!r}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if choose_backend(backend, x) == "reference":
        return evonorm_s0_reference(*args, groups, eps)
    return _forward(*args, groups, float(eps))[0]


# --- cost and benchmark -----------------------------------------------------------------------------------------------


def cost(
    samples: int, channels: int, height: int, width: int, groups: int, dtype: torch.dtype, direction: str = "forward"
) -> Cost:
    """Return the least bytes and flops: every operand read once, every result written once.

    direction: "forward" or "backward" (every gradient). The mean and deviation that forward keeps are counted in
    float32. Flops are the additions, multiplications and divisions of the formulas, and the logistic function as one:
    11 a value forward (5 for the variance), 26 backward. Raises ValueError for another direction.
    """
    values, kept = samples * channels * height * width, 8 * samples * groups
    counts = {
        "forward": (2 * values + 3 * channels, 11 * values),
        "backward": (3 * values + 5 * channels, 26 * values),
    }
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize + kept, flops)


def bench_cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    The peer with the same traffic is PyTorch's own group normalisation followed by SiLU, two fused operations.
    """
    sizes, dtypes = [(16, 64, 28, 28), (16, 256, 14, 14)], [torch.float32]
    if device.type == "cuda":
        sizes = [(256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (256, 2048, 7, 7)]
        dtypes = [torch.bfloat16, torch.float32]
    formats = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    for dtype in dtypes:
        for shape in [(2, 8, 4, 4)] if quick else sizes:
            for suffix, memory_format in formats.items():
                x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
                weight, bias, v = torch.randn(3, shape[1], device=device, dtype=dtype)
                groups = min(32, shape[1])
                forward, backward = (cost(*shape, groups, dtype, way) for way in ("forward", "backward"))

                def norm_silu(x, weight, bias, groups=groups):
                    return F.silu(F.group_norm(x, groups, weight, bias))

                def ours(*tensors, groups=groups):
                    return evonorm_s0(*tensors, groups)

                def reference(*tensors, groups=groups):
                    return evonorm_s0_reference(*tensors, groups)

                contestants = {
                    "reference": (reference, (x, weight, bias, v)),
                    "group_norm+silu": (norm_silu, (x, weight, bias)),
                    "ours": (ours, (x, weight, bias, v)),
                }
                yield "x".join(map(str, shape)) + suffix, dtype, (forward, forward + backward), contestants
