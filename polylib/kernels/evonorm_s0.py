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
logistic function costs less than the memory traffic of its result. Memory decides what a program works on:

- contiguous images whose rows are a multiple of 16 bytes, and large ones: one group, channel by channel;
- small contiguous images, such as 7 x 7: one group of up to 4,096 values as one flat run of memory, in one sample after
  the other, so that the parameters of its entries are read once for all samples;
- channels_last: the channels of several groups in one sample, so that rows of memory are read whole.

In each of them

- forward reads x and writes y. A group that fits in one tile (4,096 values) is read once; a larger one is read again
  for the output, when most of it is still in the L2 cache. The variance is merged from tile to tile by the formula of
  Chan, Golub and LeVeque, which loses no digits where the mean is large. Eager PyTorch passes over x about 13 times.
- backward reads x and the gradient, twice if the group is larger than a tile, and writes the gradient of x. The sum
  over the group is $s \sum_c \gamma_c \nabla\gamma_c$ of this group, so that it costs no reduction of its own. The
  gradients of the parameters are sums over samples: each program writes the three sums of its channels, and one more
  sum adds the samples in a fixed order. No atomics, hence the same bits every time.

At (256, 256, 56, 56) in bfloat16 x is 411 MB: forward moves at least 822 MB, backward 1.23 GB.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    autocast,
    check_shape,
    check_tensors,
    choose_backend,
    load,
    no_double_backward,
    on_device,
    registers,
    store,
    tl,
    triton,
    unit,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def evonorm_s0_reference(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Return `weight * x * sigmoid(v * x) / std(x) + bias` in plain PyTorch, the deviation taken over each group.

    x (N, C, H, W), weight, bias and v (C,). Any floating dtype and device; differentiable any number of times; works
    under `torch.func`.

    On a CPU it moves 40 bytes an entry of float32, and 148 for the gradients. The least is what one loop would
    move, 8 and 12 while a group stays in the cache; `torch.compile` fuses most of the steps.
    """
    wide, weight, bias, v = (widened(t) for t in (x, weight, bias, v))
    if 0 in x.shape[2:]:  # no pixel: the deviation is NaN, and with it the gradient of the weight would be
        return (wide * (weight * bias * v).view(-1, 1, 1)).to(x.dtype)
    std = (wide.unflatten(1, (groups, -1)).var((2, 3, 4), correction=0, keepdim=True) + eps).sqrt()
    bias, v = bias.view(-1, 1, 1), v.view(-1, 1, 1)
    factor = (weight.view(groups, -1, 1, 1) / std).flatten(1, 2)  # a number for each channel of each sample
    return torch.addcmul(bias, wide * torch.sigmoid(v * wide), factor).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# First the kernels for groups that are walked channel by channel. A tile is (BLOCK_D channels, BLOCK_P pixels);
# stride_d and stride_p are (P, 1) for contiguous tensors and (1, C) for channels_last ones. One of them is 1, which the
# compiler sees, so that neighbouring threads read neighbouring values.

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
    m2 += tl.sum(tl.sum(centred * centred, axis=1), axis=0) + delta * (delta * (count * size / total))
    return total, mean + delta * (size / total), m2


@triton.jit
def _channel_parameter(values, channel, ok):
    return load(values + channel, ok)[:, None]


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
            tile = load(x + base + offsets, ok)
            size = (tl.minimum(D - d, BLOCK_D) * tl.minimum(P - p, BLOCK_P)).to(tl.float32)
            count, mean, m2 = _merge(tile, ok, size, count, mean, m2)
            if ONE_TILE:
                rstd = 1.0 / tl.sqrt(m2 / count + eps)
                channel = group * D + ds
                factor = _channel_parameter(weight, channel, ds < D) * rstd
                out = tile * tl.sigmoid(_channel_parameter(v, channel, ds < D) * tile) * factor
                out += _channel_parameter(bias, channel, ds < D)
                store(y + base + offsets, out, ok)
    rstd = 1.0 / tl.sqrt(m2 / count + eps)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)
    if not ONE_TILE:
        for d in range(0, D, BLOCK_D):
            d_ok, channel = d + ds < D, group * D + d + ds
            factor, beta = _channel_parameter(weight, channel, d_ok) * rstd, _channel_parameter(bias, channel, d_ok)
            slope = _channel_parameter(v, channel, d_ok)
            for p in range(0, P, BLOCK_P):
                offsets, ok = _place(d + ds, p + ps, D, P, stride_d, stride_p)
                tile = load(x + base + offsets, ok)
                out = tile * tl.sigmoid(slope * tile) * factor + beta
                store(y + base + offsets, out, ok)


@triton.jit
def _grad_of_tile(tile, q, gate, slope, mean, pull):
    """The gradient of x, with q over s; `pull` is the sum of q u over the group, over M s^3."""
    straight = q * gate
    return straight + straight * (1.0 - gate) * tile * slope - (tile - mean) * pull


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
            tile = load(x + base + offsets, ok)
            g = load(grad + base + offsets, ok)
            gate = tl.where(ok, tl.sigmoid(slope * tile), 0.0)  # beyond the edge an infinite slope would count,
            q = tl.where(ok, g * (gamma * rstd), 0.0)  # and an infinite weight
            sum_beta += tl.sum(g, axis=1)
            sum_gamma += tl.sum(g * (tile * gate), axis=1)
            sum_v += tl.sum(q * tile * gate * (1.0 - gate) * tile, axis=1)
            if ONE_TILE and NEED_X:
                own = tl.sum(gamma * (sum_gamma * rstd)[:, None], axis=0) * scale
                out = _grad_of_tile(tile, q, gate, slope, mean, own[None, :])
                store(grad_x + base + offsets, out, ok)
        sum_gamma *= rstd
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
                tile = load(x + base + offsets, ok)
                g = load(grad + base + offsets, ok)
                out = _grad_of_tile(tile, g * (gamma * rstd), tl.sigmoid(slope * tile), slope, mean, pull)
                store(grad_x + base + offsets, out, ok)


# Next the kernels for a group that is one run of M = DP values in memory. A program keeps the parameters of each value
# in registers, and works on STRIP samples.


@triton.jit
def _run(N, C, D, P, STRIP: tl.constexpr, BLOCK: tl.constexpr):
    """This program's group and first sample, the values of a group, the channel of each, and which exist."""
    groups = C // D
    group, first = tl.program_id(0) % groups, tl.program_id(0) // groups * STRIP
    value = tl.arange(0, BLOCK)
    return group, first, value, group * D + value // P, value < D * P


@triton.jit
def _run_forward_kernel(
    x, weight, bias, v, y, mean_out, rstd_out, N, C, D, P, eps, STRIP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    group, first, value, channel, inside = _run(N, C, D, P, STRIP, BLOCK)
    gamma, beta, slope = load(weight + channel, inside), load(bias + channel, inside), load(v + channel, inside)
    size = D * P
    for sample in range(first, tl.minimum(first + STRIP, N)):
        start = tl.cast(sample, tl.int64) * C * P + group * size
        tile = load(x + start + value, inside)
        mean = tl.sum(tile, axis=0) / size
        centred = tl.where(inside, tile - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / size + eps)
        store(y + start + value, tile * tl.sigmoid(slope * tile) * (gamma * rstd) + beta, inside)
        tl.store(mean_out + sample * (C // D) + group, mean)
        tl.store(rstd_out + sample * (C // D) + group, rstd)


@triton.jit
def _sum_by_channel(gamma, gated, value, D, P):
    """The sum over the channels of gamma times the sum of `gated`, which is how the definition's derivative has it."""
    total = 0.0
    for start in range(0, D * P, P):
        own = (value >= start) & (value < start + P)
        total += tl.sum(tl.where(value == start, gamma, 0.0), axis=0) * tl.sum(tl.where(own, gated, 0.0), axis=0)
    return total


@triton.jit
def _run_backward_kernel(
    grad, x, weight, v, means, rstds, grad_x, partial, N, C, D, P, plane,
    NEED_X: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, first, value, channel, inside = _run(N, C, D, P, STRIP, BLOCK)
    gamma, slope = load(weight + channel, inside), load(v + channel, inside)
    size = D * P
    sum_beta = tl.zeros((BLOCK,), tl.float32)
    sum_gamma, sum_v = sum_beta, sum_beta
    for sample in range(first, tl.minimum(first + STRIP, N)):
        at = tl.cast(sample, tl.int64) * C * P + group * size + value
        mean, rstd = tl.load(means + sample * (C // D) + group), tl.load(rstds + sample * (C // D) + group)
        tile, g = load(x + at, inside), load(grad + at, inside)
        # excerpt: begin
        gate = tl.sigmoid(slope * tile)
        q, gated = g * (gamma * rstd), g * (tile * gate)
        sum_beta += g
        sum_gamma += gated * rstd
        sum_v += q * tile * gate * (1.0 - gate) * tile
        if NEED_X:
            total = tl.sum(gamma * gated, axis=0)
            if total != total:  # an infinite weight meets terms of both signs, and not their sum
                total = _sum_by_channel(gamma, gated, value, D, P)
            pull = total * rstd * (rstd * rstd / size)
            store(grad_x + at, _grad_of_tile(tile, q, gate, slope, mean, pull), inside)
        # excerpt: end
    out = partial + (first // STRIP).to(tl.int64) * C * P + group * size + value
    tl.store(out, sum_gamma, mask=inside)
    tl.store(out + plane, sum_beta, mask=inside)
    tl.store(out + 2 * plane, sum_v, mask=inside)


# Last the kernels for channels_last. A tile is (BLOCK_P pixels, LANES channels), of which GROUPS * D are used: a part
# of each row of memory. Lanes keep their own statistics, which are merged when the sample has been walked.


@triton.jit
def _lanes(C, G, D: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """This program's sample; of each lane its group, its channel, whether it exists, and whether it is the first."""
    blocks = tl.cdiv(G, GROUPS)
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    lane = tl.arange(0, LANES)
    channel = block * (GROUPS * D) + lane
    ok = (lane < GROUPS * D) & (channel < C)
    return sample, block * GROUPS + lane // D, channel, ok, ok & (lane % D == 0)


@triton.jit
def _over_groups(values, D: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The sum over the lanes of each group, for each lane; zero is expected in lanes that don't exist."""
    if GROUPS == 1:
        sums = tl.sum(values, axis=0) + tl.zeros_like(values)
    elif GROUPS * D == LANES:
        sums = tl.sum(tl.reshape(values, (GROUPS, D)), axis=1)[:, None]
        sums = tl.reshape(tl.broadcast_to(sums, (GROUPS, D)), (LANES,))
    else:
        group = tl.arange(0, LANES) // D
        sums = tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), axis=1)
    return sums


@triton.jit
def _lanes_forward_kernel(
    x, weight, bias, v, y, mean_out, rstd_out, C, G, P, eps,
    D: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C * UNIT
    sample, group, channel, lane_ok, lead = _lanes(C, G, D, GROUPS, LANES)
    base = sample * P * C + channel[None, :]
    rows = tl.arange(0, BLOCK_P)[:, None]
    means = tl.zeros((BLOCK_P, LANES), tl.float32)
    m2 = tl.zeros_like(means)
    for p in range(0, P, BLOCK_P):
        ok = (p + rows < P) & lane_ok[None, :]
        tile = load(x + base + (p + rows).to(tl.int64) * C, ok)
        delta = tile - means
        means += tl.where(ok, delta * (1.0 / (p // BLOCK_P + 1)), 0.0)
        m2 += tl.where(ok, delta * (tile - means), 0.0)
    counts = ((P - rows + BLOCK_P - 1) // BLOCK_P).to(tl.float32)  # of pixels that each row has seen
    mean = tl.sum(counts * means, axis=0) / P
    spread = tl.sum(m2 + counts * (means - mean[None, :]) * (means - mean[None, :]), axis=0)
    group_mean = _over_groups(mean, D, GROUPS, LANES) / D
    spread += tl.where(lane_ok, (mean - group_mean) * (mean - group_mean) * P, 0.0)
    rstd = 1.0 / tl.sqrt(_over_groups(spread, D, GROUPS, LANES) / (tl.cast(P, tl.float32) * D) + eps)
    tl.store(mean_out + sample * G + group, group_mean, mask=lead)
    tl.store(rstd_out + sample * G + group, rstd, mask=lead)
    factor, beta = (rstd * load(weight + channel, lane_ok))[None, :], load(bias + channel, lane_ok)[None, :]
    slope = load(v + channel, lane_ok)[None, :]
    for p in range(0, P, BLOCK_P):
        ok = (p + rows < P) & lane_ok[None, :]
        at = base + (p + rows).to(tl.int64) * C
        tile = load(x + at, ok)
        store(y + at, tile * tl.sigmoid(slope * tile) * factor + beta, ok)


@triton.jit
def _lanes_backward_kernel(
    grad, x, weight, v, means, rstds, grad_x, partial, C, G, P, plane, NEED_X: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C * UNIT
    sample, group, channel, lane_ok, _lead = _lanes(C, G, D, GROUPS, LANES)
    base = sample * P * C + channel[None, :]
    rows = tl.arange(0, BLOCK_P)[:, None]
    gamma, slope = load(weight + channel, lane_ok), load(v + channel, lane_ok)[None, :]
    mean, rstd = load(means + sample * G + group, lane_ok), load(rstds + sample * G + group, lane_ok)
    factor = (gamma * rstd)[None, :]
    beta_terms = tl.zeros((BLOCK_P, LANES), tl.float32)
    gamma_terms, v_terms = beta_terms, beta_terms
    for p in range(0, P, BLOCK_P):
        ok = (p + rows < P) & lane_ok[None, :]
        at = base + (p + rows).to(tl.int64) * C
        tile, g = load(x + at, ok), load(grad + at, ok)
        gate = tl.where(ok, tl.sigmoid(slope * tile), 0.0)
        beta_terms += g
        gamma_terms += g * (tile * gate)
        v_terms += g * tile * gate * (1.0 - gate) * (tile * rstd[None, :])
    sum_gamma = tl.sum(gamma_terms, axis=0) * rstd
    out = partial + sample * C + channel
    tl.store(out, sum_gamma, mask=lane_ok)
    tl.store(out + plane, tl.sum(beta_terms, axis=0), mask=lane_ok)
    tl.store(out + 2 * plane, tl.sum(v_terms, axis=0) * gamma, mask=lane_ok)
    if NEED_X:
        pull = _over_groups(gamma * sum_gamma, D, GROUPS, LANES) * rstd * rstd / (tl.cast(P, tl.float32) * D)
        for p in range(0, P, BLOCK_P):
            ok = (p + rows < P) & lane_ok[None, :]
            at = base + (p + rows).to(tl.int64) * C
            tile, g = load(x + at, ok), load(grad + at, ok)
            gate = tl.sigmoid(slope * tile)
            store(grad_x + at, _grad_of_tile(tile, g * factor, gate, slope, mean[None, :], pull[None, :]), ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _way(x: Tensor, groups: int) -> str:
    """How a dense x is worked on: "lanes", "run" or "channels"."""
    _, C, H, W = x.shape
    channels, pixels = C // groups, H * W
    if not x.is_contiguous():
        return "lanes" if channels <= 512 else "channels"
    wide = pixels * x.itemsize % 16 == 0
    return "run" if channels * pixels <= _TILE and not wide else "channels"


def _launch(kernels: dict[str, Any], x: Tensor, groups: int, tensors: tuple, extra: tuple, **options: bool) -> None:
    """Run the kernel for the format and the shape of a dense x; `extra` are the numbers that follow the sizes."""
    N, C, H, W = x.shape
    D, P, way = C // groups, H * W, _way(x, groups)
    if way == "lanes":
        together, part = _together(D, groups), unit(C)
        lanes = triton.next_power_of_2(together * D)
        programs = N * triton.cdiv(groups, together)
        sizes: tuple[int, ...] = (C // part, groups, P)
        options |= {"D": D, "UNIT": part, "GROUPS": together, "LANES": lanes, "num_warps": 8}
        options["BLOCK_P"] = min(max(1, 2048 // lanes), triton.next_power_of_2(P))
    elif way == "run":
        block = triton.next_power_of_2(D * P)
        strip = _strip(N, groups)
        programs, sizes = groups * triton.cdiv(N, strip), (N, C, D, P)
        options |= {"STRIP": strip, "BLOCK": block, "num_warps": max(1, min(16, block // 256))}
    else:
        channels_last = not x.is_contiguous()
        programs, sizes = N * groups, (C, D, P, *((1, C) if channels_last else (P, 1)))
        options |= _blocks(D, P, channels_last)
        if "NEED_X" in options:  # the backward kernel
            options |= registers(80 if x.itemsize == 2 else 128)
    with on_device(x):
        kernels[way][(programs,)](*tensors, *sizes, *extra, **options)


def _together(channels: int, groups: int) -> int:
    """How many groups share a tile in channels_last: about 64 channels, and a multiple of 8 where that is possible."""
    step = 8 // math.gcd(channels, 8)
    if step * channels > 128:
        return 1
    return min(step * max(1, 64 // (step * channels)), groups)


def _strip(samples: int, groups: int) -> int:
    """How many samples a program works on where a group is one run: enough programs for two a multiprocessor."""
    return max(1, min(32, samples * groups // 264))


@torch.library.custom_op("polylib::evonorm_s0", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the mean and one over the deviation of each group (N, G), which backward needs."""
    x = _dense(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        kernels = {"lanes": _lanes_forward_kernel, "run": _run_forward_kernel, "channels": _forward_kernel}
        tensors = (x, weight.contiguous(), bias.contiguous(), v.contiguous(), y, mean, rstd)
        _launch(kernels, x, groups, tensors, (eps,))
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
    run = _way(x, groups) == "run"
    shape = (triton.cdiv(len(x), _strip(len(x), groups)), x[0].numel()) if run else (len(x), C)
    partial = x.new_empty(3, *shape, dtype=torch.float32)
    kernels = {"lanes": _lanes_backward_kernel, "run": _run_backward_kernel, "channels": _backward_kernel}
    tensors = (grad, x, weight.contiguous(), v.contiguous(), mean, rstd, grad_x if need_x else None, partial)
    _launch(kernels, x, groups, tensors, (partial[0].numel(),), NEED_X=need_x)
    return grad_x, partial.view(3, shape[0], C, -1).sum((1, 3)).to(x.dtype)


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


# --- cost -------------------------------------------------------------------------------------------------------------


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
