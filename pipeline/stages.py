"""Where the time of an extraction goes: seconds that threads or a device spend on each stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

DECODE, RESAMPLE = "decode", "resample"
FRONT_END, ENCODER, QUANTISE, COPY = "front end", "encoder", "quantise", "copy"
HASH, WRITE = "hash", "write"
DECODERS, LANES, COPIES, WRITERS = "decoders", "encoder lanes", "copies", "writers"
STAGES: Mapping[str, str] = {
    DECODE: DECODERS,
    RESAMPLE: DECODERS,
    FRONT_END: LANES,
    ENCODER: LANES,
    QUANTISE: LANES,
    COPY: COPIES,
    HASH: WRITERS,
    WRITE: WRITERS,
}
"""Each stage in the order of the data's way, and who works at it."""


@dataclass(frozen=True)
class StageTimes:
    """What one worker did between two moments of its clock."""

    busy_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, summed over the threads that work at it."""
    began_s: float = 0.0
    ended_s: float = 0.0
    """Of `time.time()` there."""
    threads: Mapping[str, int] = field(default_factory=dict)
    """How many `DECODERS`, `LANES`, `COPIES` and `WRITERS` the worker has."""
    peak_bytes: int = 0
    """The most memory that the worker's process has held so far."""


class StageClock:
    """Adds up the seconds of stages; any thread may."""

    def __init__(self) -> None:
        self._busy_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[StageClock], tuple[()]]:
        return StageClock, ()  # in another process another clock

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._busy_s[stage] = self._busy_s.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds what the block takes."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began_s)

    def taken(self) -> dict[str, float]:
        """The seconds since this was asked last."""
        with self._lock:
            busy_s, self._busy_s = self._busy_s, {}
        return busy_s
