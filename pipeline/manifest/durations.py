"""How long recordings are, from their headers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patchbank.pipeline.containers import split_path
from patchbank.pipeline.sound_file import probe_duration_s

_BATCH = 64  # a future a file would cost as much as reading its header


def recording_durations_s(
    paths: Collection[str],
    *,
    audio_root: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | None]:
    """Seconds in each recording below the audio root; None where its header cannot be read.

    Of a tar the headers of its members are read, of a table its audio, once and in order.
    """
    batches = _batches(paths)

    def probe(batch: list[str]) -> list[float | None]:
        return [probe_duration_s(audio_root / path) for path in batch]

    found_s: list[float | None] = []
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as threads:
        for batch_s in threads.map(probe, batches):
            found_s += batch_s
            if progress is not None:
                progress(len(found_s), len(paths))
    ordered = [path for batch in batches for path in batch]
    return dict(zip(ordered, found_s, strict=True))


def _batches(paths: Collection[str]) -> list[list[str]]:
    """Paths by place, in order, some at a time; rows of a Parquet file, which are read in groups,
    all in one."""
    rows: defaultdict[str, list[str]] = defaultdict(list)
    others = []
    for path in paths:
        place = split_path(path)
        if place is not None and place[0].lower().endswith(".parquet"):
            rows[place[0]].append(path)
        else:
            others.append(path)
    others.sort()
    tables = [sorted(table, key=lambda path: (len(path), path)) for table in rows.values()]
    return tables + [others[first : first + _BATCH] for first in range(0, len(others), _BATCH)]
