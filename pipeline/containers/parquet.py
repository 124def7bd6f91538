"""Audio in the rows of a Parquet file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.containers.audio_column import require_audio_column, unreadable
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

    def __len__(self) -> int:
        return len(self.first_rows)


@dataclass(frozen=True)
class _RowGroup:
    cells: pa.ChunkedArray

    def __len__(self) -> int:
        return int(self.cells.nbytes)


def read_parquet_index(path: Path) -> ParquetIndex:
    """The index of a Parquet file by its footer; `AudioError` where it has no audio column."""
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise unreadable("Parquet", error) from error
    sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return ParquetIndex(require_audio_column(schema), list(accumulate(sizes, initial=0)))


def _read_row_group(path: Path, group: int) -> _RowGroup:
    index = PARQUETS.get(path)
    # Read in a stream: the whole group at once takes five times its size, this three times.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=[index.column], use_threads=False
        )
        return _RowGroup(pa.chunked_array([batch.column(0) for batch in batches]))


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
        cells = _ROW_GROUPS.get(path, status, part=group).cells
    except (pa.ArrowException, OSError) as error:
        raise unreadable("Parquet", error) from error
    cell = cells[row - index.first_rows[group]]
    content = cell.get("bytes") if isinstance(cell, pa.StructScalar) and cell.is_valid else cell
    if content is None or not content.is_valid:
        raise AudioError(no_bytes(cell))
    return memory_stretch(content.as_buffer())


def no_bytes(cell: pa.Scalar) -> str:
    """Why a row without bytes is no clip."""
    path = (cell.as_py() or {}).get("path") if isinstance(cell, pa.StructScalar) else None
    if path is None:
        return "the row holds no audio: its bytes are null"
    return f"the row holds no audio, only the path {path!r}; write the data set with audio embedded"
