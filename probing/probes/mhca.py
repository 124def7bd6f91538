"""Attention pooling with one learned query, folded so that no token is ever projected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_linear,
    uniform_linear,
)
from patchbank.probing.probes.options import check_options, whole
from patchbank.probing.probes.tokens import Tokens

MAX_HEADS = 12


@dataclass(frozen=True)
class MhcaProbe(Probe):
    """Multi-head cross attention from one learned query, then a linear layer.

    Keys and values of N tokens would cost 2 N D^2 a clip. A score is q_h . (Wk_h z_n) =
    (Wk_h^T q_h) . z_n, and values pool to Wv_h (sum_n a_n z_n), so H vectors of size D do the same
    work as the projection matrices, exactly.
    """

    n_heads: int

    def first_weights(self, random: torch.Generator) -> Weights:
        dim = self.shape.dim
        query = 0.02 * torch.randn(dim, generator=random)
        [key] = uniform_linear(dim, dim, random, bias=False)
        [value] = uniform_linear(dim, dim, random, bias=False)
        weight, bias = uniform_linear(self.shape.n_classes, dim, random)
        return {"query": query, "key": key, "value": value, "weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        attention = self.attention(weights, tokens)
        n_clips, n_trials, n_heads, n_patches = attention.shape
        z = tokens.patches
        pooled = torch.bmm(attention.view(n_clips, n_trials * n_heads, n_patches), z)
        by_head = pooled.view(n_clips, n_trials * n_heads, -1).transpose(0, 1)
        values = weights["value"].view(n_trials * n_heads, -1, self.shape.dim)
        features = torch.bmm(by_head, values.transpose(1, 2))
        features = features.view(n_trials, n_heads, n_clips, -1).transpose(1, 2).flatten(2)
        return apply_linear(features, weights["weight"], weights["bias"])

    def attention(self, weights: Weights, tokens: Tokens) -> Float[Tensor, "clip trial head patch"]:
        """How much each head of each trial looks at each patch; sums to one over patches."""
        queries = self._folded_queries(weights).flatten(0, 1)
        z = tokens.patches
        scores = torch.matmul(queries, z.transpose(1, 2))
        if tokens.counts is not None:
            scores = scores.masked_fill(~tokens.counts[:, None], -math.inf)
        return scores.softmax(dim=-1).view(z.shape[0], -1, self.n_heads, z.shape[1])

    def _folded_queries(self, weights: Weights) -> Float[Tensor, "trial head dim"]:
        """Wk_h^T q_h, scaled by the root of a head's width."""
        n_trials = len(weights["query"])
        width = self.shape.dim // self.n_heads
        q = weights["query"].view(n_trials, self.n_heads, 1, width) / math.sqrt(width)
        key = weights["key"].view(n_trials, self.n_heads, width, self.shape.dim)
        return torch.matmul(q, key)[:, :, 0]


def default_heads(dim: int) -> int:
    """12, or the largest smaller number of heads that divides `dim`."""
    return max(n_heads for n_heads in range(1, MAX_HEADS + 1) if dim % n_heads == 0)


def build_mhca(shape: ProbeShape, options: Options) -> MhcaProbe:
    """Attention pooling: one learned query, 12 heads, then a linear layer.

    a_h = softmax_n(q_h . Wk_h z_n / sqrt(D/H)), feature_h = Wv_h sum_n a_hn z_n, logits = W
    [feature_1 .. feature_H] + b; Wk and Wv without bias, no query or output projection. The
    attentive probe of AIM (El-Nouby et al., arXiv 2401.08541) without its batch norm, "mhca" in
    "Unmute the Patch Tokens" (arXiv 2509.24901). Option n_heads: default 12, or the largest
    smaller divisor of D.
    """
    check_options("mhca", options, ("n_heads",))
    n_heads = whole(options, "n_heads", default_heads(shape.dim))
    if shape.dim % n_heads:
        raise TrialError(f"found n_heads={n_heads}, expected a divisor of dim={shape.dim}")
    return MhcaProbe(shape, n_heads)
