"""Rows of banks elsewhere, kept on this disk up to a limit.

`banks/<root_sha256>/` holds a bank's small files, and of each shard file that rows were read of a
sparse file with these rows at their places. Nothing records which they are: a row counts as there
if its bytes have the checksum that clips.parquet states, and so a run that is killed, a full disk
and a power cut leave at worst rows that are fetched again. Any number of processes share a cache
without a lock: they write the same bytes to the same places, and a file that another one removes
stays readable until it is closed.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.bank.seal_record import as_digest

BANKS = "banks"
PINNED = "pinned"
"""A file of a bank's folder: nothing of the bank makes room for others."""
PAGE_BYTES = 4_096
URL = "url"
"""Another: where the bank lies, without credentials."""
DRAFTS = ".drafts"
IS_SHARD = re.compile(r"layers/\d+/(patches|prefix)/c\.\d+\.0\.0")
KEPT_S = 86_400.0
"""Small files that were used within a day stay: a process may count on them."""
TOUCHED_S = 10.0
"""Uses that follow each other more closely are noted once."""
LONGEST_URL = 4_096


@dataclass(frozen=True)
class CachedBank:
    """What is here of one bank."""

    root_sha256: str
    url: str
    """Empty where nobody noted it."""
    bytes: int
    """That it takes on the disk."""
    last_used_s: float
    """As `time.time` counts."""
    pinned: bool


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    n_bytes: int
    last_used_s: float
    may_go: bool


def bank_folder(cache: Path, root_sha256: str) -> Path:
    """Where a bank's files lie; `ValueError` for what is no SHA-256."""
    return cache / BANKS / as_digest(root_sha256)


def cached_banks(cache: Path) -> list[CachedBank]:
    """The banks that there is something of, the least recently used first."""
    found = []
    for folder in _folders(cache):
        files = list(_files(folder))
        found.append(
            CachedBank(
                folder.name,
                _noted_url(folder),
                sum(file.n_bytes for file in files),
                max((file.last_used_s for file in files), default=0.0),
                (folder / PINNED).exists(),
            )
        )
    return sorted(found, key=lambda bank: bank.last_used_s)


def remove_cached(cache: Path, root_sha256: str) -> None:
    """Removes what is here of a bank, pinned or not; quiet where there is nothing."""
    folder = bank_folder(cache, root_sha256)
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        # Renamed first: a removal that is cut short leaves nothing that looks like a bank.
        folder.rename(doomed)
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def shrink(cache: Path, limit_bytes: int) -> int:
    """Removes shards, least recently used first, until `limit_bytes` are left; returns how many
    bytes are.

    Pinned banks stay, and small files that were used within a day, so that more may be left.
    """
    files = [file for folder in _folders(cache) for file in _files(folder)]
    left = sum(file.n_bytes for file in files)
    for file in sorted(files, key=lambda file: file.last_used_s):
        if left <= limit_bytes:
            break
        if file.may_go:
            with suppress(FileNotFoundError):
                file.path.unlink()
            left -= file.n_bytes
    return left


def _folders(cache: Path) -> list[Path]:
    try:
        with os.scandir(cache / BANKS) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if re.fullmatch("[0-9a-f]{64}", entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Path) -> Iterator[_CachedFile]:
    is_pinned, now_s = (folder / PINNED).exists(), time.time()
    left = [folder]
    while left:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
                    continue
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    name = Path(entry.path).relative_to(folder).as_posix()
                    is_old = now_s - facts.st_mtime > KEPT_S and name not in (PINNED, URL)
                    may_go = not is_pinned and (is_old or IS_SHARD.fullmatch(name) is not None)
                    n_bytes = facts.st_blocks * 512
                    yield _CachedFile(Path(entry.path), n_bytes, facts.st_mtime, may_go)


def _noted_url(folder: Path) -> str:
    try:
        with (folder / URL).open("rb") as file:
            return file.read(LONGEST_URL).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def touch(descriptor: int) -> None:
    """Notes that a file is used; quiet where that cannot be noted."""
    if time.time() - os.fstat(descriptor).st_mtime > TOUCHED_S:
        with suppress(OSError):
            os.utime(descriptor)


class RowCache:
    """Reads and keeps pieces of shard files; called by many threads of one process.

    It never fails: where it cannot keep what it is given, it says so once and keeps no more.
    """

    def __init__(self, cache: Path, limit_bytes: int) -> None:
        self._cache, self._limit = cache, limit_bytes
        self._lock = threading.Lock()
        self._room = 0
        """Bytes that may be written before the disk is looked at again."""
        self._is_closed = limit_bytes <= 0

    def read(self, path: Path, offset: int, memory: memoryview) -> bool:
        """Fills `memory` from a cached file; False where there is less. The bytes may be any."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            touch(descriptor)
            return os.preadv(descriptor, [memory], offset) == len(memory)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def keep(self, path: Path, offset: int, data: bytes | memoryview) -> None:
        """Writes what was proven to belong there."""
        pages = range(offset // PAGE_BYTES, -(-(offset + len(data)) // PAGE_BYTES))
        if self._is_closed or not self.has_room(len(pages) * PAGE_BYTES):
            return
        try:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                left = memoryview(data)
                while left:
                    n_written = os.pwrite(descriptor, left, offset)
                    left, offset = left[n_written:], offset + n_written
            finally:
                os.close(descriptor)
        except OSError as error:
            self._close(error)

    def has_room(self, n_bytes: int) -> bool:
        """Makes room for `n_bytes` that will be written, if that is possible, and says whether."""
        with self._lock:
            if self._room < n_bytes and not self._is_closed:
                try:
                    self._make_room(n_bytes)
                except OSError as error:
                    self._close(error)
            self._room -= n_bytes
            return self._room >= 0

    def _make_room(self, n_bytes: int) -> None:
        # A sixteenth is left for what other processes write before they look again.
        most = self._limit - self._limit // 16
        left = shrink(self._cache, most)
        if most - left < max(n_bytes, self._limit // 64):
            left = shrink(self._cache, most - max(n_bytes, self._limit // 8))
        self._room = max(n_bytes if left + n_bytes <= most else 0, (most - left) // 4)

    def _close(self, error: OSError) -> None:
        if not self._is_closed:
            self._is_closed = True
            warnings.warn(
                f"rows are not kept in {self._cache} ({error.strerror}): every pass reads them "
                "from afar; set cache in settings.toml, or PATCHBANK_CACHE, to another folder",
                stacklevel=2,
            )
