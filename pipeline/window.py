"""Tasks on Dask workers, handed out one by one: whoever is free gets the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker

from patchbank.pipeline.errors import PatchbankError

WITHOUT_WORKERS_S = 300.0
"""How long an extraction waits for another worker when all are lost."""
LOOK_S = 1.0
TICK_S = 0.5
"""How often it looks which workers there are, and how often its user may see progress."""
AGAIN = "run the same command again: what is committed is not done again"
FETCH_S = 2.0
"""How long it waits for a result, which is small, before it looks again."""
T = TypeVar("T")


class Window:
    """The tasks that run at once: as many as the workers have threads, and one more a worker.

    Dask would take all at once, each with its rows, and deal them out before it knows who is fast.
    Workers that join or leave change the window.
    """

    def __init__(self, client: Client, scheduler: str) -> None:
        self._client, self._scheduler = client, scheduler
        self._looked_s, self._seen_s = -LOOK_S, time.monotonic()
        self.threads: Mapping[str, int] = {}
        """Of each worker, by its address; a second old at most while tasks run."""

    def results(
        self, items: Iterable[T], submit: Callable[[T], Future[Any]]
    ) -> Iterator[tuple[T, Any] | None]:
        """Each item with what its task returns, as the tasks end, and None twice a second.

        `submit` is called when there is room for the item's task. The tasks of a lost worker go to
        another; raises `PatchbankError` where none is left.
        """
        waiting, n_running = deque(items), 0
        ended: SimpleQueue[tuple[T, Future[Any]]] = SimpleQueue()
        self._seen_s = time.monotonic()
        while waiting or n_running:
            self._look()
            while waiting and n_running < sum(self.threads.values()) + len(self.threads):
                item = waiting.popleft()
                submit(item).add_done_callback(lambda future, item=item: ended.put((item, future)))
                n_running += 1
            try:
                item, future = ended.get(timeout=TICK_S)
            except Empty:
                yield None
                continue
            try:
                result = self._result(future)
            except TimeoutError:
                if future.status == "error":
                    raise
                # Its worker was lost before it handed the result over: another repeats the task.
                ended.put((item, future))
                yield None
                continue
            n_running -= 1
            yield item, result

    def _result(self, future: Future[Any]) -> Any:
        """Says what became of workers or scheduler where a task ends without a result."""
        try:
            return future.result(timeout=FETCH_S)
        except KilledWorker as error:
            raise PatchbankError(
                f"{error.allowed_failures + 1} Dask workers died over one piece of the work, the "
                f"last at {error.last_worker.address}; look into its log (out of memory?), then "
                f"{AGAIN}"
            ) from error
        except CancelledError as error:
            what = "has dropped the work" if self._is_connected else "is gone"
            raise PatchbankError(
                f"the Dask scheduler at {self._scheduler} {what}; see that it runs and {AGAIN}"
            ) from error

    @property
    def _is_connected(self) -> bool:
        return bool(self._client.status == "running")

    def _look(self) -> None:
        """Asks for the workers; gives up where there has been none for too long."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        try:
            # Without a scheduler the question would wait for half a minute.
            self.threads = self._client.nthreads() if self._is_connected else {}
        except (OSError, KeyError, RuntimeError):
            self.threads = {}
        if self.threads:
            self._seen_s = now
        elif now - self._seen_s > WITHOUT_WORKERS_S:
            raise PatchbankError(
                f"no Dask worker for {WITHOUT_WORKERS_S:.0f} s; start some and {AGAIN}"
            )
