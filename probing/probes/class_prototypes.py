"""Class-bound prototypes: a class is what its own prototypes find in a clip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

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
)
from patchbank.probing.probes.best_match import best_match
from patchbank.probing.probes.options import check_options, number, switch, whole
from patchbank.probing.probes.tokens import Tokens

EPSILON = 1e-4
N_EXTRA = 2
"""Channels of EPSILON that tokens and prototypes get: no vector is without length."""
PADDING = 8
"""Width of the extra channels, the rest zeros: rows stay aligned to what a GPU multiplies."""
COSINE_DIVISOR = 1.01
FIRST_WEIGHT, FIRST_BIAS = 1.0, -2.0


@dataclass(frozen=True)
class ClassPrototypeProbe(Probe):
    """Cosine of a class's prototypes with tokens, ReLU, maximum, non-negative sum a class.

    All trials share the tokens with their extra channels: one more copy of the batch.
    """

    learning_rates: ClassVar[tuple[float, float]] = (2e-3, 8e-2)

    n_prototypes_per_class: int
    focal: bool
    orthogonality: float

    @property
    def uses_prefix(self) -> bool:
        return self.focal

    def first_weights(self, random: torch.Generator) -> Weights:
        n_classes, n_each = self.shape.n_classes, self.n_prototypes_per_class
        return {
            "prototypes": torch.rand(n_classes, n_each, self.shape.dim, generator=random),
            "weight": torch.full((n_classes, n_each), FIRST_WEIGHT),
            "bias": torch.full((n_classes,), FIRST_BIAS),
        }

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        directions = tokens.made(f"focal={self.focal}", partial(_directions, focal=self.focal))
        wide = F.pad(weights["prototypes"].flatten(0, 2), (0, PADDING))
        wide[:, self.shape.dim : self.shape.dim + N_EXTRA] = EPSILON
        best = best_match(directions, wide / (_length(wide) + EPSILON), tokens.counts)
        # ReLU and division keep the order of similarities, so the maximum may come first.
        found = torch.relu(best / COSINE_DIVISOR).view(best.shape[0], *weights["weight"].shape)
        logits = torch.einsum("btcj,tcj->tbc", found, torch.relu(weights["weight"]))
        return logits + weights["bias"][:, None]

    def penalty(self, weights: Weights) -> Float[Tensor, " trial"] | None:
        """Mean squared deviation from orthogonality of each class's prototypes."""
        if self.orthogonality == 0:
            return None
        prototypes = weights["prototypes"]
        unit = prototypes / (_length(prototypes) + EPSILON)
        gram = torch.matmul(unit, unit.transpose(-1, -2))
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return self.orthogonality * (gram - identity).square().mean(dim=(1, 2, 3))


def _length(vectors: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes 1"]:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.sqrt(norm.square() + EPSILON)


def _directions(tokens: Tokens, *, focal: bool) -> Float[Tensor, "clip patch wide"]:
    """Patches (minus CLS where `focal`) with their extra channels, over their length."""
    z, dim = tokens.patches, tokens.shape[2]
    origin = tokens.cls[:, None] if focal else z.new_zeros(1)
    if z.requires_grad or torch.compiler.is_exporting():
        wide = F.pad(z - origin, (0, PADDING))
        wide[..., dim : dim + N_EXTRA] = EPSILON
        return wide / _length(wide)
    wide = tokens.memory(f"focal={focal}", dim=dim + PADDING)
    torch.sub(z, origin, out=wide[..., :dim])
    wide[..., dim:] = 0
    wide[..., dim : dim + N_EXTRA] = EPSILON
    return wide.div_(_length(wide))


def build_proto(shape: ProbeShape, options: Options) -> ClassPrototypeProbe:
    """Float prototypes bound to classes, as in AudioProtoPNet and Bird-MAE.

    s_cj = max_n relu(cos(v_cj, z_n - o) / 1.01), logits = W+ s + b, where W+ = relu(W) has J
    weights a class, each on a prototype of that class; v ~ U(0, 1), W = 1 and b = -2 at first. For
    the cosine both sides get 2 channels of 1e-4, and 1e-4 is added to their squared lengths.
    Training adds the mean squared deviation of P P^T from I, P the unit-length prototypes of a
    class, to the loss. Rauch et al., "Can Masked Autoencoders Also Listen to Birds?" (arXiv
    2504.12880) after Heinrich et al., "AudioProtoPNet" (arXiv 2404.10420); "proto" in "Unmute the
    Patch Tokens" (arXiv 2509.24901), whose parameter counts it has. Options: n_prototypes_per_class
    (J, default 20; the paper takes 10 on AudioSet), focal (subtract CLS o; default: where there is
    one) and orthogonality (weight of the penalty, default 1 as published; Bird-MAE's code divides
    the norm of the deviation by its number of elements instead, a far weaker penalty).
    """
    check_options("proto", options, ("n_prototypes_per_class", "focal", "orthogonality"))
    probe = ClassPrototypeProbe(
        shape,
        whole(options, "n_prototypes_per_class", 20),
        switch(options, "focal", shape.n_prefix > 0),
        number(options, "orthogonality", 1.0, at_least=0),
    )
    if probe.focal and shape.n_prefix < 1:
        raise TrialError(
            "found focal=True, but no prefix tokens in this layer of the bank, expected a CLS "
            "token to subtract; leave focal out"
        )
    return probe
