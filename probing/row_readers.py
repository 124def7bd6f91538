"""Where rows come from besides files: mapped shards, and arrays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Integer, Shaped, UInt8

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.bank.places import ADVICE, RowPlaces
from patchbank.pipeline.bank.row_files import RowMemory, RowReader, check_present
from patchbank.pipeline.errors import BankCorrupt, BankError

RowNumbers = Integer[np.ndarray, " row"]
Mapped = UInt8[np.ndarray, " byte"]


def check_announced(place: RowNumbers, rows: RowNumbers) -> None:
    """`BankError` for a row that was not among those to be kept."""
    if (place < 0).any():
        row = int(rows[np.argmax(place < 0)])
        raise BankError(
            f"row {row} has no tokens: it is a hole, or none of the rows that were asked for first"
        )


class MappedRows:
    """Rows of mapped shard files; memory is left to the page cache.

    Right while the pages are there: a page that is not costs a fault, one after the other. A file
    that is cut while it is mapped ends the process (SIGBUS).
    """

    def __init__(self, places: RowPlaces) -> None:
        self._places = places
        self.stride = places.array.layout(places.rows_per_shard).row_stride_bytes
        self._shards: dict[int, Mapped] = {}

    def read(self, rows: RowNumbers, into: RowMemory, at: RowNumbers) -> None:
        check_present(self._places, rows)
        n_bytes = self._places.array.row_bytes
        for row, slot in zip(rows.tolist(), at.tolist(), strict=True):
            offset = int(self._places.offset[row])
            mapped = self._shard(self._places.shard_of(row))
            np.copyto(into[slot, :n_bytes], mapped[offset : offset + n_bytes])

    def view(self, rows: RowNumbers) -> RowMemory | None:
        """The mapped bytes themselves, where `rows` follow each other in a file."""
        check_present(self._places, rows)
        first, last = int(rows[0]), int(rows[-1])
        if self._places.shard_of(first) != self._places.shard_of(last):
            return None
        offsets = self._places.offset[rows]
        if (np.diff(rows) != 1).any() or (np.diff(offsets) != self.stride).any():
            return None
        mapped = self._shard(self._places.shard_of(first))
        span = mapped[int(offsets[0]) : int(offsets[0]) + len(rows) * self.stride]
        return span.reshape(len(rows), self.stride)

    def _shard(self, shard: int) -> Mapped:
        mapped = self._shards.get(shard)
        if mapped is None:
            # Two threads may both map a file: one of the maps goes at once.
            mapped = self._shards.setdefault(shard, self._map(shard))
        return mapped

    def _map(self, shard: int) -> Mapped:
        """The file of a shard; `BankCorrupt` where it ends before its last row."""
        places, path = self._places, self._places.files[shard]
        first = shard * places.rows_per_shard
        end = int(places.offset[first : first + places.rows_per_shard].max()) + self.stride
        try:
            n_bytes = path.stat().st_size
            if n_bytes < end:
                raise BankCorrupt(
                    f"{path} has {n_bytes} bytes, its rows end at {end}; it was cut after the "
                    f"bank was opened; {ADVICE}"
                )
            # Private pages, so that torch may wrap them; and, unlike numpy's map, no descriptor
            # stays open, of which a process has too few for a large bank.
            tensor = torch.from_file(str(path), shared=False, size=n_bytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise BankCorrupt(f"{path}: {error}; {ADVICE}") from error
        return np.asarray(tensor.numpy())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}


class RamRows:
    """Rows that are kept in memory once they have been read.

    Memory is taken as rows come, so that the first epoch runs at the speed of the disk.
    """

    def __init__(self, files: RowReader, rows: RowNumbers, *, n_rows: int) -> None:
        """`rows` of `n_rows` are those that will be asked for."""
        self.stride = files.stride
        self._files = files
        self._wanted = np.unique(rows)
        self._place = np.full(n_rows, -1, np.int64)
        self._place[self._wanted] = np.arange(len(self._wanted))
        self._allocate()

    def _allocate(self) -> None:
        n_rows = len(self._wanted)
        try:
            memory = aligned_memory(n_rows * self.stride)
        except OSError as error:
            size = f"{n_rows * self.stride / 2**30:.1f} GiB"
            raise BankError(f"{size} of tokens do not fit into memory; use tier direct") from error
        self._memory: RowMemory = memory.reshape(n_rows, self.stride)
        self._is_here: Bool[np.ndarray, " row"] = np.zeros(len(self._wanted), np.bool_)

    def read(self, rows: RowNumbers, into: RowMemory, at: RowNumbers) -> None:
        place = self._place[rows]
        check_announced(place, rows)
        missing = ~self._is_here[place]
        if missing.any():
            # Two threads may read the same row: they write the same bytes.
            self._files.read(rows[missing], self._memory, place[missing])
            self._is_here[place[missing]] = True
        if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
            # Any other mode would make numpy copy the result once more.
            np.take(self._memory, place, axis=0, out=into[at[0] : at[-1] + 1], mode="clip")
        else:
            into[at] = self._memory[place]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_is_here")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()


class SmallRows:
    """The values of a small array, all in memory: pooled vectors, scales, counts."""

    def __init__(self, values: Shaped[np.ndarray, "row ..."]) -> None:
        self._bytes = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
        self.stride = self._bytes.shape[1]

    def read(self, rows: RowNumbers, into: RowMemory, at: RowNumbers) -> None:
        into[at] = self._bytes[rows]
