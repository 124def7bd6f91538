"""Moving files: many at once, again where it failed for the moment, no faster than allowed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.store import Meter, Store, Upload

Result = TypeVar("Result")
FILES_AT_ONCE = 8
TRIES = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


_CURRENT = threading.local()
"""In a thread of `in_parallel`: the event that tells it to stop."""


class Stopped(StoreError):
    """The transfer was given up while this thread still worked for it."""


def wait_unless_stopped(wait_s: float) -> None:
    """Waits; raises `Stopped` as soon as the transfer that this thread works for is given up."""
    stop: threading.Event | None = getattr(_CURRENT, "stop", None)
    if stop is None:
        time.sleep(wait_s)
    elif stop.wait(wait_s):
        raise Stopped("stopped")


def pause(attempt: int) -> None:
    """Waits before attempt 1, 2 ...: longer each time, and not all clients at once."""
    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
    wait_unless_stopped(wait_s * random.uniform(0.5, 1.0))


def with_retries(work: Callable[[], Result], *, tries: int = TRIES) -> Result:
    """`work`, again after a growing pause while it fails with a `StoreError` that may pass."""
    for attempt in range(1, tries):
        try:
            return work()
        except StoreError as error:
            if not error.may_pass:
                raise
        pause(attempt)
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
            self._free_at_s = max(now_s, self._free_at_s) + max(0, n_bytes) / self._per_s
            wait_s = self._free_at_s - now_s
        wait_unless_stopped(wait_s)


class Traffic:
    """Counts bytes of all threads for a progress bar, and slows them down; a `Meter`.

    Negative counts take back what has to be sent again.
    """

    def __init__(
        self,
        n_bytes: int,
        *,
        limit_bytes_per_s: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.n_bytes, self.n_done = n_bytes, 0
        self._throttle = Throttle(limit_bytes_per_s) if limit_bytes_per_s else None
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, n_bytes: int) -> None:
        if n_bytes > 0:
            wait_unless_stopped(0.0)
            if self._throttle is not None:
                self._throttle(n_bytes)
        with self._lock:
            self.n_done += n_bytes
            if self._progress is not None:
                self._progress(self.n_done, self.n_bytes)


class Counted:
    """A meter of one attempt, which can be taken back."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._n_bytes = meter, 0

    def __call__(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        self._meter(n_bytes)

    def take_back(self) -> None:
        """Uncounts everything."""
        self._meter(-self._n_bytes)
        self._n_bytes = 0


def in_parallel(jobs: Sequence[Callable[[], None]], *, at_once: int = FILES_AT_ONCE) -> None:
    """Runs all jobs; the first error, or Ctrl-C, stops the others, and is raised."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(
        min(at_once, max(1, len(jobs))),
        thread_name_prefix="transfer",
        initializer=lambda: setattr(_CURRENT, "stop", stop),
    )
    try:
        waiting: set[Future[None]] = {pool.submit(job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
    except BaseException:
        stop.set()
        raise
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

    def once(upload: Upload) -> None:
        counted = Counted(meter)
        try:
            store.put(upload, counted)
        except BaseException:
            counted.take_back()
            raise

    def job(upload: Upload) -> None:
        with_retries(partial(once, upload))
        done(upload)

    in_parallel([partial(job, upload) for upload in uploads], at_once=at_once)
