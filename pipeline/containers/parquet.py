"""Audio in the rows of a Parquet file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.containers.audio_column import audio_bytes, audio_path, find_audio_column
from patchbank.pipeline.containers.byte_stretch import ByteStretch, memory_stretch
from patchbank.pipeline.containers.index_cache import IndexCache
from patchbank.pipeline.errors import AudioError

_MOST_FILES = 10_000
_KEPT_BYTES = 256 << 20
_KEPT_GROUPS = 2
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 64


@dataclass(frozen=True)
class ParquetIndex:
    """The row groups of a Parquet file and the column that holds the audio."""

    column: str
    first_rows: Sequence[int]
    """Of each row group, and the number of all rows at the end."""
    metadata: pq.FileMetaData

    def __len__(self) -> int:
        return len(self.first_rows)


@dataclass(frozen=True)
class _RowGroup:
    batches: Sequence[pa.Array]

    def __len__(self) -> int:
        return sum(batch.nbytes for batch in self.batches)


def read_parquet_index(path: Path) -> ParquetIndex:
    """The index of a Parquet file by its footer; `AudioError` where it has no audio column."""
    try:
        metadata = pq.read_metadata(path)
        column = find_audio_column(metadata.schema.to_arrow_schema())
    except (pa.ArrowException, OSError) as error:
        raise AudioError(f"cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    if column is None:
        names = ", ".join(metadata.schema.to_arrow_schema().names)
        raise AudioError(f"no column holds the bytes of audio; found {names}")
    first_rows = [0]
    for group in range(metadata.num_row_groups):
        first_rows.append(first_rows[-1] + metadata.row_group(group).num_rows)
    return ParquetIndex(column, first_rows, metadata)


def _read_row_group(path: Path, group: int) -> _RowGroup:
    index = PARQUETS.get(path)
    # Read in a stream: the whole group at once takes five times its size, this three times.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=[index.column], use_threads=False
        )
        return _RowGroup([batch.column(0) for batch in batches])


PARQUETS = IndexCache(lambda path, _: read_parquet_index(path), most=_MOST_FILES)
# Rows are asked for in order by several threads, at several places at once (a shard each).
_ROW_GROUPS = IndexCache(_read_row_group, most=_KEPT_BYTES, least=_KEPT_GROUPS, one_at_a_time=True)


def open_parquet_row(path: Path, row: int) -> ByteStretch:
    """The audio of a row; `AudioError` where it has none.

    Its whole row group is read and kept: at most 256 MiB of them, or two where two are larger,
    and while one is read three times its size.
    """
    status = os.stat(path)  # noqa: PTH116 - one look for both caches
    index = PARQUETS.get(path, status)
    if row >= index.first_rows[-1]:
        raise AudioError(f"there is no row {row}: it has {index.first_rows[-1]} rows")
    group = bisect_right(index.first_rows, row) - 1
    try:
        batches = _ROW_GROUPS.get(path, status, part=group).batches
    except (pa.ArrowException, OSError) as error:
        raise AudioError(f"cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    batch, position = divmod(row - index.first_rows[group], _BATCH_ROWS)
    content = audio_bytes(batches[batch])[position]
    if not content.is_valid:
        raise AudioError(no_bytes(audio_path(batches[batch], position)))
    return memory_stretch(content.as_buffer())


def no_bytes(path: str | None) -> str:
    """Why a row without bytes is no clip."""
    if path is None:
        return "the row holds no audio: its bytes are null"
    return f"the row holds no audio, only the path {path!r}; write the data set with audio embedded"
