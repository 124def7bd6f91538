"""Cuts stretches of recordings into clips of one length and names the clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from patchbank.pipeline.specs import WindowSpec


@dataclass(frozen=True)
class Segments:
    """Stretches of recordings, as columns of one length."""

    paths: Sequence[str]
    clip_ids: Sequence[str | None]
    """The name that the user gave, if any."""
    starts_s: Sequence[float]
    durations_s: Sequence[float]
    views: Sequence[int] | None = None
    """The variant of each stretch; None where all are clean (0)."""


@dataclass(frozen=True)
class Cuts:
    """Clips in the order of their segments, as columns of one length."""

    segments: Sequence[int]
    """Which segment each clip is cut from."""
    clip_ids: Sequence[str]
    starts_s: Sequence[float]
    """Where each clip starts in its recording."""
    durations_s: Sequence[float]
    """Seconds of each window that its segment covers."""


def cut(segments: Segments, window: WindowSpec) -> Cuts:
    """Every window of every segment, in order.

    A clip is called by its segment's `clip_id`, or by the recording's path; `@<start_ms>` follows
    where that name would stand for several clips.
    """
    owners: list[int] = []
    starts_s: list[float] = []
    durations_s: list[float] = []
    pairs = zip(segments.starts_s, segments.durations_s, strict=True)
    for owner, (segment_start_s, segment_s) in enumerate(pairs):
        for offset_s in window.starts_s(segment_s):
            owners.append(owner)
            starts_s.append(_tidy(segment_start_s + offset_s))
            durations_s.append(_tidy(min(window.window_s, segment_s - offset_s)))
    return Cuts(owners, _clip_ids(segments, owners, starts_s), starts_s, durations_s)


def _tidy(seconds: float) -> float:
    """Nanoseconds are enough; sums like 0.1 + 0.2 lose their noise."""
    return round(seconds, 9)


def _clip_ids(
    segments: Segments, owners: Sequence[int], starts_s: Sequence[float]
) -> Sequence[str]:
    n_clips_of_segment = Counter(owners)
    n_clips_of_path = Counter(segments.paths[owner] for owner in owners)
    clip_ids = []
    for owner, start_s in zip(owners, starts_s, strict=True):
        path, given = segments.paths[owner], segments.clip_ids[owner]
        n_clips = n_clips_of_path[path] if given is None else n_clips_of_segment[owner]
        name = path if given is None else given
        clip_ids.append(name if n_clips == 1 else f"{name}@{round(start_s * 1000)}")
    return clip_ids
