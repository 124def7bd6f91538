"""A ring of blocks: memory for rows on their way to a disk, and the jobs that threads do there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from patchbank.pipeline.bank.direct import aligned_memory


class Block:
    """Memory for neighbouring rows, which lie in it as they will lie in their file."""

    def __init__(self, memory: UInt8[np.ndarray, "slot byte"]) -> None:
        self._memory = memory
        self.rows = range(0)
        """Those that it holds."""
        self.n_jobs = 0
        """How much has to be done with them before others may take their place."""

    @property
    def is_full(self) -> bool:
        return len(self.rows) == len(self._memory)

    def append(self, row: np.ndarray) -> None:
        place = self._memory[len(self.rows), : row.nbytes]
        place.view(row.dtype).reshape(row.shape)[...] = row
        self.rows = range(self.rows.start, self.rows.stop + 1)

    def row(self, row: int, n_bytes: int) -> memoryview:
        return self._memory[row - self.rows.start, :n_bytes].data

    def data(self) -> memoryview:
        """All rows, with the zeros between them."""
        return self._memory[: len(self.rows)].reshape(-1).data


Job = Callable[[Block], None]


class BlockRing:
    """Blocks that one thread fills in turn, and that are free again when their jobs are done.

    No job waits for another, so that any number of rings may share a pool of any size. The first
    error of a job is what every later call raises.
    """

    def __init__(
        self, n_blocks: int, *, n_slots: int, slot_bytes: int, threads: ThreadPoolExecutor
    ) -> None:
        memory = aligned_memory(n_blocks * n_slots * slot_bytes)
        self.n_bytes = memory.nbytes
        self._free = deque(Block(part) for part in memory.reshape(n_blocks, n_slots, slot_bytes))
        self._threads = threads
        self._in_order: deque[Block] = deque()
        """Blocks that wait for their turn."""
        self._has_turns = False
        """Whether a thread takes them."""
        self._n_running = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take(self, first_row: int) -> Block:
        """An empty block; waits where none is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._error)
            self.check()
            block = self._free.popleft()
        block.rows = range(first_row, first_row)
        return block

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def hand_over(self, block: Block, jobs: Sequence[Job], *, in_order: Job) -> None:
        """Has threads do `jobs` at once, and `in_order` after that of the block before."""
        block.n_jobs = len(jobs) + 1
        for job in jobs:
            self._start(self._do, job, block)
        with self._changed:
            self._in_order.append(block)
            had_turns, self._has_turns = self._has_turns, True
        if not had_turns:
            self._start(self._take_turns, in_order)

    def wait(self) -> None:
        """Returns when every job is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_running == 0 or self._error)
            self.check()

    def close(self) -> None:
        """Returns when no job runs or will run; frees the memory."""
        with self._changed:
            self._error = self._error or ValueError("closed")
            self._changed.wait_for(lambda: self._n_running == 0)
            self._free.clear()
            self._in_order.clear()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        # Without the lock: a pool that is shut down calls `_ended` under one that `submit` needs.
        try:
            future = self._threads.submit(work, *arguments)
        except RuntimeError as error:
            self._error = self._error or error
            raise
        with self._changed:
            self._n_running += 1
        # Called in any case, also where the pool is shut down before the work began.
        future.add_done_callback(self._ended)

    def _take_turns(self, job: Job) -> None:
        """Ends when no block waits, so that a thread is never held by a ring that is not fed."""
        while block := self._next_in_order():
            self._do(job, block)

    def _next_in_order(self) -> Block | None:
        with self._changed:
            self._has_turns = bool(self._in_order) and self._error is None
            return self._in_order.popleft() if self._has_turns else None

    def _do(self, job: Job, block: Block) -> None:
        if self._error is not None:
            return
        job(block)
        with self._changed:
            block.n_jobs -= 1
            if block.n_jobs == 0:
                self._free.append(block)
                self._changed.notify_all()

    def _ended(self, work: Future[None]) -> None:
        error = CancelledError() if work.cancelled() else work.exception()
        with self._changed:
            self._n_running -= 1
            self._error = self._error or error
            if error is not None or self._n_running == 0:
                self._changed.notify_all()
