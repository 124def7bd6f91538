"""Which way tokens come: chosen by size, memory, and a short look at the disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Integer

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.bank.places import RowPlaces
from patchbank.pipeline.bank.row_files import RowFiles, reads_directly, resident_share
from patchbank.pipeline.specs import human_bytes

Tier = Literal["auto", "device", "ram", "map", "read", "direct"]
TIERS: tuple[Tier, ...] = get_args(Tier)
SMALL_BYTES = 64 * 2**20
"""Tokens that are kept in memory wherever they come from: a copy costs nothing."""
SMALL_ROW_BYTES = 64 * 2**10
"""Below this a direct read is mostly waiting."""
FROM_AFAR = "from afar through the cache on this disk"
SAMPLED_ROWS = 64
TIMED_ROWS = 8
MOSTLY = 0.9


@dataclass(frozen=True)
class TierChoice:
    """Where tokens come from, and why."""

    tier: Tier
    reason: str

    def __str__(self) -> str:
        return f"{self.tier}: {self.reason}"


@dataclass(frozen=True)
class TierFacts:
    """What the choice rests on."""

    n_bytes: int
    """Of the rows that will be read, all arrays together."""
    free_bytes: int
    """Memory that is free now."""
    free_device_bytes: int = 0
    """Memory of the GPU that is free now; 0 without one."""
    resident_share: float | None = None
    """Rows that the page cache holds, of those sampled; None where the system does not say."""
    direct_keeps_up: bool | None = None
    """With buffered reads, measured; None where there is no O_DIRECT."""
    reads_once: bool = False
    """One pass is all: keeping tokens would not pay."""
    row_bytes: int = 2**20
    """Of the largest array."""
    is_remote: bool = False
    """The bank lies elsewhere, and this disk keeps what was read of it."""


def choose_tier(facts: TierFacts) -> TierChoice:
    """The tier for `facts`; see each reason."""
    size, free = human_bytes(facts.n_bytes), human_bytes(facts.free_bytes)
    if 0 < 2 * facts.n_bytes <= facts.free_device_bytes and not facts.reads_once:
        free_device = human_bytes(facts.free_device_bytes)
        return TierChoice("device", f"{size} fit into half of {free_device} on the GPU")
    fits = 2 * facts.n_bytes <= facts.free_bytes and not facts.reads_once
    if fits and facts.n_bytes <= SMALL_BYTES and not facts.is_remote:
        return TierChoice("ram", f"{size} are little")
    if facts.resident_share is not None and facts.resident_share >= MOSTLY:
        share = f"{facts.resident_share:.0%}"
        return TierChoice("read", f"the page cache holds {share} of {size} already")
    afar = f", {FROM_AFAR}" if facts.is_remote else ""
    if fits:
        return TierChoice("ram", f"{size} fit into half of {free} of free memory{afar}")
    why = "are read once" if facts.reads_once else f"do not fit into half of {free} of free memory"
    if facts.is_remote:
        return TierChoice("read", f"{size} {why}{afar}")
    if facts.n_bytes <= SMALL_BYTES:
        return TierChoice("read", f"{size} are little")
    if facts.row_bytes < SMALL_ROW_BYTES:
        return TierChoice("read", f"rows of {human_bytes(facts.row_bytes)} are small")
    if facts.direct_keeps_up:
        return TierChoice("direct", f"{size} {why}")
    slower = "is slower" if facts.direct_keeps_up is False else "is not to be had"
    return TierChoice("read", f"{size} {why}, and O_DIRECT {slower} here")


def look_at(
    places: Sequence[RowPlaces],
    rows: Integer[np.ndarray, " row"],
    *,
    free_device_bytes: int = 0,
    reads_once: bool = False,
    is_remote: bool = False,
) -> TierFacts:
    """Sizes, memory, and a few reads of the largest array: some tens of milliseconds."""
    n_bytes = sum(len(rows) * _stride(place) for place in places)
    free_bytes = free_memory_bytes()
    largest = max(places, key=_stride, default=None)
    share = faster = None
    if largest is not None and len(rows) and n_bytes > SMALL_BYTES and not is_remote:
        generator = np.random.default_rng(0)
        sample = generator.choice(rows, min(SAMPLED_ROWS, len(rows)), replace=False)
        share = resident_share(largest, sample)
        if 2 * n_bytes > free_bytes or reads_once:
            faster = _direct_keeps_up(largest, sample) if reads_directly(largest) else None
    row_bytes = 0 if largest is None else _stride(largest)
    return TierFacts(
        n_bytes, free_bytes, free_device_bytes, share, faster, reads_once, row_bytes, is_remote
    )


def _stride(places: RowPlaces) -> int:
    return places.array.layout(places.rows_per_shard).row_stride_bytes


def _direct_keeps_up(places: RowPlaces, rows: Integer[np.ndarray, " row"]) -> bool:
    """Whether direct reads keep up with buffered ones, by turns, other rows each.

    They only have to come near: they leave the page cache and the processor to others, and a few
    reads on a busy machine tell little.
    """
    page = aligned_memory(_stride(places)).reshape(1, -1)
    files = {direct: RowFiles(places, direct=direct) for direct in (True, False)}
    seconds = dict.fromkeys(files, 0.0)
    for number, row in enumerate(rows[: 2 * TIMED_ROWS]):
        direct = number % 2 == 0
        start = time.perf_counter()
        files[direct].read(np.array([row]), page, np.zeros(1, np.int64))
        seconds[direct] += time.perf_counter() - start
    for reader in files.values():
        reader.close()
    return seconds[True] <= 2 * seconds[False]


def free_memory_bytes() -> int:
    """Memory that is free now, within the limit of this process's control group.

    0 where the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
