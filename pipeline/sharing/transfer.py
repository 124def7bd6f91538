"""Moving files: many at once, again where it failed for the moment, no faster than allowed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.store import Meter, Store, Upload

Result = TypeVar("Result")
FILES_AT_ONCE = 8
TRIES = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


def with_retries(work: Callable[[], Result], *, tries: int = TRIES) -> Result:
    """`work`, again after a growing pause while it fails with a `StoreError` that may pass."""
    for attempt in range(tries - 1):
        try:
            return work()
        except StoreError as error:
            if not error.may_pass:
                raise
        # Not all clients of a server that came back at once.
        time.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0))
    return work()


class Throttle:
    """Lets at most so many bytes a second pass, over all threads; a `Meter`."""

    def __init__(self, bytes_per_s: float) -> None:
        self._per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def __call__(self, n_bytes: int) -> None:
        with self._lock:
            now_s = time.monotonic()
            self._free_at_s = max(now_s, self._free_at_s) + n_bytes / self._per_s
            wait_s = self._free_at_s - now_s
        time.sleep(wait_s)


def in_parallel(jobs: Sequence[Callable[[], None]], *, at_once: int = FILES_AT_ONCE) -> None:
    """Runs all jobs; the first error ends those that have not begun, and is raised."""
    pool = ThreadPoolExecutor(min(at_once, max(1, len(jobs))), thread_name_prefix="transfer")
    waiting: set[Future[None]] = set()
    try:
        waiting = {pool.submit(job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def put_in_parallel(
    store: Store,
    uploads: Sequence[Upload],
    meter: Meter,
    done: Callable[[Upload], None],
    *,
    at_once: int = FILES_AT_ONCE,
) -> None:
    """`Store.put_all` of stores that take files one by one."""

    def job(upload: Upload) -> None:
        with_retries(lambda: store.put(upload, meter))
        done(upload)

    in_parallel([lambda upload=upload: job(upload) for upload in uploads], at_once=at_once)  # type: ignore[misc]
