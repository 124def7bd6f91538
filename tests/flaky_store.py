"""A folder as a store far away: it answers late, sometimes wrong, and goes when it is told to.

`flaky://` stands before the folder; one behaviour holds for all stores of a process.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing import stores, transfer
from patchbank.pipeline.sharing.folder_store import FolderStore


@dataclass
class Behaviour:
    """What it does, and what it was asked for."""

    latency_s: float = 0.0
    fails_first: bool = False
    """Each first request for a range fails."""
    lies_first: bool = False
    """Each first answer has a wrong byte."""
    answers: int = 10**9
    """After so many it is gone."""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    most_at_once: int = 0
    n_now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


BEHAVIOUR = Behaviour()


class FlakyStore(FolderStore):
    @classmethod
    def open(cls, place: str) -> FlakyStore:
        return cls(Path(place.removeprefix("flaky://")))

    @property
    def url(self) -> str:
        return f"flaky://{self.folder}"

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        asked = (name, start, stop)
        with BEHAVIOUR.lock:
            is_first = asked not in BEHAVIOUR.asked
            BEHAVIOUR.asked.append(asked)
            BEHAVIOUR.n_now += 1
            BEHAVIOUR.most_at_once = max(BEHAVIOUR.most_at_once, BEHAVIOUR.n_now)
        try:
            time.sleep(BEHAVIOUR.latency_s)
            is_gone = len(BEHAVIOUR.asked) > BEHAVIOUR.answers
            if is_gone or (is_first and BEHAVIOUR.fails_first):
                raise StoreError(f"{self.url} does not answer", may_pass=True)
            data = bytearray(b"".join(super().stream(name, start, stop)))
            if is_first and BEHAVIOUR.lies_first:
                data[len(data) // 2] ^= 1
            yield bytes(data)
        finally:
            with BEHAVIOUR.lock:
                BEHAVIOUR.n_now -= 1


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """Makes flaky:// an address, and pauses before another try short."""
    monkeypatch.setitem(
        sys.modules, "patchbank.pipeline.sharing.flaky_store", sys.modules[__name__]
    )
    monkeypatch.setitem(stores.KINDS, "flaky", ("flaky_store", "FlakyStore"))
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.002)
    monkeypatch.setattr(sys.modules[__name__], "BEHAVIOUR", Behaviour())
    return BEHAVIOUR
