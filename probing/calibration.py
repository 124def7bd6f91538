"""Probabilities from a probe's logits, and the temperature that fits them to validation data.

Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, arXiv 1706.04599),
temperature scaling. It divides all logits by one number, so that no ranking changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
"""Where validation clips are separable, the likelihood grows without end as T falls to 0; where
logits are worse than none, as T rises. The search ends here."""
TOLERANCE = 1e-4
"""Of log T."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the data that chose it."""

    temperature: float
    n_clips: int
    nll_before: float
    """Mean negative log-likelihood in nats of the validation clips at T = 1."""
    nll_after: float


def probabilities_of(
    logits: Float[Tensor, "*trial clip class"], *, multi_label: bool, temperature: float = 1.0
) -> Float[Tensor, "*trial clip class"]:
    """Of logits / T: a sigmoid a class, or a softmax for multi-class tasks."""
    scaled = logits / temperature
    return torch.sigmoid(scaled) if multi_label else scaled.softmax(dim=-1)


def calibrate(
    scores: Float[np.ndarray, "clip class"],
    targets: Float[np.ndarray, "clip class"],
    *,
    multi_label: bool,
) -> Calibration:
    """The T that minimises the validation loss of scores / T, between the two bounds.

    scores are logits, or log-probabilities of a multi-class task. The loss is binary cross-entropy,
    the mean over clips and classes, or the softmax's cross-entropy, the mean over clips. In 1 / T
    it is convex, so a bounded search finds the one minimum; T = 1 where nothing is better.
    """
    loss = _Loss(torch.from_numpy(scores), torch.from_numpy(targets), multi_label=multi_label)
    bounds = (math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))
    found = minimize_scalar(
        lambda log_t: loss.at(math.exp(log_t)),
        bounds=bounds,
        method="bounded",
        options={"xatol": TOLERANCE},
    )
    # The search never tries a bound itself. Of equals the first: T = 1 is changed for a gain only.
    tried = [1.0, math.exp(found.x), LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE]
    losses = [loss.at(temperature) for temperature in tried]
    best = int(np.argmin(losses))
    return Calibration(tried[best], len(scores), losses[0], losses[best])


class _Loss:
    """Negative log-likelihood as a function of T.

    What is summed, in float64, is how far each score is on the wrong side, so that nothing cancels
    near zero.
    """

    def __init__(self, scores: Tensor, targets: Tensor, *, multi_label: bool) -> None:
        self._multi_label = multi_label
        if multi_label:
            self._wrong = torch.where(targets > 0.5, -scores, scores)
        else:
            truth = targets.argmax(dim=1, keepdim=True)
            self._wrong = (scores - scores.gather(1, truth)).scatter(1, truth, -torch.inf)

    def at(self, temperature: float) -> float:
        scaled = self._wrong / temperature
        if not self._multi_label:
            scaled = scaled.logsumexp(dim=-1)  # of the other classes: log(1 + e^this) is the loss
        losses = torch.nn.functional.logsigmoid(-scaled)
        return -float(losses.sum(dtype=torch.float64)) / losses.numel()
