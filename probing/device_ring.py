"""Batches on a GPU: copied while the batch before is used, or resident there."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from patchbank.probing.plan import BatchRows, sequential
from patchbank.probing.ring import N_SLOTS, Column, Filled, FilledBatches, Slot, read_ahead
from patchbank.probing.row_readers import RowNumbers, check_announced

N_DEVICE_SLOTS = 2
"""One in use, one being copied to."""
LOADED_ROWS = 64
"""Rows that are copied to the device at once where it keeps them all."""


def copied_ahead(
    batches: FilledBatches, slots: Sequence[Slot], device: torch.device
) -> FilledBatches:
    """`batches` in device memory, each valid until the next.

    A batch is one asynchronous copy from pinned memory on a stream of its own, under way while the
    consumer's kernels work on the batch before it.
    """
    stream, ready = torch.cuda.Stream(device), None
    with closing(batches), _all_done(stream, device):
        for number, filled in enumerate(batches):
            slot = slots[number % len(slots)]
            copied = _copy(filled, slot, stream)
            if ready is not None:
                yield ready
            # The reader threads fill the pinned slot again once the next batch is asked for.
            copied.synchronize()
            torch.cuda.current_stream(device).wait_event(copied)
            ready = Filled(filled.rows, slot, slot.parts(len(filled.rows)))
        if ready is not None:
            yield ready


@contextmanager
def _all_done(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """Nobody gets the slots before the last copy, and the last kernels that use them, are done."""
    try:
        yield
    finally:
        stream.synchronize()
        torch.cuda.current_stream(device).synchronize()


def _copy(filled: Filled, slot: Slot, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Begins to copy a batch to a slot on the device, and returns the event of its end."""
    slot.take_form_of(filled.slot)
    n_bytes = filled.slot.used_bytes(len(filled.rows))
    # Kernels on what the slot held two batches ago have been queued by now.
    used = torch.cuda.current_stream(stream.device).record_event()
    with torch.cuda.stream(stream):
        stream.wait_event(used)
        slot.memory[:n_bytes].copy_(filled.slot.memory[:n_bytes], non_blocking=True)
        copied: torch.cuda.Event = stream.record_event()
        return copied


class DeviceRows:
    """All rows that will be asked for, in the memory of a device."""

    def __init__(
        self, columns: Sequence[Column], rows: RowNumbers, *, n_rows: int, device: torch.device
    ) -> None:
        self._columns, self._device = columns, device
        self._wanted = np.unique(rows)
        self._place = np.full(n_rows, -1, np.int64)
        self._place[self._wanted] = np.arange(len(self._wanted))
        self._memory: list[UInt8[Tensor, "row _"]] | None = None
        self._lock = threading.Lock()

    def batches(self, plan: Iterator[BatchRows], *, n_threads: int) -> FilledBatches:
        """Batches of `plan`, gathered on the device; the first call fills it."""
        with self._lock:
            if self._memory is None:
                self._memory = self._load(n_threads)
        memory = self._memory
        for rows in plan:
            place = self._place[rows]
            check_announced(place, rows)
            index = torch.from_numpy(place).to(self._device)
            parts = [column.index_select(0, index).reshape(-1) for column in memory]
            yield Filled(rows, Slot(self._columns), parts)

    def _load(self, n_threads: int) -> list[UInt8[Tensor, "row _"]]:
        is_cuda = self._device.type == "cuda"
        memory = [
            torch.empty(
                (len(self._wanted), column.reader.stride), dtype=torch.uint8, device=self._device
            )
            for column in self._columns
        ]
        slots = [Slot(self._columns, is_pinned=is_cuda) for _ in range(N_SLOTS)]
        plan = iter(sequential(self._wanted, batch_size=LOADED_ROWS))
        start = 0
        for filled in read_ahead(plan, self._columns, slots, n_threads=n_threads, by_view=False):
            stop = start + len(filled.rows)
            for target, part in zip(memory, filled.parts, strict=True):
                target[start:stop].copy_(part.view(stop - start, -1), non_blocking=True)
            if is_cuda:
                torch.cuda.current_stream(self._device).synchronize()
            start = stop
        return memory

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._memory, self._lock = None, threading.Lock()
