"""S4D: long convolutions whose kernels are sums of decaying waves, the impulse responses of diagonal state spaces.

A. Gu, A. Gupta, K. Goel and C. Re, "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS
2022 (arXiv 2206.11893). Each channel has a state that follows x' = A x + B u, y = C x + D u with a diagonal complex A;
a step of length Delta turns it into a recurrence, and that into a convolution with K_l = 2 Re sum_n C_n B_n A_n^l (here
A and B are those of a step). All parameters are real, so that every optimizer of torch can train them.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened
from polylib.kernels.s4d_scan import s4d_scan
from polylib.kernels.vandermonde import vandermonde
from polylib.sequences.hippo import SPECTRA, s4d_spectrum
from polylib.sequences.long_convolution import causal_convolution

DECAYS = ("exp", "softplus", "relu")


class S4DKernel(nn.Module):
    """The convolution kernels of `d_model` diagonal state spaces, and the same as recurrences.

    Attributes:
        log_dt: the logarithm of the step Delta, (H,).
        decay: what `transform` turns into -Re A, (H, N / 2).
        frequency: Im A, (H, N / 2).
        B, C: (H, N / 2, 2), real and imaginary parts. B is a parameter only if it is trained.

    Args:
        d_model: H, how many.
        d_state: N, the size of each state, even: N / 2 complex numbers that stand for themselves and their conjugates.
        init: the spectrum at the start, see `s4d_spectrum`; "random" is drawn anew for each channel.
        dt_min, dt_max: Delta starts between them, uniform in its logarithm.
        disc: how a step is made: "zoh" holds the input during the step, "bilinear" is the trapezoidal rule.
        transform: keeps the real part of A negative: it is minus "exp", "softplus" or "relu" of a parameter.
        train_B: whether B, ones at the start, is trained. C, complex normal of variance 1, always is.

    Raises:
        ValueError: sizes that are no positive integers, an odd `d_state`, a range of steps that is empty or not
            positive, an unknown name.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        disc: Literal["zoh", "bilinear"] = "zoh",
        transform: Literal["exp", "softplus", "relu"] = "exp",
        train_B: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = _checks.integer("d_model", d_model, least=1)
        self.d_state = _checks.multiple("d_state", d_state, "the size of a conjugate pair", 2)
        _checks.choice("init", init, SPECTRA)
        dt_min = _checks.number("dt_min", dt_min, above=0)
        dt_max = _checks.number("dt_max", dt_max, least=dt_min)
        self.disc = _checks.choice("disc", disc, ("zoh", "bilinear"))
        self.transform = _checks.choice("transform", transform, DECAYS)
        waves = (self.d_model, self.d_state // 2)
        self.log_dt = nn.Parameter(torch.empty(self.d_model))
        self.decay = nn.Parameter(torch.empty(waves))
        self.frequency = nn.Parameter(torch.empty(waves))
        self.C = nn.Parameter(torch.empty(*waves, 2))
        if train_B:
            self.B = nn.Parameter(torch.empty(*waves, 2))
        else:
            self.register_buffer("B", torch.empty(*waves, 2))
        self._start(init, dt_min, dt_max)

    @torch.no_grad()
    def _start(self, init: str, dt_min: float, dt_max: float) -> None:
        """Draw the initial values. What they were drawn from is not kept: the spectra differ in nothing else."""
        self.log_dt.uniform_(math.log(dt_min), math.log(dt_max))
        if init == "random":
            A = torch.stack([s4d_spectrum(init, self.d_state) for _ in range(self.d_model)])
        else:
            A = s4d_spectrum(init, self.d_state).expand(self.d_model, -1)
        size = -A.real
        inverse = {"exp": size.log(), "softplus": size + (-(-size).expm1()).log(), "relu": size}
        self.decay.copy_(inverse[self.transform])
        self.frequency.copy_(A.imag)
        self.C.normal_(std=0.5**0.5)
        self.B.copy_(torch.tensor([1.0, 0.0], device="cpu"))

    def A(self) -> Tensor:
        """Return the diagonal of A as it stands, (H, N / 2), complex."""
        raw = widened(self.decay)
        size = raw.exp() if self.transform == "exp" else F.softplus(raw) if self.transform == "softplus" else raw.relu()
        return torch.complex(-size, widened(self.frequency))

    def discretized(self) -> tuple[Tensor, Tensor]:
        """Return the logarithm of A and B itself of the recurrence x <- A x + B u, each (H, N / 2), complex."""
        dt = widened(self.log_dt).exp()[:, None]
        z, B = dt * self.A(), dt * _paired(self.B)
        if self.disc == "zoh":
            return z, _expm1_over(z) * B
        # (1 + z/2) / (1 - z/2) has the squared size 1 + 2 Re z / abs(1 - z/2)^2: so a small z loses no digits.
        squared = (1 - z.real / 2).square() + z.imag.square() / 4
        shrink = (2 * z.real / squared).clamp(min=torch.finfo(z.real.dtype).eps - 1)  # at z = -2 all is forgotten
        cosine = 1 - (z.real.square() + z.imag.square()) / 4
        cosine = torch.where((cosine == 0) & (z.imag == 0), 1, cosine)  # there, where the angle has no meaning
        return torch.complex(torch.log1p(shrink) / 2, torch.atan2(z.imag, cosine)), B / (1 - z / 2)

    def waves(self) -> tuple[Tensor, Tensor]:
        """Return what `vandermonde` and `s4d_scan` ask for: the weight C B of each wave and log A, (H, N / 2) each."""
        log_A, B = self.discretized()
        return _paired(self.C) * B, log_A

    def forward(self, L: int) -> Tensor:
        """Return the kernels at the times 0, ..., L - 1, (H, L)."""
        return vandermonde(*self.waves(), L)

    def initial_state(self, *batch: int) -> Tensor:
        """Return zeros, `(*batch, H, N / 2)`, complex."""
        return torch.zeros_like(self.A()).expand(*batch, -1, -1)

    def recur(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the recurrence along (..., L, H), from `state` or from zeros.

        Returns:
            The outputs (..., L, H), which are those of the convolution, and the last state (..., H, N / 2).

        Raises:
            TypeError: inputs that are not floating.
            ValueError: shapes that don't fit.
        """
        fits = u.dim() >= 2 and u.shape[-1] == self.d_model
        _checks.shape("u", u, f"(..., L, {self.d_model})", fits)
        _checks.floating("dtype of u", u.dtype)
        state = self.initial_state(*u.shape[:-2]) if state is None else state
        expected = (*u.shape[:-2], self.d_model, self.d_state // 2)
        _checks.shape("state", state, f"{expected}", tuple(state.shape) == expected)
        log_A, B = self.discretized()
        A, C, outputs = log_A.exp(), 2 * _paired(self.C), []
        for now in widened(u).unbind(-2):
            state = A * state + B * now[..., None]
            outputs.append((C * state).sum(-1).real)
        y = torch.stack(outputs, -2) if outputs else widened(u)
        return y.to(u.dtype), state


class S4D(nn.Module):
    """A layer on sequences: S4D kernels and a direct path, GELU, dropout, and a gated linear map of the channels.

    Residual connections and normalisation are left to the network around it. It sees the past only.

    Args:
        d_model: channels.
        dropout: the share of the convolved channels that are dropped in training.
        kernel: for `S4DKernel`: `d_state`, `init`, `dt_min`, `dt_max`, `disc`, `transform`, `train_B`.
    """

    def __init__(self, d_model: int, *, dropout: float = 0.0, **kernel: Any) -> None:
        super().__init__()
        self.kernel = S4DKernel(d_model, **kernel)
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(_checks.number("dropout", dropout, least=0, most=1))
        self.mix = nn.Linear(d_model, 2 * d_model)

    def forward(self, u: Tensor) -> Tensor:
        """Return (B, L, H) of (B, L, H): on a GPU by `s4d_scan`, elsewhere by convolution with the kernels.

        Raises:
            ValueError: another shape, or no time at all.
        """
        fits = u.dim() == 3 and u.shape[1] > 0 and u.shape[2] == len(self.D)
        _checks.shape("u", u, f"(batch, L, {len(self.D)}) with L of at least 1", fits)
        if u.is_cuda and isinstance(self.kernel, S4DKernel):  # another module may have been put in its place
            return self._out(s4d_scan(u.mT, *self.kernel.waves()).mT, u)
        return self._out(causal_convolution(u.mT, self.kernel(u.shape[1])).mT, u)

    def recur(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same by the recurrence, from `state` or from zeros: the outputs and the last state (B, H, N / 2)."""
        y, state = self.kernel.recur(u, state)
        return self._out(y, u), state

    def step(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step: (B, H) and a state, or none at the start, to (B, H) and the state after it."""
        y, state = self.recur(u.unsqueeze(-2), state)
        return y.squeeze(-2), state

    def _out(self, y: Tensor, u: Tensor) -> Tensor:
        return F.glu(self.mix(self.dropout(F.gelu(y + self.D * u))), dim=-1)


def s4d_groups(
    model: nn.Module, learning_rate: float, *, dynamics_rate: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Return the parameter groups of the paper, for any optimizer of torch.

    A, Delta and a trained B, of all S4D kernels inside `model`, get `dynamics_rate` and no weight decay, which would
    pull the memory towards one fixed length. Everything else, C and D too, gets the other two numbers.
    """
    kernels = [module for module in model.modules() if isinstance(module, S4DKernel)]
    own = {id(p) for k in kernels for name, p in k.named_parameters(recurse=False) if name != "C"}
    parameters = [p for p in model.parameters() if p.requires_grad]
    rest, dynamics = ([p for p in parameters if (id(p) in own) is inside] for inside in (False, True))
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": dynamics, "lr": dynamics_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _paired(parts: Tensor) -> Tensor:
    """Real and imaginary parts along the last axis as complex numbers; a copy, so that no stride is too odd for it."""
    re, im = widened(parts).unbind(-1)
    return torch.complex(re, im)


def _expm1_over(z: Tensor) -> Tensor:
    """(e^z - 1) / z, and its derivative, with all digits near 0 and at 0."""
    small = z.abs() < 0.1
    near = torch.where(small, z, 0)
    series = torch.ones_like(z)
    for k in range(9, 1, -1):
        series = 1 + series * near / k
    far = torch.where(small, 1, z)
    return torch.where(small, series, (far.exp() - 1) / far)
