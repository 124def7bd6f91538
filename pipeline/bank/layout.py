"""Where the rows of a shard file lie, and the index at its end.

A shard file is a Zarr v3 `sharding_indexed` chunk with one inner chunk a row, no compression, and
the index (with its crc32c) at the end. Each row starts on a 4,096-byte boundary, so that a file can
be mapped or read with O_DIRECT; the bytes between rows are zero. Pure functions, no disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64
from numcodecs.checksum32 import CRC32C

from patchbank.pipeline.errors import BankCorrupt

ALIGNMENT_BYTES = 4_096
MAX_ROWS_PER_SHARD = 512
MIN_ROWS_PER_SHARD = 16
MAX_SHARD_BYTES = 384 * 2**20
MAX_FILES = 20_000
MAX_SHARDS = 4_000
"""Of a bank that is made at once: hubs take at most 10,000 files in a folder, and a bank grows."""
MAX_FILE_BYTES = 19 * 10**9
"""Rows of a shard file at most, with the padding; hubs ask for files below 20 GB."""
MISSING = np.uint64(2**64 - 1)
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class ShardLayout:
    """Offsets inside the shard files of one array."""

    n_slots: int
    """Rows that a whole shard holds; also the number of index entries."""
    row_bytes: int

    @property
    def row_stride_bytes(self) -> int:
        return -(-self.row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def index_bytes(self) -> int:
        return 16 * self.n_slots + _CHECKSUM_BYTES

    def file_bytes(self, n_rows: int) -> int:
        """Size of a shard file that holds `n_rows` rows (fewer than `n_slots` in a last shard)."""
        return n_rows * self.row_stride_bytes + self.index_bytes


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of a buffer."""
    return int(CRC32C.checksum(np.frombuffer(data, np.uint8)))


def encode_index(layout: ShardLayout, n_rows: int) -> bytes:
    """The index of a shard whose first `n_rows` slots are filled in order."""
    entries = np.full((layout.n_slots, 2), MISSING, dtype="<u8")
    entries[:n_rows, 0] = np.arange(n_rows, dtype="<u8") * np.uint64(layout.row_stride_bytes)
    entries[:n_rows, 1] = layout.row_bytes
    return sealed_index(entries)


def sealed_index(entries: UInt64[np.ndarray, "slot 2"]) -> bytes:
    """Offsets and lengths as they stand at the end of a shard file, with their checksum."""
    body = entries.astype("<u8", copy=False).tobytes()
    return body + crc32c(body).to_bytes(_CHECKSUM_BYTES, "little")


def parse_index(
    tail: bytes, layout: ShardLayout, *, file_bytes: int, name: str
) -> Int64[np.ndarray, " slot"]:
    """The offset of each slot's row in a shard file, -1 for empty slots.

    `tail` is the last `layout.index_bytes` of the file. Raises `BankCorrupt` where the checksum
    does not match, or an entry leaves the file, has another length than a row, overlaps another or
    is not aligned.
    """
    offsets = parse_indices([tail], layout, file_bytes=[file_bytes], names=[name])
    return np.asarray(offsets[0])


def parse_indices(
    tails: Sequence[bytes],
    layout: ShardLayout,
    *,
    file_bytes: Sequence[int],
    names: Sequence[str],
) -> Int64[np.ndarray, "shard slot"]:
    """`parse_index` of several shard files of one array at once."""
    entries = [
        index_entries(tail, layout, file_bytes=n_bytes, name=name)
        for tail, n_bytes, name in zip(tails, file_bytes, names, strict=True)
    ]
    return _checked_offsets(np.stack(entries), layout, file_bytes=file_bytes, names=names)


def index_entries(
    tail: bytes, layout: ShardLayout, *, file_bytes: int, name: str
) -> UInt64[np.ndarray, "slot 2"]:
    """Offsets and lengths as an index tells them, unchecked; `BankCorrupt` for a wrong checksum."""
    if len(tail) != layout.index_bytes:
        raise BankCorrupt(
            f"shard {name}: {file_bytes} bytes, too short for an index of {layout.index_bytes}"
        )
    body, stored = tail[:-_CHECKSUM_BYTES], tail[-_CHECKSUM_BYTES:]
    if crc32c(body).to_bytes(_CHECKSUM_BYTES, "little") != stored:
        raise BankCorrupt(f"shard {name}: the index does not match its crc32c")
    return np.frombuffer(body, dtype="<u8").reshape(layout.n_slots, 2)


def _checked_offsets(
    entries: UInt64[np.ndarray, "shard slot 2"],
    layout: ShardLayout,
    *,
    file_bytes: Sequence[int],
    names: Sequence[str],
) -> Int64[np.ndarray, "shard slot"]:
    offset, length = entries[..., 0], entries[..., 1]
    empty = (offset == MISSING) & (length == MISSING)
    end_of_rows = np.array(file_bytes, np.int64) - layout.index_bytes
    # A row may be said to have more bytes than 64 bits count.
    last_offset = end_of_rows[:, None] - min(layout.row_bytes, np.iinfo(np.int64).max)
    outside = (last_offset < 0) | (offset > last_offset.clip(min=0).astype(np.uint64))
    wrong = ~empty & (outside | (length != layout.row_bytes))
    # Empty slots are sorted behind all others.
    used = np.sort(np.where(empty, MISSING, offset), axis=1)
    overlap = (np.diff(used, axis=1) < layout.row_bytes) & (used[:, 1:] != MISSING)
    # Direct reads and 16-bit views need it.
    misaligned = ~empty & (offset % np.uint64(ALIGNMENT_BYTES) != 0)
    damaged = (wrong | misaligned).any(axis=1) | overlap.any(axis=1)
    if not damaged.any():
        return np.where(empty, np.int64(-1), offset.astype(np.int64))
    shard = int(np.argmax(damaged))
    name = names[shard]
    if wrong[shard].any():
        slot = int(np.argmax(wrong[shard]))
        raise BankCorrupt(
            f"shard {name}, row {slot}: the index points to {int(length[shard, slot])} bytes at "
            f"{int(offset[shard, slot])}; rows have {layout.row_bytes} bytes and end before "
            f"{int(end_of_rows[shard])}"
        )
    if overlap[shard].any():
        raise BankCorrupt(f"shard {name}: rows overlap in the index")
    raise BankCorrupt(f"shard {name}: a row does not begin at a multiple of {ALIGNMENT_BYTES}")


def rows_per_shard(*, n_rows: int, largest_row_bytes: int, files_per_shard: int) -> int:
    """Rows in a shard, from the table and the recipe alone.

    At most 512 rows and 384 MiB, at least 16 rows, about 32 shards for small tables. More rows
    where there would otherwise be over 4,000 shards, as long as a file stays below 20 GB, and where
    the bank would otherwise have over 20,000 files.
    """
    by_count = max(MIN_ROWS_PER_SHARD, n_rows // 32)
    by_bytes = max(1, MAX_SHARD_BYTES // largest_row_bytes)
    rows = min(MAX_ROWS_PER_SHARD, by_bytes, by_count)
    in_a_file = max(1, MAX_FILE_BYTES // ShardLayout(1, largest_row_bytes).row_stride_bytes)
    for_hubs = min(-(-n_rows // MAX_SHARDS), in_a_file)
    most_shards = MAX_FILES * 9 // 10 // files_per_shard
    return max(rows, for_hubs, -(-n_rows // most_shards))
