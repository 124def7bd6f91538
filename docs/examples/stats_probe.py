"""Mean and deviation of the patches, then linear, as a native probe.

All trials share the tokens, so the layers of all trials are one plain matrix product: what a
module that torch stacks comes close to, and the way for what torch cannot stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbank.probing.probes.plugin import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Tokens,
    Weights,
    apply_dropout,
    apply_linear,
    check_options,
    number,
    uniform_linear,
)


@dataclass(frozen=True)
class StatsProbe(Probe):
    """The fields beside `shape` are the options."""

    dropout: float = 0.0

    def first_weights(self, random: torch.Generator) -> Weights:
        """One trial's arrays, drawn from `random` and from nothing else."""
        weight, bias = uniform_linear(self.shape.n_classes, 2 * self.shape.dim, random)
        return {"weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        """Weights come with a leading axis of trials; (trial, clip, class)."""
        features = torch.cat([tokens.mean, deviation(tokens)], dim=1)
        if dropout is not None and self.dropout:
            # Each trial drops other features, so here they part.
            per_trial = features.expand(len(dropout), -1, -1)
            kept = apply_dropout(per_trial, self.dropout, dropout)
            return apply_linear(kept, weights["weight"], weights["bias"])
        n_trials, n_classes, _ = weights["weight"].shape
        joined = F.linear(features, weights["weight"].flatten(0, 1), weights["bias"].flatten())
        return joined.view(-1, n_trials, n_classes).transpose(0, 1)


def deviation(tokens: Tokens) -> Tensor:
    """(clip, dim), over the patches that count."""
    away = (tokens.patches - tokens.mean[:, None]).square()
    if tokens.counts is None or tokens.n_patches is None:
        return away.mean(dim=1).sqrt()
    counted = away.masked_fill(~tokens.counts[..., None], 0.0).sum(dim=1)
    return (counted / tokens.n_patches[:, None]).sqrt()


def build(shape: ProbeShape, options: Options) -> StatsProbe:
    """Linear layer on mean and standard deviation of the patches.

    logits = W dropout([mean_n(z_n), std_n(z_n)]) + b, W (C, 2 D). Option dropout: default 0.
    """
    check_options("stats_probe", options, ("dropout",))
    return StatsProbe(shape, number(options, "dropout", 0.0, at_least=0, below=1))
