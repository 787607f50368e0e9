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
    HAS_TRITON = INTERPRETED = IN_INTERPRETER = False
else:
    HAS_TRITON = True
    # Read once: `triton.jit` decides when it decorates, so a later change of the variable has no effect on the kernels.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    IN_INTERPRETER = tl.constexpr(INTERPRETED)  # for use in kernels

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def wide(x):
    """Return x in float32."""
    if IN_INTERPRETER and x.dtype == tl.bfloat16:  # the interpreter's own conversion loses subnormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return x, in float32, rounded to dtype."""
    if IN_INTERPRETER and dtype == tl.bfloat16:  # the interpreter would cut off digits, where a GPU rounds half to even
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, rounded, 0x7FC00000)
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def load(at, ok):
    """Read float32 values; `ok` masks them, and None says that all exist, which leaves loads as wide as they can be."""
    if ok is None:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=ok, other=0.0)
    return wide(values)


@triton.jit
def store(at, x, ok):
    """Write float32 values in the dtype of the pointers; `ok` as in `load`."""
    tl.store(at, narrow(x, at.dtype.element_ty), mask=ok)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, accumulated in float32. PRECISION comes from `dot_precision`."""
    if IN_INTERPRETER:  # its `tl.dot` would multiply the bit patterns of bfloat16; widened, the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, halves to the even one, as torch.round does; what is not finite stays."""
    shift = tl.where(x < 0, -8388608.0, 8388608.0)  # 2^23: from there on float32 has no fraction
    return tl.where(tl.abs(x) < 8388608.0, (x + shift) - shift, x)


class Tiles:
    """A kernel with the tiles that it may be launched with; `kernel[grid](...)` as ever.

    The fastest is found by timing, once per `key`, and kept on disk. The first that `keep` leaves serves where nothing
    can be timed: under the interpreter, and while a CUDA graph is captured.
    """

    def __init__(self, kernel: Any, configs: list, key: Sequence[str], keep: Callable[..., bool] | None):
        self.kernel, self.configs, self.keep = kernel, configs, keep
        self.tuned = triton.autotune(
            configs, key=list(key), prune_configs_by={"early_config_prune": self.prune}, cache_results=True
        )(kernel)

    def prune(self, configs: list, named: dict[str, Any], **constants: Any) -> list:
        """Return the configurations that suit the arguments of a launch."""
        return [config for config in configs if self.keep is None or self.keep(config.kwargs, named | constants)]

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not INTERPRETED and not capturing:
            return self.tuned[grid]

        def launch(*args: Any, **constants: Any) -> Any:
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            config = self.prune(self.configs, named, **constants)[0]
            return self.kernel[grid](*args, **constants, **config.all_kwargs())

        return launch


def autotune(
    tiles: Sequence[tuple[dict[str, int], int, int]], key: Sequence[str], keep: Callable[..., bool] | None = None
) -> Callable:
    """Decorate a kernel so that it is launched with one of `tiles`, each (block sizes, warps, stages); see `Tiles`.

    `keep(tile, arguments)` leaves out the tiles that don't suit the arguments, by name, of a launch: those that would
    spill registers, or want more shared memory than a block may have.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in tiles]
    return lambda kernel: Tiles(kernel, configs, key, keep)


def unit(size: int) -> int:
    """Return the largest of 1, 2, 4, 8 and 16 that divides `size`.

    A kernel that is handed `size // unit(size)` and, as a constant, `unit(size)` knows how its rows are aligned.
    """
    return min(size & -size, 16) if size else 16


def registers(most: int) -> dict[str, int]:
    """Return the launch option that gives a thread up to `most` registers. Triton has it for NVIDIA's GPUs alone.

    Left to itself, the compiler may keep a value in memory to stay at a number of registers that nobody asked for.
    """
    return {} if torch.version.hip else {"maxnreg": most}


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
