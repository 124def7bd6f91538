"""Linear probes: one global vector of a clip, one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_dropout,
    apply_linear,
    apply_shared_linear,
    uniform_linear,
)
from patchbank.probing.probes.options import check_options, dropout_rate, switch
from patchbank.probing.probes.tokens import Tokens

Pooling = Literal["mean", "cls"]
NORM_EPSILON = 1e-6
"""That of the layer norms of ViTs."""


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Linear(D, C) on one vector a clip, if asked for after a layer norm and dropout."""

    # The paper searches 1e-4 to 7e-3. On sets of some hundred clips a pass has few steps and the
    # best rate lies above that, which would hold the baseline down.
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 1e-1)

    pooling: Pooling
    layer_norm: bool = False
    dropout: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return {"layer_norm": self.layer_norm, "dropout": self.dropout}

    @property
    def uses_prefix(self) -> bool:
        return self.pooling == "cls"

    @property
    def reads_means_only(self) -> bool:
        return self.pooling == "mean"

    def first_weights(self, random: torch.Generator) -> Weights:
        weight, bias = uniform_linear(self.shape.n_classes, self.shape.dim, random)
        linear = {"weight": weight, "bias": bias}
        if not self.layer_norm:
            return linear
        dim = self.shape.dim
        return {**linear, "norm_weight": torch.ones(dim), "norm_bias": torch.zeros(dim)}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        vector = tokens.mean if self.pooling == "mean" else tokens.cls
        if not self.layer_norm and not self.dropout:
            return apply_shared_linear(vector, weights["weight"], weights["bias"])
        features = vector.expand(len(weights["weight"]), -1, -1)
        if self.layer_norm:
            features = F.layer_norm(features, (self.shape.dim,), eps=NORM_EPSILON)
            features = features * weights["norm_weight"][:, None] + weights["norm_bias"][:, None]
        features = apply_dropout(features, self.dropout, dropout)
        return apply_linear(features, weights["weight"], weights["bias"])


def build_linear(shape: ProbeShape, options: Options) -> LinearProbe:
    """Linear layer on the mean of a clip's patch tokens.

    logits = W mean_n(z_n) + b, W (C, D). The usual global baseline for encoders without CLS;
    "Unmute the Patch Tokens" (arXiv 2509.24901). Options: layer_norm (of the mean, with weight and
    bias; default false) and dropout (after it, default 0), both as in BAT (arXiv 2602.16305).
    """
    return _built("linear", shape, "mean", options)


def build_linear_cls(shape: ProbeShape, options: Options) -> LinearProbe:
    """Linear layer on the CLS token (the first prefix token).

    logits = W o + b, W (C, D). The usual global baseline for encoders with CLS; "Unmute the Patch
    Tokens" (arXiv 2509.24901). Options: layer_norm (of CLS, with weight and bias; default false)
    and dropout (after it, default 0), both as in BAT (arXiv 2602.16305).
    """
    if shape.n_prefix < 1:
        raise TrialError(
            "probe 'linear-cls' needs a CLS token, found no prefix tokens in this layer of the "
            "bank; use --probe linear, which takes the mean of the patches"
        )
    return _built("linear-cls", shape, "cls", options)


def _built(name: str, shape: ProbeShape, pooling: Pooling, options: Options) -> LinearProbe:
    check_options(name, options, ("layer_norm", "dropout"))
    layer_norm = switch(options, "layer_norm", False)
    return LinearProbe(shape, pooling, layer_norm, dropout_rate(options, 0.0))
