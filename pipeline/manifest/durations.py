"""How long recordings are, from their headers."""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patchbank.pipeline.sound_file import probe_duration_s

_BATCH = 64  # a future a file would cost as much as reading its header


def recording_durations_s(paths: Collection[str], *, audio_root: Path) -> dict[str, float | None]:
    """Seconds in each recording below the audio root; None where its header cannot be read."""
    ordered = sorted(paths)
    batches = [ordered[first : first + _BATCH] for first in range(0, len(ordered), _BATCH)]

    def probe(batch: list[str]) -> list[float | None]:
        return [probe_duration_s(audio_root / path) for path in batch]

    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as threads:
        found_s = [duration_s for batch in threads.map(probe, batches) for duration_s in batch]
    return dict(zip(ordered, found_s, strict=True))
