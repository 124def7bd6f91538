"""Bootstrap over clips: how far a score could move with another draw of the same test set.

A resample is a weight for every clip (how often it was drawn), so each class is sorted once and
all resamples are weighted sums along that order: far cheaper than scoring every resample anew,
and equal to scikit-learn's metrics with `sample_weight` (tested).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

from patchbank.probing.metrics import Metric, left_out
from patchbank.probing.randomness import derived_seed

Draws = UInt16[np.ndarray, "resample clip"]
"""How often each clip was drawn."""
Samples = Float[np.ndarray, " resample"]
ELEMENT_BUDGET = 2**29
"""Resamples x clips x classes x seeds that one metric of one split may cost: ten seconds or so."""
MIN_RESAMPLES = 100
BLOCK_ELEMENTS = 2**19


def affordable_resamples(n_resamples: int, *, n_seeds: int, n_clips: int, n_classes: int) -> int:
    """`n_resamples`, or fewer where the set is large, but then at least 100."""
    affordable = ELEMENT_BUDGET // max(1, n_seeds * n_clips * n_classes)
    return min(n_resamples, max(MIN_RESAMPLES, affordable))


def draw_clips(n_clips: int, *, n_resamples: int, seed: int) -> Draws:
    """Resamples that (n_clips, seed) alone decide, so that probes are compared in pairs."""
    random = np.random.default_rng([derived_seed("bootstrap", seed), n_clips])
    draws = np.empty((n_resamples, n_clips), dtype=np.uint16)
    for row in range(n_resamples):
        drawn = random.integers(0, n_clips, size=n_clips)
        draws[row] = np.bincount(drawn, minlength=n_clips)
    return draws


def resampled_scores(
    metric: Metric,
    targets: Float[np.ndarray, "clip class"],
    scores: Float[np.ndarray, "seed clip class"],
    draws: Draws,
) -> Samples:
    """The mean over seeds of `metric` on each resample; NaN where it has no positives at all.

    A class that a resample leaves without positives is left out of that resample's mean.
    """
    truth = targets > 0.5
    if metric == "accuracy":
        hits = (scores.argmax(axis=2) == truth.argmax(axis=1)).mean(axis=0)
        return np.asarray(draws @ hits / targets.shape[0])
    if metric == "map_micro":
        curves = [_curve(one.ravel(), truth.ravel(), n_classes=truth.shape[1]) for one in scores]
        return np.asarray(np.mean([_average_precision(curve, draws) for curve in curves], axis=0))
    area = _average_precision if metric == "map_macro" else _roc_area
    judged = np.setdiff1d(np.arange(truth.shape[1]), left_out(metric, targets))
    total, n_valid = np.zeros(len(draws)), np.zeros(len(draws))
    for one in scores:
        for index in judged:
            value = area(_curve(one[:, index], truth[:, index], n_classes=1), draws)
            n_valid += ~np.isnan(value)
            total += np.nan_to_num(value)
    return np.where(n_valid > 0, total / np.maximum(n_valid, 1), np.nan)


def interval(samples: Samples, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; NaN where none is defined."""
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class _Curve:
    """Clips from the highest to the lowest score, cut where a positive begins or ends a tie.

    Between two cuts no threshold matters, so a resample needs one sum a stretch, not one a clip.
    """

    clip: Int[np.ndarray, " element"]
    cuts: Int[np.ndarray, " cut"]
    """Beginnings of the stretches; the first is 0."""
    begin: Int[np.ndarray, " threshold"]
    """Position in `cuts` where the ties of a threshold begin; thresholds have positives."""
    end: Int[np.ndarray, " threshold"]
    """Position in `cuts` after them; their number is that of the last stretch's end."""
    positive_clip: Int[np.ndarray, " positive"]
    positive_cuts: Int[np.ndarray, " threshold"]
    """First of the positives of each threshold."""


def _curve(
    scores: Float[np.ndarray, " element"],
    truth: Bool[np.ndarray, " element"],
    *,
    n_classes: int,
) -> _Curve:
    order = np.argsort(-scores, kind="stable")
    clip, ordered = order // n_classes, scores[order]
    starts = np.append(0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    positions = np.flatnonzero(truth[order])
    ties = np.searchsorted(starts, positions, side="right") - 1
    thresholds, first = np.unique(ties, return_index=True)
    begin, end = starts[thresholds], np.append(starts, len(order))[thresholds + 1]
    cuts = np.unique(np.concatenate([[0], begin, end]))
    places = np.searchsorted(cuts, begin), np.searchsorted(cuts, end)
    return _Curve(clip, cuts[cuts < len(order)], *places, clip[positions], first)


@dataclass(frozen=True)
class _Drawn:
    """Drawn clips around each threshold, exact integers."""

    positives: Float[np.ndarray, "resample threshold"]
    """Positives at the threshold."""
    hits: Float[np.ndarray, "resample threshold"]
    """Positives at or above it."""
    before: Float[np.ndarray, "resample threshold"]
    """Clips above it."""
    through: Float[np.ndarray, "resample threshold"]
    """Clips at or above it."""
    total: Float[np.ndarray, " resample"]


def _draw(curve: _Curve, draws: Draws) -> _Drawn:
    stretches = np.add.reduceat(draws[:, curve.clip], curve.cuts, axis=1, dtype=np.float64)
    above = np.cumsum(np.pad(stretches, ((0, 0), (1, 0))), axis=1)
    weights = draws[:, curve.positive_clip]
    positives = np.add.reduceat(weights, curve.positive_cuts, axis=1, dtype=np.float64)
    hits = np.cumsum(positives, axis=1)
    return _Drawn(positives, hits, above[:, curve.begin], above[:, curve.end], above[:, -1])


def _average_precision(curve: _Curve, draws: Draws) -> Samples:
    """Sum over thresholds of precision x gain in recall, as scikit-learn defines it."""
    samples = np.empty(len(draws))
    for block in _blocks(len(draws), len(curve.clip)):
        drawn = _draw(curve, draws[block])
        precision = drawn.hits / np.maximum(drawn.through, 1)
        samples[block] = _ratio((precision * drawn.positives).sum(axis=1), drawn.hits[:, -1])
    return samples


def _roc_area(curve: _Curve, draws: Draws) -> Samples:
    """Share of (positive, negative) pairs in the right order, ties for a half: the ROC's area."""
    samples = np.empty(len(draws))
    for block in _blocks(len(draws), len(curve.clip)):
        drawn = _draw(curve, draws[block])
        n_negatives = drawn.total - drawn.hits[:, -1]
        below = n_negatives[:, None] - (drawn.through - drawn.hits)
        tied = drawn.through - drawn.before - drawn.positives
        area = (drawn.positives * (below + tied / 2)).sum(axis=1)
        samples[block] = _ratio(area, drawn.hits[:, -1] * n_negatives)
    return samples


def _blocks(n_resamples: int, n_elements: int) -> list[slice]:
    """Slices of resamples whose weights fit a bounded scratch."""
    size = max(1, BLOCK_ELEMENTS // n_elements)
    return [slice(start, start + size) for start in range(0, n_resamples, size)]


def _ratio(part: Float[np.ndarray, " resample"], whole: Float[np.ndarray, " resample"]) -> Samples:
    ratio = np.full(len(part), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio
