"""The per-row facts of a shard: what its part file holds until the seal gathers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from patchbank.pipeline.bank.schema import DONE, FAILED, BankSchema, SmallArray
from patchbank.pipeline.bank.writer import RowDigest


@dataclass(frozen=True)
class RowFacts:
    """What is known of one row besides its tokens."""

    small: Mapping[str, Shaped[np.ndarray, ...]]
    """Values of the small arrays, by `SmallArray.path`: of a failed row 0 patches and NaN."""
    audio_sha256: str | None
    failure: str | None = field(default=None)
    """Why the clip has no tokens; None where it has."""
    mix_gains: tuple[float, ...] | None = None
    """What each source of a mix was multiplied with; None where the bank mixes nothing."""


def part_path(shard: int) -> str:
    """Path of a shard's part file inside the bank, until the seal removes it."""
    return f"parts/{shard:05d}.parquet"


def part_table(
    clips: pa.Table,
    facts: Sequence[RowFacts],
    digests: Mapping[str, Sequence[RowDigest]],
    schema: BankSchema,
) -> pa.Table:
    """One row a clip: the clip table's columns, the row's facts, and its small values.

    `digests` of the rows by `TokenArray.column_suffix`.
    """
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        name: clips[name] for name in ("clip_id", "view", "path", "start_s", "duration_s")
    }
    columns |= {
        "audio_sha256": pa.array([fact.audio_sha256 for fact in facts], pa.string()),
        "status": pa.array([FAILED if fact.failure else DONE for fact in facts], pa.int8()),
        "reason": pa.array([fact.failure for fact in facts], pa.string()),
    }
    if facts[0].mix_gains is not None:
        gains = [fact.mix_gains for fact in facts]
        columns["mix_gains"] = pa.array(gains, pa.list_(pa.float64()))
    columns |= _digest_columns(digests, schema)
    for name in clips.column_names:
        columns.setdefault(name, clips[name])
    for array in schema.small_arrays():
        columns[array.path] = _small_column(np.stack([f.small[array.path] for f in facts]), array)
    return pa.table(columns)


def _digest_columns(
    digests: Mapping[str, Sequence[RowDigest]], schema: BankSchema
) -> dict[str, pa.Array]:
    columns = {}
    for suffix in (array.column_suffix for array in schema.described_arrays()):
        columns[f"sha256_{suffix}"] = pa.array([d.sha256 for d in digests[suffix]])
        columns[f"crc32c_{suffix}"] = pa.array([d.crc32c for d in digests[suffix]], "uint32")
    return columns


def _small_column(values: Shaped[np.ndarray, "row ..."], array: SmallArray) -> pa.Array:
    flat = pa.array(values.astype(array.dtype, copy=False).reshape(-1))
    if not array.row_shape:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.row_shape)))


def small_values(column: pa.ChunkedArray, array: SmallArray) -> Shaped[np.ndarray, "row ..."]:
    """What `part_table` put into the column of a small array."""
    values = column.combine_chunks()
    flat = values.flatten() if array.row_shape else values
    numbers = flat.to_numpy(zero_copy_only=False)
    return np.asarray(numbers).astype(array.dtype, copy=False).reshape(-1, *array.row_shape)


def clip_columns(part: Path) -> list[str]:
    """The columns of a part file that go into clips.parquet."""
    return [name for name in pq.read_schema(part).names if not name.startswith("layers/")]
