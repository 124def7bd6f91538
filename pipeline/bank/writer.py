"""Streams the rows of one shard to their files, and keeps what the shard's records need.

Rows are copied into a small ring of blocks; threads write a block past the page cache while others
hash it. Memory is the ring, and speed that of the disk or of SHA-256, whichever is less: a core
hashes 1-2 GiB/s, and every byte twice, as part of its row and of its file. zarr-python's sharded
writer is 3-6 times slower than the disk (it concatenates the shard per inner chunk,
zarr-developers/zarr-python#3560), so the files are written here and checked against it in tests.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchbank.pipeline.bank.blocks import Block, BlockRing, Job
from patchbank.pipeline.bank.direct import NOT_DIRECT, O_DIRECT
from patchbank.pipeline.bank.layout import ShardLayout, crc32c, encode_index

BLOCK_BYTES = 2**20
"""About how much is written at once: whole rows, at least one."""
BLOCKS_PER_FILE = 4


@dataclass(frozen=True)
class RowDigest:
    """Checksums of one row's bytes."""

    sha256: str
    crc32c: int


@dataclass(frozen=True)
class FileRecord:
    """One file of a bank as its records name it."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class FinishedFile:
    """A shard file that is written and flushed."""

    record: FileRecord
    digests: tuple[RowDigest, ...]
    """Of its rows, in order."""


def fsync_folder(folder: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Makes everything below `folder` durable, files before the folders that name them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(folder)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and flushes it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path, *, relative_to: Path) -> FileRecord:
    """The record of a file that lies on the disk."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.relative_to(relative_to).as_posix(), path.stat().st_size, sha256)


def n_writer_threads() -> int:
    """For all writers of a process: one a core to hash, and two that wait for the disk."""
    return min(16, 2 + (os.cpu_count() or 1))


def writer_threads() -> ThreadPoolExecutor:
    """`n_writer_threads` of them."""
    return ThreadPoolExecutor(n_writer_threads(), thread_name_prefix="write")


class ShardFileWriter:
    """Writes one shard file, row by row in order; a context manager.

    `threads` may serve any number of writers. What fails in them is raised by the next call here.
    """

    def __init__(
        self,
        path: Path,
        layout: ShardLayout,
        *,
        n_rows: int,
        name: str,
        threads: ThreadPoolExecutor,
        count_seconds: Callable[[str, float], None] | None = None,
    ) -> None:
        """`count_seconds` is told what threads did, "write" or "hash", and how long."""
        self._count_seconds = count_seconds
        self._layout, self._n_rows, self._name = layout, n_rows, name
        self._n_written = 0
        self._digests: dict[int, RowDigest] = {}
        self._hash = hashlib.sha256()
        self._ring = _ring(layout, n_rows, threads)
        self._block: Block | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # A full disk shows here, before the encoder has worked for the shard.
            os.posix_fallocate(self._descriptor, 0, layout.file_bytes(n_rows))
            self._direct = _open_direct(path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._is_direct = self._direct is not None

    @property
    def is_direct(self) -> bool:
        """Whether rows go past the page cache; a file system may refuse that at the first block."""
        return self._is_direct

    @property
    def ring_bytes(self) -> int:
        """Memory for rows, however many there are."""
        return self._ring.n_bytes

    def write_row(self, row: np.ndarray) -> None:
        """Appends a copy of one row, shape (token, dim) in the stored dtype.

        Waits while as many rows as the ring holds are on their way.
        """
        if row.nbytes != self._layout.row_bytes:
            raise ValueError(f"a row has {self._layout.row_bytes} bytes, found {row.nbytes}")
        if self._n_written == self._n_rows:
            raise ValueError(f"all {self._n_rows} rows were written, found one more")
        self._ring.check()
        block = self._block or self._ring.take(self._n_written)
        block.append(row)
        self._n_written += 1
        is_last = self._n_written == self._n_rows
        self._block = None if block.is_full or is_last else block
        if self._block is None:
            jobs = [self._timed("write", self._write), self._timed("hash", self._digest)]
            in_order = self._timed("hash", self._add_to_hash)
            self._ring.hand_over(block, jobs, in_order=in_order)

    def _timed(self, what: str, job: Job) -> Job:
        count_seconds = self._count_seconds
        if count_seconds is None:
            return job

        def timed(block: Block) -> None:
            began_s = time.perf_counter()
            job(block)
            count_seconds(what, time.perf_counter() - began_s)

        return timed

    def _write(self, block: Block) -> None:
        offset = block.rows.start * self._layout.row_stride_bytes
        if self._is_direct:
            assert self._direct is not None
            try:
                _write_at(self._direct, block.data(), offset)
                return
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise
                self._is_direct = False
        _write_at(self._descriptor, block.data(), offset)

    def _digest(self, block: Block) -> None:
        for row in block.rows:
            data = block.row(row, self._layout.row_bytes)
            self._digests[row] = RowDigest(hashlib.sha256(data).hexdigest(), crc32c(data))

    def _add_to_hash(self, block: Block) -> None:
        self._hash.update(block.data())

    def finish(self) -> FinishedFile:
        """Waits for the rows, writes the index, and flushes."""
        if self._n_written != self._n_rows:
            raise ValueError(f"{self._n_written} of {self._n_rows} rows were written")
        self._ring.wait()
        index = encode_index(self._layout, self._n_rows)
        size = self._layout.file_bytes(self._n_rows)
        # The index is no multiple of a page, so that O_DIRECT does not take it.
        _write_at(self._descriptor, memoryview(index), size - len(index))
        os.fsync(self._descriptor)
        whole = self._hash.copy()
        whole.update(index)
        record = FileRecord(self._name, size, whole.hexdigest())
        return FinishedFile(record, tuple(self._digests[row] for row in range(self._n_rows)))

    def __enter__(self) -> ShardFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # No job may write to a descriptor that is closed, and may be another file's by then.
        self._ring.close()
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


def ring_bytes(layout: ShardLayout) -> int:
    """The most memory that a writer has for rows of such a file."""
    slots = max(1, BLOCK_BYTES // layout.row_stride_bytes)
    return BLOCKS_PER_FILE * slots * layout.row_stride_bytes


def _ring(layout: ShardLayout, n_rows: int, threads: ThreadPoolExecutor) -> BlockRing:
    n_slots = max(1, min(n_rows, BLOCK_BYTES // layout.row_stride_bytes))
    n_blocks = max(1, min(BLOCKS_PER_FILE, -(-n_rows // n_slots)))
    return BlockRing(n_blocks, n_slots=n_slots, slot_bytes=layout.row_stride_bytes, threads=threads)


def _open_direct(path: Path) -> int | None:
    """A descriptor that writes past the page cache, where the file system has it."""
    if not O_DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | O_DIRECT)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return None


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        n_bytes = os.pwrite(descriptor, data, offset)
        data, offset = data[n_bytes:], offset + n_bytes
