"""Ranking metrics of many trials at once: where positives lie among the sorted scores.

Average precision and the ROC's area need the ranks of the positives alone. So a column's scores
are sorted as bare numbers (numpy's vectorised sort, which lets go of the interpreter's lock: over
five times as fast as a sort of positions) and the positives looked up in them. Ties are treated as
scikit-learn treats them. Scratch is bounded: some 2**21 scores a thread, for `micro` one trial.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from patchbank.probing.threads import in_threads

Truth = Bool[np.ndarray, "clip class"]
TrialScores = Float[np.ndarray, "trial clip class"]
Column = Float[np.ndarray, " _"]
"""Ascending scores."""
BLOCK_ELEMENTS = 2**21


def average_precisions(truth: Truth, scores: TrialScores) -> Float[np.ndarray, "trial class"]:
    """The average precision of each class; NaN of a class without positives."""
    return _by_class(_average_precision, truth, scores)


def roc_areas(truth: Truth, scores: TrialScores) -> Float[np.ndarray, "trial class"]:
    """The area under the ROC of each class; NaN of a class without positives or negatives."""
    return _by_class(_roc_area, truth, scores)


def micro_average_precisions(truth: Truth, scores: TrialScores) -> Float[np.ndarray, " trial"]:
    """The average precision of all (clip, class) pairs in one ranking."""
    flat = truth.ravel()

    def judge(trial: Float[np.ndarray, "clip class"]) -> float:
        pairs = trial.ravel()
        return _average_precision(np.sort(pairs), np.sort(pairs[flat]))

    return np.array(in_threads(judge, list(_exact(scores))))


def label_ranking_precisions(truth: Truth, scores: TrialScores) -> Float[np.ndarray, "trial clip"]:
    """For each clip, the sum over its labels of the precision at the label's rank in the clip.

    The precision of a label is the share of labels among the classes that score no lower.
    """
    clips, classes = np.nonzero(truth)
    size = max(1, BLOCK_ELEMENTS // truth.shape[1])
    blocks = [slice(start, start + size) for start in range(0, len(clips), size)]

    def judge(trial: Float[np.ndarray, "clip class"]) -> Float[np.ndarray, " clip"]:
        total = np.zeros(len(trial))
        for block in blocks:
            rows = clips[block]
            no_lower = trial[rows] >= trial[rows, classes[block]][:, None]
            hits = np.count_nonzero(no_lower & truth[rows], axis=1)
            precisions = hits / np.maximum(1, np.count_nonzero(no_lower, axis=1))
            total += np.bincount(rows, precisions, minlength=len(trial))
        return total

    return np.stack(in_threads(judge, list(_exact(scores))))


def _by_class(
    judge: Callable[[Column, Column], float], truth: Truth, scores: TrialScores
) -> Float[np.ndarray, "trial class"]:
    n_trials, n_clips, n_classes = scores.shape
    positives = [np.flatnonzero(column) for column in np.ascontiguousarray(truth.T)]
    size = max(1, BLOCK_ELEMENTS // n_clips)
    values = np.full((n_trials, n_classes), np.nan)

    def fill(place: tuple[int, int]) -> None:
        trial, start = place
        columns = _exact(np.ascontiguousarray(scores[trial, :, start : start + size].T))
        ordered = np.sort(columns, axis=1)
        for index in range(len(columns)):
            positive = positives[start + index]
            if len(positive):
                ranked = np.sort(columns[index, positive])
                values[trial, start + index] = judge(ordered[index], ranked)

    in_threads(fill, [(t, start) for t in range(n_trials) for start in range(0, n_classes, size)])
    return values


def _exact(scores: Float[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Half precision as float32, which numpy sorts many times faster; others as they are."""
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores


def _average_precision(ordered: Column, positives: Column) -> float:
    """The mean, over positives, of the share of positives among what scores no lower.

    Which is scikit-learn's sum over thresholds of precision x gain in recall.
    """
    if not len(positives):
        return float("nan")
    n_no_lower = len(ordered) - np.searchsorted(ordered, positives)
    hits = len(positives) - np.searchsorted(positives, positives)
    return float(np.mean(hits / n_no_lower))


def _roc_area(ordered: Column, positives: Column) -> float:
    """The share of (positive, negative) pairs in the right order, ties for a half."""
    n_pairs = len(positives) * (len(ordered) - len(positives))
    if not n_pairs:
        return float("nan")
    twice = sum(
        int(np.searchsorted(ordered, positives, side=side).sum())
        - int(np.searchsorted(positives, positives, side=side).sum())
        for side in ("left", "right")
    )
    return twice / 2 / n_pairs
