"""Power-law graph attention: softmax(q G k^T / sqrt(d)) v, with a bilinear form G inferred from the input.

B. Gokden, "PLDR-LLMs Learn A Generalizable Tensor Operator That Can Replace Its Own Deep Neural Net At Inference", 2025
(arXiv 2502.13502); initial values and caches as in the author's code, burcgokden/PLDR-LLM-with-KVG-cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.sequences.metric_learner import Deductive, MetricLearner, xavier
from polylib.sequences.rotary import rotate_by_position


class KVCache(NamedTuple):
    """What later tokens need: keys and values of earlier ones, `(batch, heads, n, d)`, and the A of the first call.

    `A`, `(batch, heads, d, d)`, is not updated by later tokens. It is None where the first call had a given G.
    """

    k: Tensor
    v: Tensor
    A: Tensor | None


def bilinear_attention(q: Tensor, k: Tensor, v: Tensor, G: Tensor, causal: bool = True) -> Tensor:
    """softmax(q G k^T / sqrt(d)) v, `(batch, heads, n, d)`. With G = I this is scaled dot-product attention.

    Args:
        q: `(batch, heads, n, d)`.
        k, v: `(batch, heads, m, d)`.
        G: `(heads, d, d)`, or `(batch, heads, d, d)`; it need be neither symmetric nor positive.
        causal: the queries are the last n of m positions, and none sees a later key.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes that don't fit, or with `causal` fewer keys than queries.
    """
    for name, value in (("q", q), ("k", k), ("v", v), ("G", G)):
        _checks.floating(f"dtype of {name}", value.dtype)
    _checks.shape("q", q, "(batch, heads, n, d)", q.dim() == 4)
    batch, heads, n, d = q.shape
    fits = k.dim() == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == d and not (causal and k.shape[2] < n)
    _checks.shape("k", k, f"({batch}, {heads}, m, {d}), as q{', m at least n' if causal else ''}", fits)
    _checks.shape("v", v, f"{tuple(k.shape)}, as k", v.shape == k.shape)
    square = (heads, d, d)
    own = G.dim() == 4 and G.shape[0] == batch  # lengths first: tuples of other lengths are compared entry by entry
    fits = G.shape[-3:] == square and (G.dim() == 3 or own)
    _checks.shape("G", G, f"{square} or {(batch, *square)}", fits)
    # Written out: the fused function of torch has no rule for vmap.
    scores = q @ G @ k.transpose(-2, -1) / d**0.5
    if causal:
        m = k.shape[2]
        scores = scores.masked_fill(scores.new_ones(n, m, dtype=torch.bool).triu(m - n + 1), -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class PowerLawGraphAttention(nn.Module):
    """Attention whose bilinear form G a residual network infers from the queries (`MetricLearner`).

    Queries and keys are turned by their positions before anything else. Without a given G, an output depends on later
    tokens, in spite of the causal mask, since G is inferred from all queries. With a given one it does not.

    Query, key and output maps start uniform by Xavier's rule with biases of zero; the value map starts as torch's
    linear layers do, as in the author's code.

    Args:
        d_model: channels.
        n_heads: heads.
        n_res_units, n_dense, d_metric: residual units, SwiGLUs in each of them, and the hidden width of these.
        causal: whether a token's attention leaves out later tokens.

    Raises:
        ValueError: sizes that are no positive integers, heads that don't divide `d_model`, or an odd width of a head.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_res_units: int, n_dense: int, d_metric: int, causal: bool = True
    ) -> None:
        super().__init__()
        self.d_model = _checks.multiple("d_model", d_model, "n_heads", n_heads)
        d_head = _checks.multiple("d_model / n_heads", self.d_model // n_heads, "the size of a pair", 2)
        self.causal = causal
        self.query, self.key = xavier(nn.Linear(d_model, d_model)), xavier(nn.Linear(d_model, d_model))
        self.value, self.output = nn.Linear(d_model, d_model), xavier(nn.Linear(d_model, d_model))
        self.metric = MetricLearner(n_heads, d_head, n_res_units, n_dense, d_metric)

    def forward(
        self, x: Tensor, kv_cache: KVCache | None = None, g_cache: Tensor | None = None
    ) -> tuple[Tensor, KVCache, Deductive]:
        """Attend from each token of `x`.

        Args:
            x: `(batch, n, d_model)`.
            kv_cache: of the tokens before `x`. G is then inferred from its `A`, to which `x` adds nothing.
            g_cache: G, `(heads, d, d)` or `(batch, heads, d, d)`: nothing is inferred.

        Returns:
            The output `(batch, n, d_model)`, the cache for the tokens after `x`, and what was inferred.

        Raises:
            ValueError: another shape, a cache of another batch, or a cache without `A` and no `g_cache`.
        """
        fits = x.dim() == 3 and x.shape[2] == self.d_model
        _checks.shape("x", x, f"(batch, n, {self.d_model})", fits)
        heads, d_head = self.metric.W.shape[:2]
        if kv_cache is not None:
            fits = kv_cache.k.dim() == 4 and kv_cache.k.shape[:2] == (len(x), heads) and kv_cache.k.shape[3] == d_head
            _checks.shape("kv_cache.k", kv_cache.k, f"({len(x)}, {heads}, n, {d_head}), as x", fits)
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        start = 0 if kv_cache is None else kv_cache.k.shape[2]
        q, k = rotate_by_position(q, start), rotate_by_position(k, start)
        if g_cache is not None:
            found = Deductive(None if kv_cache is None else kv_cache.A, None, None, g_cache)
        elif kv_cache is None:
            found = self.metric(q)
        elif kv_cache.A is None:
            raise ValueError("g_cache must be given with a kv_cache whose first call had one, got None")
        else:
            found = self.metric.curvature(kv_cache.A)
        if kv_cache is not None:
            k, v = torch.cat([kv_cache.k, k], 2), torch.cat([kv_cache.v, v], 2)
        y = bilinear_attention(q, k, v, found.G_LM, self.causal)
        return self.output(y.transpose(1, 2).flatten(2)), KVCache(k, v, found.A), found
