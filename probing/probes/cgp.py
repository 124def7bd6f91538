"""Convex gated probing: prototypes on a convex mix of all layers, at both extremes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_dropout,
    apply_linear,
    uniform_linear,
)
from patchbank.probing.probes.extreme_match import extreme_match
from patchbank.probing.probes.layer_mix import LAYERS, ONE_AT_A_TIME
from patchbank.probing.probes.mixing import layers_to_mix, mix
from patchbank.probing.probes.options import check_options, dropout_rate, whole
from patchbank.probing.probes.tokens import Tokens


@dataclass(frozen=True)
class ConvexGatedProbe(Probe):
    """Lowest, CLS and highest similarity of K prototypes with mixed directions, linear layer.

    One layer needs no mix, and all trials share its tokens. Of several layers the unit-length
    patches of each are kept until the next batch; trials go one at a time, and memory holds the
    mixed patches of one (and in training their gradient), never a similarity of all patches.
    """

    mixes_layers: ClassVar[bool] = True
    # The authors train with 1e-3 and search nothing.
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 3e-3)

    n_prototypes: int
    dropout: float

    @property
    def trials_at_once(self) -> int | None:
        return None if self.shape.n_layers == 1 else 1

    @property
    def note(self) -> str | None:
        return None if self.shape.n_layers == 1 else ONE_AT_A_TIME

    @property
    def uses_prefix(self) -> bool:
        return self.shape.n_prefix > 0

    def first_weights(self, random: torch.Generator) -> Weights:
        prototypes = 0.02 * torch.randn(self.n_prototypes, self.shape.dim, generator=random)
        weight, bias = uniform_linear(self.shape.n_classes, 3 * self.n_prototypes, random)
        weights = {"prototypes": prototypes, "weight": weight, "bias": bias}
        if self.shape.n_layers > 1:
            weights[LAYERS] = torch.zeros(self.shape.n_layers)
        return weights

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        features = self._features(weights, tokens).transpose(0, 1).flatten(2)
        kept = apply_dropout(features, self.dropout, dropout)
        return apply_linear(kept, weights["weight"], weights["bias"])

    def _features(
        self, weights: Weights, tokens: Tokens
    ) -> Float[Tensor, "clip trial 3 prototype"]:
        layers = layers_to_mix(tokens, self.shape.n_layers, uses_prefix=self.uses_prefix)
        prototypes = F.normalize(weights["prototypes"], dim=-1)
        if len(layers) == 1:
            found = self._similarities(layers, None, prototypes.flatten(0, 1))
            return found.view(found.shape[0], 3, len(prototypes), -1).transpose(1, 2)
        shares = weights[LAYERS].softmax(dim=-1)
        trials = zip(shares, prototypes, strict=True)
        return torch.stack([self._similarities(layers, *trial) for trial in trials], dim=1)

    def _similarities(
        self,
        layers: tuple[Tokens, ...],
        shares: Float[Tensor, " layer"] | None,
        prototypes: Float[Tensor, "prototype dim"],
    ) -> Float[Tensor, "clip 3 prototype"]:
        """Lowest over patches, of the clip's vector, and highest over patches."""
        last = layers[-1]
        directions = _mixed([layer.directions for layer in layers], shares)
        if self.shape.n_prefix:
            vector = _mixed([F.normalize(layer.cls, dim=-1) for layer in layers], shares)
        else:
            # The mean of similarities is the similarity with the mean.
            vector = Tokens(directions, None, last.n_patches).mean
        lowest, highest = extreme_match(directions, prototypes, last.counts)
        return torch.stack([lowest, vector @ prototypes.T, highest], dim=1)


def _mixed(
    arrays: list[Float[Tensor, "clip ..."]], shares: Float[Tensor, " layer"] | None
) -> Float[Tensor, "clip ..."]:
    return arrays[0] if shares is None else mix(shares, arrays)


def build_cgp(shape: ProbeShape, options: Options) -> ConvexGatedProbe:
    """Convex gated probing: float prototypes on a softmax mix of the layers' token directions.

    z = sum_l softmax(w)_l z_l / |z_l| (not normalised again), o alike from the CLS tokens, s_k =
    [min_n v_k . z_n, v_k . o, max_n v_k . z_n] with v of unit length, logits = W dropout(s) + b;
    v ~ 0.02 N(0, 1), w uniform. Without CLS the mean over tokens of v_k . z_n stands in for the
    second. Ghaffari et al., "BAT: Better Audio Transformer Guided by Convex Gated Probing" (arXiv
    2602.16305), whose parameter count it has; the authors decay neither layer weights nor
    prototypes. Options: n_prototypes (K, default 10,000 as published) and dropout (default 0.2,
    likewise).
    """
    check_options("cgp", options, ("n_prototypes", "dropout"))
    n_prototypes = whole(options, "n_prototypes", 10_000)
    return ConvexGatedProbe(shape, n_prototypes, dropout_rate(options, 0.2))
