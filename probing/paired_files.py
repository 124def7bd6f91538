"""The files of a run that let other runs be compared with it: its test clips, and its resamples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.errors import TrialError
from patchbank.probing.atomic import write_atomically
from patchbank.probing.bootstrap import Samples
from patchbank.probing.evaluation import Fold
from patchbank.probing.labels import LabelSet
from patchbank.probing.metrics import Metric

TEST_CLIPS = "test-clips.parquet"
RESAMPLES = "resamples.parquet"


@dataclass(frozen=True)
class JudgedClip:
    """What was tested: a clip, once in each fold that tests it."""

    fold: str
    clip_id: str
    group: str
    labels: frozenset[str]


def write_test_clips(
    out: Path,
    folds: Sequence[Fold],
    labels: LabelSet,
    *,
    clip_ids: Sequence[str],
    groups: Sequence[str],
) -> None:
    """One row for each clip of each fold's test split: `fold`, `clip_id`, `group`, `labels`."""
    places = [(fold.split.name, row) for fold in folds for row in fold.split.test.tolist()]
    table = pa.table(
        {
            "fold": [name for name, _ in places],
            "clip_id": [clip_ids[row] for _, row in places],
            "group": [groups[row] for _, row in places],
            "labels": pa.array(
                [
                    [labels.classes[index] for index in np.flatnonzero(labels.targets[row] > 0.5)]
                    for _, row in places
                ],
                pa.list_(pa.string()),
            ),
        }
    )
    write_atomically(out / TEST_CLIPS, lambda temporary: pq.write_table(table, temporary))


def write_resamples(out: Path, samples: Mapping[tuple[str, Metric], Samples]) -> None:
    """One row for each probe and metric, with its bootstrap samples on the test split, in order."""
    table = pa.table(
        {
            "probe": [probe for probe, _ in samples],
            "metric": [metric for _, metric in samples],
            "samples": pa.array(list(samples.values()), pa.list_(pa.float64())),
        }
    )
    write_atomically(out / RESAMPLES, lambda temporary: pq.write_table(table, temporary))


def read_test_clips(run: Path) -> list[JudgedClip]:
    """In the order of folds and clip ids; `TrialError` where the file is missing or damaged."""
    rows = _read(run / TEST_CLIPS, ["fold", "clip_id", "group", "labels"]).to_pylist()
    clips = [
        JudgedClip(row["fold"], row["clip_id"], row["group"], frozenset(row["labels"]))
        for row in rows
    ]
    return sorted(clips, key=lambda clip: (clip.fold, clip.clip_id))


def read_resamples(run: Path) -> dict[tuple[str, str], Samples]:
    """Samples by probe and metric; `TrialError` where the file is missing or damaged."""
    table = _read(run / RESAMPLES, ["probe", "metric", "samples"])
    keys = zip(table["probe"].to_pylist(), table["metric"].to_pylist(), strict=True)
    return {
        key: np.asarray(samples.values.to_numpy(zero_copy_only=False))
        for key, samples in zip(keys, table["samples"], strict=True)
    }


def _read(path: Path, columns: list[str]) -> pa.Table:
    if not path.is_file():
        raise TrialError(
            f"found no {path.name} in {path.parent}, which runs of an earlier version lack; "
            "train again: patchbank train-probe"
        )
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise TrialError(
            f"{path} is damaged ({str(error).splitlines()[0]}); train again: patchbank train-probe"
        ) from error
