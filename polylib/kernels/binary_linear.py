r"""A product of signs, packed 32 to a word: $y_{mn} = \sum_k \mathrm{sign}(x_{mk})\,\mathrm{sign}(w_{nk})$, exactly.

Sources: Courbariaux, Hubara, Soudry, El-Yaniv, Bengio, "Binarized Neural Networks", arXiv 1602.02830; Rastegari,
Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016.

`pack_signs` turns x (..., K) into words (..., L) of int32 with $L = \lceil K/32\rceil$: bit b of word j, counted from
the lowest, is 1 where $x_{32j+b} \ge 0$, and zero counts as positive. Two signs have the product -1 where their bits
differ, so that

$$y_{mn} = K - 2\sum_{j=1}^{L} \mathrm{popcount}(x_{mj} \oplus w_{nj}).$$

The bits beyond K are 0 in every word: they never differ, and cancel. x_words (..., L), w_words (N, L), y (..., N), all
int32; y is exact, in any order of the sum.

There is no gradient: a layer trains with the real-valued product of its signs, whose derivative is chosen where the
signs are made (`sine_binarize` for weights, a window around zero for activations). Once trained, its weights are packed
and this product takes its place, with the same values.

A word holds in 4 bytes the signs that take 64 in bfloat16 or 128 in float32. `pack_signs` reads x once. The product is
limited by memory for a few rows, where a program holds a row of x against many rows of w. For many rows a program makes
a tile of y, reads 8 words of each of its rows at a time, and is limited by the popcounts, 16 a cycle on a
multiprocessor: there the tensor cores, with int8 or bfloat16, do more multiplications than this has words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend, load, on_device, tl, triton, unit
from polylib.kernels._cost import Cost

WORD = 32

# --- the definition ---------------------------------------------------------------------------------------------------


def pack_signs_reference(x: Tensor) -> Tensor:
    """Return the signs of x (..., K) as int32 words (..., ceil(K / 32)) in plain PyTorch; bit 1 for x >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.int32), (0, -x.shape[-1] % WORD))
    places = torch.arange(WORD, device=x.device, dtype=torch.int32)
    return (bits.unflatten(-1, (-1, WORD)) << places).sum(-1, dtype=torch.int32)  # no two have a bit in common


def unpack_signs(words: Tensor, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the signs, -1 and 1, of shape (..., features), that `pack_signs` made the words (..., L) of."""
    places = torch.arange(WORD, device=words.device, dtype=torch.int32)
    bits = ((words.unsqueeze(-1) >> places) & 1).flatten(-2)
    return (2 * bits[..., :features] - 1).to(dtype)


def binary_linear_reference(x_words: Tensor, w_words: Tensor, features: int) -> Tensor:
    """Return the products of signs as int32 in plain PyTorch: a floating-point product of whole numbers, exact.

    x_words (..., L), w_words (N, L), both from `pack_signs`; features is K. PyTorch itself checks the arguments.
    """
    # float32 would lose whole numbers beyond 2**24, and those beyond 256 under autocast, which leaves float64 alone.
    x, w = (unpack_signs(words, features, torch.float64) for words in (x_words, w_words))
    return (x @ w.mT).to(torch.int32)


# --- the kernels ------------------------------------------------------------------------------------------------------

_PACKED = 4096  # entries that a program packs: thirty-two a thread with four warps
_WORDS = 2048  # words of w that a program reads at a time, where x has few rows
_TILE = 32  # rows and columns of a tile of y, sixteen entries a thread with two warps
_FEW = 8  # rows; w is read anew for each, from the cache


@triton.jit(do_not_specialize=["rows", "width", "length"])
def _pack_kernel(x, words, rows, width, length, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    width = width * UNIT
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (tl.program_id(0) % blocks) * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    ok = (row < rows) & (column < width)
    bits = ((load(x + row * width + column, ok) >= 0) & ok).to(tl.int32) << (column % 32)
    packed = tl.sum(tl.reshape(bits, (ROWS, COLUMNS // 32, 32)), axis=2)
    word = first // 32 + tl.arange(0, COLUMNS // 32)[None, :]
    tl.store(words + row * length + word, packed, mask=(row < rows) & (word < length))


# excerpt: begin
@triton.jit
def _ones(v):
    """The number of ones in each word; the compiler knows the pattern, and makes one instruction of it."""
    v = v.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)  # of every two bits
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)  # of every four
    return ((((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _differing(count, a, b):
    """count (M, N), and the bits in which the words a (M, 2) and b (N, 2) differ."""
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    return count + _ones(a0[:, None] ^ b0[None, :]) + _ones(a1[:, None] ^ b1[None, :])


# excerpt: end


@triton.jit
def _quarters(words, ROWS: tl.constexpr):
    """Words (ROWS, 8) in four parts of two."""
    a, b = tl.split(tl.reshape(words, (ROWS, 4, 2)))
    a0, a1 = tl.split(tl.reshape(a, (ROWS, 2, 2)))
    b0, b1 = tl.split(tl.reshape(b, (ROWS, 2, 2)))
    return a0, a1, b0, b1


@triton.jit(do_not_specialize=["rows", "length", "features"])
def _tile_kernel(
    x, w, y, rows, outputs, length, features, UNIT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    length = length * UNIT
    tiles = tl.cdiv(outputs, SIZE)
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * SIZE
    first_output = (tl.program_id(0) % tiles).to(tl.int64) * SIZE
    x += first_row * length
    w += first_output * length
    each, word = tl.arange(0, SIZE), tl.arange(0, 8)[None, :]
    at = each[:, None] * length + word
    is_row, is_output = first_row + each < rows, first_output + each < outputs
    count = tl.zeros((SIZE, SIZE), tl.int32)
    for start in range(0, length, 8):  # words beyond the end are 0 in both, and don't differ
        ok = start + word < length
        a = tl.load(x + start + at, mask=is_row[:, None] & ok, other=0)
        b = tl.load(w + start + at, mask=is_output[:, None] & ok, other=0)
        a0, a1, a2, a3 = _quarters(a, SIZE)
        b0, b1, b2, b3 = _quarters(b, SIZE)
        count = _differing(_differing(count, a0, b0), a1, b1)
        count = _differing(_differing(count, a2, b2), a3, b3)
    at = (first_row + each)[:, None] * outputs + (first_output + each)[None, :]
    tl.store(y + at, features - 2 * count, mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["rows", "length", "features"])
def _few_rows_kernel(
    x, w, y, rows, outputs, length, features, UNIT: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    length = length * UNIT
    row = (tl.program_id(0) % rows).to(tl.int64)  # programs with the same words of w run at the same time
    output = (tl.program_id(0) // rows).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    word = tl.arange(0, WORDS)[None, :]
    count = tl.zeros((OUTPUTS, WORDS), tl.int32)
    for start in range(0, length, WORDS):
        here = start + word
        a = tl.load(x + row * length + here, mask=here < length, other=0)
        b = tl.load(w + output * length + here, mask=(output < outputs) & (here < length), other=0)
        count += _ones(a ^ b)
    differing = tl.sum(count, axis=1)[:, None]
    tl.store(y + row * outputs + output, features - 2 * differing, mask=output < outputs)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::pack_signs", mutates_args=())
def _pack(x: Tensor) -> Tensor:
    """Return the words (rows, L); x is (rows, K) with any strides."""
    x = x.contiguous()
    (rows, width), length = x.shape, triton.cdiv(x.shape[1], WORD)
    words = x.new_empty(rows, length, dtype=torch.int32)
    if rows > 0:
        columns = min(max(triton.next_power_of_2(width), WORD), _PACKED)
        height, part = _PACKED // columns, unit(width)
        with on_device(x):
            _pack_kernel[(triton.cdiv(rows, height) * triton.cdiv(width, columns),)](
                x, words, rows, width // part, length, UNIT=part, ROWS=height, COLUMNS=columns
            )
    return words


@_pack.register_fake
def _(x):
    return x.new_empty(x.shape[0], (x.shape[1] + WORD - 1) // WORD, dtype=torch.int32)


@torch.library.custom_op("polylib::binary_linear", mutates_args=())
def _product(x_words: Tensor, w_words: Tensor, features: int) -> Tensor:
    """Return y (rows, N); x_words (rows, L) and w_words (N, L) have any strides."""
    x, w = x_words.contiguous(), w_words.contiguous()
    (rows, length), outputs = x.shape, w.shape[0]
    y = x.new_empty(rows, outputs)
    if y.numel() == 0:
        return y
    part = unit(length)
    shape = (rows, outputs, length // part, features)
    with on_device(x):
        if rows <= _FEW:
            words = min(triton.next_power_of_2(length), 128)
            height = _WORDS // words
            _few_rows_kernel[(rows * triton.cdiv(outputs, height),)](
                x, w, y, *shape, UNIT=part, OUTPUTS=height, WORDS=words
            )
        else:
            _tile_kernel[(triton.cdiv(rows, _TILE) * triton.cdiv(outputs, _TILE),)](
                x, w, y, *shape, UNIT=part, SIZE=_TILE, num_warps=2
            )
    return y


@_product.register_fake
def _(x_words, w_words, features):
    return x_words.new_empty(x_words.shape[0], w_words.shape[0])


# --- the public functions ---------------------------------------------------------------------------------------------


def pack_signs(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the signs of x, 32 in each word of int32, for `binary_linear`. It has no gradient.

    Args:
        x: (..., K) with K >= 1, any strides. Zero counts as positive, also -0.0, and what is not a number as negative.
        backend: "auto" runs the Triton kernel on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist.

    Returns:
        (..., ceil(K / 32)) of int32. The last word is filled up with bits of 0.

    Raises:
        ValueError: x without a last dimension of at least 1, an unknown backend.
        TypeError: not a floating-point tensor.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    check_tensors({"x": x})
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., K) with K >= 1, got {tuple(x.shape)}")
    if choose_backend(backend, x) == "reference":
        return pack_signs_reference(x.detach())
    return _pack(x.detach().reshape(-1, x.shape[-1])).view(*x.shape[:-1], -(-x.shape[-1] // WORD))


def binary_linear(x_words: Tensor, w_words: Tensor, features: int, *, backend: str = "auto") -> Tensor:
    """Return the sums over K products of signs, each -1 or 1, as whole numbers. It has no gradient.

    Args:
        x_words: (..., L) of int32 from `pack_signs`, any strides.
        w_words: (N, L) of int32 from `pack_signs`, a row an output.
        features: K, the number of signs that were packed, up to 2**29; L is ceil(K / 32).
        backend: "auto" runs the Triton kernels on CUDA tensors and the reference elsewhere and under `torch.func`;
            "triton" and "reference" insist.

    Returns:
        (..., N) of int32, from -K to K.

    Raises:
        ValueError: words of another shape, tensors on different devices, an unknown backend.
        TypeError: words that are not a tensor of int32.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Courbariaux and others, "Binarized Neural Networks", arXiv 1602.02830.
    """
    features = _checks.integer("features", features, least=1, most=2**29)
    length = -(-features // WORD)
    for name, words in (("x_words", x_words), ("w_words", w_words)):
        if not isinstance(words, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(words).__name__}")
        if words.dtype != torch.int32:
            raise TypeError(f"{name} must have dtype torch.int32, from pack_signs, got {words.dtype}")
    if x_words.dim() == 0 or x_words.shape[-1] != length:
        raise ValueError(
            f"x_words must have shape (..., L) with L = {length} for {features} features, got {tuple(x_words.shape)}"
        )
    if w_words.dim() != 2 or w_words.shape[-1] != length:
        raise ValueError(
            f"w_words must have shape (N, L) with L = {length} for {features} features, got {tuple(w_words.shape)}"
        )
    if w_words.device != x_words.device:
        raise ValueError(f"w_words must be on the device of x_words, {x_words.device}, got {w_words.device}")
    if choose_backend(backend, x_words, (torch.int32,)) == "reference":
        return binary_linear_reference(x_words, w_words, features)
    return _product(x_words.reshape(-1, length), w_words, features).view(*x_words.shape[:-1], w_words.shape[0])


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, features: int, outputs: int) -> Cost:
    """Return the least bytes and operations of the product: words read once, y written once.

    A product and a sum for each pair of signs count as two, so that it can be compared with other matrix products.
    """
    length = -(-features // WORD)
    return Cost(4 * (rows * length + outputs * length + rows * outputs), 2 * rows * outputs * features)


def cost_of_packing(rows: int, features: int, dtype: torch.dtype) -> Cost:
    """Return the least bytes and operations of `pack_signs`: x read and words written once; 3 an entry (a comparison, a
    shift, a sum).
    """
    return Cost(rows * features * dtype.itemsize + 4 * rows * -(-features // WORD), 3 * rows * features)
