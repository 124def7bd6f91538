"""Prototypical probes: what a clip's best-matching token says about each prototype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
    uniform_linear,
)
from patchbank.probing.probes.best_match import match_tokens
from patchbank.probing.probes.class_blocks import apply_class_blocks
from patchbank.probing.probes.options import check_options, dropout_rate, whole
from patchbank.probing.probes.tokens import Tokens

OPTIONS = ("n_prototypes_per_class", "dropout", "classes_per_block")


@dataclass(frozen=True)
class PrototypeProbe(Probe):
    """Cosine of prototypes with tokens, maximum over tokens, dropout, linear layer.

    The prototypes belong to no class: the dense layer mixes all of them, or those of a block of
    classes. Only directions of tokens count, and CLS is not used.
    """

    learning_rates: ClassVar[tuple[float, float]] = (2e-3, 8e-2)

    is_binary: bool
    n_prototypes_per_class: int
    dropout: float
    classes_per_block: int | None

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def n_prototypes(self) -> int:
        return self.shape.n_classes * self.n_prototypes_per_class

    @property
    def n_features(self) -> int:
        """Prototypes that a class is told of."""
        n_classes = self.shape.n_classes
        return min(self.classes_per_block or n_classes, n_classes) * self.n_prototypes_per_class

    def first_weights(self, random: torch.Generator) -> Weights:
        prototypes = 0.02 * torch.randn(self.n_prototypes, self.shape.dim, generator=random)
        weight, bias = uniform_linear(self.shape.n_classes, self.n_features, random)
        return {"prototypes": prototypes, "weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        latent = weights["prototypes"]
        directions = F.normalize(binarise(latent) if self.is_binary else latent, dim=-1)
        # All trials' prototypes meet the shared tokens in one product.
        best = match_tokens(tokens, directions.flatten(0, 1))
        features = best.view(best.shape[0], len(latent), -1).transpose(0, 1)
        kept = apply_dropout(features, self.dropout, dropout)
        return apply_class_blocks(kept, weights["weight"], weights["bias"])


def binarise(latent: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The sign of `latent`, with 0 -> +1; its gradient is the identity, without clipping."""
    sign = torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
    # Not latent + (sign - latent).detach(): that rounds, and a sign must be exactly one.
    result: Tensor = _StraightThrough.apply(latent, sign)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, sign: Tensor) -> Tensor:
        return sign

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def build_protobin(shape: ProbeShape, options: Options) -> PrototypeProbe:
    """Binarised prototypes: the best cosine of each sign vector with any token, then linear.

    s_p = max_n cos(sign(v_p), z_n), logits = W dropout(s) + b with C x J class-agnostic
    prototypes, v ~ 0.02 N(0, 1), straight-through identity gradient through the sign, then
    through the normalisation. "Unmute the Patch Tokens" (arXiv 2509.24901). Options:
    n_prototypes_per_class (J, default 20; the paper takes 10 on AudioSet), dropout (default 0.2,
    the rate of the authors' later probes; the paper does not state it) and classes_per_block (s,
    default none). W is (C, C x J), as in the paper, and grows as C^2 J: 16 GB for 10,000 classes.
    With s it is (C, s x J): class c has weights on the prototypes of s neighbouring classes only,
    from min(floor(c / s) s, C - s) on.
    """
    return _build("protobin", shape, options, is_binary=True)


def build_protofloat(shape: ProbeShape, options: Options) -> PrototypeProbe:
    """protobin without the sign: the paper's ablation, as good within 0.5 mAP.

    s_p = max_n cos(v_p, z_n), logits = W dropout(s) + b. "Unmute the Patch Tokens" (arXiv
    2509.24901). Options as protobin.
    """
    return _build("protofloat", shape, options, is_binary=False)


def _build(name: str, shape: ProbeShape, options: Options, *, is_binary: bool) -> PrototypeProbe:
    check_options(name, options, OPTIONS)
    block = None
    if options.get("classes_per_block") is not None:
        block = whole(options, "classes_per_block", 1, other="null for a dense layer")
    return PrototypeProbe(
        shape,
        is_binary,
        whole(options, "n_prototypes_per_class", 20),
        dropout_rate(options, 0.2),
        block,
    )
