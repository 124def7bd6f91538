"""Rows of a bank at a store: from the cache on this disk, else by range; each compared with its
digest before anyone sees it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Integer

from patchbank.pipeline.bank.archive import decompress
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.layout import crc32c
from patchbank.pipeline.bank.places import RowPlaces
from patchbank.pipeline.bank.row_files import RowMemory, check_present
from patchbank.pipeline.errors import BankError

if TYPE_CHECKING:
    from patchbank.pipeline.sharing.remote_bank import RemoteBank

REQUEST_BYTES = 4 * 2**20
"""What a request asks for at most, unless a single row is larger."""
Deliver = Callable[[int, memoryview], None]
"""Takes the place of a row among those that were asked for, and its stored bytes."""


@dataclass(frozen=True)
class _Request:
    """Rows that follow each other in a shard file."""

    shard: int
    start: int
    stop: int
    wanted: tuple[tuple[int, int], ...]
    """Places among the rows that were asked for, and the rows."""


class RemoteRows:
    """The rows of one array of a bank that lies elsewhere; see `RowReader`."""

    def __init__(self, bank: RemoteBank, places: RowPlaces) -> None:
        self._bank, self._places = bank, places
        self.stride = places.array.layout(places.rows_per_shard).row_stride_bytes
        self._lock = threading.Lock()
        self._digests: _Digests | None = _Digests.of(bank, places)

    def read(
        self, rows: Integer[np.ndarray, " row"], into: RowMemory, at: Integer[np.ndarray, " row"]
    ) -> None:
        """Reads `rows[i]` to `into[at[i]]`.

        Raises `BankError` for a hole and for a bank that was replaced, `BankCorrupt` for bytes that
        are not those of the row's digest, `StoreError`.
        """
        n_bytes, slots = self._places.array.row_bytes, at.tolist()
        memory = [into[slot, :n_bytes].data for slot in slots]

        def deliver(place: int, data: memoryview) -> None:
            memory[place][:] = data

        self._read(rows, memory, deliver)

    def stored(self, rows: Sequence[int]) -> list[bytes]:
        """The bytes of some rows as they are stored; raises what `read` does."""
        numbers = np.asarray(rows, np.int64)
        found = [bytearray(int(n_bytes)) for n_bytes in self._places.length[numbers]]

        def deliver(place: int, data: memoryview) -> None:
            found[place][:] = data

        self._read(numbers, [memoryview(data) for data in found], deliver)
        return [bytes(data) for data in found]

    def _read(
        self, rows: Integer[np.ndarray, " row"], memory: Sequence[memoryview], deliver: Deliver
    ) -> None:
        check_present(self._places, rows)
        digests = self._known_digests()
        missing = [
            (place, row)
            for place, row in enumerate(rows.tolist())
            if not self._is_cached(row, memory[place], digests)
        ]
        self._bank.remote.each(
            lambda request: self._fetch(request, deliver, digests), self._requests(missing)
        )

    def _is_cached(self, row: int, memory: memoryview, digests: _Digests) -> bool:
        path, offset = self._path(row), int(self._places.offset[row])
        return self._bank.remote.cache.read(path, offset, memory) and digests.has_crc(row, memory)

    def _path(self, row: int) -> Path:
        return self._places.files[self._places.shard_of(row)]

    def _requests(self, missing: Sequence[tuple[int, int]]) -> Iterator[_Request]:
        """Neighbours in a file are one request, up to a size that leaves work for others."""
        places = self._places
        in_order = sorted(
            missing, key=lambda one: (places.shard_of(one[1]), int(places.offset[one[1]]))
        )
        request: _Request | None = None
        for place, row in in_order:
            offset, length = places.span(row)
            shard, stop = places.shard_of(row), offset + length
            if (
                request is not None
                and request.shard == shard
                and offset - request.stop < self.stride - places.array.row_bytes + 1
                and stop - request.start <= REQUEST_BYTES
            ):
                stop = max(stop, request.stop)
                request = _Request(shard, request.start, stop, (*request.wanted, (place, row)))
                continue
            if request is not None:
                yield request
            request = _Request(shard, offset, stop, ((place, row),))
        if request is not None:
            yield request

    def _fetch(self, request: _Request, deliver: Deliver, digests: _Digests) -> None:
        name = self._places.array.shard_path(request.shard)
        data = memoryview(self._bank.remote.read(name, request.start, request.stop))
        is_whole = True
        for place, row in request.wanted:
            offset, length = self._places.span(row)
            found = data[offset - request.start : offset - request.start + length]
            if not digests.has_sha256(row, found):
                is_whole = False
                found = self._fetch_again(name, row, digests)
                self._bank.remote.cache.keep(self._path(row), offset, found)
            deliver(place, found)
        if is_whole:
            row = request.wanted[0][1]
            self._bank.remote.cache.keep(self._path(row), request.start, data)

    def _fetch_again(self, name: str, row: int, digests: _Digests) -> memoryview:
        offset, length = self._places.span(row)
        found = memoryview(self._bank.remote.read(name, offset, offset + length))
        if not digests.has_sha256(row, found):
            raise self._wrong(name, row)
        return found

    def _wrong(self, name: str, row: int) -> BankError:
        clip = shown(str(self._bank.clips["clip_id"][row].as_py()))
        return self._bank.remote.problem(
            f"shard {name}, row {row} ({clip}): the bytes do not match the row's SHA-256"
        )

    def _known_digests(self) -> _Digests:
        if self._digests is not None:  # without the lock, which a fork could find taken
            return self._digests
        with self._lock:
            if self._digests is None:
                self._digests = _Digests.of(self._bank, self._places)
            return self._digests

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_digests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._digests = threading.Lock(), None


@dataclass(frozen=True)
class _Digests:
    """What clips.parquet, which is sealed, says of the rows of an array."""

    sha256: pa.Array
    crc32c: pa.Array
    archived_row_bytes: int | None
    """Of an archive, whose digests are those of the rows once decompressed."""

    @classmethod
    def of(cls, bank: RemoteBank, places: RowPlaces) -> _Digests:
        array = places.array
        columns = (f"{kind}_{array.column_suffix}" for kind in ("sha256", "crc32c"))
        sha256, crc = (bank.clips[name].combine_chunks() for name in columns)
        return cls(sha256, crc, array.row_bytes if bank.schema.is_archive else None)

    def has_crc(self, row: int, stored: memoryview) -> bool:
        tokens = self._tokens(stored)
        return tokens is not None and crc32c(tokens) == self.crc32c[row].as_py()

    def has_sha256(self, row: int, stored: memoryview) -> bool:
        """Both digests: a row whose checksum is another would never be found in the cache."""
        tokens = self._tokens(stored)
        return (
            tokens is not None
            and hashlib.sha256(tokens).hexdigest() == self.sha256[row].as_py()
            and crc32c(tokens) == self.crc32c[row].as_py()
        )

    def _tokens(self, stored: memoryview) -> bytes | memoryview | None:
        if self.archived_row_bytes is None:
            return stored
        try:
            return decompress(bytes(stored), row_bytes=self.archived_row_bytes)
        except ValueError:
            return None
