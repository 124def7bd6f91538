"""What has been learnt of a container, kept for as long as the file is the same."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Index = TypeVar("Index", bound=Sized)
_Key = tuple[str, int, int, int, int]


@dataclass
class _Entry(Generic[Index]):
    lock: threading.Lock
    index: Index | None = None


class IndexCache(Generic[Index]):
    """Indices by file and part, each built once however many threads ask.

    A file that was replaced (another size, time of change or inode) is indexed again. The least
    recently used go first where `len` of all is more than `most`; the latest `least` stay.
    """

    def __init__(
        self,
        build: Callable[[Path, int], Index],
        *,
        most: int,
        least: int = 1,
        one_at_a_time: bool = False,
    ) -> None:
        self._build = build
        self._most = most
        self._least = least
        self._one_at_a_time = one_at_a_time
        self._forget()
        # A child must not inherit a lock that a thread of its parent held.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._entries: OrderedDict[_Key, _Entry[Index]] = OrderedDict()
        self._total = 0

    def get(self, path: Path, status: os.stat_result | None = None, *, part: int = 0) -> Index:
        """The index of the file at `path`; `status` is of the open file where one is open."""
        status = status or path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino, part)
        with self._lock:
            lock = self._building if self._one_at_a_time else threading.Lock()
            entry = self._entries.setdefault(key, _Entry(lock))
            self._entries.move_to_end(key)
        if entry.index is None:
            with entry.lock:
                if entry.index is None:
                    entry.index = self._build(path, part)
                    self._keep(key, len(entry.index))
        return entry.index

    def _keep(self, key: _Key, size: int) -> None:
        with self._lock:
            if key in self._entries:
                self._total += size
            while self._total > self._most and len(self._entries) > self._least:
                _, oldest = self._entries.popitem(last=False)
                self._total -= 0 if oldest.index is None else len(oldest.index)
