"""Decodes the rows of shards ahead of the encoder, in threads or processes; makes the views.

Rows of a bank that makes views share what is decoded: a clip stands next to its views, and a source
may be that of several.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from patchbank.pipeline.audio import DecodedClip, decode_clip
from patchbank.pipeline.bank.seal_record import brief
from patchbank.pipeline.draws import Draw, draws_of
from patchbank.pipeline.environment import compute_alone
from patchbank.pipeline.errors import AudioError, PatchbankError
from patchbank.pipeline.slots import SlotRing, WaveformSlot, map_slots
from patchbank.pipeline.specs import DecodeIn, Recipe
from patchbank.pipeline.stages import StageClock
from patchbank.pipeline.view_audio import made_view

READ_AHEAD_BATCHES = 2
"""Of each shard, under way while another is in the encoder."""
SHARED_BATCHES = 2
"""Decoded clips that the rows of a shard share: as many waveforms as these batches have."""
Stretch = Mapping[str, Any]
"""Where the audio of a clip lies: the columns `STRETCH`."""
STRETCH = ("path", "start_s", "duration_s")
Decode = Callable[[Stretch], "DecodedClip | AudioError"]


@dataclass(frozen=True)
class ClipFacts:
    """What is known of a decoded clip besides its waveform; see `DecodedClip`."""

    audio_sha256: str
    n_audio_samples: int
    mix_gains: tuple[float, ...] = ()


Decoded = ClipFacts | AudioError


@dataclass(frozen=True)
class ShardClips:
    """Rows of the clip table on their way to a worker."""

    clips: pa.Table
    sources: pa.Table | None = None
    """`clip_id, path, start_s, duration_s` of what is mixed into views among them."""

    def __len__(self) -> int:
        return int(self.clips.num_rows)


@dataclass(frozen=True)
class DecodedBatch:
    """Waveforms of neighbouring rows; whoever takes it has to release its slot."""

    slot: WaveformSlot
    """Holds silence where a clip failed, so that its mates' tokens stay the same."""
    clips: Sequence[Decoded]

    @property
    def n_audio(self) -> list[int | None]:
        """How many samples of each clip are audio; None of those that failed."""
        return [
            None if isinstance(clip, AudioError) else clip.n_audio_samples for clip in self.clips
        ]


@dataclass(frozen=True)
class _Row:
    """How a row is made: what it is decoded from, and of a view its draw and sources."""

    stretch: Stretch
    draw: Draw | None = None
    sources: Sequence[tuple[str, Stretch]] = ()


class SharedClips:
    """The clips that were decoded last, each once for all threads that want it.

    Holds at most `n_clips` clips; the one that was wanted longest ago goes first.
    """

    def __init__(self, decode: Decode, n_clips: int) -> None:
        self._decode, self._n_clips = decode, n_clips
        self._clips: OrderedDict[tuple[Any, ...], Future[DecodedClip | AudioError]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, stretch: Stretch) -> DecodedClip | AudioError:
        """The decoded clip, which nobody may change."""
        key = tuple(stretch[name] for name in STRETCH)
        with self._lock:
            future = self._clips.get(key)
            is_first = future is None
            if future is None:
                future = self._clips[key] = Future()
            self._clips.move_to_end(key)
            if len(self._clips) > self._n_clips:
                self._clips.popitem(last=False)
        # Whoever comes first decodes, in its own thread: nobody waits for work that is in a queue.
        if is_first:
            try:
                future.set_result(self._decode(stretch))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


@dataclass(frozen=True)
class ClipDecoder:
    """How clips are decoded; travels to processes."""

    audio_root: Path
    recipe: Recipe
    clock: StageClock

    def decode(self, stretch: Stretch) -> DecodedClip | AudioError:
        try:
            return decode_clip(
                self.audio_root / stretch["path"],
                start_s=stretch["start_s"],
                duration_s=stretch["duration_s"],
                window=self.recipe.window,
                sample_rate_hz=self.recipe.encoder.sample_rate_hz,
                clock=self.clock,
            )
        except AudioError as error:
            return error

    def sharing(self, n_clips: int) -> Decode:
        """`decode`; where there are views, with the last `n_clips` kept."""
        if self.recipe.augment is None:
            return self.decode
        return SharedClips(self.decode, n_clips).get


class Decoders:
    """Threads or processes that decode; any number of threads may ask for batches.

    Processes are for codecs that hold Python's lock. Where there are views, each process keeps
    decoded clips of its own, so that a clip may be decoded by several.
    """

    def __init__(
        self,
        decoder: ClipDecoder,
        ring: SlotRing,
        *,
        n_threads: int,
        decode_in: DecodeIn = "threads",
    ) -> None:
        self._decoder, self._ring = decoder, ring
        self.batch_size = ring.shape[1]
        self._run_rows = -(-self.batch_size // n_threads)
        self._pool: ThreadPoolExecutor | ProcessPoolExecutor
        if decode_in == "threads":
            self._pool = ThreadPoolExecutor(
                n_threads, thread_name_prefix="decode", initializer=compute_alone
            )
        else:
            assert ring.path is not None
            if current_process().daemon:
                raise PatchbankError(
                    "this worker process may have none of its own to decode in; start workers with "
                    "`patchbank worker`, or use --decode-in threads"
                )
            self._pool = ProcessPoolExecutor(
                n_threads,
                mp_context=get_context("spawn"),
                initializer=_begin_process,
                initargs=(decoder, ring.path, ring.shape),
            )

    def stop(self) -> None:
        """Ends all loops over batches; the ring's memory stays until `close`."""
        self._ring.stop()
        self._pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """`stop`, and frees the memory, from which nobody may be copying."""
        self.stop()
        self._ring.close()

    def batches(self, clips: ShardClips) -> Generator[DecodedBatch]:
        """The rows in order, in batches of the ring's size, with some under way.

        Memory is the ring; where there are views, `SHARED_BATCHES` batches of clips beside it.
        """
        rows = _rows(clips, self._decoder.recipe)
        decode = self._decoder.sharing(SHARED_BATCHES * self.batch_size)
        waiting: deque[_Pending] = deque()
        start = 0
        try:
            while start < len(rows) or waiting:
                pending = None
                if start < len(rows) and len(waiting) <= READ_AHEAD_BATCHES:
                    # Who holds decoded batches hands them on before it waits for memory.
                    pending = self._begin(rows[start : start + self.batch_size], decode, waiting)
                if pending is not None:
                    waiting.append(pending)
                    start += self.batch_size
                    continue
                batch = waiting[0].result()
                waiting.popleft()
                yield batch
        finally:
            for pending in waiting:
                pending.abandon()

    def _begin(
        self, rows: Sequence[_Row], decode: Decode, waiting: deque[_Pending]
    ) -> _Pending | None:
        slot = self._ring.take(waits=not waiting)
        if slot is None:
            return None
        pending = _Pending(slot, self._decoder.clock)
        try:
            for start in range(0, len(rows), self._run_rows):
                run = rows[start : start + self._run_rows]
                pending.runs.append(self._submit(slot, start, run, decode))
        except BaseException:
            pending.abandon()
            raise
        return pending

    def _submit(
        self, slot: WaveformSlot, start: int, rows: Sequence[_Row], decode: Decode
    ) -> Future[Any]:
        if isinstance(self._pool, ThreadPoolExecutor):
            return self._pool.submit(_decode_run, decode, slot.waveforms[start:], rows)
        try:
            return self._pool.submit(_decode_there, slot.index, start, rows)
        except BrokenProcessPool as error:
            raise _process_died() from error


class _Pending:
    """A batch that is being decoded into its slot, in runs of rows."""

    def __init__(self, slot: WaveformSlot, clock: StageClock) -> None:
        self._slot, self._clock = slot, clock
        self.runs: list[Future[tuple[list[Decoded], dict[str, float]]]] = []

    def result(self) -> DecodedBatch:
        try:
            results = [run.result() for run in self.runs]
        except BrokenProcessPool as error:
            raise _process_died() from error
        for _, busy_s in results:
            for stage, seconds in busy_s.items():
                self._clock.add(stage, seconds)
        return DecodedBatch(self._slot, [clip for clips, _ in results for clip in clips])

    def abandon(self) -> None:
        """Gives the slot back when nobody writes into it."""
        for run in self.runs:
            if not run.cancel():
                with suppress(Exception):
                    run.result()
        self._slot.release()


def _process_died() -> PatchbankError:
    return PatchbankError(
        "a process that decodes died (out of memory, or a codec that crashes on a file); run the "
        "same command again with --decode-in threads"
    )


def _rows(clips: ShardClips, recipe: Recipe) -> list[_Row]:
    stretches = clips.clips.select(STRETCH).to_pylist()
    if recipe.augment is None:
        return [_Row(stretch) for stretch in stretches]
    there = [] if clips.sources is None else clips.sources.to_pylist()
    sources = {row.pop("clip_id"): row for row in there}
    views, draws = clips.clips["view"].to_pylist(), draws_of(clips.clips)
    return [
        _Row(stretch, draw, [(name, sources[name]) for name in draw.mix_sources])
        if view
        else _Row(stretch)
        for stretch, view, draw in zip(stretches, views, draws, strict=True)
    ]


def _decode_run(
    decode: Decode, out: Float32[np.ndarray, "row sample"], rows: Sequence[_Row]
) -> tuple[list[Decoded], dict[str, float]]:
    """What is known of the rows, and the seconds that the caller's clock has not counted yet."""
    found: list[Decoded] = []
    for waveform, row in zip(out, rows, strict=False):
        clip = _made(decode, row)
        if isinstance(clip, AudioError):
            waveform.fill(0.0)
            found.append(clip)
        else:
            waveform[...] = clip.waveform
            found.append(ClipFacts(clip.audio_sha256, clip.n_audio_samples, clip.mix_gains))
    return found, {}


def _made(decode: Decode, row: _Row) -> DecodedClip | AudioError:
    clip = decode(row.stretch)
    if row.draw is None or isinstance(clip, AudioError):
        return clip
    parts = []
    for clip_id, place in row.sources:
        part = decode(place)
        if isinstance(part, AudioError):
            return AudioError(f"{brief(clip_id)}, which is mixed in: {part}")
        parts.append(part)
    try:
        return made_view(clip, parts, row.draw)
    except AudioError as error:
        return error


class _Process:
    """What a decoding process keeps between runs."""

    decoder: ClipDecoder
    decode: Decode
    waveforms: Float32[np.ndarray, "slot batch sample"]


def _begin_process(decoder: ClipDecoder, path: str, shape: tuple[int, int, int]) -> None:
    # The parent is who ends it: Ctrl-C in a terminal reaches all, and kill -9 only the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    compute_alone()
    _Process.decoder, _Process.waveforms = decoder, map_slots(path, shape)
    _Process.decode = decoder.sharing(SHARED_BATCHES * shape[1])


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode_there(
    slot: int, start: int, rows: Sequence[_Row]
) -> tuple[list[Decoded], dict[str, float]]:
    found, _ = _decode_run(_Process.decode, _Process.waveforms[slot, start:], rows)
    return found, _Process.decoder.clock.taken()
