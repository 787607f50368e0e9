"""Tangent kernels of finite networks, and how well kernels and representations agree.

The tangent kernel K = J J^T holds the products of the gradients of all outputs. It says in which way a small step on
one sample moves the outputs of another, and it stays as it is in lazy training. For the weight of a linear layer the
gradient of output k on sample a is an outer product, of the layer's input A_a and the sensitivity D_ak of the output to
what the layer returned, so that

    K_(ak)(bl) = (A_a . A_b) (D_ak . D_bl),

and a layer that is applied several times, as in a recurrent network, adds such a product for every pair of its
applications. No Jacobian is formed then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from polylib import _checks

Params = dict[str, Tensor]


def empirical_ntk(
    model: nn.Module | Callable[[Params, Tensor], Tensor],
    params: Params,
    x: Tensor,
    *,
    wrt: Sequence[str] | None = None,
    method: str = "gram",
) -> Tensor:
    """The tangent kernel J J^T of a network on the samples `x`; it is not centred and not divided by anything.

    Works under `torch.func.vmap` over stacked parameters.

    Args:
        model: a module, or for `"jacobian"` any function of `(params, x)`. Samples must not influence each other: put
            layers that use the statistics of the batch into evaluation mode.
        params: the values of the parameters, by name.
        x: `(n, ...)`, the samples.
        wrt: the names by which J differentiates; all of `params` by default.
        method: `"gram"`, by the formula above, for weights and biases of `torch.nn.Linear` with inputs `(n, ..., p)`;
            `"jacobian"`, for any parameter, by forming J.

    Returns:
        `(n m, n m)`, where m is the number of outputs for one sample; row `a m + k` belongs to output k of sample a.

    Raises:
        ValueError: an unknown method or name, for `"gram"` a parameter that is not of a linear layer, or an output
            whose first dimension is not n.
    """
    names = list(params if wrt is None else wrt)
    for name in names:
        if name not in params:
            raise ValueError(f"wrt must name parameters, {sorted(params)}, got {name!r}")
    if method == "gram":
        return _gram(model, params, x, names)
    _checks.choice("method", method, ("gram", "jacobian"))
    call = (lambda p, x: functional_call(model, p, (x,))) if isinstance(model, nn.Module) else model
    rows = jacrev(lambda p: _rows(call({**params, **p}, x), x))({name: params[name] for name in names})
    jacobian = torch.cat([part.flatten(2) for part in rows.values()], 2).flatten(0, 1)
    return jacobian @ jacobian.mT


def _gram(model: Any, params: Params, x: Tensor, names: list[str]) -> Tensor:
    layers = _linear_layers(model, names)
    inputs: list[tuple[Any, Tensor]] = []

    def forward(shifts: list[Tensor] | None) -> Tensor:
        inputs.clear()
        shapes.clear()

        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.append((layer, arguments[0]))
            shapes.append(output)
            return output if shifts is None else output + shifts[len(inputs) - 1]

        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            return _rows(functional_call(model, params, (x,)), x)
        finally:
            for handle in handles:
                handle.remove()

    shapes: list[Tensor] = []
    forward(None)
    shifts = [torch.zeros_like(output) for output in shapes]
    out, pull = vjp(forward, shifts)
    recorded = [(layer, tensor) for layer, tensor in inputs]
    ones = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
    sensitivity = vmap(lambda one: pull(one.expand_as(out))[0])(ones)  # one output of all samples at a time
    total = out.new_zeros(out.numel(), out.numel())
    for layer, (weight, bias) in layers.items():
        applied = [(a, d) for (own, a), d in zip(recorded, sensitivity, strict=True) if own is layer]
        parts = [
            (a.flatten(1, -2), d.flatten(2, -2)) if a.dim() > 2 else (a[:, None], d[:, :, None]) for a, d in applied
        ]
        if not parts:
            continue
        a = torch.cat([part[0] for part in parts], 1).transpose(0, 1)  # (applications, n, p)
        d = torch.cat([part[1] for part in parts], 2).permute(2, 1, 0, 3).flatten(1, 2)  # (applications, n m, q)
        total = total + _pairs(a, d, out.shape[1], weight, bias)
    return total


def _pairs(a: Tensor, d: Tensor, outputs: int, weight: bool, bias: bool) -> Tensor:
    """The sum over all pairs of applications; a pair and its mirror image are each other's transpose."""
    total = d.new_zeros(d.shape[1], d.shape[1])
    for s in range(len(a)):
        for t in range(s + 1):
            seen = a[s] @ a[t].mT if weight else a.new_zeros(a.shape[1], a.shape[1])
            seen = seen + 1 if bias else seen
            product = (d[s] @ d[t].mT).unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs))
            product = (product * seen[:, None, :, None]).flatten(2, 3).flatten(0, 1)
            total = total + (product if s == t else product + product.mT)
    return total


def _linear_layers(model: Any, names: list[str]) -> dict[nn.Linear, tuple[bool, bool]]:
    """The layers that own the parameters, with whether their weight and their bias are among them."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a module for method 'gram', or method='jacobian', got a {type(model).__name__}"
        )
    wanted: dict[nn.Linear, tuple[bool, bool]] = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"wrt must name parameters of a torch.nn.Linear for 'gram', got {name!r}, of a {type(layer).__name__}"
            )
        weight, bias = wanted.get(layer, (False, False))
        wanted[layer] = (weight or kind == "weight", bias or kind == "bias")
    return wanted


def _rows(output: Tensor, x: Tensor) -> Tensor:
    if output.dim() < 1 or len(output) != len(x):
        raise ValueError(f"model must return shape ({len(x)}, ...), a row for each sample, got {tuple(output.shape)}")
    return output.reshape(len(x), -1)


def kernel_alignment(k0: Tensor, k1: Tensor, *, center: bool = False) -> Tensor:
    """The cosine of the angle between two kernels: ``<K0, K1> / (|K0| |K1|)``, in the Frobenius product.

    1 if one is a positive multiple of the other. Between 0 and 1 for positive semidefinite kernels.

    Args:
        k0, k1: `(..., m, m)`, of one shape.
        center: subtract the means of rows and columns first. The paper does not.

    Returns:
        `(...)`.

    Raises:
        ValueError: shapes that differ or are not square, or a kernel of norm zero.
    """
    if k0.shape != k1.shape or k0.dim() < 2 or k0.shape[-1] != k0.shape[-2]:
        raise ValueError(f"k0 and k1 must have shape (..., m, m), got {tuple(k0.shape)} and {tuple(k1.shape)}")
    if center:
        k0, k1 = (
            k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-1, -2), keepdim=True) for k in (k0, k1)
        )
    norms = [torch.linalg.matrix_norm(k) for k in (k0, k1)]
    for name, norm in zip(("k0", "k1"), norms, strict=True):
        if (norm == 0).any():
            raise ValueError(f"{name} must have an entry that is not zero, got a kernel of norm zero")
    return ((k0 / norms[0][..., None, None]) * (k1 / norms[1][..., None, None])).sum((-1, -2))


def representation_alignment(h0: Tensor, h1: Tensor) -> Tensor:
    """`kernel_alignment` of the products of all pairs of samples, H0 H0^T and H1 H1^T.

    It does not see rotations or a common scale of the hidden units.

    Args:
        h0, h1: `(..., n, N)`, the hidden states of the same n samples; N may differ.

    Raises:
        ValueError: as `kernel_alignment`.
    """
    return kernel_alignment(h0 @ h0.mT, h1 @ h1.mT)
