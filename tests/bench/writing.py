"""Writers of the same bytes: patchbank's shards, zarr-python's, raw files; and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from cache import files_below, opened
from clips import SyntheticClips
from limits import in_threads, open_direct, touched_memory
from reading import Sample

from patchbank.pipeline.bank.layout import ShardLayout
from patchbank.pipeline.bank.writer import ShardFileWriter, writer_threads

SHARDS_IN_FLIGHT = 2
"""As a worker of an extraction has."""
RAW_BLOCKS = (2**20, 2**21, 2**22)
RAW_THREADS = (1, 2)


@dataclass(frozen=True)
class WriteJob:
    """A number of equal shards, whose rows lie in memory."""

    folder: Path
    """Where each writer makes its files; they are removed after each."""
    rows: np.ndarray
    """Of one shard (clip, patch, dim), at the beginning of a page."""
    n_shards: int

    @property
    def n_clips(self) -> int:
        return len(self.rows) * self.n_shards

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n_clips, *self.rows.shape[1:])


def make_job(folder: Path, clips: SyntheticClips, *, n_clips: int, rows_per_shard: int) -> WriteJob:
    n_rows = min(rows_per_shard, n_clips)
    memory = touched_memory(n_rows * clips.row_bytes).view(np.float16)
    rows = memory.reshape(n_rows, clips.n_patches, clips.dim)
    rows[:] = clips.rows(range(n_rows))
    return WriteJob(folder, rows, n_clips // n_rows)


def measured(write: Callable[[WriteJob], dict[str, Any] | None], job: WriteJob) -> Sample:
    """Clips a second until all is on the disk; what was written is checked, then removed."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    os.sync()
    start = time.perf_counter()
    facts = write(job)
    seconds = time.perf_counter() - start
    if (job.folder / "zarr.json").is_file():
        _check(job)
    shutil.rmtree(job.folder)
    # The disk hears of removed files when the journal is written: not during the next one's time.
    os.sync()
    return Sample(job.n_clips / seconds, facts or {})


def _empty_array(job: WriteJob) -> zarr.Array[Any]:
    return zarr.create_array(
        job.folder,
        shape=job.shape,
        chunks=(1, *job.shape[1:]),
        shards=(len(job.rows), *job.shape[1:]),
        dtype="f2",
        compressors=None,
        filters=None,
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def _check(job: WriteJob) -> None:
    """Reads the first and the last row of each shard with zarr-python, whoever wrote it."""
    array = zarr.open_array(job.folder, mode="r")
    for first in range(0, job.n_clips, len(job.rows)):
        for slot in (0, len(job.rows) - 1):
            if not np.array_equal(np.asarray(array[first + slot]), job.rows[slot]):
                raise AssertionError(f"{job.folder}: row {first + slot} is not what was written")


def write_own(job: WriteJob) -> dict[str, Any]:
    """patchbank's shard files, as many at a time as extraction has under way."""
    _empty_array(job)
    with writer_threads() as threads, ThreadPoolExecutor(SHARDS_IN_FLIGHT) as shards:
        write = partial(_write_own_shard, job, threads=threads)
        ring_bytes = list(shards.map(write, range(job.n_shards)))
    return {"ring_bytes": SHARDS_IN_FLIGHT * max(ring_bytes)}


def _write_own_shard(job: WriteJob, shard: int, *, threads: ThreadPoolExecutor) -> int:
    layout, name = ShardLayout(len(job.rows), job.rows[0].nbytes), f"c.{shard}.0.0"
    with ShardFileWriter(
        job.folder / name, layout, n_rows=len(job.rows), name=name, threads=threads
    ) as writer:
        for row in job.rows:
            writer.write_row(row)
        writer.finish()
        return writer.ring_bytes


def write_zarr(job: WriteJob) -> None:
    """zarr-python, a whole shard at a time, which is its fastest way."""
    array = _empty_array(job)
    for first in range(0, job.n_clips, len(job.rows)):
        array[first : first + len(job.rows)] = job.rows
    for path in files_below(job.folder):
        with opened(path) as descriptor:
            os.fsync(descriptor)


def write_raw(job: WriteJob, *, n_threads: int, block_bytes: int) -> None:
    """The same bytes past the page cache into one file whose space is there already."""
    source = job.rows.reshape(-1).view(np.uint8).data
    n_bytes, block_bytes = job.n_shards * len(source), min(block_bytes, len(source))
    descriptor = open_direct(job.folder / "raw", os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
        offsets = iter(range(0, n_bytes, block_bytes))

        def write(_: int) -> None:
            for offset in offsets:
                at = offset % len(source)
                _write_all(descriptor, source[at : at + block_bytes], offset)

        in_threads(n_threads, write)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, block: memoryview, offset: int) -> None:
    if os.pwrite(descriptor, block, offset) != len(block):
        raise OSError(f"a part of {len(block)} bytes was written at {offset}")


def hash_twice(job: WriteJob) -> Sample:
    """SHA-256 of every row and of every file, which a bank records, on all cores."""
    rows = [row.reshape(-1).view(np.uint8).data for row in job.rows]
    # No generator, which threads cannot share.
    jobs = iter(rows * (2 * job.n_shards))

    def digest(_: int) -> None:
        for row in jobs:
            hashlib.sha256(row).digest()

    start = time.perf_counter()
    in_threads(os.cpu_count() or 1, digest)
    return Sample(job.n_clips / (time.perf_counter() - start))
