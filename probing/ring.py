"""Reads batches ahead of their consumer, into a fixed ring of slots.

The consumer's thread says what to read next and waits for its own batch only; reader threads fill
the slots meanwhile. Threads, because `preadv` and copies release the interpreter lock: worker
processes would copy every batch once more, and are 1.3-15 times slower for rows of this size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.bank.layout import ALIGNMENT_BYTES
from patchbank.pipeline.bank.row_files import RowReader
from patchbank.pipeline.errors import BankError
from patchbank.probing.plan import BatchRows
from patchbank.probing.row_readers import MappedRows

N_SLOTS = 3
"""One in the consumer's hands, two under way."""
SMALLEST_PIECE, LARGEST_PIECE = 256 * 2**10, 16 * 2**20
"""Bytes that a reader thread takes on at once, at least a row."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Column:
    """One array of a batch: where its rows come from and what they are."""

    layer: int
    name: str
    """patches, prefix, scale, n_patches, mean, max or min."""
    reader: RowReader
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def span_bytes(self, n_rows: int) -> int:
        """Memory that `n_rows` rows take, up to where the next column may begin."""
        return -(-n_rows * self.reader.stride // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def tensor(self, flat: UInt8[Tensor, " byte"], n_rows: int) -> Shaped[Tensor, "clip ..."]:
        """The first rows of a slot as values, without a copy.

        Rows of a size that is no multiple of a page are apart in memory.
        """
        values = flat.view(_torch_dtype(self.dtype))
        strides = [1]
        for size in reversed(self.row_shape[1:]):
            strides.insert(0, strides[0] * size)
        row_stride = self.reader.stride // self.dtype.itemsize
        shape = (n_rows, *self.row_shape)
        return values.as_strided(shape, (row_stride, *strides[: len(self.row_shape)]))


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    # numpy has no bfloat16: a bank holds its bits in 16-bit integers.
    return torch.bfloat16 if dtype == np.uint16 else torch.from_numpy(np.empty(0, dtype)).dtype


class Slot:
    """Memory of one batch, a span for each column; it grows to the largest batch."""

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        device: torch.device = _CPU,
        is_pinned: bool = False,
    ) -> None:
        self._columns, self._device, self._is_pinned = columns, device, is_pinned
        self._offsets = [0] * len(columns)
        self.n_rows = 0
        self.memory: UInt8[Tensor, " byte"] = torch.empty(0, dtype=torch.uint8)

    def reserve(self, n_rows: int) -> None:
        """Makes room for `n_rows` rows; what the slot held is lost where it grows."""
        if n_rows > self.n_rows:
            spans = [column.span_bytes(n_rows) for column in self._columns]
            self.memory = self._allocate(sum(spans))
            self.n_rows, self._offsets = n_rows, [0, *accumulate(spans)][:-1]

    def take_form_of(self, other: Slot) -> None:
        """Spans begin where those of `other` do, so that one copy moves them all."""
        self.n_rows, self._offsets = other.n_rows, other._offsets
        if len(self.memory) < len(other.memory):
            self.memory = self._allocate(len(other.memory))

    def _allocate(self, n_bytes: int) -> UInt8[Tensor, " byte"]:
        # A tensor that is made while gradients are off for good could not be written to later.
        with torch.inference_mode(False):
            if self._device.type == "cpu" and not self._is_pinned:
                return torch.from_numpy(aligned_memory(n_bytes))
            memory = torch.empty(
                n_bytes + ALIGNMENT_BYTES,
                dtype=torch.uint8,
                device=self._device,
                pin_memory=self._is_pinned,
            )
        # Pinned memory need not begin on a page, and O_DIRECT asks for it.
        start = -memory.data_ptr() % ALIGNMENT_BYTES
        return memory[start : start + n_bytes]

    def parts(self, n_rows: int) -> list[UInt8[Tensor, " _"]]:
        """The bytes of the first rows, by column."""
        return [
            self.memory[offset : offset + n_rows * column.reader.stride]
            for offset, column in zip(self._offsets, self._columns, strict=True)
        ]

    def used_bytes(self, n_rows: int) -> int:
        """Where the first rows of the last column end."""
        return self._offsets[-1] + n_rows * self._columns[-1].reader.stride


@dataclass(frozen=True)
class Filled:
    """A batch that has been read: the bytes of each column, in its slot or in mapped pages."""

    rows: BatchRows
    slot: Slot
    parts: list[UInt8[Tensor, " _"]]


FilledBatches = Generator[Filled, None, None]


def read_ahead(
    plan: Iterator[BatchRows],
    columns: Sequence[Column],
    slots: Sequence[Slot],
    *,
    n_threads: int,
    by_view: bool = True,
) -> FilledBatches:
    """Batches of `plan` in order, each valid until the next.

    As many are under way as there are slots but one. `by_view` hands out mapped pages themselves
    where rows follow each other. What goes wrong in a reader thread is raised here. However the
    iteration ends, its threads end with it. It cannot go on in a forked process.
    """
    free, waiting, process = deque(slots), deque[tuple[Filled, list[Future[None]]]](), os.getpid()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="patchbank-read")
    try:
        while True:
            while free and (rows := next(plan, None)) is not None:
                filled = _empty(rows, columns, free.popleft(), by_view=by_view)
                waiting.append((filled, _submit(pool, filled, columns, n_threads)))
            if not waiting:
                return
            filled, futures = waiting.popleft()
            for future in futures:
                future.result()
            yield filled
            free.append(filled.slot)
            if os.getpid() != process:
                raise BankError(
                    "this epoch was begun before the process forked, and its reader threads are "
                    "not here; begin a new one: for batch in loader"
                )
    finally:
        if os.getpid() == process:
            pool.shutdown(cancel_futures=True)


def _empty(rows: BatchRows, columns: Sequence[Column], slot: Slot, *, by_view: bool) -> Filled:
    slot.reserve(len(rows))
    parts = slot.parts(len(rows))
    for index, column in enumerate(columns):
        if by_view and isinstance(column.reader, MappedRows):
            view = column.reader.view(rows)
            parts[index] = parts[index] if view is None else torch.from_numpy(view.reshape(-1))
    return Filled(rows, slot, parts)


def _submit(
    pool: ThreadPoolExecutor, filled: Filled, columns: Sequence[Column], n_threads: int
) -> list[Future[None]]:
    """Begins to read what is not there as a view."""
    futures, at = [], np.arange(len(filled.rows))
    own = filled.slot.parts(len(filled.rows))
    for column, part, memory in zip(columns, filled.parts, own, strict=True):
        if part.data_ptr() != memory.data_ptr():
            continue
        stride = column.reader.stride
        into = memory.numpy().reshape(len(at), stride)
        size = _piece_rows(len(at), stride, n_threads)
        for start in range(0, len(at), size):
            some = slice(start, start + size)
            futures.append(pool.submit(column.reader.read, filled.rows[some], into, at[some]))
    return futures


def _piece_rows(n_rows: int, stride: int, n_threads: int) -> int:
    """Rows that one thread reads at once: all share in a batch, and none for long."""
    most, least = (max(1, n_bytes // stride) for n_bytes in (LARGEST_PIECE, SMALLEST_PIECE))
    return min(most, max(least, -(-n_rows // n_threads)))
