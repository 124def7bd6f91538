"""Cold storage: shard files whose rows are compressed with Blosc.

On token-like data it saves a tenth or less and costs most of the speed, so that training never
reads an archive: `bank convert` makes a bank of it again. Any Zarr reader opens one. A shard file
is as in other banks, but rows have lengths of their own and follow each other without padding.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Int64
from numcodecs import Blosc

from patchbank.pipeline.bank.layout import (
    MISSING,
    ShardLayout,
    crc32c,
    index_entries,
    sealed_index,
)
from patchbank.pipeline.bank.writer import FileRecord, FinishedFile, RowDigest
from patchbank.pipeline.errors import BankCorrupt

CODEC: Literal["zstd"] = "zstd"
LEVEL = 5
HEADER_BYTES = 16
MOST_EXPANSION = 2**16
"""How many times its stored length a row may have: a failed clip is one value all over."""


def compress(row: bytes, *, typesize: int) -> bytes:
    """A row as it lies in an archive."""
    codec = Blosc(cname=CODEC, clevel=LEVEL, shuffle=Blosc.BITSHUFFLE, typesize=typesize)
    return bytes(codec.encode(row))


def decompress(stored: bytes, *, row_bytes: int) -> bytes:
    """The `row_bytes` bytes of a row; `ValueError` where `stored` does not hold them."""
    # The header is read here, so that nothing is allocated on its word.
    header = np.frombuffer(stored[4:HEADER_BYTES], "<u4").tolist()
    if len(header) != 3 or (header[0], header[2]) != (row_bytes, len(stored)):
        raise ValueError("its header names another size")
    if row_bytes > MOST_EXPANSION * len(stored):
        raise ValueError("it claims to be more than it can hold")
    row = np.empty(row_bytes, np.uint8)
    try:
        Blosc().decode(stored, out=row)
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from error
    return row.tobytes()


def archive_bytes(layout: ShardLayout, n_rows: int) -> int:
    """The least size of a shard file of an archive: rows cannot be smaller than they expand."""
    least = max(HEADER_BYTES, layout.row_bytes // MOST_EXPANSION)
    return n_rows * least + layout.index_bytes


def archive_spans(
    tail: bytes, layout: ShardLayout, *, file_bytes: int, name: str
) -> Int64[np.ndarray, "slot 2"]:
    """Offset and length of each slot's compressed row; -1 and 0 for empty slots.

    Raises `BankCorrupt` like `parse_index`.
    """
    entries = index_entries(tail, layout, file_bytes=file_bytes, name=name)
    empty = (entries == MISSING).all(axis=1)
    used = entries[~empty]
    end_of_rows = file_bytes - layout.index_bytes
    longest = layout.row_bytes + HEADER_BYTES
    length, offset = used[:, 1], used[:, 0]
    wrong = (length > longest) | (length < HEADER_BYTES) | (offset > end_of_rows)
    # Both are below the file's size now, so that their sum cannot overflow.
    if wrong.any() or (offset + length > end_of_rows).any():
        raise BankCorrupt(f"shard {name}: the index points to bytes that are no row")
    order = np.argsort(offset)
    if (offset[order][1:] < (offset + length)[order][:-1]).any():
        raise BankCorrupt(f"shard {name}: rows overlap in the index")
    return np.where(empty[:, None], np.array([-1, 0]), entries.astype(np.int64))


class ArchiveFileWriter:
    """Writes one shard file of an archive, row by row in order; a context manager."""

    def __init__(self, path: Path, layout: ShardLayout, *, n_rows: int, name: str) -> None:
        self._layout, self._n_rows, self._name = layout, n_rows, name
        self._hash = hashlib.sha256()
        self._lengths: list[int] = []
        self._digests: list[RowDigest] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")

    def write_row(self, row: np.ndarray) -> None:
        """Appends one row, shape (token, dim); its digest is that of its bytes, not compressed."""
        data = np.ascontiguousarray(row).tobytes()
        if len(data) != self._layout.row_bytes:
            raise ValueError(f"a row has {self._layout.row_bytes} bytes, found {len(data)}")
        if len(self._lengths) == self._n_rows:
            raise ValueError(f"all {self._n_rows} rows were written, found one more")
        stored = compress(data, typesize=row.dtype.itemsize)
        self._write(stored)
        self._lengths.append(len(stored))
        self._digests.append(RowDigest(hashlib.sha256(data).hexdigest(), crc32c(data)))

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> FinishedFile:
        """Writes the index and flushes."""
        if len(self._lengths) != self._n_rows:
            raise ValueError(f"{len(self._lengths)} of {self._n_rows} rows were written")
        entries = np.full((self._layout.n_slots, 2), MISSING, dtype="<u8")
        lengths = np.array(self._lengths, "<u8")
        entries[: self._n_rows, 1] = lengths
        entries[: self._n_rows, 0] = np.cumsum(lengths) - lengths
        self._write(sealed_index(entries))
        self._file.flush()
        os.fsync(self._file.fileno())
        record = FileRecord(self._name, self._file.tell(), self._hash.hexdigest())
        return FinishedFile(record, tuple(self._digests))

    def __enter__(self) -> ArchiveFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
