"""Losses of stacked trials: one mean a trial, so that trials add up without touching each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Logits = Float[Tensor, "trial clip class"]
Targets = Float[Tensor, "clip class"]
PerTrial = Float[Tensor, " trial"]
Loss = Callable[[Logits, Targets], PerTrial]
LossName = Literal["asymmetric", "bce", "cross-entropy"]


def asymmetric(
    logits: Logits,
    targets: Targets,
    *,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
) -> PerTrial:
    """Asymmetric loss, the mean over clips and classes.

    With p = sigmoid(logit) and q = max(p - clip, 0):
    -[y (1-p)^gamma_positive log p + (1-y) q^gamma_negative log(1-q)], gradients through every
    factor. Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021,
    eq. 3-7; the defaults are those of Bird-MAE. Targets between 0 and 1 mix both terms.
    """
    p = torch.sigmoid(logits)
    q = (p - clip).clamp(min=0)
    # log(1-q) is safe for clip > 0 only; the floor serves clip = 0.
    log_miss = torch.log((1 - q).clamp(min=1e-8))
    positive = targets * (1 - p) ** gamma_positive * F.logsigmoid(logits)
    negative = (1 - targets) * q**gamma_negative * log_miss
    return -(positive + negative).mean(dim=(1, 2))


def bce(logits: Logits, targets: Targets) -> PerTrial:
    """Binary cross-entropy, the mean over clips and classes."""
    expanded = targets.expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, expanded, reduction="none").mean(dim=(1, 2))


def cross_entropy(logits: Logits, targets: Targets) -> PerTrial:
    """Softmax cross-entropy of one-hot (or soft) targets, the mean over clips."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean(dim=1)


LOSSES: dict[LossName, Loss] = {
    "asymmetric": asymmetric,
    "bce": bce,
    "cross-entropy": cross_entropy,
}
