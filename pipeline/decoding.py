"""Decodes the rows of a shard in threads, ahead of the encoder; makes the views among them.

Rows of a bank that makes views share what is decoded: a clip stands next to its views, and a source
may be that of several.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchbank.pipeline.audio import DecodedClip, decode_clip
from patchbank.pipeline.bank.seal_record import brief
from patchbank.pipeline.draws import Draw, draws_of
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.specs import Recipe
from patchbank.pipeline.view_audio import made_view

READ_AHEAD_BATCHES = 2
SHARED_BATCHES = 2
"""Decoded clips that the rows of a shard share: as many waveforms as these batches have."""
Decoded = DecodedClip | AudioError
Stretch = Mapping[str, Any]
"""Where the audio of a clip lies: the columns `STRETCH`."""
STRETCH = ("path", "start_s", "duration_s")
Decode = Callable[[Stretch], Decoded]


@dataclass(frozen=True)
class ShardClips:
    """Rows of the clip table on their way to a worker."""

    clips: pa.Table
    sources: pa.Table | None = None
    """`clip_id, path, start_s, duration_s` of what is mixed into views among them."""

    def __len__(self) -> int:
        return int(self.clips.num_rows)


class SharedClips:
    """The clips that were decoded last, each once for all threads that want it.

    Holds at most `n_clips` clips; the one that was wanted longest ago goes first.
    """

    def __init__(self, decode: Decode, n_clips: int) -> None:
        self._decode, self._n_clips = decode, n_clips
        self._clips: OrderedDict[tuple[Any, ...], Future[Decoded]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, stretch: Stretch) -> Decoded:
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


class Decoders:
    """Threads that decode."""

    def __init__(self, audio_root: Path, recipe: Recipe, *, n_threads: int) -> None:
        self._audio_root, self._recipe = audio_root, recipe
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def batches(self, clips: ShardClips, size: int) -> Iterator[list[Decoded]]:
        """Decoded clips, a batch at a time, with `READ_AHEAD_BATCHES` batches under way.

        Where there are views, at most `SHARED_BATCHES` batches of clips are kept beside these.
        """
        rows = clips.clips.select(STRETCH).to_pylist()
        views = self._views_of(clips)
        decode: Decode = self._decode
        if self._recipe.augment is not None:
            decode = SharedClips(decode, SHARED_BATCHES * size).get
        waiting: deque[list[Future[Decoded]]] = deque()
        for start in range(0, len(rows), size):
            batch = range(start, min(start + size, len(rows)))
            waiting.append(
                [self._threads.submit(_made, decode, rows[row], *views[row]) for row in batch]
            )
            if len(waiting) > READ_AHEAD_BATCHES:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]

    def _views_of(self, clips: ShardClips) -> list[tuple[Draw | None, dict[str, Stretch]]]:
        """How each row is made, and where its sources lie; None of what is decoded as it is."""
        if self._recipe.augment is None:
            return [(None, {})] * len(clips)
        there = [] if clips.sources is None else clips.sources.to_pylist()
        sources = {row.pop("clip_id"): row for row in there}
        return [
            (draw, {name: sources[name] for name in draw.mix_sources}) if view else (None, {})
            for view, draw in zip(
                clips.clips["view"].to_pylist(), draws_of(clips.clips), strict=True
            )
        ]

    def _decode(self, stretch: Stretch) -> Decoded:
        recipe = self._recipe
        try:
            return decode_clip(
                self._audio_root / stretch["path"],
                start_s=stretch["start_s"],
                duration_s=stretch["duration_s"],
                window=recipe.window,
                sample_rate_hz=recipe.encoder.sample_rate_hz,
            )
        except AudioError as error:
            return error


def _made(
    decode: Decode, stretch: Stretch, draw: Draw | None, sources: Mapping[str, Stretch]
) -> Decoded:
    clip = decode(stretch)
    if draw is None or isinstance(clip, AudioError):
        return clip
    parts = []
    for clip_id, place in sources.items():
        part = decode(place)
        if isinstance(part, AudioError):
            return AudioError(f"{brief(clip_id)}, which is mixed in: {part}")
        parts.append(part)
    try:
        return made_view(clip, parts, draw)
    except AudioError as error:
        return error
