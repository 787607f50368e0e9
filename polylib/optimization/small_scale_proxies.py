"""Instabilities of large Transformers that show in small ones at high learning rates, and what removes them.

M. Wortsman, P. J. Liu, L. Xiao et al., "Small-scale proxies for large-scale Transformer training instabilities", ICLR
2024 (arXiv 2309.14322). Attention logits grow without bound at a high rate: `QKNormAttention` normalises queries and
keys. Output logits drift away from zero: `cross_entropy_z_loss` holds them. Weight decay is easier to set when it
does not shrink with the rate: `AdamWIndependent`. `lr_sensitivity` measures how much a model minds its learning rate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks

TRUNCATED = 0.8796  # the deviation of a standard normal variable that is cut off at two deviations


def rope(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (Su et al., 2021): `(..., length, size)` to the same, `size` even.

    The pair (x_i, x_{i + size/2}) at position t is rotated by the angle t base^(-2i / size), so that the inner product
    of two rotated vectors depends on the difference of their positions only. Lengths of vectors are kept.
    """
    half = x.shape[-1] // 2
    exact: dict[str, Any] = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    angles = torch.arange(x.shape[-2], **exact)[:, None] * base ** (-torch.arange(half, **exact) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class QKNormAttention(nn.Module):
    """Causal self-attention whose queries and keys are normalised: `(batch, length, dim)` to the same, no biases.

    q and k pass through a layer norm over the features of a head, with one learned scale that all heads share, then
    through rotary embedding. The logits q k^T / sqrt(d), with d = dim / num_heads, are then at most
    ``sqrt(d) max|scale_q| max|scale_k|`` in magnitude, whatever the weights.

    While `track` is true, each call stores the largest magnitude of a logit of a visible pair in `max_logit`, a
    scalar. Leave it off under `vmap`.

    Args:
        dim, num_heads: the width, and the number of heads that share it.
        qk_norm: without, the same attention with no norms.
        rope_base: of the rotary embedding.
        eps: of the norms.

    Raises:
        ValueError: `dim` that is no multiple of `num_heads`, or an odd number of features in a head.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qk_norm: bool = True, rope_base: float = 10000.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads or dim // num_heads % 2:
            raise ValueError(
                f"dim must give each head an even number of features, got {dim} for num_heads = {num_heads}"
            )
        self.num_heads, self.rope_base = num_heads, rope_base
        self.inputs = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        head = dim // num_heads
        self.q_norm = nn.LayerNorm(head, eps=eps, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head, eps=eps, bias=False) if qk_norm else nn.Identity()
        self.track, self.max_logit = False, None
        initialise_(self)

    def pattern(self, logits: Tensor) -> Tensor:
        """What the values are weighted by: the softmax of the logits, in float32 or better. Hidden ones are -inf."""
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        q, k = rope(self.q_norm(q), self.rope_base), rope(self.k_norm(k), self.rope_base)
        logits = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)
        later = x.new_full((x.shape[-2], x.shape[-2]), float("-inf")).triu(1)
        if self.track:
            self.max_logit = logits.detach().abs().add(later).max()
        pattern = self.pattern(logits + later)
        return self.output((pattern @ v).transpose(-3, -2).flatten(-2))


@torch.no_grad()
def max_attention_logits(model: nn.Module, x: Tensor) -> Tensor:
    """The largest magnitude of an attention logit in every `QKNormAttention` of a model, `(layers,)`, for one input.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QKNormAttention)]
    if not layers:
        raise ValueError(f"model must have at least one QKNormAttention, got a {type(model).__name__} without")
    before = [layer.track for layer in layers]
    for layer in layers:
        layer.track = True
    try:
        model(x)
    finally:
        for layer, track in zip(layers, before, strict=True):
            layer.track = track
    return torch.stack([layer.max_logit for layer in layers])  # type: ignore[misc]


@torch.no_grad()
def initialise_(model: nn.Module) -> nn.Module:
    """The paper's initial values, in place: matrices of deviation 1/sqrt(fan-in), embeddings of 1/sqrt(width).

    The matrices are drawn from a normal distribution that is cut off at two deviations. That makes its deviation 0.8796
    times as large, which is divided out. Biases are set to 0, the scales of norms are left at 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, a=-2.0, b=2.0)
            module.weight.div_(TRUNCATED * math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    return model


def cross_entropy_z_loss(
    logits: Tensor, target: Tensor, z_coeff: float = 1e-4, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus `z_coeff` times the mean of (log Z)^2, where Z is the sum of the exponentials of the logits.

    Softmax does not change when a constant is added to all logits, so that nothing in the plain loss keeps log Z near
    0. The second term does; with it the gradient of a row is p (1 + 2 z_coeff log Z) minus the one-hot target.

    Args:
        logits: `(..., V)`; float16 and bfloat16 are computed in float32.
        target: `(...)`, int64 classes from 0 to V - 1.
        ignore_index: rows with this target do not count.

    Returns:
        The loss, a scalar, and log Z, `(...)`.

    Raises:
        ValueError: shapes that do not match, or a negative coefficient.
        IndexError: a target out of range.
    """
    if logits.dim() < 2 or logits.shape[:-1] != target.shape:
        raise ValueError(f"target must have shape {tuple(logits.shape[:-1])}, as the logits, got {tuple(target.shape)}")
    _checks.number("z_coeff", z_coeff, least=0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = logits.logsumexp(-1)
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index)
    if z_coeff:
        counts = (target != ignore_index).to(log_z)
        loss = loss + z_coeff * (counts * log_z.square()).sum() / counts.sum()
    return loss, log_z


class AdamWIndependent(torch.optim.AdamW):
    """AdamW whose weight decay does not depend on the learning rate: w <- w - s (lr update + weight_decay w).

    s is what a schedule has made of the rate: the rate now in force over the one given at the start, so that schedules
    act on both terms. It is `torch.optim.AdamW` with `weight_decay / lr` for its decay, and `param_groups` shows that.

    Raises:
        ValueError: a group whose `lr` is not above 0.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["weight_decay"] = _coupled(group["weight_decay"], group["lr"])


def _coupled(weight_decay: float, lr: float) -> float:
    """The decay that has the same effect where it is multiplied by the learning rate."""
    if not lr > 0:
        raise ValueError(f"lr must be a number above 0 with independent weight decay, got {lr}")
    return weight_decay / lr


def decay_groups(
    params: Iterable[nn.Parameter], lr: float, weight_decay: float = 1e-4, *, independent: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, of torch or of `train_many`: matrices decay, biases and the scales of norms do not.

    Args:
        independent: the decay of a step is `weight_decay` whatever the rate; else it is `lr * weight_decay`.
    """
    params = list(params)
    decay = _coupled(weight_decay, lr) if independent else weight_decay
    groups = [
        {"params": [p for p in params if p.dim() > 1], "lr": lr, "weight_decay": decay},
        {"params": [p for p in params if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def mu_param_groups(
    model: nn.Module,
    lr: float,
    base_fan_in: int = 256,
    weight_decay: float = 0.0,
    *,
    independent: bool = True,
    readout: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of the paper's muParam (simple): hidden linear layers learn at `lr * base_fan_in / fan_in`.

    The best `lr` is then about the same at every width. Embeddings, norms, biases and the output layer learn at `lr`.

    Args:
        base_fan_in: the width at which nothing changes.
        weight_decay, independent: as in `decay_groups`.
        readout: the output layer; by default `model.head`, if there is one.

    Raises:
        ValueError: `base_fan_in` below 1.
    """
    _checks.integer("base_fan_in", base_fan_in, least=1)
    readout = getattr(model, "head", None) if readout is None else readout
    fan_in = {
        id(layer.weight): layer.in_features
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer is not readout
    }
    groups = []
    for size in sorted({base_fan_in, *fan_in.values()}):
        params = [p for p in model.parameters() if fan_in.get(id(p), base_fan_in) == size]
        groups += decay_groups(params, lr * base_fan_in / size, weight_decay, independent=independent)
    return groups


def warmup_cosine(fraction: float, warmup: float = 0.05, floor: float = 0.0) -> float:
    """The paper's schedule: linearly from 0 to 1 in the first `warmup` of training, then half a cosine to `floor`."""
    if fraction < warmup:
        return fraction / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def lr_sensitivity(losses: Tensor, initial_loss: float | Tensor) -> Tensor:
    """How much is lost on average by a learning rate that is not the best: the mean of min(loss, initial) - best.

    Args:
        losses: `(..., rates)`, the final validation losses; a value that is not finite counts as the initial loss.
        initial_loss: before training, a number or `(...)`.

    Returns:
        `(...)`.

    Raises:
        ValueError: no losses.
    """
    if losses.dim() == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must have shape (..., rates) with at least one rate, got {tuple(losses.shape)}")
    ceiling = torch.as_tensor(initial_loss, dtype=losses.dtype, device=losses.device)[..., None]
    capped = torch.minimum(losses.where(losses.isfinite(), ceiling), ceiling)
    return capped.mean(-1) - capped.min(-1).values
