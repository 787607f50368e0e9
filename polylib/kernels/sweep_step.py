r"""One optimizer step for K stacked models at once, in place: SGD or Adam, each row with its own learning rate.

Sources: SGD with momentum as in Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in
deep learning", ICML 2013, in torch's form; Adam: Kingma, Ba, arXiv 1412.6980; its decoupled decay: Loshchilov, Hutter,
arXiv 1711.05101.

Shapes: parameter w, gradient g, velocity v, first moment m and second moment s (K, ...); row k belongs to model k. Rate
$\eta$, decay $\lambda$ and scale c (K,), float32. Kernels: w and g in float32, bfloat16 or float16, the state in any of
these; arithmetic in float32. Reference: any floating dtype, half precisions computed in float32.

$$\text{SGD:}\quad \hat g = c\,g + \lambda w,\qquad v \leftarrow \mu v + \hat g,\qquad w \leftarrow w - \eta v;$$

$$\text{Adam, step } t:\quad \hat g = c\,g,\qquad m \leftarrow \beta_1 m + (1-\beta_1)\hat g,\qquad
  s \leftarrow \beta_2 s + (1-\beta_2)\hat g^2,\qquad
  w \leftarrow (1-\eta\lambda)\,w - \frac{\eta}{1-\beta_1^t}\,\frac{m}{\sqrt{s/(1-\beta_2^t)}+\epsilon}.$$

The factor c clips the gradient of each model, which would otherwise cost a pass of its own.

Nothing is saved and nothing is differentiated: this is the last thing that happens in a step of training. All of the
work is memory traffic. Adam reads w, g, m, s and writes w, m, s: 28 bytes an entry in float32. PyTorch's operations,
one after the other, move about three times as much, and `torch.optim.Adam(fused=True)` has one rate a group, so that K
models need K groups. A program works on one row, whose rate it reads once. It takes memory in blocks that begin at a
multiple of 16 entries: those that lie in the row as a whole, all but the first and the last, are read 16 bytes at a
time whatever the length of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib.kernels._common import (
    check_shape,
    check_tensors,
    choose_backend,
    load,
    on_device,
    store,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definitions --------------------------------------------------------------------------------------------------


def sweep_sgd_step_reference(
    parameter: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    rate: Tensor,
    decay: Tensor | None,
    scale: Tensor | None,
    momentum: float,
) -> None:
    """Change parameter, and velocity if there is one, in plain PyTorch. Without `decay` it is 0, without `scale` 1."""
    rate, decay, scale = (_beside(values, parameter) for values in (rate, decay, scale))
    wide, step = widened(parameter), widened(gradient)
    step = step.clone() if scale is None else scale * step
    if decay is not None:
        step.addcmul_(decay, wide)
    if velocity is not None:
        step.add_(widened(velocity), alpha=momentum)
        velocity.copy_(step)
    parameter.copy_(wide.addcmul_(rate, step, value=-1))


def sweep_adam_step_reference(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: Tensor | None,
    scale: Tensor | None,
    step: int,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Change parameter, first and second in plain PyTorch. Without `decay` it is 0, without `scale` 1."""
    rate, decay, scale = (_beside(values, parameter) for values in (rate, decay, scale))
    wide, g = widened(parameter), widened(gradient)
    g = g if scale is None else scale * g
    m = widened(first).mul_(beta1).add_(g, alpha=1 - beta1)
    s = widened(second).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    first.copy_(m)
    second.copy_(s)
    if decay is not None:
        wide.mul_(1 - rate * decay)
    root = (s / (1 - beta2**step)).sqrt_().add_(epsilon)
    parameter.copy_(wide.sub_((m * (rate / (1 - beta1**step))).div_(root)))


def _beside(values: Tensor | None, parameter: Tensor) -> Tensor | None:
    """One value a row, shaped and typed to multiply the stacked parameter."""
    return None if values is None else values.to(widened(parameter).dtype).view(-1, *[1] * (parameter.dim() - 1))


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # entries a program: eight for each thread of four warps


@triton.jit
def _block(columns, blocks, BLOCK: tl.constexpr):
    """This program's row, its entries, and where the row begins and ends."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    first = row * columns
    start = first // 16 * 16 + (pid % blocks).to(tl.int64) * BLOCK
    end = first + columns
    return row, start + tl.arange(0, BLOCK), first, end, (start >= first) & (start + BLOCK <= end)


# excerpt: begin
@triton.jit
def _sgd_block(parameter, gradient, velocity, eta, decay, scale, momentum, at, ok):
    w, step = load(parameter + at, ok), scale * load(gradient + at, ok)
    step += decay * w
    if velocity is not None:
        step += momentum * load(velocity + at, ok)
        store(velocity + at, step, ok)
    store(parameter + at, w - eta * step, ok)


# excerpt: end


@triton.jit
def _of_row(values, row, default):
    """The number of a row, or the default where there are none."""
    if values is None:
        number = default
    else:
        number = tl.load(values + row)
    return number


@triton.jit(do_not_specialize=["columns", "blocks", "momentum"])
def _sgd_kernel(parameter, gradient, velocity, rate, decay, scale, columns, blocks, momentum, BLOCK: tl.constexpr):
    row, at, first, end, full = _block(columns, blocks, BLOCK)
    eta, decay, scale = tl.load(rate + row), _of_row(decay, row, 0.0), _of_row(scale, row, 1.0)
    if full:
        _sgd_block(parameter, gradient, velocity, eta, decay, scale, momentum, at, None)
    else:
        _sgd_block(parameter, gradient, velocity, eta, decay, scale, momentum, at, (at >= first) & (at < end))


@triton.jit
def _adam_block(
    parameter, gradient, first, second, eta, shrink, scale, beta1, rest1, beta2, rest2, epsilon, correction1,
    correction2, at, ok,
):  # fmt: skip
    w, g = load(parameter + at, ok), scale * load(gradient + at, ok)
    m = beta1 * load(first + at, ok) + rest1 * g
    s = beta2 * load(second + at, ok) + rest2 * g * g
    store(first + at, m, ok)
    store(second + at, s, ok)
    w = shrink * w - eta / correction1 * m / (tl.sqrt_rn(s / correction2) + epsilon)
    store(parameter + at, w, ok)


_FACTORS = ["beta1", "rest1", "beta2", "rest2", "epsilon", "correction1", "correction2"]


@triton.jit(do_not_specialize=["columns", "blocks", *_FACTORS])
def _adam_kernel(
    parameter, gradient, first, second, rate, decay, scale, columns, blocks, beta1, rest1, beta2, rest2, epsilon,
    correction1, correction2, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, begin, end, full = _block(columns, blocks, BLOCK)
    eta, scale = tl.load(rate + row), _of_row(scale, row, 1.0)
    shrink = 1 - eta * _of_row(decay, row, 0.0)
    if full:
        _adam_block(
            parameter, gradient, first, second, eta, shrink, scale, beta1, rest1, beta2, rest2, epsilon, correction1,
            correction2, at, None,
        )  # fmt: skip
    else:
        _adam_block(
            parameter, gradient, first, second, eta, shrink, scale, beta1, rest1, beta2, rest2, epsilon, correction1,
            correction2, at, (at >= begin) & (at < end),
        )  # fmt: skip


def _blocks(columns: int) -> int:
    """The number of blocks that cover a row, which may begin up to 15 entries after its first block."""
    return triton.cdiv(columns + (15 if columns % 16 else 0), _BLOCK)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::sweep_sgd_step", mutates_args=("parameter", "velocity"))
def _sgd(
    parameter: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    rate: Tensor,
    decay: Tensor | None,
    scale: Tensor | None,
    momentum: float,
) -> None:
    """Change contiguous parameter and velocity (K, ...); rate, decay and scale are float32 (K,), contiguous."""
    if parameter.numel() > 0:
        columns = parameter[0].numel()
        blocks = _blocks(columns)
        with on_device(parameter):
            _sgd_kernel[(len(parameter) * blocks,)](
                parameter, gradient.contiguous(), velocity, rate, decay, scale, columns, blocks, momentum, BLOCK=_BLOCK
            )


@torch.library.custom_op("polylib::sweep_adam_step", mutates_args=("parameter", "first", "second"))
def _adam(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: Tensor | None,
    scale: Tensor | None,
    step: int,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Change contiguous parameter, first and second (K, ...); rate, decay and scale are float32 (K,), contiguous."""
    if parameter.numel() > 0:
        columns = parameter[0].numel()
        blocks = _blocks(columns)
        # One minus beta is computed here: in float32, 1 - 0.999 is off by 5e-5 of itself.
        factors = (beta1, 1 - beta1, beta2, 1 - beta2, epsilon, 1 - beta1**step, 1 - beta2**step)
        with on_device(parameter):
            _adam_kernel[(len(parameter) * blocks,)](
                parameter, gradient.contiguous(), first, second, rate, decay, scale, columns, blocks, *factors,
                BLOCK=_BLOCK,
            )  # fmt: skip


@_sgd.register_fake
def _(parameter, gradient, velocity, rate, decay, scale, momentum):
    return None


@_adam.register_fake
def _(parameter, gradient, first, second, rate, decay, scale, step, beta1, beta2, epsilon):
    return None


# --- the public functions ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sweep_sgd_step(
    parameter: Tensor,
    gradient: Tensor,
    rate: Tensor,
    *,
    velocity: Tensor | None = None,
    momentum: float = 0.0,
    decay: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take one step of SGD in K stacked models, in place: `torch.optim.SGD`, with a rate for each row.

    Args:
        parameter: (K, ...), contiguous; changed.
        gradient: (K, ...), of the dtype of parameter, any strides.
        rate: (K,), the learning rate of each row.
        velocity: (K, ...), contiguous, any floating dtype, zeros before the first step; changed. Momentum needs it.
        momentum: from 0 to below 1.
        decay: (K,), the weight decay of each row, added to the gradient; none by default.
        scale: (K,), what the gradient of each row is multiplied by before all else, for clipping; 1 by default.
        backend: "auto" runs the Triton kernel for CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere; "triton" and "reference" insist.

    Raises:
        ValueError: shapes or devices that don't fit, a tensor to change that is not contiguous, a momentum outside
            [0, 1) or without velocity, an unknown backend.
        TypeError: not a floating-point tensor, or a gradient of another dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    chosen, rows = _checked(parameter, gradient, {"velocity": velocity}, (rate, decay, scale), backend)
    _check_fraction("momentum", momentum)
    if momentum and velocity is None:
        raise ValueError(f"velocity is None; momentum = {momentum} needs a tensor of the shape of parameter")
    step = _sgd if chosen == "triton" else sweep_sgd_step_reference
    step(parameter, gradient, velocity, *rows, momentum)


@torch.no_grad()
def sweep_adam_step(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    decay: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take one step of Adam in K stacked models, in place: `torch.optim.AdamW`, with a rate for each row.

    Args:
        parameter: (K, ...), contiguous; changed.
        gradient: (K, ...), of the dtype of parameter, any strides.
        first, second: (K, ...), contiguous, of any floating dtype, zeros before the first step; changed.
        rate: (K,), the learning rate of each row.
        step: the number of this step, from 1 on, for the correction of the bias.
        betas: of the two moments, each from 0 to below 1.
        epsilon: added to the root of the second moment, at least 0.
        decay: (K,), the decoupled weight decay of each row; none by default.
        scale: (K,), what the gradient of each row is multiplied by before all else, for clipping; 1 by default.
        backend: as in `sweep_sgd_step`.

    Raises:
        ValueError: shapes or devices that don't fit, a tensor to change that is not contiguous, a step below 1, a beta
            outside [0, 1), a negative epsilon, an unknown backend.
        TypeError: not a floating-point tensor, or a gradient of another dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    state = {"first": first, "second": second}
    chosen, rows = _checked(parameter, gradient, state, (rate, decay, scale), backend)
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        _check_fraction(name, beta)
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    update = _adam if chosen == "triton" else sweep_adam_step_reference
    update(parameter, gradient, first, second, *rows, step, *betas, epsilon)


def _checked(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor | None],
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    backend: str,
) -> tuple[str, list[Tensor | None]]:
    """Check what both steps share. Return the backend, and rate, decay and scale as the backend wants them."""
    check_tensors({"parameter": parameter, "gradient": gradient})
    if parameter.dim() < 1:
        raise ValueError("parameter must have shape (K, ...), got a scalar")
    check_shape("gradient", gradient, tuple(parameter.shape), "that of parameter")
    beside = dict(zip(("rate", "decay", "scale"), rows, strict=True))
    for name, tensor in (*state.items(), *beside.items()):
        if tensor is None and name in ("velocity", "decay", "scale"):
            continue
        check_tensors({name: tensor})
        if tensor.device != parameter.device:
            raise ValueError(f"{name} must be on the device of parameter, {parameter.device}, got {tensor.device}")
        if name in state:
            check_shape(name, tensor, tuple(parameter.shape), "that of parameter")
        else:
            check_shape(name, tensor, (len(parameter),), "(K,)")
    for name, tensor in {"parameter": parameter, **state}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, since it is changed in place; got strides {tensor.stride()}")
    chosen = choose_backend(backend, parameter)
    if chosen == "triton":
        return chosen, [None if values is None else values.float().contiguous() for values in rows]
    return chosen, list(rows)


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be from 0 to below 1, got {value}")


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, columns: int, dtype: torch.dtype, optimizer: str = "adam") -> Cost:
    """Return the least bytes and flops of one step: everything read once, what changes written once.

    optimizer: "sgd", "momentum" or "adam"; the state is counted in float32, and one rate a row. Raises ValueError for
    another optimizer.
    """
    passes = {"sgd": (3, 0, 2), "momentum": (3, 2, 4), "adam": (3, 4, 13)}  # over parameter or gradient, over state
    if optimizer not in passes:
        raise ValueError(f'optimizer must be "sgd", "momentum" or "adam", got {optimizer!r}')
    own, state, flops = passes[optimizer]
    return Cost(rows * columns * (own * dtype.itemsize + 4 * state) + 4 * rows, rows * columns * flops)
