"""The files of a sealed bank at a store: small ones fetched whole, pieces of large ones by range.

Nothing is believed of a store but what the seal confirms, and no more is read than it states.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.seal_record import Seal, parse_seal
from patchbank.pipeline.bank.writer import FileRecord, fsync_folder, hash_file
from patchbank.pipeline.errors import BankCorrupt, BankError, NotInStore, StoreError
from patchbank.pipeline.sharing.remote_seal import ask_pusher, seal_content
from patchbank.pipeline.sharing.row_cache import (
    DRAFTS,
    PAGE_BYTES,
    URL,
    RowCache,
    bank_folder,
    touch,
)
from patchbank.pipeline.sharing.settings import ShareSettings
from patchbank.pipeline.sharing.store import Meter, Store
from patchbank.pipeline.sharing.stores import open_store
from patchbank.pipeline.sharing.transfer import with_retries

REQUESTS_AT_ONCE = 32
"""A bucket answers after 20 to 50 ms, however little it is asked for."""
PIECE_BYTES = 8 * 2**20
"""What one request asks for of a file that is fetched whole."""
MOST_ASKED = 64
"""Files whose sizes are asked for where a store cannot list them."""
LEAST_LIMIT_BYTES = 2**30
"""Small files up to this are fetched whatever the limit of the cache is."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Process:
    """What belongs to one process; a fork begins anew."""

    store: Store
    cache: RowCache
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="afar")
    )
    fetching: threading.Lock = field(default_factory=threading.Lock)
    known: dict[str, Path] = field(default_factory=dict)
    """Files whose digest was compared."""
    own_folder: Path | None = None
    """Of small files where the cache cannot be written."""


class RemoteFiles:
    """The files that a seal names, at an address; for many threads, also after a fork."""

    def __init__(self, url: str, seal: Seal, settings: ShareSettings) -> None:
        self._url, self.seal, self._settings = url, seal, settings
        self.where = open_store(url).url
        """The address, for messages."""
        self._advice = f"it may be in the middle of a push; else {ask_pusher(open_store(url))}"
        self.folder = bank_folder(settings.cache, seal.root_sha256)
        """Where files are kept."""
        self.meter: Meter | None = None
        """Told of what comes, in this process."""
        self._processes: dict[int, _Process] = {}

    def _process(self) -> _Process:
        found = self._processes.get(os.getpid())
        if found is None:
            cache = RowCache(self._settings.cache, self._settings.cache_limit_bytes)
            made = _Process(open_store(self._url), cache)
            # One of two threads wins, without a lock that a fork could find taken.
            found = self._processes.setdefault(os.getpid(), made)
        return found

    @property
    def store(self) -> Store:
        return self._process().store

    @property
    def cache(self) -> RowCache:
        return self._process().cache

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`work` of all, many at once; where one fails none is still at work when it is raised.

        `work` may not call this again, nor `files`.
        """
        futures = [self._process().pool.submit(work, item) for item in items]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(waiting)
        for future in done:
            future.result()
        return [future.result() for future in futures]

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of a file as the store has them, tried again where that may help."""
        return with_retries(lambda: self._read_once(name, start, stop))

    def _read_once(self, name: str, start: int, stop: int) -> bytes:
        store = self._process().store
        try:
            return b"".join(self._metered(store.stream(name, start, stop)))
        except NotInStore as error:
            raise self.problem(f"{shown(name)} is gone") from error
        except StoreError as error:
            sealed = self.seal.files[name].size
            with suppress(StoreError):
                if (found := store.size(name)) not in (None, sealed):
                    what = f"{shown(name)} has {found} bytes, sealed {sealed}"
                    raise self.problem(what) from error
            raise

    def _metered(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if self.meter is not None:
                self.meter(len(piece))
            yield piece

    def problem(self, what: str) -> BankError:
        """The error for bytes that are not the sealed ones: another bank may lie there by now."""
        content = seal_content(self._process().store)
        try:
            now = None if content is None else parse_seal(content, where=self.where).root_sha256
        except BankError:
            now = None
        if now == self.seal.root_sha256:
            return BankCorrupt(f"{self.where}: {what}; {self._advice}")
        return BankError(
            f"{self.where} has grown or was replaced since it was opened; open it again"
        )

    def file(self, name: str) -> Path:
        """A file of this disk with the sealed bytes."""
        return self.files([name])[0]

    def files(self, names: Sequence[str]) -> list[Path]:
        """The same of several, fetched together."""
        process = self._process()
        with process.fetching:
            missing = [name for name in dict.fromkeys(names) if not self._is_here(process, name)]
            if missing:
                self._fetch(process, [self._sealed(name) for name in missing])
            return [process.known[name] for name in names]

    def _sealed(self, name: str) -> FileRecord:
        record = self.seal.files.get(name)
        if record is None:
            raise BankCorrupt(f"{self.where}: {shown(name)} is not sealed; {self._advice}")
        most = max(LEAST_LIMIT_BYTES, self._settings.cache_limit_bytes)
        if record.size > most:
            raise BankError(
                f"{self.where}: {shown(name)} has {record.size} bytes, more than the cache's limit "
                f"of {most}; allow more with cache_limit in settings.toml, or PATCHBANK_CACHE_LIMIT"
            )
        return record

    def _is_here(self, process: _Process, name: str) -> bool:
        known = process.known.get(name)
        if known is not None and known.is_file():
            return True
        path, record = self.folder / name, self.seal.files.get(name)
        try:
            if record is None or path.stat().st_size != record.size:
                return False
            if hash_file(path, relative_to=self.folder) != record:
                return False
            with path.open("rb") as file:
                touch(file.fileno())
        except OSError:
            return False
        process.known[name] = path
        return True

    def _fetch(self, process: _Process, records: Sequence[FileRecord]) -> None:
        if process.own_folder is None:
            try:
                self._note_url()
                process.cache.has_room(sum(record.size + PAGE_BYTES for record in records))
                self._fetch_into(process, self.folder, records)
            except OSError as error:
                process.own_folder = self._own_folder(error)
            else:
                return
        try:
            self._fetch_into(process, process.own_folder, records)
        except OSError as error:
            raise StoreError(
                f"{self.where}: its small files can be kept neither in {self._settings.cache} nor "
                f"in {process.own_folder} ({error.strerror}); make room, or set PATCHBANK_CACHE"
            ) from error

    def _own_folder(self, error: OSError) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="patchbank-"))
        weakref.finalize(self, _remove_own, folder, os.getpid())
        warnings.warn(
            f"{self._settings.cache} cannot be written ({error.strerror}): small files go to "
            f"{folder} for now; set cache in settings.toml, or PATCHBANK_CACHE, to another folder",
            stacklevel=2,
        )
        return folder

    def _note_url(self) -> None:
        if not (self.folder / URL).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / URL).write_text(self.where, encoding="utf-8")

    def _fetch_into(self, process: _Process, folder: Path, records: Sequence[FileRecord]) -> None:
        drafts = {record.path: folder / DRAFTS / uuid.uuid4().hex for record in records}
        try:
            (folder / DRAFTS).mkdir(parents=True, exist_ok=True)
            wrong = self._fill(drafts, records)
            if wrong and (still := self._fill(drafts, wrong)):
                raise self.problem(f"{shown(still[0].path)} does not have the sealed SHA-256")
            for name, draft in drafts.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                draft.replace(target)
                fsync_folder(target.parent)
                process.known[name] = target
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)

    def _fill(self, drafts: dict[str, Path], records: Sequence[FileRecord]) -> list[FileRecord]:
        """Fetches files, and returns those whose bytes are not the sealed ones."""
        for record in records:
            drafts[record.path].touch()
        self.each(
            lambda piece: self._fill_piece(drafts[piece[0]], *piece),
            [
                (record.path, start, min(start + PIECE_BYTES, record.size))
                for record in records
                for start in range(0, record.size, PIECE_BYTES)
            ],
        )
        return [record for record in records if not _is_whole(drafts[record.path], record)]

    def _fill_piece(self, draft: Path, name: str, start: int, stop: int) -> None:
        data = self.read(name, start, stop)
        with draft.open("r+b") as file:
            file.seek(start)
            file.write(data)

    def check_sizes(self) -> None:
        """Compares sizes with what the store tells: all where it can list, else those of the
        largest files, so that no memory is taken on a seal's word. Raises `BankCorrupt`."""
        store, records = self._process().store, list(self.seal.files.values())
        if store.can_list:
            sizes = with_retries(store.sizes)
            told = [sizes.get(record.path) for record in records]
        else:
            records = sorted(records, key=lambda record: record.size)[-MOST_ASKED:]
            told = self.each(lambda record: with_retries(lambda: store.size(record.path)), records)
        for record, found in zip(records, told, strict=True):
            if found != record.size:
                told_of = "is missing" if found is None else f"has {found} bytes"
                what = f"{shown(record.path)} {told_of}, sealed {record.size}"
                raise BankCorrupt(f"{self.where}: {what}; {self._advice}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_processes": {}, "meter": None}


def _is_whole(draft: Path, record: FileRecord) -> bool:
    with draft.open("r+b") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256


def _remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
