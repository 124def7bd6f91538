"""A linear layer on every token before anything is pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_shared_linear,
    uniform_linear,
)
from patchbank.probing.probes.best_match import best_match
from patchbank.probing.probes.log_mean_exp import log_mean_exp
from patchbank.probing.probes.options import check_options, choice
from patchbank.probing.probes.tokens import Tokens

Pooling = Literal["max", "mean", "lse"]


@dataclass(frozen=True)
class LinpreProbe(Probe):
    """Linear(D, C) on each token, then pooling of the logits.

    The rows of all trials' W meet the shared tokens in one product, and no logit of a token is
    kept: a row that is pooled by maximum is a prototype, of any length, with its best match.
    """

    # As for `linear`.
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 1e-1)

    pooling: Pooling = "max"

    @property
    def reads_means_only(self) -> bool:
        return self.pooling == "mean"

    def first_weights(self, random: torch.Generator) -> Weights:
        weight, bias = uniform_linear(self.shape.n_classes, self.shape.dim, random)
        return {"weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        weight, bias = weights["weight"], weights["bias"]
        if self.pooling == "mean":
            return apply_shared_linear(tokens.mean, weight, bias)
        pool = best_match if self.pooling == "max" else log_mean_exp
        pooled = pool(tokens.patches, weight.flatten(0, 1), tokens.counts)
        # All three poolings let a constant through, so the bias can come last.
        return pooled.view(-1, *bias.shape).transpose(0, 1) + bias[:, None]


def build_linpre(shape: ProbeShape, options: Options) -> LinpreProbe:
    """Linear layer on each token, then pooling of its logits.

    logits = W z_n + b pooled over the patches n: by max; by lse, log mean_n exp(W z_n + b), a
    soft maximum; or by mean, which is exactly the probe linear. W (C, D). "Unmute the Patch
    Tokens" (arXiv 2509.24901) names linpre and does not say how it pools. Option pooling
    ("max", "mean" or "lse"), default max: one patch is enough for an event to be heard.
    """
    check_options("linpre", options, ("pooling",))
    return LinpreProbe(shape, choice(options, "pooling", get_args(Pooling), "max"))
