"""How long an extraction will take: some of its clips go the whole way, to a folder that goes."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from patchbank.pipeline.bank.card import read_attributes
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.decoding import ShardClips
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.extraction import begin_bank, to_travel
from patchbank.pipeline.fitting import Extraction
from patchbank.pipeline.plan import ExtractionPlan
from patchbank.pipeline.preparation import telling_of_a_full_disk
from patchbank.pipeline.progress import Progress
from patchbank.pipeline.workers import Workers, open_workers

MEASURE_S = 20.0
"""How long clips are encoded once the first are."""
MOST_CLIPS = 16_384
SEED = 0
CALIBRATION_CLIPS = 32
"""Of the trial alone: how good its constants are does not matter."""
ROWS_PER_SHARD = 64
"""Small, that the trial ends soon; a worker on a GPU gets a few batches a shard."""
ROWS_PER_SHARD_OF_A_GPU = 512


@dataclass(frozen=True)
class Forecast:
    """What an extraction will take, by what some of its clips took."""

    n_clips: int
    """Clips that are left to encode."""
    start_s: float
    """Until the first clips are through the encoder."""
    clips_per_s: float
    n_measured: int
    measured_s: float
    n_workers: int

    @property
    def seconds(self) -> float:
        return self.start_s + self.n_clips / self.clips_per_s


def measure(
    extraction: Extraction,
    *,
    for_s: float = MEASURE_S,
    progress: Callable[[Progress], None] | None = None,
) -> Forecast:
    """Encodes and writes clips of an extraction for some seconds, with the workers that it has.

    Clips are drawn from those that are left, and what they give lies beside the bank until the end.
    Raises `PatchbankError` where none is left.
    """
    left = _left(extraction)
    began_s = time.monotonic()
    with _trial(extraction, left) as trial, open_workers(trial.job, trial.workplace) as workers:
        begin_bank(trial, workers, to_travel(extraction, left.slice(0, CALIBRATION_CLIPS)))
        marks = [(0.0, 0)]
        for state in _encode(extraction, trial, left, workers):
            if progress is not None:
                progress(state)
            if state.n_encoded == marks[-1][1]:
                continue
            marks.append((time.monotonic() - began_s, state.n_encoded))
            n_workers = state.n_workers
            if marks[-1][0] - marks[1][0] > for_s:
                break
    (first_s, n_first), (last_s, n_last) = marks[1], marks[-1]
    if last_s == first_s or n_last <= n_first:
        raise PatchbankError(
            f"{len(left)} clips are too few to measure with; run the command without --measure"
        )
    return Forecast(
        n_clips=_n_left(extraction),
        start_s=first_s,
        clips_per_s=(n_last - n_first) / (last_s - first_s),
        n_measured=n_last - n_first,
        measured_s=last_s - first_s,
        n_workers=n_workers,
    )


def _n_left(extraction: Extraction) -> int:
    schema = extraction.plan.schema
    return sum(len(schema.clips_of(shard)) for shard in extraction.plan.missing_shards)


def _left(extraction: Extraction) -> pa.Table:
    """Some of the clips that are left, in an order that a seed draws."""
    schema = extraction.plan.schema
    shards = [schema.clips_of(shard) for shard in extraction.plan.missing_shards]
    rows = np.concatenate([np.arange(s.start, s.stop) for s in shards] or [np.array([], np.int64)])
    if not len(rows):
        raise PatchbankError(f"{extraction.bank} is complete: there is nothing left to measure")
    order = np.random.default_rng(SEED).permutation(len(rows))[:MOST_CLIPS]
    return extraction.clips.take(rows[order])


@contextmanager
def _trial(extraction: Extraction, clips: pa.Table) -> Iterator[Extraction]:
    """An extraction of `clips` into a folder beside the bank, which is removed at the end."""
    bank = extraction.bank.with_name(f".{extraction.bank.name}.measure-{uuid.uuid4().hex[:8]}")
    schema = _schema(extraction, len(clips))
    plan = ExtractionPlan(
        folder=bank,
        recipe=extraction.job.recipe,
        schema=schema,
        first_shard=0,
        missing_shards=tuple(range(schema.n_shards)),
        total_bytes=0,
        missing_bytes=0,
        free_bytes=0,
    )
    job = replace(extraction.job, bank=bank, folder=bank, schema=schema)
    bank.parent.mkdir(parents=True, exist_ok=True)
    try:
        with telling_of_a_full_disk(bank):
            yield replace(extraction, plan=plan, clips=clips, job=job, schema=schema, grows=None)
    finally:
        shutil.rmtree(bank, ignore_errors=True)


def _schema(extraction: Extraction, n_clips: int) -> BankSchema:
    schema = extraction.plan.schema
    most = ROWS_PER_SHARD if extraction.job.device == "cpu" else ROWS_PER_SHARD_OF_A_GPU
    rows = min(schema.rows_per_shard, most)
    return replace(schema, generations=(n_clips,), rows_per_shard=rows)


def _encode(
    extraction: Extraction, trial: Extraction, clips: pa.Table, workers: Workers
) -> Iterator[Progress]:
    schema = trial.plan.schema

    def clips_of(shard: int) -> ShardClips:
        rows = schema.clips_of(shard)
        return to_travel(extraction, clips.slice(rows.start, len(rows)))

    begun_with = read_attributes(trial.bank)["card"]["extraction"]
    shards = trial.plan.missing_shards
    return workers.extract(shards, clips_of, begun_with, n_clips=len(clips))
