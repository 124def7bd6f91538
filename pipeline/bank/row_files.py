"""Reads rows of shard files into memory that is used again, through the page cache or past it.

A row lies in memory as it lies in its file, padded to `row_stride_bytes`, so that a direct read
needs no copy and neighbours in a file come with one system call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from patchbank.pipeline.bank.direct import NOT_DIRECT, O_DIRECT, aligned_memory
from patchbank.pipeline.bank.layout import ALIGNMENT_BYTES
from patchbank.pipeline.bank.places import ADVICE, RowPlaces
from patchbank.pipeline.errors import BankCorrupt, BankError

MOST_OPEN_FILES = 512
"""Of one array, at most; a bank may have 18,000 shards."""
_LIBC = ctypes.CDLL(None)
RowMemory = UInt8[np.ndarray, "slot byte"]
"""Rows in their padded form, each `row_stride_bytes` long; begins on a page for direct reads."""


@runtime_checkable
class RowReader(Protocol):
    """Puts rows into memory; called by several threads at once."""

    stride: int
    """Bytes from one row to the next in that memory."""

    def read(
        self, rows: Integer[np.ndarray, " row"], into: RowMemory, at: Integer[np.ndarray, " row"]
    ) -> None:
        """Writes `rows[i]` to `into[at[i]]`."""
        ...


class RowFiles:
    """The rows of one array, read by any number of threads, also after a fork.

    `direct` reads with O_DIRECT, past the page cache: right for what does not fit into memory. The
    caller finds out with `reads_directly` whether the file system can.
    """

    def __init__(
        self, places: RowPlaces, *, direct: bool, most_open: int = MOST_OPEN_FILES
    ) -> None:
        layout = places.array.layout(places.rows_per_shard)
        self.stride = layout.row_stride_bytes
        self._places = places
        flags = os.O_RDONLY | (O_DIRECT if direct else 0)
        self._descriptors = _Descriptors(places.files, flags, most=most_open)

    def read(
        self, rows: Integer[np.ndarray, " row"], into: RowMemory, at: Integer[np.ndarray, " row"]
    ) -> None:
        """Reads `rows[i]` to `into[at[i]]`.

        Raises `BankError` for a hole, `BankCorrupt` where a file is gone or has been cut since the
        bank was opened.
        """
        memory, stride = into.reshape(-1).data, self.stride
        for shard, offset, slot, n_rows in _runs(self._places, rows, at, stride):
            self._read_run(shard, offset, memory[slot * stride : (slot + n_rows) * stride])

    def _read_run(self, shard: int, offset: int, memory: memoryview) -> None:
        try:
            file = self._descriptors.acquire(shard)
            try:
                while memory:
                    n_read = os.preadv(file.descriptor, [memory], offset)
                    if n_read == 0:
                        raise BankCorrupt(
                            f"{self._places.files[shard]} ends at byte {offset}; it was cut after "
                            f"the bank was opened; {ADVICE}"
                        )
                    memory, offset = memory[n_read:], offset + n_read
            finally:
                self._descriptors.release(file)
        except OSError as error:
            raise read_error(self._places.files[shard], error) from error

    def close(self) -> None:
        """Closes the files, which nobody may be reading; reading opens them again."""
        self._descriptors.close()


def check_present(places: RowPlaces, rows: Integer[np.ndarray, " row"]) -> None:
    """`BankError` for a row that is a hole."""
    is_hole = places.offset[rows] < 0
    if is_hole.any():
        raise _hole_error(int(rows[np.argmax(is_hole)]))


def _hole_error(row: int) -> BankError:
    return BankError(f"row {row} has no tokens: it is a hole")


def read_error(path: Path, error: OSError) -> BankError:
    """What a failed read means: a damaged bank, or a system that has not enough of something."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return BankError(f"{path}: {error.strerror}; allow more with `ulimit -n`, and try again")
    if error.errno in (errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.ESTALE):
        return BankCorrupt(f"{path}: {error.strerror}; {ADVICE}")
    return BankError(f"{path} cannot be read: {error.strerror}")


def _runs(
    places: RowPlaces,
    rows: Integer[np.ndarray, " row"],
    at: Integer[np.ndarray, " row"],
    stride: int,
) -> Iterator[tuple[int, int, int, int]]:
    """Shard, offset, slot and number of rows that follow each other in a file and in memory.

    Plain numbers and a loop: for the few rows of a call numpy would take as long as a tenth of the
    copy from the page cache.
    """
    shard = offset = slot = n_rows = -1
    found = zip(rows.tolist(), places.offset[rows].tolist(), at.tolist(), strict=True)
    for row, its_offset, its_slot in found:
        if its_offset < 0:
            raise _hole_error(row)
        its_shard = row // places.rows_per_shard
        if (its_shard, its_offset, its_slot) == (shard, offset + n_rows * stride, slot + n_rows):
            n_rows += 1
            continue
        if n_rows > 0:
            yield shard, offset, slot, n_rows
        shard, offset, slot, n_rows = its_shard, its_offset, its_slot, 1
    if n_rows > 0:
        yield shard, offset, slot, n_rows


def read_span(path: Path, offset: int, n_bytes: int) -> bytes:
    """Some bytes of a file, fewer where it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, n_bytes, offset)
    finally:
        os.close(descriptor)


def reads_directly(places: RowPlaces) -> bool:
    """Whether the first row that there is can be read with O_DIRECT."""
    present = np.flatnonzero(places.offset >= 0)
    if not O_DIRECT or not len(present):
        return False
    first, page = int(present[0]), aligned_memory(ALIGNMENT_BYTES).data
    path = places.files[places.shard_of(first)]
    try:
        descriptor = os.open(path, os.O_RDONLY | O_DIRECT)
        try:
            return os.preadv(descriptor, [page], int(places.offset[first])) > 0
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in NOT_DIRECT:
            return False
        raise read_error(path, error) from error


def resident_share(places: RowPlaces, rows: Integer[np.ndarray, " row"]) -> float | None:
    """How much of `rows` the page cache holds, from a page of each; None where nobody says.

    Nothing is fetched. A read that must not wait (RWF_NOWAIT) would not do: Linux begins to fetch
    what is missing, and on a quick disk it is there in time.
    """
    if not len(rows) or not hasattr(_LIBC, "mincore"):
        return None
    middle = places.array.row_bytes // 2
    try:
        found = [
            _is_resident(places.files[places.shard_of(row)], int(places.offset[row]) + middle)
            for row in rows.tolist()
        ]
    except (OSError, ValueError):  # cut or gone: reading it will tell
        return None
    return None if None in found else sum(map(bool, found)) / len(found)


def _is_resident(path: Path, offset: int) -> bool | None:
    """Whether the page at `offset` is in memory; None where the kernel tells only the owner."""
    offset -= offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return None
        with mmap.mmap(
            file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_COPY, offset=offset
        ) as page:
            flag = ctypes.c_ubyte()
            address = ctypes.c_void_p(ctypes.addressof(ctypes.c_ubyte.from_buffer(page)))
            failed = _LIBC.mincore(address, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(flag))
    return None if failed else bool(flag.value & 1)


@dataclass
class _OpenFile:
    descriptor: int
    n_readers: int = 0


class _Descriptors:
    """Files that are opened when they are first read, the latest of which stay open.

    Reads name their offset, so that threads, and processes after a fork, share a descriptor.
    """

    def __init__(self, paths: Sequence[Path], flags: int, *, most: int) -> None:
        self._paths, self._flags, self._most = paths, flags, most
        self._all_stay_open = len(paths) <= most  # nobody has to count who reads
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)
        _LIVE.add(self)

    def acquire(self, number: int) -> _OpenFile:
        """An open file, until it is released."""
        file = self._open.get(number)
        if file is not None and self._all_stay_open:
            return file
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _OpenFile(os.open(self._paths[number], self._flags))
                self._advise(file.descriptor)
                self._close_idle()
            if not self._all_stay_open:
                self._open.move_to_end(number)
                file.n_readers += 1
            return file

    def release(self, file: _OpenFile) -> None:
        """Lets a file be closed where others are wanted more."""
        if not self._all_stay_open:
            with self._lock:
                file.n_readers -= 1

    def _advise(self, descriptor: int) -> None:
        if not self._flags & O_DIRECT:
            # A row is read whole, and the next one lies elsewhere: read-ahead would be wasted.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def _close_idle(self) -> None:
        idle = [number for number, file in self._open.items() if not file.n_readers]
        for number in idle[: max(0, len(self._open) - self._most)]:
            if number != next(reversed(self._open)):
                os.close(self._open.pop(number).descriptor)

    def close(self) -> None:
        """Closes every file that nobody reads."""
        with self._lock:
            for number in [number for number, file in self._open.items() if not file.n_readers]:
                os.close(self._open.pop(number).descriptor)

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_flags": self._flags, "_most": self._most}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["_paths"], state["_flags"], most=state["_most"])  # type: ignore[misc]

    def _after_fork(self) -> None:
        # The parent's readers are not here, and one may have held the lock.
        self._lock = threading.Lock()
        for file in self._open.values():
            file.n_readers = 0


def _close_all(files: OrderedDict[int, _OpenFile]) -> None:
    while files:
        os.close(files.popitem()[1].descriptor)


_LIVE: weakref.WeakSet[_Descriptors] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for descriptors in list(_LIVE):
        descriptors._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
