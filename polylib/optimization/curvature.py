"""The curvature of a loss without its Hessian: products with a vector, Lanczos, and the density of eigenvalues.

A Hessian of P parameters has P^2 entries; its product with a vector costs about as much as two gradients. Lanczos'
iteration turns m such products into a tridiagonal matrix T, m x m, whose eigenvalues (Ritz values) are the Gauss
quadrature nodes of the spectral measure of the Hessian seen from the start vector. Averaged over random start vectors,
they estimate the density of all eigenvalues: stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017; applied to
networks by Ghorbani, Krishnan and Xiao, 2019, and by Granziol, Zohren and Roberts, arXiv 2006.09092).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from polylib import _checks

Params = Tensor | dict[str, Tensor]
Matvec = Callable[[Tensor], Tensor]


def hessian_vector_product(loss_fn: Callable[[Params], Tensor], params: Params, v: Params) -> Params:
    """The exact product of the Hessian of `loss_fn` at `params` with `v`: the derivative of the gradient along `v`.

    Forward over reverse, so that `torch.func.vmap` over `v` computes several products in one pass. Layers that draw
    random numbers or use the statistics of the batch must be in evaluation mode, or there is no fixed Hessian.

    Args:
        loss_fn: maps parameters, a tensor or a dict of tensors, to a scalar.
        params: where the Hessian is taken.
        v: of the same names, shapes and dtypes as `params`.

    Raises:
        ValueError: `v` does not match `params`.
    """
    _check_like(params, v)
    return jvp(grad(loss_fn), (params,), (v,))[1]


def ggn_vector_product(
    model_fn: Callable[[Params], Tensor], loss_fn: Callable[[Tensor], Tensor], params: Params, v: Params
) -> Params:
    """The product of the generalised Gauss-Newton matrix J^T L J of `loss_fn(model_fn(params))` with `v`.

    J is the Jacobian of the outputs by the parameters and L the Hessian of the loss by the outputs. The matrix is what
    remains of the Hessian when the model is replaced by its linearisation; for a convex loss it has no negative
    eigenvalue. Arguments and errors as in `hessian_vector_product`.
    """
    _check_like(params, v)
    outputs, change = jvp(model_fn, (params,), (v,))
    return vjp(model_fn, params)[1](hessian_vector_product(loss_fn, outputs, change))[0]


def flat_matvec(product: Callable[[dict[str, Tensor]], dict[str, Tensor]], params: dict[str, Tensor]) -> Matvec:
    """A product with dicts of tensors like `params` as a function of flat vectors `(P,)`, for `lanczos`.

    The vector holds the parameters in the order of the dict, each flattened, as `parameters_to_vector` of torch does.
    """
    sizes = [value.numel() for value in params.values()]

    def matvec(vector: Tensor) -> Tensor:
        parts = zip(params.items(), vector.split(sizes), strict=True)
        result = product({name: part.view_as(value) for (name, value), part in parts})
        return torch.cat([result[name].flatten() for name in params])

    return matvec


def hessian_matvec(loss_fn: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> Matvec:
    """The Hessian of `loss_fn` at `params` as a function of flat vectors `(P,)`, for `lanczos` and its kin."""
    return flat_matvec(lambda v: hessian_vector_product(loss_fn, params, v), params)


class LanczosResult(NamedTuple):
    """What m steps of Lanczos' iteration found.

    `alpha`, `(m,)`, and `beta`, `(m - 1,)`: the diagonal and the side diagonal of T. `basis`, `(m, P)`: orthonormal
    rows. `ritz`, `(m,)`: the eigenvalues of T, ascending. `weights`, `(m,)`: how much of the start vector lies along
    each of them; they add up to 1.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor
    ritz: Tensor
    weights: Tensor


def lanczos(matvec: Matvec, v0: Tensor, num_steps: int, *, reorth: bool = True) -> LanczosResult:
    """Lanczos' iteration for a symmetric matrix that is given by its product with a vector.

    The extreme Ritz values converge to the extreme eigenvalues within few steps. The iteration ends early, with a
    shorter result, when the vectors so far span an invariant subspace: its Ritz values are then exact.

    Args:
        matvec: `(P,)` to `(P,)`, linear and symmetric.
        v0: the start vector, `(P,)`, of any length but zero.
        num_steps: 1 to P.
        reorth: make each new vector orthogonal to all before it, twice. Without, rounding lets converged eigenvalues
            appear again as ghosts.

    Raises:
        ValueError: a zero or non-finite `v0`, one that is not a vector, `num_steps` out of range, or a product that is
            not finite.
    """
    if v0.dim() != 1:
        raise ValueError(f"v0 must be a vector, got shape {tuple(v0.shape)}")
    if not v0.isfinite().all() or not v0.any():
        raise ValueError("v0 must be a direction, got one that is zero or not finite")
    _check_steps(num_steps, len(v0))
    alpha, beta, basis, length = _tridiagonal(lambda q: matvec(q[0])[None], v0[None], num_steps, reorth)
    m = int(length[0])
    ritz, weights = _quadrature(alpha[:, :m], beta[:, : m - 1])
    return LanczosResult(alpha[0, :m], beta[0, : m - 1], basis[0, :m], ritz[0], weights[0])


class SpectralDensity(NamedTuple):
    """An estimate of the density of the eigenvalues of a matrix.

    `ritz` and `weights`, `(probes, m)`: a quadrature rule for each probe, whose weights add up to 1; the mean of a
    function f over all eigenvalues is about `(weights * f(ritz)).sum(-1).mean()`. `grid` and `density`, `(points,)`:
    the same as a smooth curve of integral 1.
    """

    ritz: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor


def spectral_density(
    matvec: Matvec,
    dim: int,
    num_steps: int,
    num_probes: int,
    grid: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    bandwidth: float | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    Args:
        matvec: `(dim,)` to `(dim,)`, linear and symmetric. All probes of a chunk go through it at once, by `vmap`.
        num_steps: of Lanczos' iteration, 1 to `dim`; the rule integrates polynomials of degree `2 num_steps - 1`.
        num_probes: random start vectors, with entries of +1 and -1.
        grid: where the curve is wanted; by default 400 points a little wider than the Ritz values.
        generator: draws the probes.
        bandwidth: the deviation of the Gaussian that each Ritz value is smoothed to; by default 1 % of the grid.
        chunk_size: how many probes go through `matvec` at once, all by default. With 1, `vmap` is not used.
        dtype, device: of the probes.

    Raises:
        ValueError: a size out of range, or a product that is not finite.
    """
    _check_steps(num_steps, dim)
    for name, value in (("num_probes", num_probes), ("chunk_size", num_probes if chunk_size is None else chunk_size)):
        _checks.integer(name, value, least=1)
    if bandwidth is not None:
        _checks.number("bandwidth", bandwidth, above=0)
    source = device if generator is None else generator.device
    signs = torch.randint(2, (num_probes, dim), generator=generator, device=source)
    probes = (2 * signs - 1).to(device=device, dtype=dtype or torch.get_default_dtype())
    rules = []
    for chunk in probes.split(chunk_size or num_probes):
        mapped = vmap(matvec) if chunk_size != 1 else lambda q: matvec(q[0])[None]
        rules.append(_quadrature(*_tridiagonal(mapped, chunk, num_steps, reorth=True)[:2]))
    ritz, weights = (torch.cat(parts) for parts in zip(*rules, strict=True))
    if grid is None:
        low, high = (edge(ritz[weights > 0]).item() for edge in (torch.min, torch.max))
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        grid = torch.linspace(low - margin, high + margin, 400).to(ritz)
    width = bandwidth or 0.01 * (grid.max() - grid.min()).item()
    bumps = torch.exp(-0.5 * ((grid[:, None] - ritz.flatten()) / width).square()) / (width * math.sqrt(2 * math.pi))
    return SpectralDensity(ritz, weights, grid, bumps @ weights.flatten() / num_probes)


def _tridiagonal(matvec: Matvec, start: Tensor, num_steps: int, reorth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lanczos' iteration for n start vectors `(n, P)` at once: alpha, beta, bases `(n, m, P)` and lengths `(n,)`.

    A row that has exhausted its subspace goes on with zero vectors: its T falls into two blocks, and the start vector
    has no part in the second one.
    """
    tiny = 8 * torch.finfo(start.dtype).eps
    q = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    basis = start.new_zeros(len(start), num_steps, start.shape[-1])
    alpha, beta = start.new_zeros(len(start), num_steps), start.new_zeros(len(start), num_steps)
    scale, alive = start.new_zeros(len(start)), torch.ones(len(start), dtype=torch.bool, device=start.device)
    length = torch.zeros_like(alive, dtype=torch.long)
    for k in range(num_steps):
        basis[:, k] = q
        length += alive
        r = matvec(q).detach()
        if not r.isfinite().all():
            raise ValueError(f"matvec returned a value that is not finite at step {k + 1}")
        alpha[:, k] = (q * r).sum(-1)
        if reorth:
            for _ in range(2):
                known = basis[:, : k + 1]
                r = r - torch.einsum("nk,nkp->np", torch.einsum("nkp,np->nk", known, r), known)
        else:
            r = r - alpha[:, k, None] * q - (beta[:, k - 1, None] * basis[:, k - 1] if k else 0)
        size = torch.linalg.vector_norm(r, dim=-1)
        scale = torch.maximum(scale, alpha[:, k].abs())
        alive = alive & (size > tiny * torch.maximum(scale, size))
        scale = torch.maximum(scale, size)
        beta[:, k] = size.where(alive, 0)
        q = (r / size.where(alive, 1)[:, None]).where(alive[:, None], 0)
        if not alive.any():
            break
    return alpha, beta[:, :-1], basis, length


def _quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights `(n, m)` from n tridiagonal matrices, computed in float64 on the CPU: they are small."""
    matrix = torch.diag_embed(alpha.double().cpu())
    side = beta.double().cpu()
    matrix = matrix + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    ritz, vectors = torch.linalg.eigh(matrix)
    return ritz.to(alpha), vectors[:, 0].square().to(alpha)


def _check_steps(num_steps: int, dim: int) -> None:
    _checks.integer("num_steps", num_steps, least=1, most=dim)


def _check_like(params: Params, v: Params) -> None:
    here, there = ({"params": x} if isinstance(x, Tensor) else x for x in (params, v))
    if here.keys() != there.keys():
        raise ValueError(f"v must have the names {sorted(here)}, as params, got {sorted(there)}")
    for name, value in here.items():
        if value.shape != there[name].shape or value.dtype != there[name].dtype:
            given = f"{tuple(there[name].shape)} {there[name].dtype}"
            raise ValueError(f"v[{name!r}] must be {tuple(value.shape)} {value.dtype}, as params, got {given}")
