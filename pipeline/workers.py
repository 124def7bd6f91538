"""What Dask workers do for an extraction: each keeps the encoder and works on shards."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from distributed import Client, Future, WorkerPlugin, get_worker

from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.pipeline.cluster import open_client
from patchbank.pipeline.decoding import ShardClips
from patchbank.pipeline.environment import keep_freed_memory
from patchbank.pipeline.job import ExtractionJob, ShardReport
from patchbank.pipeline.progress import OpenShards, Progress
from patchbank.pipeline.shard import ShardExtractor
from patchbank.pipeline.specs import Json
from patchbank.pipeline.window import Window
from patchbank.pipeline.workplace import DECODE_THREADS, DEVICE, THREADS, Workplace

PROGRESS_S = 1.0
"""How often a worker tells of each shard that it has open."""
T = TypeVar("T")


class Workers:
    """The workers of a scheduler, each with the job's encoder; use `open_workers`."""

    def __init__(self, client: Client, plugin: str, window: Window) -> None:
        self._client, self._plugin, self._window = client, plugin, window
        self._open = OpenShards()

    def environment(self) -> Json:
        """Device, versions and threads of one worker."""
        return self._call(_environment)

    def batch_size(self) -> int:
        """Clips that one worker encodes together where nobody says how many."""
        return self._call(_batch_size)

    def calibrate(
        self, clips: ShardClips, layers: tuple[int, ...], batch_size: int
    ) -> dict[int, ChannelConstants]:
        """The channel constants of `layers` over `clips`."""
        return self._call(_calibrate, clips, layers, batch_size)

    def golden(self) -> None:
        """Commits the golden clip, where it is not."""
        self._call(_golden)

    def extract(
        self,
        shards: Sequence[int],
        clips_of: Callable[[int], ShardClips],
        extraction: Json,
        *,
        n_clips: int,
    ) -> Iterator[Progress]:
        """Encodes and commits shards, of `n_clips` in all, and tells how far it is on the way.

        `clips_of` gives a shard's clips when its turn comes. `extraction` is what the bank's card
        says of the run. Shards that another run works on come last. The shards of a lost worker go
        to another; raises `PatchbankError` where none is left.
        """
        state = Progress(n_clips)
        self._client.subscribe_topic(self._plugin, self._open.note)
        for is_last_call in (False, True):
            begin = partial(self._begin, clips_of, extraction=extraction, is_last_call=is_last_call)
            held = []
            for ended in self._window.results(shards, begin):
                state = replace(state, report=None)
                if ended is not None:
                    shard, report = ended
                    self._open.end(shard)
                    if report is None:
                        held.append(shard)
                    else:
                        state = state.after(report)
                workers = self._window.threads
                n_open = self._open.n_clips(workers)
                yield replace(state, n_open=n_open, n_workers=len(workers))
            shards = held

    def _begin(
        self,
        clips_of: Callable[[int], ShardClips],
        shard: int,
        *,
        extraction: Json,
        is_last_call: bool,
    ) -> Future[Any]:
        self._open.begin(shard)
        return self._client.submit(
            _extract, self._plugin, shard, clips_of(shard), extraction, is_last_call, pure=False
        )

    def _call(self, function: Callable[..., T], *arguments: object) -> T:
        def submit(function: Callable[..., T]) -> Future[T]:
            return self._client.submit(function, self._plugin, *arguments, pure=False)

        result: T
        (result,) = (end[1] for end in self._window.results([function], submit) if end is not None)
        return result


@contextmanager
def open_workers(job: ExtractionJob, workplace: Workplace) -> Iterator[Workers]:
    """Workers for a job, of a scheduler that exists or of this machine.

    Raises `PatchbankError` where the scheduler cannot be reached or has no worker, and what a
    worker raises that cannot do the job: it does not see the bank, the audio or the weights.
    """
    # A scheduler may serve several extractions: each has a plugin of its own.
    plugin = f"patchbank-{uuid.uuid4().hex}"
    with open_client(workplace) as client:
        client.register_plugin(_ExtractionPlugin(job), name=plugin)
        try:
            yield Workers(client, plugin, Window(client, str(workplace)))
        finally:
            # A worker that has just come may not have it yet.
            with suppress(KeyError):
                if client.status == "running":
                    client.unregister_worker_plugin(plugin)


class _ExtractionPlugin(WorkerPlugin):
    """Keeps one encoder alive in a worker, for all its shard tasks."""

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self.extractor: ShardExtractor | None = None
        self.error: Exception | None = None

    def setup(self, worker: Any) -> None:
        inside = worker.address.startswith("inproc:")
        if not inside:
            keep_freed_memory()
        # A worker that raises here would be shut down; other people's tasks may run on it.
        try:
            self.extractor = ShardExtractor(self._job if inside else job_here(self._job))
        except Exception as error:
            self.error = error

    def teardown(self, worker: Any) -> None:
        if self.extractor is not None:
            self.extractor.close()


def job_here(job: ExtractionJob) -> ExtractionJob:
    """A job with the device and the threads of the worker process that it has come to."""
    n_threads, n_decode_threads = os.environ.get(THREADS), os.environ.get(DECODE_THREADS)
    return replace(
        job,
        device=os.environ.get(DEVICE, job.device),
        n_threads=int(n_threads) if n_threads else job.n_threads,
        n_decode_threads=int(n_decode_threads) if n_decode_threads else job.n_decode_threads,
    )


def _extractor(plugin_name: str) -> ShardExtractor:
    plugin = get_worker().plugins[plugin_name]
    assert isinstance(plugin, _ExtractionPlugin)
    if plugin.error is not None:
        raise plugin.error
    assert plugin.extractor is not None
    return plugin.extractor


def _environment(plugin_name: str) -> Json:
    return _extractor(plugin_name).environment()


def _batch_size(plugin_name: str) -> int:
    return _extractor(plugin_name).batch_size()


def _calibrate(
    plugin_name: str, clips: ShardClips, layers: tuple[int, ...], batch_size: int
) -> dict[int, ChannelConstants]:
    return _extractor(plugin_name).calibrate(clips, layers, batch_size)


def _golden(plugin_name: str) -> None:
    _extractor(plugin_name).golden()


def _extract(
    plugin_name: str, shard: int, clips: ShardClips, extraction: Json, is_last_call: bool
) -> ShardReport | None:
    report = _extractor(plugin_name).extract(
        shard,
        clips,
        extraction,
        is_last_call=is_last_call,
        on_progress=_teller(plugin_name, shard),
    )
    return None if report is None else replace(report, worker=str(get_worker().name))


def _teller(topic: str, shard: int) -> Callable[[int], None]:
    """What tells the client how many clips of a shard are encoded, about once a second."""
    worker, told_s = get_worker(), -PROGRESS_S

    def tell(n_clips: int) -> None:
        nonlocal told_s
        now = time.monotonic()
        if now - told_s >= PROGRESS_S:
            told_s = now
            worker.log_event(topic, {"shard": shard, "n_clips": n_clips})

    return tell
