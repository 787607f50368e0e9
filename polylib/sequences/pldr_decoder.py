"""A language model of power-law graph attention (PLDR-LLM), with its caches.

B. Gokden, "PLDR-LLMs Learn A Generalizable Tensor Operator That Can Replace Its Own Deep Neural Net At Inference", 2025
(arXiv 2502.13502); details as in the author's code, burcgokden/PLDR-LLM-with-KVG-cache.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.sequences.metric_learner import Deductive, SwiGLU, xavier
from polylib.sequences.power_law_attention import KVCache, PowerLawGraphAttention


class PLDRBlock(nn.Module):
    """A post-norm block: o = LN(x + attention(x)), then LN(o + SwiGLU(o)); arguments as in `PLDRDecoder`."""

    def __init__(self, d_model: int, n_heads: int, n_res_units: int, n_dense: int, d_metric: int, d_ff: int) -> None:
        super().__init__()
        self.attention = PowerLawGraphAttention(d_model, n_heads, n_res_units, n_dense, d_metric)
        self.feed_forward = SwiGLU(d_model, d_ff, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps=1e-6), nn.LayerNorm(d_model, eps=1e-6)

    def forward(
        self, x: Tensor, kv_cache: KVCache | None = None, g_cache: Tensor | None = None
    ) -> tuple[Tensor, KVCache, Deductive]:
        """As `PowerLawGraphAttention.forward`."""
        y, cache, found = self.attention(x, kv_cache, g_cache)
        x = self.norm1(x + y)
        return self.norm2(x + self.feed_forward(x)), cache, found


class PLDRDecoder(nn.Module):
    """A language model: tokens `(batch, length)`, int64, to logits `(batch, length, vocabulary)`.

    The embedding times the root of `d_model`, a LayerNorm, blocks, and a linear layer. Each sequence gets the bilinear
    forms that the layers infer from it, later tokens included: the logits of a whole text know what comes. With forms
    that are given, or kept by `freeze_metric`, the model is causal.

    Args:
        vocabulary: symbols.
        d_model, n_layers, n_heads: channels, blocks, heads of each.
        n_res_units, n_dense, d_metric: as in `PowerLawGraphAttention`.
        d_ff: the hidden width of the feed-forward parts; by default 8/3 of `d_model`, rounded down.

    Raises:
        ValueError: sizes that are no positive integers, heads that don't divide `d_model`, or an odd width of a head.
    """

    frozen: Tensor | None

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        n_res_units: int = 8,
        n_dense: int = 2,
        d_metric: int = 170,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        d_model, n_layers = _checks.integer("d_model", d_model, least=1), _checks.integer("n_layers", n_layers, least=1)
        d_ff = 8 * d_model // 3 if d_ff is None else d_ff
        self.tokens = nn.Embedding(_checks.integer("vocabulary", vocabulary, least=1), d_model)
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.blocks = nn.ModuleList(
            PLDRBlock(d_model, n_heads, n_res_units, n_dense, d_metric, d_ff) for _ in range(n_layers)
        )
        self.head = xavier(nn.Linear(d_model, vocabulary))
        self.register_buffer("frozen", None, persistent=False)

    def forward(self, tokens: Tensor, g_cache: Tensor | None = None) -> Tensor:
        """Return logits `(batch, length, vocabulary)`.

        Args:
            tokens: `(batch, length)`, int64.
            g_cache: the forms of all layers, `(layers, heads, d, d)` or `(layers, batch, heads, d, d)`; by default
                those of `freeze_metric`, or else those that each sequence has.

        Raises:
            TypeError: tokens that are not integers of torch's embeddings.
            ValueError: another shape.
        """
        return self.run(tokens, g_cache=self.frozen if g_cache is None else g_cache)[0]

    def run(
        self, tokens: Tensor, kv_caches: Sequence[KVCache] | None = None, g_cache: Tensor | None = None
    ) -> tuple[Tensor, list[KVCache], list[Deductive]]:
        """Logits, the caches of all layers for the tokens that come, and what each layer inferred.

        `kv_caches` are of the tokens before these; `g_cache` as in `forward`, but None means that G is inferred.
        """
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be of dtype torch.int64 or torch.int32, got {tokens.dtype}")
        _checks.shape("tokens", tokens, "(batch, length)", tokens.dim() == 2)
        layers = len(self.blocks)
        for name, given in (("kv_caches", kv_caches), ("g_cache", g_cache)):
            if given is not None and len(given) != layers:
                raise ValueError(f"{name} must hold one entry for each of the {layers} layers, got {len(given)}")
        x = self.norm(self.tokens(tokens) * self.tokens.embedding_dim**0.5)
        caches, found = [], []
        for layer, block in enumerate(self.blocks):
            kv = None if kv_caches is None else kv_caches[layer]
            x, cache, inferred = block(x, kv, None if g_cache is None else g_cache[layer])
            caches.append(cache)
            found.append(inferred)
        return self.head(x), caches, found

    def infer_metric(self, tokens: Tensor) -> Tensor:
        """The forms G of each sequence, `(layers, batch, heads, d, d)`, of tokens `(batch, length)`."""
        return torch.stack([own.G_LM for own in self.run(tokens)[2]])

    @torch.no_grad()
    def freeze_metric(self, prompt: Tensor) -> None:
        """From now on use the forms of this prompt, `(length,)`, for every input. They are not saved in the state.

        Raises:
            ValueError: another shape.
        """
        _checks.shape("prompt", prompt, "(length,) with at least one token", prompt.dim() == 1 and len(prompt) > 0)
        self.frozen = self.infer_metric(prompt[None])[:, 0]

    def unfreeze_metric(self) -> None:
        """Use the forms of each sequence again."""
        self.frozen = None

    @torch.no_grad()
    def generate(self, prompt: Tensor, steps: int, cache: Literal["none", "kv", "kvg"] = "kvg") -> Tensor:
        """Append the likeliest token, `steps` times.

        Args:
            prompt: `(batch, length)`, int64.
            steps: how many tokens.
            cache: `"none"` reads the whole text at each step, and infers G from all of it. `"kv"` keeps keys, values
                and A, so that G stays that of the prompt, and is made again from A at each step; `"kvg"` keeps G too.
                The last two give the same tokens up to rounding. After `freeze_metric` all three do.

        Returns:
            `(batch, length + steps)`.

        Raises:
            ValueError: another shape, a negative number of steps, or another word.
        """
        steps = _checks.integer("steps", steps, least=0)
        _checks.choice("cache", cache, ("none", "kv", "kvg"))
        fits = prompt.dim() == 2 and prompt.shape[1] > 0
        _checks.shape("prompt", prompt, "(batch, length) with at least one token", fits)
        text, new, caches, forms = prompt, prompt, None, self.frozen
        for _ in range(steps):
            logits, kept, found = self.run(new, caches, forms)
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
            if cache == "none":
                new = text
                continue
            new, caches = text[:, -1:], kept
            if cache == "kvg":
                forms = torch.stack([own.G_LM for own in found])
        return text
