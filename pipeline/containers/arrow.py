"""Audio in the rows of an Arrow file, as `datasets.save_to_disk` writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from patchbank.pipeline.containers.audio_column import (
    audio_bytes,
    require_audio_column,
    unreadable,
)
from patchbank.pipeline.containers.byte_stretch import ByteStretch, file_stretch
from patchbank.pipeline.containers.index_cache import IndexCache
from patchbank.pipeline.containers.parquet import no_bytes
from patchbank.pipeline.errors import AudioError

_MOST_ROWS = 5_000_000
"""Of all indices kept in a process: 80 MiB."""
_NULL = -1


@dataclass(frozen=True)
class ArrowIndex:
    """Where the audio of each row lies in the file."""

    column: str
    starts: Int64[np.ndarray, " row"]
    """First byte; negative where the row holds none."""
    sizes: Int64[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.starts)


@contextmanager
def open_arrow(path: Path) -> Iterator[tuple[pa.NativeFile, pa.Schema, Iterator[pa.RecordBatch]]]:
    """The memory map, the columns and the record batches of a file in the stream or file format.

    What is wrong with the file is an `AudioError`.
    """
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                numbers = range(file.num_record_batches)
                yield source, file.schema, (file.get_batch(number) for number in numbers)
            else:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                yield source, stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise unreadable("Arrow", error) from error


def read_arrow_index(path: Path) -> ArrowIndex:
    """The index of an Arrow file by its offsets; `AudioError` where it has no audio column.

    Only places are kept and not the map: a file that is cut off later would kill the process.
    """
    starts, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with open_arrow(path) as (source, schema, batches):
        column = require_audio_column(schema)
        position = source.tell()
        source.seek(0)
        whole = source.read_buffer(source.size())
        source.seek(position)
        for batch in batches:
            batch_starts, batch_sizes = _places(audio_bytes(batch[column]), whole)
            starts.append(batch_starts)
            sizes.append(batch_sizes)
    return ArrowIndex(column, np.concatenate(starts), np.concatenate(sizes))


def _places(
    cells: pa.Array, whole: pa.Buffer
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"]]:
    """Where the bytes of each cell lie in the map, and how many they are."""
    offset_type = np.int64 if pa.types.is_large_binary(cells.type) else np.int32
    if not len(cells):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, offset_buffer, content = cells.buffers()
    first = 0 if content is None else content.address - whole.address
    if not 0 <= first < whole.size:
        raise AudioError("its buffers are compressed; write it again without compression")
    offsets = np.frombuffer(offset_buffer, offset_type).astype(np.int64)
    ends = offsets[cells.offset : cells.offset + len(cells) + 1]
    is_null = cells.is_null().to_numpy(zero_copy_only=False)
    return np.where(is_null, _NULL, first + ends[:-1]), np.diff(ends)


ARROWS = IndexCache(lambda path, _: read_arrow_index(path), most=_MOST_ROWS)


def open_arrow_row(path: Path, row: int) -> ByteStretch:
    """The audio of a row, read where it lies; `AudioError` where there is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        index = ARROWS.get(path, os.fstat(descriptor))
        if row >= len(index):
            raise AudioError(f"there is no row {row}: it has {len(index)} rows")
        if index.starts[row] == _NULL:
            raise AudioError(no_bytes(_cell(path, index.column, row)))
    except BaseException:
        os.close(descriptor)
        raise
    return file_stretch(descriptor, int(index.starts[row]), int(index.sizes[row]))


def _cell(path: Path, column: str, row: int) -> pa.Scalar:
    with open_arrow(path) as (_, schema, batches):
        return pa.Table.from_batches(batches, schema)[column][row]
