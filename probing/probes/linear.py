"""Linear probes: one global vector of a clip, one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from patchbank.pipeline.errors import TrialError
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
from patchbank.probing.probes.options import check_options
from patchbank.probing.probes.tokens import Tokens


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Linear(D, C) on one vector a clip."""

    # The paper searches 1e-4 to 7e-3. On sets of some hundred clips a pass has few steps and the
    # best rate lies above that, which would hold the baseline down.
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 1e-1)

    pooling: Literal["mean", "cls"]

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def uses_prefix(self) -> bool:
        return self.pooling == "cls"

    def first_weights(self, random: torch.Generator) -> Weights:
        weight, bias = uniform_linear(self.shape.n_classes, self.shape.dim, random)
        return {"weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        vector = tokens.mean if self.pooling == "mean" else tokens.cls
        return apply_shared_linear(vector, weights["weight"], weights["bias"])


def build_linear(shape: ProbeShape, options: Options) -> LinearProbe:
    """Linear layer on the mean of a clip's patch tokens.

    logits = W mean_n(z_n) + b, W (C, D). The usual global baseline for encoders without CLS;
    "Unmute the Patch Tokens" (arXiv 2509.24901).
    """
    check_options("linear", options, ())
    return LinearProbe(shape, "mean")


def build_linear_cls(shape: ProbeShape, options: Options) -> LinearProbe:
    """Linear layer on the CLS token (the first prefix token).

    logits = W o + b, W (C, D). The usual global baseline for encoders with CLS; "Unmute the Patch
    Tokens" (arXiv 2509.24901).
    """
    check_options("linear-cls", options, ())
    if shape.n_prefix < 1:
        raise TrialError(
            "probe 'linear-cls' needs a CLS token, found no prefix tokens in this layer of the "
            "bank; use --probe linear, which takes the mean of the patches"
        )
    return LinearProbe(shape, "cls")
