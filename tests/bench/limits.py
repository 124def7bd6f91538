"""What disk and memory can do at most: reads of a flat file into memory that is used again."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cache import make_cold, make_warm
from clips import N_MARKS, SyntheticClips
from reading import BATCH_SIZE, Order, Sample, WrongData

from patchbank.pipeline.bank.direct import aligned_memory


def touched_memory(n_bytes: int) -> np.ndarray:
    """Bytes that begin on a page, as O_DIRECT asks, and have been used."""
    memory = aligned_memory(n_bytes)
    memory.fill(1)
    return memory


def open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise SystemExit(
            f"the file system of {path.parent} has no O_DIRECT; choose another --folder"
        ) from error


def in_threads(n_threads: int, work: Callable[[int], None]) -> None:
    """The same work in several threads, which get numbers and share what there is to do."""
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(work, number) for number in range(n_threads)]:
            future.result()


class FlatFile:
    """Clips one after another, without a header or padding, read in rows of any size."""

    def __init__(self, path: Path, clips: SyntheticClips) -> None:
        self.path, self._clips = path, clips
        self._memory = touched_memory(BATCH_SIZE * clips.row_bytes)

    def write(self) -> None:
        with self.path.open("wb") as file:
            for rows in self._clips.blocks(BATCH_SIZE):
                file.write(self._clips.rows(rows).data.cast("B"))

    def read_cold(self, order: Order, *, row_bytes: int, n_threads: int) -> Sample:
        """Rows a second with O_DIRECT."""
        make_cold(self.path)
        return self._timed(open_direct(self.path, os.O_RDONLY), order, row_bytes, n_threads)

    def read_warm(self, order: Order, *, row_bytes: int, n_threads: int) -> Sample:
        """Rows a second from the page cache."""
        make_warm(self.path)
        return self._timed(os.open(self.path, os.O_RDONLY), order, row_bytes, n_threads)

    def _timed(self, descriptor: int, order: Order, row_bytes: int, n_threads: int) -> Sample:
        slots = self._memory[: BATCH_SIZE * row_bytes].reshape(BATCH_SIZE, -1)
        held, jobs = [-1] * BATCH_SIZE, iter(order.sequence)

        def read(thread: int) -> None:
            own = itertools.cycle(range(thread, BATCH_SIZE, n_threads))
            for row, slot in zip(jobs, own, strict=False):
                if os.preadv(descriptor, [slots[slot]], row * row_bytes) != row_bytes:
                    raise OSError(f"row {row} came in part")
                held[slot] = row

        try:
            start = time.perf_counter()
            in_threads(n_threads, read)
            seconds = time.perf_counter() - start
        finally:
            os.close(descriptor)
        self._check(slots, np.array(held))
        return Sample(len(order.rows) / seconds)

    def _check(self, slots: np.ndarray, held: np.ndarray) -> None:
        """Whether the slots hold what was read into them last."""
        values = slots.view(np.float16)[held >= 0]
        places = np.linspace(0, values.shape[1] - 1, N_MARKS).astype(np.int64)
        rows = held[held >= 0, None]
        expected = self._clips.values_at(rows * values.shape[1] + places)
        if not np.array_equal(values[:, places], expected):
            raise WrongData(f"{self.path}: other rows than were asked for")
