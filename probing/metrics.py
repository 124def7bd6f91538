"""What a probe's scores are worth, all as fractions of 1, computed by scikit-learn.

A class without a positive clip has no average precision, and one without a negative clip no ROC:
such classes are left out of the means, and `left_out` names them so that a table can say so. For
multi-class tasks each class stands against the rest. `accuracy` is the share of clips whose
highest score is their class; multi-label tasks have none, because every choice of threshold or
subset rule would make another number of it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

Metric = Literal["map_macro", "map_micro", "auroc_macro", "accuracy"]
Targets = Float[np.ndarray, "clip class"]
Scores = Float[np.ndarray, "clip class"]


def metric_names(*, multi_label: bool) -> tuple[Metric, ...]:
    """The metrics of a task, the one that selects first."""
    if multi_label:
        return ("map_macro", "map_micro", "auroc_macro")
    return ("accuracy", "map_macro", "map_micro", "auroc_macro")


def primary_metric(*, multi_label: bool) -> Metric:
    """The metric that selects learning rates and seeds on validation data."""
    return metric_names(multi_label=multi_label)[0]


def left_out(metric: Metric, targets: Targets) -> Int[np.ndarray, " absent"]:
    """Numbers of the classes that `metric` cannot judge on these clips."""
    n_positives = (targets > 0.5).sum(axis=0)
    if metric == "map_macro":
        return np.flatnonzero(n_positives == 0)
    if metric == "auroc_macro":
        return np.flatnonzero((n_positives == 0) | (n_positives == len(targets)))
    return np.array([], dtype=np.int64)


def score(metric: Metric, targets: Targets, scores: Scores) -> float:
    """`metric` of `scores`, NaN where no class can be judged; higher scores mean more likely."""
    truth = targets > 0.5
    if metric == "accuracy":
        return float(accuracy_score(truth.argmax(axis=1), scores.argmax(axis=1)))
    if metric == "map_micro":
        return float(average_precision_score(truth.ravel(), scores.ravel()))
    judged = np.setdiff1d(np.arange(targets.shape[1]), left_out(metric, targets))
    if not len(judged):
        return float("nan")
    judge = average_precision_score if metric == "map_macro" else roc_auc_score
    return float(np.mean([judge(truth[:, index], scores[:, index]) for index in judged]))
