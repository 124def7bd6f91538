"""What a probe's scores are worth: fractions of 1 but for d', equal to scikit-learn's.

A class without a positive clip has no average precision and no recall, and one without a negative
clip no ROC: such classes are left out of the means, and `left_out` names them so that a table can
say so. For multi-class tasks each class stands against the rest. `accuracy` is the share of clips
whose highest score is their class; multi-label tasks have none, because every choice of threshold
or subset rule would make another number of it. `d_prime` is sqrt(2) x the normal quantile of the
macro AUROC, as in papers on AudioSet (Hershey et al., CNN architectures for large-scale audio
classification, ICASSP 2017); it is infinite where the AUROC is 0 or 1. `lwlrap` is label-weighted
label-ranking average precision (Fonseca et al., DCASE 2019 task 2): every label counts the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri

from patchbank.probing.ranking import (
    Truth,
    average_precisions,
    label_ranking_precisions,
    micro_average_precisions,
    roc_areas,
)

Metric = Literal[
    "map_macro",
    "map_micro",
    "auroc_macro",
    "d_prime",
    "lwlrap",
    "accuracy",
    "balanced_accuracy",
]
Targets = Float[np.ndarray, "clip class"]
Scores = Float[np.ndarray, "clip class"]
TrialScores = Float[np.ndarray, "trial clip class"]
TrialValues = Float[np.ndarray, " trial"]
RANKING: tuple[Metric, ...] = ("map_macro", "map_micro", "auroc_macro", "d_prime")


def metric_names(*, multi_label: bool) -> tuple[Metric, ...]:
    """The metrics of a task, the one that selects first."""
    return (*RANKING, "lwlrap") if multi_label else ("accuracy", "balanced_accuracy", *RANKING)


def primary_metric(*, multi_label: bool) -> Metric:
    """The metric that selects learning rates and seeds on validation data."""
    return metric_names(multi_label=multi_label)[0]


def left_out(metric: Metric, targets: Targets) -> Int[np.ndarray, " absent"]:
    """Numbers of the classes that `metric` cannot judge on these clips."""
    n_positives = (targets > 0.5).sum(axis=0)
    if metric in ("map_macro", "balanced_accuracy"):
        return np.flatnonzero(n_positives == 0)
    if metric in ("auroc_macro", "d_prime"):
        return np.flatnonzero((n_positives == 0) | (n_positives == len(targets)))
    return np.array([], dtype=np.int64)


def score(metric: Metric, targets: Targets, scores: Scores) -> float:
    """`metric` of `scores`, NaN where no class can be judged; higher scores mean more likely."""
    return float(score_trials(metric, targets, scores[None])[0])


def score_trials(metric: Metric, targets: Targets, scores: TrialScores) -> TrialValues:
    """`score` of every trial, from all cores; NaN of a trial with a NaN among its scores."""
    truth = targets > 0.5
    values = _values(metric, truth, scores)
    if scores.shape[1]:
        values[[bool(np.isnan(trial.max())) for trial in scores]] = np.nan
    return values


def _values(metric: Metric, truth: Truth, scores: TrialScores) -> TrialValues:
    if metric == "map_macro":
        return class_mean(average_precisions(truth, scores))
    if metric == "map_micro":
        return micro_average_precisions(truth, scores)
    if metric == "auroc_macro":
        return class_mean(roc_areas(truth, scores))
    if metric == "d_prime":
        return d_prime_of(class_mean(roc_areas(truth, scores)))
    if metric == "lwlrap":
        n_labels = np.count_nonzero(truth)
        total = label_ranking_precisions(truth, scores).sum(axis=1)
        return np.asarray(total / n_labels) if n_labels else np.full(len(scores), np.nan)
    if metric == "balanced_accuracy":
        return class_mean(recalls(truth, scores))
    return np.asarray(are_hits(truth, scores).mean(axis=1))


def d_prime_of(areas: Float[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """The distance of two normal distributions of variance 1 whose ROC has this area."""
    return np.asarray(np.sqrt(2) * ndtri(areas))


def are_hits(truth: Truth, scores: TrialScores) -> Float[np.ndarray, "trial clip"]:
    """1 where the highest score (the first of equals) is the clip's class, else 0."""
    chosen = np.stack([trial.argmax(axis=1) for trial in scores])
    return np.asarray(chosen == truth.argmax(axis=1), dtype=np.float64)


def recalls(truth: Truth, scores: TrialScores) -> Float[np.ndarray, "trial class"]:
    """The share of each class's clips that are hits; NaN of a class without positives."""
    n_classes, classes = truth.shape[1], truth.argmax(axis=1)
    n_positives = np.bincount(classes, minlength=n_classes)
    n_hits = [np.bincount(classes, hits, n_classes) for hits in are_hits(truth, scores)]
    shares = np.stack(n_hits) / np.maximum(1, n_positives)
    return np.asarray(np.where(n_positives > 0, shares, np.nan))


def class_mean(values: Float[np.ndarray, "trial class"]) -> TrialValues:
    """The mean over classes that have a value; NaN where none has."""
    n_judged = (~np.isnan(values)).sum(axis=1)
    total = np.nansum(values, axis=1)
    return np.where(n_judged > 0, total / np.maximum(1, n_judged), np.nan)
