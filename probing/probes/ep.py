"""Efficient probing: many queries on raw tokens, each with its own slice of the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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

MAX_QUERIES = 32
NORM_EPSILON = 1e-6
MOMENTUM = 0.1


@dataclass(frozen=True)
class EfficientProbe(Probe):
    """M queries without key projection, a slice of the values each, batch norm, linear layer.

    Pooling comes before the projection: V_m (sum_n a_mn z_n) instead of sum_n a_mn (V z_n)_m, so
    M vectors of size D a clip and trial are projected, and no token is.
    """

    buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_variance")

    n_queries: int
    d_out: int = 1

    @property
    def width(self) -> int:
        """Features that reach the linear layer."""
        return self.shape.dim // self.d_out

    def first_weights(self, random: torch.Generator) -> Weights:
        queries = 0.02 * torch.randn(self.n_queries, self.shape.dim, generator=random)
        [value] = uniform_linear(self.width, self.shape.dim, random, bias=False)
        weight, bias = uniform_linear(self.shape.n_classes, self.width, random)
        return {
            "queries": queries,
            "value": value,
            "weight": weight,
            "bias": bias,
            "running_mean": torch.zeros(self.width),
            "running_variance": torch.ones(self.width),
        }

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        features = self._features(weights, tokens)
        normal = batch_norm(features, weights, in_training=dropout is not None)
        return apply_linear(normal, weights["weight"], weights["bias"])

    def attention(
        self, weights: Weights, tokens: Tokens
    ) -> Float[Tensor, "clip trial query patch"]:
        """How much each query of each trial looks at each patch; sums to one over patches."""
        z = tokens.patches
        queries = weights["queries"].flatten(0, 1) / math.sqrt(self.shape.dim)
        scores = torch.matmul(queries, z.transpose(1, 2))
        if tokens.counts is not None:
            scores = scores.masked_fill(~tokens.counts[:, None], -math.inf)
        return scores.softmax(dim=-1).view(z.shape[0], -1, self.n_queries, z.shape[1])

    def _features(self, weights: Weights, tokens: Tokens) -> Float[Tensor, "trial clip feature"]:
        n_trials, n_rows = len(weights["queries"]), len(weights["queries"]) * self.n_queries
        pooled = torch.bmm(self.attention(weights, tokens).flatten(1, 2), tokens.patches)
        values = weights["value"].view(n_rows, -1, self.shape.dim)
        features = torch.bmm(pooled.transpose(0, 1), values.transpose(1, 2))
        by_query = features.view(n_trials, self.n_queries, pooled.shape[0], -1)
        return by_query.transpose(1, 2).flatten(2)


def batch_norm(
    features: Float[Tensor, "trial clip feature"], weights: Weights, *, in_training: bool
) -> Float[Tensor, "trial clip feature"]:
    """Each trial's batch norm without affine part; a batch in training moves running statistics.

    Running statistics are also what normalises a single clip in training: it has no deviation.
    """
    mean, variance = weights["running_mean"], weights["running_variance"]
    n_clips = features.shape[1]
    if in_training and n_clips > 1:
        running_mean, running_variance = mean, variance
        variance, mean = torch.var_mean(features, dim=1, correction=0)
        with torch.no_grad():
            running_mean.lerp_(mean, MOMENTUM)
            running_variance.lerp_(variance * (n_clips / (n_clips - 1)), MOMENTUM)
    return (features - mean[:, None]) * torch.rsqrt(variance + NORM_EPSILON)[:, None]


def default_queries(width: int) -> int:
    """32, or the largest smaller number of queries that divides `width`."""
    return max(n_queries for n_queries in range(1, MAX_QUERIES + 1) if width % n_queries == 0)


def build_ep(shape: ProbeShape, options: Options) -> EfficientProbe:
    """Efficient probing: M learned queries on raw tokens, each pools its own part of the values.

    a_m = softmax_n(q_m . z_n / sqrt(D)), feature_m = V_m sum_n a_mn z_n with V = [V_1 .. V_M] a
    bias-free Linear(D, D / d_out), logits = W batchnorm([feature_1 .. feature_M]) + b; queries ~
    0.02 N(0, 1), batch norm without affine part (epsilon 1e-6, momentum 0.1), per trial. Psomas et
    al., "Attention, Please! Revisiting Attentive Probing" (arXiv 2506.10178); "ep" in "Unmute the
    Patch Tokens" (arXiv 2509.24901), whose parameter counts it has. Options: n_queries (M, default
    32 as published, or the largest smaller divisor of D / d_out) and d_out (default 1: features as
    wide as a token).
    """
    check_options("ep", options, ("n_queries", "d_out"))
    d_out = whole(options, "d_out", 1)
    if shape.dim % d_out:
        raise TrialError(f"found d_out={d_out}, expected a divisor of dim={shape.dim}")
    width = shape.dim // d_out
    n_queries = whole(options, "n_queries", default_queries(width))
    if width % n_queries:
        raise TrialError(f"found n_queries={n_queries}, expected a divisor of dim/d_out={width}")
    return EfficientProbe(shape, n_queries, d_out)
