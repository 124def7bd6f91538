"""From trained probes to the numbers that are reported: means, deviations, intervals.

Over seeds of one split, or over folds of each fold's mean over seeds. Intervals come from
resampling clips, the same draws for every probe, so that two probes can be compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from patchbank.probing.bootstrap import (
    Draws,
    affordable_resamples,
    draw_clips,
    interval,
    resampled_scores,
)
from patchbank.probing.metrics import Metric, left_out, metric_names, score
from patchbank.probing.protocol import Outcome
from patchbank.probing.splits import Split

Part = Literal["valid", "test"]
PARTS: tuple[Part, ...] = ("valid", "test")


@dataclass(frozen=True)
class Fold:
    """What all probes did on one split."""

    split: Split
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class _Judged:
    """Scores of one probe on one part of one fold."""

    truth: Float[np.ndarray, "clip class"]
    scores: Float[np.ndarray, "seed clip class"]
    draws: Draws


def score_rows(
    folds: Sequence[Fold],
    targets: Float[np.ndarray, "clip class"],
    *,
    multi_label: bool,
    n_resamples: int,
) -> list[dict[str, Any]]:
    """The `scores` of results.json: one row a probe, split and metric.

    `std` is over seeds, or over folds where there are several (ddof=1; None of a single value).
    """
    rows = []
    for index, outcome in enumerate(folds[0].outcomes):
        for part in PARTS:
            judged = [
                _judge(fold, fold.outcomes[index], part, targets, n_resamples, seed)
                for seed, fold in enumerate(folds)
            ]
            for metric in metric_names(multi_label=multi_label):
                place = {"probe": outcome.name, "split": part, "metric": metric}
                rows.append(place | _statistics(metric, judged))
    return rows


def _judge(
    fold: Fold,
    outcome: Outcome,
    part: Part,
    targets: Float[np.ndarray, "clip class"],
    n_resamples: int,
    seed: int,
) -> _Judged:
    truth = targets[getattr(fold.split, part)]
    scores = outcome.valid_scores if part == "valid" else outcome.test_scores
    n_draws = resamples_of(scores, n_resamples)
    return _Judged(truth, scores, draw_clips(len(truth), n_resamples=n_draws, seed=seed))


def resamples_of(scores: Float[np.ndarray, "seed clip class"], n_resamples: int) -> int:
    """How many resamples a set of this size is given."""
    n_seeds, n_clips, n_classes = scores.shape
    return affordable_resamples(n_resamples, n_seeds=n_seeds, n_clips=n_clips, n_classes=n_classes)


def _statistics(metric: Metric, judged: Sequence[_Judged]) -> dict[str, Any]:
    by_fold = [[score(metric, fold.truth, one) for one in fold.scores] for fold in judged]
    spread = by_fold[0] if len(judged) == 1 else [float(np.mean(values)) for values in by_fold]
    n_draws = min(len(fold.draws) for fold in judged)
    samples = np.mean(
        [
            resampled_scores(metric, fold.truth, fold.scores, fold.draws[:n_draws])
            for fold in judged
        ],
        axis=0,
    )
    return {
        "mean": _number(float(np.mean(spread))),
        "std": _number(float(np.std(spread, ddof=1))) if len(spread) > 1 else None,
        "n_seeds": len(by_fold[0]),
        "n_clips": sum(len(fold.truth) for fold in judged),
        "ci95": [_number(bound) for bound in interval(samples)],
    }


def left_out_rows(
    folds: Sequence[Fold],
    targets: Float[np.ndarray, "clip class"],
    classes: Sequence[str],
    *,
    multi_label: bool,
) -> list[dict[str, Any]]:
    """The classes that a metric could not judge, where there are any."""

    def found() -> Iterator[dict[str, Any]]:
        for fold in folds:
            for part in PARTS:
                truth = targets[getattr(fold.split, part)]
                for metric in metric_names(multi_label=multi_label):
                    names = [classes[index] for index in left_out(metric, truth)]
                    if names:
                        place = {"fold": fold.split.name, "split": part, "metric": metric}
                        yield place | {"n_classes": len(names), "classes": names}

    return list(found())


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
