"""Where a probability becomes a decision: for each class the best F1 on validation clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

DEFAULT_THRESHOLD = 0.5
"""Of a class for which validation data say nothing."""


@dataclass(frozen=True)
class Thresholds:
    """One threshold a class, in calibrated probability: at or above it, the class is there."""

    values: tuple[float, ...]
    f1: tuple[float | None, ...]
    """What each reaches on the validation clips that chose it; None where nothing did."""


def choose_thresholds(
    probabilities: Float[np.ndarray, "clip class"], targets: Float[np.ndarray, "clip class"]
) -> Thresholds:
    """The thresholds with the best F1 of each class; `DEFAULT_THRESHOLD` without positives.

    F1 = 2 TP / (2 TP + FP + FN). A threshold lies half-way between the last probability it takes
    and the next below, or 0 where it takes all; of equal F1 the one that takes fewest clips.
    """
    found = [
        _best(probabilities[:, column], targets[:, column] > 0.5)
        for column in range(targets.shape[1])
    ]
    return Thresholds(tuple(value for value, _ in found), tuple(f1 for _, f1 in found))


def _best(
    probabilities: Float[np.ndarray, " clip"], truth: Bool[np.ndarray, " clip"]
) -> tuple[float, float | None]:
    n_positive = int(truth.sum())
    if not n_positive:
        return DEFAULT_THRESHOLD, None
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order].astype(np.float64)
    # Clips of one probability go together: a threshold takes all of them or none.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    f1 = 2 * np.cumsum(truth[order])[ends] / (ends + 1 + n_positive)
    best = int(np.argmax(f1))
    last = int(ends[best])
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((ranked[last] + below) / 2), float(f1[best])
