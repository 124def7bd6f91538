"""From trained probes to the numbers that are reported: means, deviations, intervals.

Over seeds of one split, or over folds of each fold's mean over seeds. Intervals come from
resampling groups of clips, the same draws for every probe, so that two probes can be compared in
pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt16

from patchbank.probing.bootstrap import (
    Draws,
    Samples,
    affordable_resamples,
    draw_clips,
    interval,
    resampled_metrics,
)
from patchbank.probing.comparison import Contestant, compare, finite
from patchbank.probing.groups import group_numbers
from patchbank.probing.metrics import Metric, left_out, metric_names, primary_metric, score_trials
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
class Evaluation:
    """What all probes of a run are worth."""

    scores: list[dict[str, Any]]
    """The `scores` of results.json: one row a probe, split and metric."""
    samples: Mapping[tuple[str, Metric], Samples]
    """Bootstrap samples of each probe and metric on the test split; with folds of their mean."""
    comparisons: list[dict[str, Any]]
    """Pairs of probes on the test split in the primary metric."""
    n_groups: int
    """Groups of clips in the test split, with folds in all of them."""


@dataclass(frozen=True)
class _Judged:
    """Scores of one probe on one part of one fold."""

    truth: Float[np.ndarray, "clip class"]
    scores: Float[np.ndarray, "seed clip class"]
    draws: Draws


def evaluate(
    folds: Sequence[Fold],
    targets: Float[np.ndarray, "clip class"],
    *,
    clip_ids: Sequence[str],
    groups: Sequence[str],
    multi_label: bool,
    n_resamples: int,
) -> Evaluation:
    """Means, deviations, intervals and comparisons; `clip_ids` and `groups` are of all rows.

    `std` is over seeds, or over folds where there are several (ddof=1; None of a single value).
    What is not defined, or infinite, is None.
    """
    n_draws = resamples_of(folds, n_resamples)
    metrics = metric_names(multi_label=multi_label)
    rows: list[dict[str, Any]] = []
    samples: dict[tuple[str, Metric], Samples] = {}
    numbers = {part: [_numbers(fold, part, clip_ids, groups) for fold in folds] for part in PARTS}
    draws = {part: _draws(numbers[part], n_draws) for part in PARTS}
    for index, outcome in enumerate(folds[0].outcomes):
        for part in PARTS:
            judged = _judge(folds, index, part, targets, draws[part])
            found = _samples(metrics, judged)
            for metric in metrics:
                place = {"probe": outcome.name, "split": part, "metric": metric}
                rows.append(place | _statistics(metric, judged, found[metric]))
                if part == "test":
                    samples[outcome.name, metric] = found[metric]
    n_groups = [int(of_fold.max()) + 1 for of_fold in numbers["test"]]
    primary = primary_metric(multi_label=multi_label)
    contestants = [
        Contestant(
            row["probe"], row["mean"], row["std"], samples[row["probe"], primary], max(n_groups)
        )
        for row in rows
        if (row["split"], row["metric"]) == ("test", primary)
    ]
    return Evaluation(rows, samples, compare(contestants, metric=primary), sum(n_groups))


def _numbers(
    fold: Fold, part: Part, clip_ids: Sequence[str], groups: Sequence[str]
) -> Int[np.ndarray, " clip"]:
    rows = getattr(fold.split, part).tolist()
    return group_numbers([clip_ids[row] for row in rows], [groups[row] for row in rows])


def _draws(numbers: Sequence[Int[np.ndarray, " _"]], n_draws: int) -> list[Draws]:
    return [
        draw_clips(groups, n_resamples=n_draws, seed=fold) for fold, groups in enumerate(numbers)
    ]


def _judge(
    folds: Sequence[Fold],
    index: int,
    part: Part,
    targets: Float[np.ndarray, "clip class"],
    draws: Sequence[UInt16[np.ndarray, "_ _"]],
) -> list[_Judged]:
    return [
        _Judged(
            targets[getattr(fold.split, part)],
            getattr(fold.outcomes[index], f"{part}_scores"),
            drawn,
        )
        for fold, drawn in zip(folds, draws, strict=True)
    ]


def resamples_of(folds: Sequence[Fold], n_resamples: int) -> int:
    """How many resamples a probe is given: as many as its largest part of a fold can afford."""

    def affordable(scores: Float[np.ndarray, "seed clip class"]) -> int:
        n_seeds, n_clips, n_classes = scores.shape
        return affordable_resamples(
            n_resamples, n_seeds=n_seeds, n_clips=n_clips, n_classes=n_classes
        )

    first = [fold.outcomes[0] for fold in folds]
    return min(affordable(one) for all_ in first for one in (all_.valid_scores, all_.test_scores))


def _samples(metrics: Sequence[Metric], judged: Sequence[_Judged]) -> dict[Metric, Samples]:
    by_fold = [resampled_metrics(metrics, fold.truth, fold.scores, fold.draws) for fold in judged]
    with np.errstate(invalid="ignore"):  # of infinite d'
        return {metric: np.mean([one[metric] for one in by_fold], axis=0) for metric in metrics}


def _statistics(metric: Metric, judged: Sequence[_Judged], samples: Samples) -> dict[str, Any]:
    by_fold = [score_trials(metric, fold.truth, fold.scores) for fold in judged]
    spread = by_fold[0] if len(judged) == 1 else np.array([values.mean() for values in by_fold])
    with np.errstate(invalid="ignore"):  # of infinite d'
        std = float(np.std(spread, ddof=1)) if len(spread) > 1 else float("nan")
        mean = float(np.mean(spread))
    return {
        "mean": finite(mean),
        "std": finite(std),
        "n_seeds": len(by_fold[0]),
        "n_clips": sum(len(fold.truth) for fold in judged),
        "ci95": [finite(bound) for bound in interval(samples)],
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
