"""Where the rows of a bank's arrays lie, as the indices at the ends of its shard files tell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from patchbank.pipeline.bank.archive import archive_spans
from patchbank.pipeline.bank.layout import parse_indices
from patchbank.pipeline.bank.schema import BankSchema, TokenArray
from patchbank.pipeline.errors import BankCorrupt

ADVICE = "pull the bank again, or remove it and extract"
SHARDS_AT_ONCE = 64
"""Whose indices are checked together."""
READ_THREADS = 8
"""So many disk accesses are waited for at once."""
Tail = tuple[bytes, int]
"""The last bytes of a shard file, and its size."""
TailReader = Callable[[Sequence[str], int], Sequence[Tail]]
"""Takes the names of shard files and how many bytes are wanted; a file may have fewer."""
WAITING_S = 150e-6
"""A shard that takes longer is waited for; what the page cache holds takes a third of it."""


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows of one array lie: row i is `length[i]` bytes at `offset[i]` of its file."""

    array: TokenArray
    files: tuple[Path, ...]
    rows_per_shard: int
    offset: Int64[np.ndarray, " row"]
    """-1 for holes, which are rows without a clip."""
    length: Int64[np.ndarray, " row"]
    """`row_bytes`, but for the compressed rows of an archive."""

    def shard_of(self, row: int) -> int:
        return row // self.rows_per_shard

    def span(self, row: int) -> tuple[int, int]:
        """Offset and length."""
        return int(self.offset[row]), int(self.length[row])


def read_places(
    bank: Path, schema: BankSchema, array: TokenArray, *, read_tails: TailReader | None = None
) -> RowPlaces:
    """The places of all rows of an array, at the cost of one small read a shard.

    `read_tails` gives the ends of shard files that do not lie in `bank`.
    Raises `BankCorrupt` where an index cannot be read or is damaged, or a clip's row is missing.
    """
    offset = np.full(schema.n_rows, -1, np.int64)
    length = np.zeros(schema.n_rows, np.int64)

    def read(shards: range) -> None:
        names = [array.shard_path(shard) for shard in shards]
        n_bytes = array.layout(schema.rows_per_shard).index_bytes
        if read_tails is None:
            tails: Sequence[Tail] = [_read_tail(bank, name, n_bytes) for name in names]
        else:
            tails = read_tails(names, n_bytes)
        for shard, spans in zip(shards, _spans(schema, array, names, tails), strict=True):
            rows = schema.rows_of(shard)
            own = slice(rows.start, rows.stop)
            offset[own], length[own] = spans[: len(rows)].T
            if (missing := offset[own] < 0).any():
                name, row = array.shard_path(shard), rows[int(np.argmax(missing))]
                raise BankCorrupt(f"{bank}: shard {name}: row {row} is missing; {ADVICE}")

    shards = range(schema.n_shards)
    left = iter([shards[first : first + SHARDS_AT_ONCE] for first in shards[::SHARDS_AT_ONCE]])
    for group in left:
        start = time.perf_counter()
        read(group)
        if time.perf_counter() - start > WAITING_S * len(group):
            break
    # Only against waiting: threads that never wait are in each other's way, and take twice as long.
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="places") as pool:
        # In this order errors are raised, too.
        for _ in pool.map(read, left):
            pass
    files = tuple(bank / array.shard_path(shard) for shard in shards)
    return RowPlaces(array, files, schema.rows_per_shard, offset, length)


def _spans(
    schema: BankSchema, array: TokenArray, names: Sequence[str], found: Sequence[Tail]
) -> Int64[np.ndarray, "shard slot 2"]:
    """Offset and length of each slot's row; -1 and 0 for empty ones."""
    layout = array.layout(schema.rows_per_shard)
    tails, sizes = zip(*found, strict=True)
    if schema.is_archive:
        return np.stack(
            [
                archive_spans(tail, layout, file_bytes=size, name=name)
                for name, tail, size in zip(names, tails, sizes, strict=True)
            ]
        )
    offsets = parse_indices(tails, layout, file_bytes=sizes, names=names)
    return np.stack([offsets, np.where(offsets < 0, 0, array.row_bytes)], axis=2)


def _read_tail(bank: Path, name: str, n_bytes: int) -> Tail:
    """The last bytes of a shard file, and its size."""
    try:
        descriptor = os.open(f"{bank}/{name}", os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            # Never more than there is: the card may claim any number of slots.
            n_bytes = min(size, n_bytes)
            return os.pread(descriptor, n_bytes, size - n_bytes), size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BankCorrupt(f"{bank}: shard {name}: {error.strerror}; {ADVICE}") from error
