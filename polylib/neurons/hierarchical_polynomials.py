r"""Hierarchical polynomials, and the three-layer network that learns them layer by layer.

Z. Wang, E. Nichani and J. D. Lee, "Learning Hierarchical Polynomials with Three-Layer Neural Networks", ICLR 2024
(arXiv 2311.13774). The target is h(x) = g(p(x)) for Gaussian x: a polynomial p of degree k, the feature, inside a link
g of degree q. The network has a bottleneck of width one and a residual link,

    phi(x) = sum_j u_j sigma_2(v_j . x + s_j),    h(x) = phi(x) + sum_i c_i relu(a_i phi(x) / tau + b_i),

and only u and c are trained, one after the other, on separate halves of the data. Three details are ours: the features
of the first layer are centred, tau is the deviation of phi on the second half, and the second stage also fits a linear
term and a constant.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from polylib import _checks

METHODS = ("ridge", "gd")


def pair_product_feature(x: Tensor) -> Tensor:
    """The feature p(x) = sqrt(2/d) (x_1 x_2 + x_3 x_4 + ...), `(n, d)` to `(n,)`, of mean 0 and variance 1.

    Raises:
        ValueError: d is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of features, got {x.shape[-1]}")
    return math.sqrt(2 / x.shape[-1]) * (x[..., ::2] * x[..., 1::2]).sum(-1)


def hermite_link(coefficients: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The link g = sum_k coefficients[k - 1] h_k with the Hermite polynomials of unit variance: h_1 = z,
    h_2 = (z^2 - 1) / sqrt(2), ...

    Raises:
        ValueError: no coefficients.
    """
    coefficients = [float(value) for value in coefficients]
    if not coefficients:
        raise ValueError("coefficients must have at least one entry, got none")

    return partial(_hermite_series, coefficients)


def _hermite_series(coefficients: Sequence[float], z: Tensor) -> Tensor:
    before, current, total = torch.ones_like(z), z, coefficients[0] * z
    for k, coefficient in enumerate(coefficients[1:], start=1):
        before, current = current, (z * current - math.sqrt(k) * before) / math.sqrt(k + 1)
        total = total + coefficient * current
    return total


def gaussian_mean_derivative(g: Callable[[Tensor], Tensor], nodes: int = 64) -> float:
    """E g'(z) for standard normal z. By Stein's lemma it is E z g(z), which Gauss-Hermite quadrature with `nodes` nodes
    gives exactly for polynomials up to degree 2 nodes - 2."""
    z, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    return float((weights * z * g(z)).sum() / weights.sum())


class HierarchicalPolynomial:
    """The target h(x) = g(p(x)) and its samples.

    Args:
        p: the feature, `(n, d)` to `(n,)`; of mean 0 and variance 1 for Gaussian x.
        g: the link, `(n,)` to `(n,)`.
    """

    def __init__(
        self, p: Callable[[Tensor], Tensor] = pair_product_feature, g: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.p, self.g = p, hermite_link([math.sqrt(0.5), math.sqrt(0.5)]) if g is None else g

    def sample(self, n: int, d: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal inputs `(n, d)`, targets g(p(x)) `(n,)`, and the values of the feature, `(n,)`."""
        _checks.integer("n", n, least=1)
        x = torch.randn(n, d, generator=generator)
        z = self.p(x)
        return x, self.g(z), z


def poly2(t: Tensor) -> Tensor:
    """h_2(t) + h_1(t): features of this activation span the quadratic polynomials, and no more."""
    return (t * t - 1) / math.sqrt(2) + t


class ThreeLayerResidualNet(nn.Module):
    """The network of the module's docstring, `(n, d)` to `(n,)`. Before training it computes 0.

    Args:
        d: number of inputs.
        m1: ReLU units of the link.
        m2: features of the first layer. To reach every quadratic with `poly2` it takes d (d + 1) / 2 + d.
        sigma2: `"poly2"` or any activation.
        generator: draws the frozen weights: v uniform on the sphere, s of variance 1/2, a = 1 or -1, b uniform on
            [-3, 3].

    Parameters: `u` (m2,) and `c` (m1 + 2,), both 0 at first; the last two of `c` weigh phi / tau and 1.

    Raises:
        ValueError: a size below 1, or an unknown name for `sigma2`.
    """

    def __init__(
        self,
        d: int,
        m1: int = 100,
        m2: int = 1000,
        sigma2: str | Callable[[Tensor], Tensor] = "poly2",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("m1", m1), ("m2", m2)):
            _checks.integer(name, value, least=1)
        if sigma2 != "poly2" and not callable(sigma2):
            raise ValueError(f"sigma2 must be 'poly2' or a function, got {sigma2!r}")
        self.d, self.sigma2 = d, poly2 if sigma2 == "poly2" else sigma2
        directions = torch.randn(m2, d, generator=generator)
        self.register_buffer("v", directions / directions.norm(dim=1, keepdim=True))
        self.register_buffer("s", math.sqrt(0.5) * torch.randn(m2, generator=generator))
        self.register_buffer("a", torch.randint(2, (m1,), generator=generator) * 2.0 - 1)
        self.register_buffer("b", 6 * torch.rand(m1, generator=generator) - 3)
        self.register_buffer("centre", torch.zeros(m2))
        self.register_buffer("tau", torch.ones(()))
        self.u, self.c = nn.Parameter(torch.zeros(m2)), nn.Parameter(torch.zeros(m1 + 2))

    def features(self, x: Tensor) -> Tensor:
        """sigma_2(v_j . x + s_j) minus its mean, `(n, m2)`."""
        if x.dim() != 2 or x.shape[1] != self.d:
            raise ValueError(f"x must have shape (n, {self.d}), got {tuple(x.shape)}")
        return self.sigma2(x @ self.v.T + self.s) - self.centre

    def bottleneck(self, x: Tensor) -> Tensor:
        """phi, `(n, d)` to `(n,)`."""
        return self.features(x) @ self.u

    def link_features(self, phi: Tensor) -> Tensor:
        """What the second stage combines: m1 ReLU units, a linear and a constant term, `(n,)` to `(n, m1 + 2)`."""
        scaled = (phi / self.tau)[:, None]
        return torch.cat([torch.relu(self.a * scaled + self.b), scaled, torch.ones_like(scaled)], 1)

    def forward(self, x: Tensor) -> Tensor:
        phi = self.bottleneck(x)
        return phi + self.link_features(phi) @ self.c


def least_squares(
    features: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, fractions: Sequence[float], chunk: int = 4096
) -> Tensor:
    """Ridge regression for several ridges, `(len(fractions), m)`: the minimisers of

    1/(2n) ||F w - y||^2 + xi/2 ||w||^2,  xi = fraction * the largest eigenvalue of F^T F / n.

    F = features(x) is `(n, m)`; it is formed `chunk` rows at a time and never stored whole.
    """
    gram, moment = _moments(features, x, y, chunk)
    return torch.stack([_ridge(gram, moment, fraction * largest_eigenvalue(gram)) for fraction in fractions])


def largest_eigenvalue(matrix: Tensor, steps: int = 50) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, from below, by power iteration."""
    vector = torch.ones_like(matrix[0])
    for _ in range(steps):
        product = matrix @ vector
        if not product.any():
            return 0.0
        vector = product / product.norm()
    return float(vector @ matrix @ vector)


@torch.no_grad()
def fit_layerwise(
    net: ThreeLayerResidualNet,
    x1: Tensor,
    y1: Tensor,
    x2: Tensor,
    y2: Tensor,
    xi1: float,
    xi2: float,
    method: str = "ridge",
    lr: float | None = None,
    steps: int = 1000,
) -> None:
    """Train `net` in place: u on the first sample with c = 0, then c on the second one.

    Each stage minimises half the mean squared error plus half of xi times the squared norm, with
    xi = xi1 (or xi2) times the largest eigenvalue of the second moments of its features.

    Args:
        method: `"ridge"` solves both problems; `"gd"` takes `steps` steps of full-batch gradient descent from 0.
        lr: of gradient descent; by default one over the largest curvature. At twice that it becomes unstable, and a
            warning says so.

    Raises:
        ValueError: a negative xi, an unknown method, or fewer than two samples.
    """
    for name, value in (("xi1", xi1), ("xi2", xi2)):
        _checks.number(name, value, least=0)
    _checks.choice("method", method, METHODS)
    for name, x in (("x1", x1), ("x2", x2)):
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {len(x)}")

    def solve(gram: Tensor, moment: Tensor, fraction: float) -> Tensor:
        top = largest_eigenvalue(gram)
        if method == "ridge":
            return _ridge(gram, moment, fraction * top)
        return _descend(gram, moment, fraction * top, top, lr, steps)

    net.centre.zero_()
    net.centre.copy_(sum(net.features(part).sum(0) for part in x1.split(4096)) / len(x1))
    net.u.copy_(solve(*_moments(net.features, x1, y1), xi1))
    phi = torch.cat([net.bottleneck(part) for part in x2.split(4096)])
    net.tau.copy_(phi.std().clamp(min=torch.finfo(phi.dtype).tiny))
    net.c.copy_(solve(*_moments(net.link_features, phi, y2 - phi), xi2))


def _moments(features: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """F^T F / n and F^T y / n."""
    gram = moment = x.new_zeros(())
    for rows, targets in zip(x.split(chunk), y.split(chunk), strict=True):
        block = features(rows)
        gram, moment = gram + block.T @ block, moment + block.T @ targets
    return gram / len(x), moment / len(x)


def _ridge(gram: Tensor, moment: Tensor, xi: float) -> Tensor:
    regular = gram + xi * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(regular, moment)


def _descend(gram: Tensor, moment: Tensor, xi: float, top: float, lr: float | None, steps: int) -> Tensor:
    rate = 1 / (top + xi) if lr is None else lr
    if rate >= 2 / (top + xi):
        warnings.warn(f"lr is {rate:.3g}; gradient descent is stable below {2 / (top + xi):.3g}", stacklevel=4)
    w = torch.zeros_like(moment)
    for _ in range(steps):
        w = w - rate * (gram @ w - moment + xi * w)
    return w
