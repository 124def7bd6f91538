"""Dask runs an extraction: in this process, or on the workers of a scheduler that exists."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, TypeVar

from distributed import (
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    WorkerPlugin,
    as_completed,
    get_worker,
)

from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.pipeline.decoding import ShardClips
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.job import ExtractionJob, ShardReport
from patchbank.pipeline.shard import ShardExtractor
from patchbank.pipeline.specs import Json

SHARDS_PER_WORKER = 2
"""Shard tasks that run at once in a worker, so that its pipeline never drains between shards."""
FIRST_WORKER_S = 60.0
WITHOUT_WORKERS_S = 300.0
"""How long an extraction waits for a first worker, and for another when all are lost."""
T = TypeVar("T")


class Workers:
    """The workers of a scheduler, each with the job's encoder; use `open_workers`."""

    def __init__(self, client: Client, plugin: str, scheduler: str) -> None:
        self._client, self._plugin, self._scheduler = client, plugin, scheduler
        self._gave_up = False

    def environment(self) -> Json:
        """Device, versions and threads of one worker."""
        return self._call(_environment)

    def calibrate(
        self, clips: ShardClips, layers: tuple[int, ...], batch_size: int
    ) -> dict[int, ChannelConstants]:
        """The channel constants of `layers` over `clips`."""
        return self._call(_calibrate, clips, layers, batch_size)

    def golden(self) -> None:
        """Commits the golden clip, where it is not."""
        self._call(_golden)

    def extract(self, shards: Mapping[int, ShardClips], extraction: Json) -> Iterator[ShardReport]:
        """Encodes and commits shards, each with its clips; reports come as they end.

        `extraction` is what the bank's card says of the run. Shards that another run works on come
        last. The shards of a lost worker go to another; raises `PatchbankError` where none is left.
        """
        left = dict(shards)
        for report in self._extract(left, extraction, is_last_call=False):
            if report is not None:
                del left[report.shard]
                yield report
        for report in self._extract(left, extraction, is_last_call=True):
            if report is not None:
                yield report

    def _extract(
        self, shards: Mapping[int, ShardClips], extraction: Json, *, is_last_call: bool
    ) -> Iterator[ShardReport | None]:
        futures = [
            self._client.submit(
                _extract, self._plugin, shard, clips, extraction, is_last_call, pure=False
            )
            for shard, clips in list(shards.items())
        ]
        with self._watched(futures):
            for future in as_completed(futures, loop=self._client.loop):
                yield future.result()
                future.release()

    def _call(self, function: Callable[..., T], *arguments: object) -> T:
        future = self._client.submit(function, self._plugin, *arguments, pure=False)
        with self._watched([future]):
            result: T = future.result()
        return result

    @contextmanager
    def _watched(self, futures: Sequence[Future[Any]]) -> Iterator[None]:
        """Says what became of workers or scheduler where futures end without a result."""
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(futures, ended), daemon=True)
        watch.start()
        again = "run the same command again: what is committed is not done again"
        try:
            yield
        except KilledWorker as error:
            raise PatchbankError(
                f"{error.allowed_failures + 1} Dask workers died over one piece of the work, the "
                f"last at {error.last_worker.address}; look into its log (out of memory?), then "
                f"{again}"
            ) from error
        except CancelledError as error:
            if self._gave_up:
                raise PatchbankError(
                    f"no Dask worker for {WITHOUT_WORKERS_S:.0f} s; start some and {again}"
                ) from error
            what = "has dropped the work" if self._is_connected else "is gone"
            raise PatchbankError(
                f"the Dask scheduler at {self._scheduler} {what}; see that it runs and {again}"
            ) from error
        finally:
            ended.set()
            watch.join()

    @property
    def _is_connected(self) -> bool:
        return bool(self._client.status == "running")

    def _watch(self, futures: Sequence[Future[Any]], ended: threading.Event) -> None:
        """Gives up where there has been no worker for too long."""
        seen_s = time.monotonic()
        while not ended.wait(1.0):
            try:
                # Without a scheduler the question would wait for half a minute.
                there = self._is_connected and self._client.scheduler_info(n_workers=-1)["workers"]
            except (OSError, KeyError, RuntimeError):
                there = {}
            if there:
                seen_s = time.monotonic()
            elif time.monotonic() - seen_s > WITHOUT_WORKERS_S:
                self._gave_up = True
                self._client.cancel(list(futures), force=True)
                return


@contextmanager
def open_workers(job: ExtractionJob, scheduler: str | None) -> Iterator[Workers]:
    """Workers for a job, on the scheduler at that address or in this process.

    Raises `PatchbankError` where the scheduler cannot be reached or has no worker, and what a
    worker raises that cannot do the job: it does not see the bank, the audio or the weights.
    """
    # A scheduler may serve several extractions: each has a plugin of its own.
    plugin = f"patchbank-{uuid.uuid4().hex}"
    with _client(scheduler) as client:
        client.register_plugin(_ExtractionPlugin(job), name=plugin)
        try:
            yield Workers(client, plugin, scheduler or "this process")
        finally:
            if client.status == "running":
                client.unregister_worker_plugin(plugin)


class _ExtractionPlugin(WorkerPlugin):
    """Keeps one encoder alive in a worker, for all its shard tasks."""

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self.extractor: ShardExtractor | None = None
        self.error: Exception | None = None

    def setup(self, worker: Any) -> None:
        # A worker that raises here would be shut down; other people's tasks may run on it.
        try:
            self.extractor = ShardExtractor(self._job)
        except Exception as error:
            self.error = error

    def teardown(self, worker: Any) -> None:
        if self.extractor is not None:
            self.extractor.close()


def _extractor(plugin_name: str) -> ShardExtractor:
    plugin = get_worker().plugins[plugin_name]
    assert isinstance(plugin, _ExtractionPlugin)
    if plugin.error is not None:
        raise plugin.error
    assert plugin.extractor is not None
    return plugin.extractor


def _environment(plugin_name: str) -> Json:
    return _extractor(plugin_name).environment()


def _calibrate(
    plugin_name: str, clips: ShardClips, layers: tuple[int, ...], batch_size: int
) -> dict[int, ChannelConstants]:
    return _extractor(plugin_name).calibrate(clips, layers, batch_size)


def _golden(plugin_name: str) -> None:
    _extractor(plugin_name).golden()


def _extract(
    plugin_name: str, shard: int, clips: ShardClips, extraction: Json, is_last_call: bool
) -> ShardReport | None:
    return _extractor(plugin_name).extract(shard, clips, extraction, is_last_call=is_last_call)


@contextmanager
def _client(scheduler: str | None) -> Iterator[Client]:
    if scheduler is not None:
        try:
            client = Client(scheduler, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise PatchbankError(
                f"no Dask scheduler answers at {scheduler}; start one with `dask scheduler`"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=FIRST_WORKER_S)
            except TimeoutError as error:
                raise PatchbankError(
                    f"the scheduler at {scheduler} has no worker; start one with "
                    f"`dask worker {scheduler}` where patchbank is installed"
                ) from error
            yield client
        return
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=SHARDS_PER_WORKER,
            processes=False,
            # The default would listen on every interface of the machine.
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
