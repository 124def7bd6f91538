"""Streams the rows of one shard to their files, and keeps what the shard's records need.

Memory is one row an array: a row is written, hashed and forgotten. zarr-python's sharded writer is
3-6 times slower than the disk (it concatenates the shard per inner chunk,
zarr-developers/zarr-python#3560), so the files are written here and checked against it in tests.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchbank.pipeline.bank.layout import ShardLayout, crc32c, encode_index


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


class ShardFileWriter:
    """Writes one shard file, row by row in order; a context manager."""

    def __init__(self, path: Path, layout: ShardLayout, *, n_rows: int, name: str) -> None:
        self._layout, self._n_rows, self._name = layout, n_rows, name
        self._padding = bytes(layout.row_stride_bytes - layout.row_bytes)
        self._hash = hashlib.sha256()
        self._n_written = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # A full disk shows here, before the encoder has worked for the shard.
            os.posix_fallocate(self._descriptor, 0, layout.file_bytes(n_rows))
        except BaseException:
            os.close(self._descriptor)
            raise

    def write_row(self, row: np.ndarray) -> RowDigest:
        """Appends one row, shape (token, dim) in the stored dtype."""
        data = np.ascontiguousarray(row).data.cast("B")
        if len(data) != self._layout.row_bytes:
            raise ValueError(f"a row has {self._layout.row_bytes} bytes, found {len(data)}")
        self._write([data, memoryview(self._padding)])
        self._n_written += 1
        return RowDigest(hashlib.sha256(data).hexdigest(), crc32c(data))

    def _write(self, parts: list[memoryview]) -> None:
        for part in parts:
            self._hash.update(part)
            while part:
                part = part[os.write(self._descriptor, part) :]

    def finish(self) -> FileRecord:
        """Writes the index, flushes, and returns the file's record."""
        if self._n_written != self._n_rows:
            raise ValueError(f"{self._n_written} of {self._n_rows} rows were written")
        self._write([memoryview(encode_index(self._layout, self._n_rows))])
        os.fsync(self._descriptor)
        size = self._layout.file_bytes(self._n_rows)
        return FileRecord(self._name, size, self._hash.hexdigest())

    def __enter__(self) -> ShardFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
