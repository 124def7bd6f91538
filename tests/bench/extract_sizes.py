"""How many clips a run needs to take about as long as it should, and what limits them."""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from extract_cases import Case
from extract_runs import Extract, Ran, without_start_up

from patchbank.pipeline.environment import is_cpu
from patchbank.pipeline.lanes import CPU_BATCH, GPU_BATCH

FIRST_CLIPS = {True: 256, False: 16}
"""Of the first try, where clips are fast (a GPU, or no encoder) and where they are not."""
SHARE_OF_TIME = 8
"""A try that takes this part of the time tells the rate well enough."""
GROWTH = 8
DISK_SHARE = 0.4
QUICK_CLIPS = 32
BATCH = 16
"""Clips come in whole batches."""


@dataclass(frozen=True)
class Size:
    """Of a case's runs."""

    n_clips: int
    n_clips_of_workers: int
    """One worker has one core."""
    batch_size: int
    """That the command chose."""
    notes: tuple[str, ...] = ()


def usual_batch_size(device: str) -> int:
    """What the command begins with; on a GPU it halves that where memory is short."""
    return CPU_BATCH if is_cpu(device) else GPU_BATCH


def size_of(
    case: Case, weights: Path | None, extract: Extract, options: argparse.Namespace
) -> Size:
    """From runs with few clips that come before the rounds and count for nothing."""
    if options.quick:
        return Size(QUICK_CLIPS, QUICK_CLIPS, usual_batch_size(options.device))
    n_clips = FIRST_CLIPS[options.is_gpu or not case.is_encoder]

    def run(*, dry: bool = False) -> Ran:
        table = case.audio.table(n_clips)
        return extract.run(
            table, encoder=case.encoder, weights=weights, dtype=case.dtypes[0], dry=dry
        )

    dry = run(dry=True)
    most = int(DISK_SHARE * shutil.disk_usage(extract.folder).free * n_clips / dry.facts["bytes"])
    while True:
        ran = run()
        # Without a profile, a dry run is what start-up takes, or nearly.
        rate = without_start_up(ran.facts) or n_clips / max(ran.seconds - dry.seconds, 0.5)
        wanted = whole_batches(rate * options.seconds)
        larger = min(GROWTH * n_clips, wanted, whole_batches(most))
        if n_clips / rate >= options.seconds / SHARE_OF_TIME or larger <= n_clips:
            break
        n_clips = larger
    chosen = min(wanted, whole_batches(most))
    notes = (f"{case.name}: {chosen:,} clips a run",)
    if chosen < wanted:
        notes = (f"{notes[0]}, {DISK_SHARE:.0%} of the free disk, where {wanted:,} were wanted",)
    batch_size = ran.facts.get("batch_size") or usual_batch_size(options.device)
    return Size(chosen, whole_batches(chosen / 2), int(batch_size), notes)


def whole_batches(n_clips: float) -> int:
    return BATCH * max(2, math.floor(n_clips / BATCH))
