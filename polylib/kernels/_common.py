"""What every op file needs: Triton if there is one, argument checks, the choice of backend, registration helpers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or a CPU-only install: op files must still import, and use their reference

    class triton:  # type: ignore[no-redef]
        """Stands in for the one name that op files use at import time."""

        @staticmethod
        def jit(fn: Callable | None = None, **_options: Any) -> Callable:
            return fn if fn is not None else lambda f: f

    tl = None
    HAS_TRITON = INTERPRETED = False
else:
    HAS_TRITON = True
    # Read once: `triton.jit` decides when it decorates, so a later change of the variable has no effect on the kernels.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    _INTERPRETED = tl.constexpr(INTERPRETED)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, accumulated in float32. PRECISION comes from `dot_precision`."""
    if _INTERPRETED:  # its `tl.dot` would multiply the bit patterns of bfloat16; widened, the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, halves to the even one, as torch.round does; |x| must be below 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fraction there


def autotune(tiles: Sequence[tuple[dict[str, int], int, int]], key: Sequence[str]) -> Callable:
    """Decorate a kernel so that the fastest of `tiles`, each (block sizes, warps, stages), is found once per `key`.

    Under the interpreter only the first is kept: there is no device to time the others on.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in tiles]
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=list(key))


def row_bucket(rows: int) -> int:
    """Round a row count up to 64, 256, 1024, 4096 or 16384, so that a new batch size seldom means a new tuning."""
    bits = max(rows - 1, 1).bit_length()
    return 1 << min(max(bits + bits % 2, 6), 14)


def dot_precision() -> str:
    """Return Triton's `input_precision` for float32 products that agrees with PyTorch's own setting."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of `x` current: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast as `torch.autocast` does for matrix products, if it is on: every floating tensor except float64.

    The first tensor tells the device.
    """
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "meta"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return x in at least float32: the cube of 41 is already too large for float16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Tell whether the result will be differentiated, that is, whether anything must be saved."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_tensors(tensors: dict[str, torch.Tensor | None], optional: Sequence[str] = ()) -> None:
    """Raise unless all are floating-point tensors of one dtype (TypeError) on one device (ValueError).

    The first is the one that the others are compared with; those named in `optional` may be None.
    """
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype, got {t.dtype}")
        if t.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {t.device}")


def check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `tensor` is None or has the shape `expected`, which `meaning` spells in letters."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(tensor.shape)}")


def transformed() -> bool:
    """Tell whether a transform of `torch.func`, such as vmap, is active."""
    return torch._C._are_functorch_transforms_active()  # there is no public name for this question


def choose_backend(backend: str, x: torch.Tensor, dtypes: Sequence[torch.dtype] = TRITON_DTYPES) -> str:
    """Return "triton" or "reference".

    "auto" takes Triton for a CUDA tensor of a supported dtype where Triton is installed, and the reference elsewhere.
    Inside `torch.func` (grad, vmap, ...) it takes the reference: PyTorch can't transform a registered op's derivative.
    Raises ValueError for an unknown name, TypeError for a dtype the kernels don't have, and RuntimeError if Triton
    was asked for by name and can't run here.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f'backend must be "auto", "triton" or "reference", got {backend!r}')
    inside = transformed()
    if backend == "auto":
        return "triton" if x.is_cuda and HAS_TRITON and x.dtype in dtypes and not inside else "reference"
    if backend == "triton":
        if not HAS_TRITON:
            raise RuntimeError('backend="triton" needs the triton package, which is not installed')
        if inside:
            raise RuntimeError('backend="triton" can\'t be used inside torch.func; "auto" takes the reference there')
        if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
            raise RuntimeError(
                f'backend="triton" needs CUDA tensors, got {x.device}; for CPU tensors set TRITON_INTERPRET=1 '
                "before polylib.kernels is first imported (slow, meant for tests)"
            )
        if x.dtype not in dtypes:
            raise TypeError(f'backend="triton" supports {", ".join(map(str, dtypes))}, got {x.dtype}')
    return backend


def no_double_backward(name: str) -> Callable:
    """Return a backward formula for a backward op: it raises, since the kernels are differentiable once only."""

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(
            f'{name}: the Triton kernels are differentiable once; pass backend="reference" for higher derivatives'
        )

    return backward
