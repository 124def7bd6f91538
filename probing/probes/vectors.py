"""Probes on one vector a clip that do more than `linear`: a hidden layer, or a wider vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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
    apply_dropout,
    apply_linear,
    apply_shared_linear,
    uniform_linear,
)
from patchbank.probing.probes.options import check_options, choice, dropout_rate, whole
from patchbank.probing.probes.tokens import Tokens

Vector = Literal["mean", "cls"]
Variant = Literal["cls-mean", "time-mean"]


@dataclass(frozen=True)
class MlpProbe(Probe):
    """Linear(D, H), GELU, dropout, Linear(H, C) on one vector a clip."""

    hidden: int
    vector: Vector = "mean"
    dropout: float = 0.0

    @property
    def uses_prefix(self) -> bool:
        return self.vector == "cls"

    @property
    def reads_means_only(self) -> bool:
        return self.vector == "mean"

    def first_weights(self, random: torch.Generator) -> Weights:
        first, first_bias = uniform_linear(self.hidden, self.shape.dim, random)
        weight, bias = uniform_linear(self.shape.n_classes, self.hidden, random)
        return {"hidden": first, "hidden_bias": first_bias, "weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        vector = tokens.mean if self.vector == "mean" else tokens.cls
        features = F.gelu(apply_shared_linear(vector, weights["hidden"], weights["hidden_bias"]))
        kept = apply_dropout(features, self.dropout, dropout)
        return apply_linear(kept, weights["weight"], weights["bias"])


@dataclass(frozen=True)
class ConcatenationProbe(Probe):
    """A linear layer on several vectors of a clip, one after another."""

    # As for `linear`.
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 1e-1)

    variant: Variant

    @property
    def n_features(self) -> int:
        n_vectors = 2 if self.variant == "cls-mean" else n_frequencies(self.shape)
        return n_vectors * self.shape.dim

    @property
    def uses_prefix(self) -> bool:
        return self.variant == "cls-mean"

    def first_weights(self, random: torch.Generator) -> Weights:
        weight, bias = uniform_linear(self.shape.n_classes, self.n_features, random)
        return {"weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        if self.variant == "cls-mean":
            vectors = torch.cat([tokens.cls, tokens.mean], dim=1)
        else:
            vectors = time_means(tokens, n_frequencies(self.shape)).flatten(1)
        return apply_shared_linear(vectors, weights["weight"], weights["bias"])


def n_frequencies(shape: ProbeShape) -> int:
    """Rows of the grid; one where nobody knows it."""
    return 1 if shape.grid is None else shape.grid[1]


def time_means(tokens: Tokens, n_rows: int) -> Float[Tensor, "clip freq dim"]:
    """The mean over time of each frequency row's patches that count; zeros where none does."""
    n_patches = tokens.shape[1]
    rows = torch.arange(n_patches, device=tokens.device) % n_rows
    belongs = rows == torch.arange(n_rows, device=tokens.device)[:, None]
    if tokens.counts is not None:
        belongs = belongs & tokens.counts[:, None]
    share = 1 / belongs.sum(dim=-1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return torch.matmul(belongs * share, tokens.patches)


def build_mlp(shape: ProbeShape, options: Options) -> MlpProbe:
    """One hidden layer on the same vector as linear.

    logits = W dropout(gelu(V x + a)) + b, x = mean_n(z_n) or the CLS token o, V (H, D), W (C, H).
    "Unmute the Patch Tokens" (arXiv 2509.24901), which names it and states no sizes. Options:
    hidden (H, default D, which makes half the parameters of mhca), vector
    ("mean", the default as in linear, or "cls") and dropout (of the hidden layer, default 0: the
    protocol searches learning rate and weight decay only).
    """
    check_options("mlp", options, ("hidden", "vector", "dropout"))
    probe = MlpProbe(
        shape,
        whole(options, "hidden", shape.dim),
        choice(options, "vector", get_args(Vector), "mean"),
        dropout_rate(options, 0.0),
    )
    if probe.vector == "cls":
        _check_cls(shape, "mlp", "vector=cls", "vector=mean")
    return probe


def build_linearc(shape: ProbeShape, options: Options) -> ConcatenationProbe:
    """Linear layer on concatenated vectors of a clip.

    logits = W x + b with, by the option variant,
    - cls-mean: x = [o, mean_n(z_n)], CLS and the mean of the patches, W (C, 2 D);
    - time-mean: x = [mean_t(z_t1) .. mean_t(z_tF)], one mean over time for each of the F
      frequency rows of the grid, W (C, F D).
    "Unmute the Patch Tokens" (arXiv 2509.24901) names linearc and does not define it, so both
    readings are offered. Default: cls-mean where there is a CLS token, else time-mean.
    """
    check_options("linearc", options, ("variant",))
    default = "cls-mean" if shape.n_prefix else "time-mean"
    variant = choice(options, "variant", get_args(Variant), default)
    if variant == "cls-mean":
        _check_cls(shape, "linearc", "variant=cls-mean", "variant=time-mean")
    elif shape.grid is None:
        other = "variant=cls-mean" if shape.n_prefix else "--probe linear, the mean of all patches"
        raise TrialError(
            "probe 'linearc' with variant=time-mean needs the (time, freq) grid of the patches, "
            f"found none; use {other}"
        )
    return ConcatenationProbe(shape, variant)


def _check_cls(shape: ProbeShape, name: str, found: str, instead: str) -> None:
    if shape.n_prefix < 1:
        raise TrialError(
            f"probe {name!r} with {found} needs a CLS token, found no prefix tokens in this layer "
            f"of the bank; use {instead}"
        )
