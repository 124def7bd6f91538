"""SimPool: a clip's own mean asks which of its tokens to pool."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
from patchbank.probing.probes.options import check_options, number
from patchbank.probing.probes.tokens import Tokens

NORM_EPSILON = 1e-6
SHIFT = 1e-6
"""Keeps the base of the power mean above zero."""


@dataclass(frozen=True)
class SimPoolProbe(Probe):
    """One head, query = token mean, keys and values = layer-normed tokens, linear layer.

    With y_n = (z_n - m_n) / s_n, the norm before its affine part g * y + h, a score is
    (g * Wk^T Wq mean) . y_n up to a constant of the clip, and what is pooled is g * sum_n a_n y_n
    + h. Both are products with the raw tokens that all trials share: only the numbers m_n and s_n
    are made, and no token is normed or projected. `gamma` raises every normed value to a power,
    which no product replaces: then trials go one at a time, with some copies of a batch each.
    """

    gamma: float | None = None

    @property
    def trials_at_once(self) -> int | None:
        return None if self.gamma is None else 1

    def first_weights(self, random: torch.Generator) -> Weights:
        dim = self.shape.dim
        [query] = uniform_linear(dim, dim, random, bias=False)
        [key] = uniform_linear(dim, dim, random, bias=False)
        weight, bias = uniform_linear(self.shape.n_classes, dim, random)
        return {
            "norm_weight": torch.ones(dim),
            "norm_bias": torch.zeros(dim),
            "query": query,
            "key": key,
            "weight": weight,
            "bias": bias,
        }

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        attention = self.attention(weights, tokens)
        mean, deviation = tokens.made("moments", _moments)
        scale, shift = weights["norm_weight"], weights["norm_bias"]
        if self.gamma is None:
            share = attention / deviation[:, None]
            normed = torch.bmm(share, tokens.patches) - torch.bmm(share, mean[..., None])
            features = torch.addcmul(shift[:, None], normed.transpose(0, 1), scale[:, None])
        else:
            normed = (tokens.patches - mean[..., None]) / deviation[..., None]
            features = torch.stack(
                [
                    _power_mean(normed * one + other, share, tokens.counts, self.gamma)
                    for one, other, share in zip(scale, shift, attention.unbind(1), strict=True)
                ]
            )
        return apply_linear(features, weights["weight"], weights["bias"])

    def attention(self, weights: Weights, tokens: Tokens) -> Float[Tensor, "clip trial patch"]:
        """How much each trial looks at each patch; sums to one over patches."""
        mean, deviation = tokens.made("moments", _moments)
        query = torch.matmul(tokens.mean, weights["query"].transpose(1, 2))
        folded = torch.bmm(query, weights["key"]) * weights["norm_weight"][:, None]
        folded = folded.transpose(0, 1) / math.sqrt(self.shape.dim)
        scores = torch.bmm(folded, tokens.patches.transpose(1, 2))
        scores = (scores - folded.sum(dim=-1, keepdim=True) * mean[:, None]) / deviation[:, None]
        if tokens.counts is not None:
            scores = scores.masked_fill(~tokens.counts[:, None], -math.inf)
        return scores.softmax(dim=-1)


def _moments(tokens: Tokens) -> tuple[Float[Tensor, "clip patch"], Float[Tensor, "clip patch"]]:
    """Mean and deviation of each patch over its channels, as the layer norm takes them."""
    variance, mean = torch.var_mean(tokens.patches, dim=-1, correction=0)
    return mean, torch.sqrt(variance + NORM_EPSILON)


def _power_mean(
    values: Float[Tensor, "clip patch dim"],
    attention: Float[Tensor, "clip patch"],
    counts: Tensor | None,
    gamma: float,
) -> Float[Tensor, "clip dim"]:
    """Values above their clip's lowest, to the power, averaged, and back by the root."""
    seen = values if counts is None else values.masked_fill(~counts[..., None], math.inf)
    base = values - seen.amin(dim=(1, 2), keepdim=True) + SHIFT
    if counts is not None:
        base = base.masked_fill(~counts[..., None], 1.0)
    pooled = torch.bmm(attention[:, None], base.pow(gamma))[:, 0]
    return pooled.pow(1 / gamma)


def build_simpool(shape: ProbeShape, options: Options) -> SimPoolProbe:
    """SimPool: one head whose query is the token mean, on layer-normed tokens, then linear.

    y_n = layernorm(z_n), a = softmax_n((Wq mean_n z_n) . (Wk y_n) / sqrt(D)), logits = W sum_n
    a_n y_n + b; layer norm with affine part and epsilon 1e-6, Wq and Wk without bias, values not
    projected. Psomas et al., "Keep It SimPool" (arXiv 2309.06891); "simpool" in "Unmute the Patch
    Tokens" (arXiv 2509.24901), whose parameter counts it has. Option gamma (default None, as in
    the published probes): pools (sum_n a_n (y_n - min + 1e-6)^gamma)^(1/gamma) instead, where min
    is the lowest value of the clip (the published code takes that of the batch, which would let
    the clips of a batch change each other's logits).
    """
    check_options("simpool", options, ("gamma",))
    if options.get("gamma") is None:
        return SimPoolProbe(shape)
    return SimPoolProbe(shape, number(options, "gamma", 1.0, above=0, other="null"))
