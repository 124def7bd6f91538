"""Attention-based multiple-instance pooling: a small network scores every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
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
from patchbank.probing.probes.options import check_options
from patchbank.probing.probes.tokens import Tokens

SelfAttention = Literal["none", "map", "both"]


@dataclass(frozen=True)
class AbmilpProbe(Probe):
    """Scores from an MLP on each token, softmax over tokens, weighted sum, linear layer.

    Every trial projects every token, so nothing is shared and trials go one at a time. In training
    a trial keeps its hidden layer, and with self-attention the queries, what was attended to and
    the attention, (clip, patch, dim) each and (clip, patch, patch); they are free before the next
    trial starts. Self-attention is folded: with u = softmax(z Wq^T Wk z^T) z, the only products
    with tokens are z (Wq^T Wk), u (W1 Wp Wv)^T and those of the attention itself, 2 projections
    instead of 5.
    """

    self_attention: SelfAttention = "both"

    @property
    def trials_at_once(self) -> int | None:
        return 1

    def first_weights(self, random: torch.Generator) -> Weights:
        dim = self.shape.dim
        weights: Weights = {}
        if self.self_attention != "none":
            for name in ("query", "key", "value"):
                [weights[name]] = uniform_linear(dim, dim, random, bias=False)
            weights["output"], weights["output_bias"] = uniform_linear(dim, dim, random)
        weights["hidden"], weights["hidden_bias"] = uniform_linear(dim, dim, random)
        weights["score"], weights["score_bias"] = uniform_linear(1, dim, random)
        weights["weight"], weights["bias"] = uniform_linear(self.shape.n_classes, dim, random)
        return weights

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        features = [
            self._pooled({name: value[trial] for name, value in weights.items()}, tokens)
            for trial in range(len(weights["weight"]))
        ]
        return apply_linear(torch.stack(features), weights["weight"], weights["bias"])

    def _pooled(self, weights: Weights, tokens: Tokens) -> Float[Tensor, "clip dim"]:
        """One trial's weighted sum."""
        z, seen = tokens.patches, tokens.patches
        hidden, hidden_bias = weights["hidden"], weights["hidden_bias"]
        if self.self_attention != "none":
            seen = _attended(z, weights["query"].T @ weights["key"], tokens.counts)
            projection = weights["output"] @ weights["value"]
            hidden_bias = hidden @ weights["output_bias"] + hidden_bias
            hidden = hidden @ projection
        score = F.linear(
            torch.tanh(F.linear(seen, hidden, hidden_bias)), weights["score"], weights["score_bias"]
        )
        if tokens.counts is not None:
            score = score.masked_fill(~tokens.counts[..., None], -math.inf)
        share = score.softmax(dim=1).transpose(1, 2)
        if self.self_attention != "both":
            return torch.bmm(share, z)[:, 0]
        return F.linear(torch.bmm(share, seen)[:, 0], projection, weights["output_bias"])


def _attended(
    z: Float[Tensor, "clip patch dim"],
    folded: Float[Tensor, "dim dim"],
    counts: Tensor | None,
) -> Float[Tensor, "clip patch dim"]:
    """softmax(z Wq^T Wk z^T / sqrt(D)) z: one head, values and output not yet projected."""
    mask = None if counts is None else counts[:, None, None]
    keys = z[:, None]
    queries = (z @ folded)[:, None]
    return F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask)[:, 0]


def build_abmilp(shape: ProbeShape, options: Options) -> AbmilpProbe:
    """Attention-based MIL pooling: an MLP scores each token, after one-head self-attention.

    x = Wp softmax((Wq z)(Wk z)^T / sqrt(D)) Wv z + bp, a = softmax_n(w2 . tanh(W1 x_n + b1) + b2),
    logits = W sum_n a_n x_n + b. Ilse et al., "Attention-based Deep Multiple Instance Learning"
    (arXiv 1802.04712), as a probe by Przewiezlikowski et al., "Beyond [cls]" (arXiv 2412.03215);
    "abmilp" in "Unmute the Patch Tokens" (arXiv 2509.24901), which does not say which variant.
    Option self_attention: "both" (default, that of the published probing code: scores and sum are
    of x), "map" (scores of x, sum of z) or "none" (x = z, 4 D^2 + D parameters fewer and several
    times faster).
    """
    check_options("abmilp", options, ("self_attention",))
    found = options.get("self_attention", "both")
    if found not in get_args(SelfAttention):
        raise TrialError(
            f"found self_attention={found!r}, expected one of {', '.join(get_args(SelfAttention))}"
        )
    return AbmilpProbe(shape, cast(SelfAttention, found))
