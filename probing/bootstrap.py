"""Bootstrap over clips: how far a score could move with another draw of the same test set.

Clips of one group (a recording, say) are drawn together. A resample is a weight for every clip (how
often it was drawn), so each class is sorted once, and all resamples are weighted sums over the
stretches between its positives: far cheaper than scoring every resample anew, and equal to
scikit-learn's metrics with `sample_weight` (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, Integer, UInt16

from patchbank.probing.metrics import (
    Metric,
    are_hits,
    class_mean,
    d_prime_of,
    left_out,
)
from patchbank.probing.randomness import derived_seed
from patchbank.probing.ranking import label_ranking_precisions
from patchbank.probing.threads import in_threads

Draws = UInt16[np.ndarray, "resample clip"]
"""How often each clip was drawn."""
Samples = Float[np.ndarray, " resample"]
SeedScores = Float[np.ndarray, "seed clip class"]
Truth = Bool[np.ndarray, "clip class"]
Weights = Integer[np.ndarray, "clip drawn"]
"""Some resamples of `Draws`, clip by clip: sums over clips then run along memory."""
ELEMENT_BUDGET = 2**33
"""Resamples x clips x classes x seeds that a probe may cost on one split: see docs/statistics.md
for what was measured."""
MIN_RESAMPLES = 100
BLOCK_ELEMENTS = 2**21


def affordable_resamples(n_resamples: int, *, n_seeds: int, n_clips: int, n_classes: int) -> int:
    """`n_resamples`, or fewer where the set is large, but then at least 100."""
    affordable = ELEMENT_BUDGET // max(1, n_seeds * n_clips * n_classes)
    return min(n_resamples, max(MIN_RESAMPLES, affordable))


def draw_clips(groups: Int[np.ndarray, " clip"], *, n_resamples: int, seed: int) -> Draws:
    """Resamples of the groups 0, 1, ... of clips, as many groups as there are, with replacement.

    The seed and the number of groups alone decide how often each group is drawn, so that probes
    are compared in pairs; the first draws do not depend on `n_resamples`.
    """
    n_groups = int(groups.max()) + 1
    random = np.random.default_rng([derived_seed("bootstrap", seed), n_groups])
    draws = np.empty((n_resamples, len(groups)), dtype=np.uint16)
    for row in range(n_resamples):
        drawn = random.integers(0, n_groups, size=n_groups)
        draws[row] = np.bincount(drawn, minlength=n_groups)[groups]
    return draws


def resampled_scores(
    metric: Metric,
    targets: Float[np.ndarray, "clip class"],
    scores: SeedScores,
    draws: Draws,
) -> Samples:
    """The mean over seeds of `metric` on each resample; NaN where it has no positives at all.

    A class that a resample leaves without positives is left out of that resample's mean.
    """
    return resampled_metrics([metric], targets, scores, draws)[metric]


def resampled_metrics(
    metrics: Sequence[Metric],
    targets: Float[np.ndarray, "clip class"],
    scores: SeedScores,
    draws: Draws,
) -> dict[Metric, Samples]:
    """`resampled_scores` of several metrics, of which those by class share their sums."""
    truth = targets > 0.5
    found: dict[Metric, Samples] = {}
    if {"map_macro", "auroc_macro", "d_prime"} & set(metrics):
        precision, area = _by_class(truth, scores, draws)
        found["map_macro"], found["auroc_macro"] = precision.mean(axis=0), area.mean(axis=0)
        with np.errstate(invalid="ignore"):  # of one seed infinite, of another minus infinite
            found["d_prime"] = d_prime_of(area).mean(axis=0)
    if "map_micro" in metrics:
        found["map_micro"] = _micro(truth, scores, draws)
    if "accuracy" in metrics:
        found["accuracy"] = _weighted_mean(are_hits(truth, scores).mean(axis=0), draws)
    if "balanced_accuracy" in metrics:
        found["balanced_accuracy"] = _balanced(truth, scores, draws)
    if "lwlrap" in metrics:
        n_labels = truth.sum(axis=1)
        by_label = label_ranking_precisions(truth, scores).mean(axis=0) / np.maximum(1, n_labels)
        found["lwlrap"] = _weighted_mean(by_label, draws, weights=n_labels)
    return {metric: found[metric] for metric in metrics}


def interval(samples: Samples, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; NaN where none is defined.

    A bound that falls beside an infinite sample is infinite or NaN.
    """
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class _Curve:
    """Clips from the highest to the lowest score, cut after each tie that has a positive.

    Between two cuts no threshold matters, so a resample needs one sum a stretch, not one a clip.
    """

    stretches: scipy.sparse.csr_matrix
    """(threshold + 1, clip): down to and with each threshold's tie; last what lies below."""
    positives: scipy.sparse.csr_matrix
    """(threshold, clip): the positives at each threshold; every threshold has some."""
    ties: scipy.sparse.csr_matrix
    """(tie, clip): all at those thresholds where negatives are too."""
    is_tied: Bool[np.ndarray, " threshold"]


def _curve(
    scores: Float[np.ndarray, " element"], truth: Bool[np.ndarray, " element"], *, n_classes: int
) -> _Curve:
    n_elements, n_clips = len(scores), len(scores) // n_classes
    order = np.argsort(scores)[::-1]
    clips, ordered, positive = order // n_classes, scores[order], np.flatnonzero(truth[order])
    thresholds, n_positives = np.unique(-ordered[positive], return_counts=True)
    begin, end = (np.searchsorted(-ordered, thresholds, side=side) for side in ("left", "right"))
    is_tied = end - begin > n_positives
    ties = [clips[start:stop] for start, stop in zip(begin[is_tied], end[is_tied], strict=True)]
    return _Curve(
        _rows_of_ones(clips, np.diff(end, prepend=0, append=n_elements), n_clips),
        _rows_of_ones(clips[positive], n_positives, n_clips),
        _rows_of_ones(np.concatenate([clips[:0], *ties]), (end - begin)[is_tied], n_clips),
        is_tied,
    )


def _rows_of_ones(
    clips: Int[np.ndarray, " element"], lengths: Int[np.ndarray, " row"], n_clips: int
) -> scipy.sparse.csr_matrix:
    # 16-bit ones: a product has the wider type of its factors, which the weights then decide.
    ones, ends = np.ones(len(clips), dtype=np.int16), np.append(0, np.cumsum(lengths))
    return scipy.sparse.csr_matrix((ones, clips, ends), shape=(len(lengths), n_clips))


@dataclass(frozen=True)
class _Drawn:
    """Drawn clips around each threshold, exact."""

    positives: Integer[np.ndarray, "threshold drawn"]
    """Positives at the threshold."""
    hits: Integer[np.ndarray, "threshold drawn"]
    """Positives at or above it."""
    through: Integer[np.ndarray, "threshold drawn"]
    """Clips at or above it."""
    total: Integer[np.ndarray, " drawn"]


def _draw(curve: _Curve, weights: Weights) -> _Drawn:
    positives, above = curve.positives @ weights, _summed(curve.stretches @ weights)
    return _Drawn(positives, _summed(positives), above[:-1], above[-1])


def _summed(counts: Integer[np.ndarray, "row drawn"]) -> Integer[np.ndarray, "row drawn"]:
    """Sums down to each row; converted before, which numpy does several times as fast."""
    dtype = np.int64 if counts.dtype == np.int64 else np.int32
    return np.cumsum(counts.astype(dtype), axis=0, dtype=dtype)


def _average_precision(drawn: _Drawn) -> Float[np.ndarray, " drawn"]:
    """Sum over thresholds of precision x gain in recall, as scikit-learn defines it."""
    precision = drawn.hits / np.maximum(drawn.through, 1)
    precision *= drawn.positives
    return _ratio(precision.sum(axis=0), drawn.hits[-1])


def _roc_area(drawn: _Drawn, curve: _Curve, weights: Weights) -> Float[np.ndarray, " drawn"]:
    """Share of (positive, negative) pairs in the right order, ties for a half: the ROC's area."""
    n_negatives = drawn.total - drawn.hits[-1]
    pairs = (n_negatives - drawn.through + drawn.hits).astype(np.float64)
    if curve.is_tied.any():
        pairs[curve.is_tied] += (curve.ties @ weights - drawn.positives[curve.is_tied]) / 2
    pairs *= drawn.positives
    return _ratio(pairs.sum(axis=0), drawn.hits[-1].astype(np.float64) * n_negatives)


def _by_class(
    truth: Truth, scores: SeedScores, draws: Draws
) -> tuple[Float[np.ndarray, "seed resample"], Float[np.ndarray, "seed resample"]]:
    """Macro average precision and ROC area of each seed on each resample."""
    judged = np.setdiff1d(np.arange(truth.shape[1]), left_out("map_macro", truth.astype(float)))
    if not len(judged):
        nothing = np.full((len(scores), len(draws)), np.nan)
        return nothing, nothing
    blocks = _blocks(draws, n_rows=len(truth))
    parts = [truth[:, index] for index in judged]

    def judge(place: tuple[int, int]) -> Float[np.ndarray, "metric resample"]:
        seed, part = place
        curve = _curve(scores[seed][:, judged[part]], parts[part], n_classes=1)
        drawn = [_draw(curve, weights) for weights in blocks]
        areas = [_roc_area(*pair) for pair in zip(drawn, repeat(curve), blocks)]
        return np.stack([np.concatenate([*map(_average_precision, drawn)]), np.concatenate(areas)])

    means = []
    for seed in range(len(scores)):
        values = np.stack(in_threads(judge, [(seed, part) for part in range(len(judged))]), axis=2)
        means.append([class_mean(one) for one in values])
    precision, area = np.array(means).swapaxes(0, 1)
    return precision, area


def _micro(truth: Truth, scores: SeedScores, draws: Draws) -> Samples:
    n_positives = int(np.count_nonzero(truth))
    if not n_positives:
        return np.full(len(draws), np.nan)
    blocks = _blocks(draws, n_rows=max(len(truth), n_positives), n_classes=truth.shape[1])
    total = np.zeros(len(draws))
    for one in scores:
        curve = _curve(one.ravel(), truth.ravel(), n_classes=truth.shape[1])

        def judge(weights: Weights, curve: _Curve = curve) -> Samples:
            return _average_precision(_draw(curve, weights))

        total += np.concatenate(in_threads(judge, blocks))
    return total / len(scores)


def _balanced(truth: Truth, scores: SeedScores, draws: Draws) -> Samples:
    """The mean recall of the classes that a resample holds."""
    of_class = scipy.sparse.csr_matrix(truth.T.astype(np.float64))
    hits = of_class.multiply(are_hits(truth, scores).mean(axis=0)).tocsr()
    return np.concatenate(
        [
            class_mean(_ratio(hits @ weights, of_class @ weights).T)
            for weights in _blocks(draws, n_rows=len(truth))
        ]
    )


def _weighted_mean(
    values: Float[np.ndarray, " clip"],
    draws: Draws,
    weights: Int[np.ndarray, " clip"] | None = None,
) -> Samples:
    weights = np.ones(len(values), dtype=np.int64) if weights is None else weights
    blocks = _blocks(draws, n_rows=len(values))
    return np.concatenate([_ratio((values * weights) @ one, weights @ one) for one in blocks])


def _blocks(draws: Draws, *, n_rows: int, n_classes: int = 1) -> list[Weights]:
    """The draws in parts whose sums over `n_rows` rows fit a bounded scratch."""
    size = max(1, BLOCK_ELEMENTS // n_rows)
    most = int(draws.sum(axis=1, dtype=np.int64).max()) * n_classes
    # The smaller the integers, the faster are their sums.
    dtype = next(one for one in (np.int16, np.int32, np.int64) if most <= np.iinfo(one).max)
    return [
        np.ascontiguousarray(draws[start : start + size].T.astype(dtype))
        for start in range(0, len(draws), size)
    ]


def _ratio(
    part: Float[np.ndarray, "*axes"],
    whole: Integer[np.ndarray, "*axes"] | Float[np.ndarray, "*axes"],
) -> Float[np.ndarray, "*axes"]:
    ratio = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio
