"""What a probe reaches in each class: a table beside it, as it is too long for results.json."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from patchbank.probing.atomic import write_atomically
from patchbank.probing.evaluation import Fold
from patchbank.probing.metrics import recalls
from patchbank.probing.ranking import TrialScores, Truth, average_precisions, roc_areas

Judge = Callable[[Truth, TrialScores], Float[np.ndarray, "seed class"]]


def write_per_class(
    path: Path,
    folds: Sequence[Fold],
    index: int,
    *,
    targets: Float[np.ndarray, "clip class"],
    classes: Sequence[str],
    multi_label: bool,
) -> None:
    """One row a class: its clips, and mean and deviation on test of the probe at `index`.

    `n_train` counts rows, views among them. Deviations are over seeds; with folds over folds, as
    means are, of those where the class can be judged; `n_test` is then their sum, `n_train` and
    `n_valid` their mean. Cells stay empty where nothing is defined.
    """
    judges: dict[str, Judge] = {"average_precision": average_precisions, "auroc": roc_areas}
    if not multi_label:
        judges["recall"] = recalls
    columns = dict(_counts(folds, targets))
    for name, judge in judges.items():
        columns[name], columns[f"{name}_std"] = _statistics(judge, folds, index, targets)

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["class", *columns])
            for row, name in enumerate(classes):
                writer.writerow([name, *(_cell(values[row]) for values in columns.values())])

    write_atomically(path, write)


def _counts(
    folds: Sequence[Fold], targets: Float[np.ndarray, "clip class"]
) -> Iterator[tuple[str, Float[np.ndarray, " class"]]]:
    for part, gather in (("train", np.mean), ("valid", np.mean), ("test", np.sum)):
        # A mix of a multi-class task holds each of its classes in part.
        n_clips = [(targets[getattr(fold.split, part)] > 0).sum(axis=0) for fold in folds]
        yield f"n_{part}", gather(n_clips, axis=0).astype(np.float64)


def _statistics(
    judge: Judge, folds: Sequence[Fold], index: int, targets: Float[np.ndarray, "clip class"]
) -> tuple[Float[np.ndarray, " class"], Float[np.ndarray, " class"]]:
    values = [
        judge(targets[fold.split.test] > 0.5, fold.outcomes[index].test_scores) for fold in folds
    ]
    spread = values[0] if len(folds) == 1 else np.stack([one.mean(axis=0) for one in values])
    n_defined = (~np.isnan(spread)).sum(axis=0)
    mean = np.where(n_defined > 0, np.nansum(spread, axis=0) / np.maximum(1, n_defined), np.nan)
    squares = np.nansum((spread - mean) ** 2, axis=0) / np.maximum(1, n_defined - 1)
    return mean, np.where(n_defined > 1, np.sqrt(squares), np.nan)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"
