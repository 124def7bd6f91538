"""The per-row facts of a shard: what its part file holds until the seal gathers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from patchbank.pipeline.bank.schema import DONE, FAILED, POOLED, BankSchema
from patchbank.pipeline.bank.writer import RowDigest


@dataclass(frozen=True)
class RowFacts:
    """What is known of one row after it has been written."""

    digests: Mapping[str, RowDigest]
    """By `TokenArray.column_suffix`."""
    n_patches: Mapping[int, int]
    """Patches that count, by layer; 0 for a failed row."""
    pooled: Mapping[int, Float32[np.ndarray, "pool dim"]]
    """Mean, maximum and minimum over those patches, by layer; NaN for a failed row."""
    audio_sha256: str | None
    failure: str | None = field(default=None)
    """Why the clip has no tokens; None where it has."""


def part_path(shard: int) -> str:
    """Path of a shard's part file inside the bank, until the seal removes it."""
    return f"parts/{shard:05d}.parquet"


def part_table(clips: pa.Table, facts: Sequence[RowFacts], schema: BankSchema) -> pa.Table:
    """One row a clip: the clip table's columns, the row's facts, and its pooled vectors."""
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "clip_id": clips["clip_id"],
        "view": pa.array([0] * len(facts), pa.int16()),
        "path": clips["path"],
        "start_s": clips["start_s"],
        "duration_s": clips["duration_s"],
        "audio_sha256": pa.array([fact.audio_sha256 for fact in facts], pa.string()),
        "status": pa.array([FAILED if fact.failure else DONE for fact in facts], pa.int8()),
        "reason": pa.array([fact.failure for fact in facts], pa.string()),
    }
    columns |= _digest_columns(facts, schema)
    for name in clips.column_names:
        columns.setdefault(name, clips[name])
    return pa.table(columns | _small_columns(facts, schema))


def _digest_columns(facts: Sequence[RowFacts], schema: BankSchema) -> dict[str, pa.Array]:
    columns = {}
    for array in schema.arrays():
        digests = [fact.digests[array.column_suffix] for fact in facts]
        columns[f"sha256_{array.column_suffix}"] = pa.array([d.sha256 for d in digests])
        columns[f"crc32c_{array.column_suffix}"] = pa.array([d.crc32c for d in digests], "uint32")
    return columns


def _small_columns(facts: Sequence[RowFacts], schema: BankSchema) -> dict[str, pa.Array]:
    columns = {}
    for spec in schema.layers:
        counts = [fact.n_patches[spec.layer] for fact in facts]
        columns[small_column(spec.layer, "n_patches")] = pa.array(counts, pa.int32())
        pooled = np.stack([fact.pooled[spec.layer] for fact in facts])
        for index, pool in enumerate(POOLED):
            flat = pa.array(pooled[:, index].reshape(-1), pa.float32())
            columns[small_column(spec.layer, pool)] = pa.FixedSizeListArray.from_arrays(
                flat, spec.dim
            )
    return columns


def small_column(layer: int, name: str) -> str:
    """Column of a part file that becomes the array `layers/<layer>/<name>`."""
    return f"layers/{layer}/{name}"


def clip_columns(part: Path) -> list[str]:
    """The columns of a part file that go into clips.parquet."""
    return [name for name in pq.read_schema(part).names if not name.startswith("layers/")]
