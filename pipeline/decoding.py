"""Decodes the rows of a shard in threads, ahead of the encoder; makes the views among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
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
Decoded = DecodedClip | AudioError
Stretch = Mapping[str, Any]
"""Where the audio of a clip lies: the columns `STRETCH`."""
STRETCH = ("path", "start_s", "duration_s")


@dataclass(frozen=True)
class ShardClips:
    """Rows of the clip table on their way to a worker."""

    clips: pa.Table
    sources: pa.Table | None = None
    """`clip_id, path, start_s, duration_s` of what is mixed into views among them."""

    def __len__(self) -> int:
        return int(self.clips.num_rows)


class Decoders:
    """Threads that decode."""

    def __init__(self, audio_root: Path, recipe: Recipe, *, n_threads: int) -> None:
        self._audio_root, self._recipe = audio_root, recipe
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def batches(self, clips: ShardClips, size: int) -> Iterator[list[Decoded]]:
        """Decoded clips, a batch at a time, with `READ_AHEAD_BATCHES` batches under way."""
        rows = clips.clips.select(STRETCH).to_pylist()
        views = self._views_of(clips)
        waiting: deque[list[Future[Decoded]]] = deque()
        for start in range(0, len(rows), size):
            batch = range(start, min(start + size, len(rows)))
            waiting.append(
                [self._threads.submit(self._decode, rows[row], *views[row]) for row in batch]
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

    def _decode(
        self, stretch: Stretch, draw: Draw | None, sources: Mapping[str, Stretch]
    ) -> Decoded:
        try:
            clip = self._decode_stretch(stretch)
            if draw is None:
                return clip
            return made_view(clip, [self._decode_source(*item) for item in sources.items()], draw)
        except AudioError as error:
            return error

    def _decode_source(self, clip_id: str, stretch: Stretch) -> DecodedClip:
        try:
            return self._decode_stretch(stretch)
        except AudioError as error:
            raise AudioError(f"{brief(clip_id)}, which is mixed in: {error}") from error

    def _decode_stretch(self, stretch: Stretch) -> DecodedClip:
        recipe = self._recipe
        return decode_clip(
            self._audio_root / stretch["path"],
            start_s=stretch["start_s"],
            duration_s=stretch["duration_s"],
            window=recipe.window,
            sample_rate_hz=recipe.encoder.sample_rate_hz,
        )
