"""A folder of a machine that is reached by SSH, as a store."""

from __future__ import annotations

import hashlib
import stat
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.folder_store import DRAFTS
from patchbank.pipeline.sharing.sftp_client import SftpPool, SshPlace
from patchbank.pipeline.sharing.store import Meter, Upload
from patchbank.pipeline.sharing.transfer import put_in_parallel, with_retries
from patchbank.pipeline.sharing.wire import (
    ASK_TRIES,
    MOST_FILES,
    Outgoing,
    PerProcess,
    ends_early,
    too_large,
)

WINDOW_BYTES = 4 * 2**20
"""Asked for at once: paramiko keeps all that it asked for until it is taken."""
SEND_BYTES = 2**18


class SftpStore:
    """See `Store`. No link below its folder is followed."""

    is_writable = True
    can_list = True

    def __init__(self, host: str, folder: str, pool: PerProcess[SftpPool]) -> None:
        self.host, self.folder = host, folder
        self._pool = pool
        self._lock, self._n_drafts = threading.Lock(), 0

    @classmethod
    def open(cls, url: str) -> SftpStore:
        """The store of sftp://[user@]host[:port]/folder; /~/folder is one of the user's home."""
        parts = urlsplit(url)
        try:
            place = SshPlace(parts.hostname or "", parts.username, parts.port)
        except ValueError as error:
            raise StoreError(f"sftp://: {error}") from error
        host = parts.netloc.rpartition("@")[2]
        folder = "/" + url.split("://", 1)[1].partition("/")[2].strip("/")
        folder = folder.removeprefix("/~/")
        if parts.password or not place.host or place.host.startswith("-") or folder == "/":
            raise StoreError(
                "expected sftp://[user@]host[:port]/folder, without a password: ssh has keys"
            )
        return cls(host, folder, PerProcess(partial(SftpPool, place)))

    @property
    def url(self) -> str:
        return f"sftp://{self.host}{self.folder if self.folder[0] == '/' else f'/~/{self.folder}'}"

    def below(self, part: str) -> SftpStore:
        return SftpStore(self.host, f"{self.folder}/{part}", self._pool)

    def sizes(self) -> Mapping[str, int]:
        return with_retries(self._sizes, tries=ASK_TRIES)

    def _sizes(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        left = [""]
        while left:
            folder = left.pop()
            for entry in self._entries(folder):
                name = f"{folder}{entry.filename}"
                if stat.S_ISDIR(entry.st_mode or 0):
                    left.append(f"{name}/")
                elif stat.S_ISREG(entry.st_mode or 0):
                    found[name] = entry.st_size or 0
            if len(found) + len(left) > MOST_FILES:
                raise self._endless()
        return found

    def folders(self) -> Sequence[str]:
        entries = with_retries(partial(self._entries, ""), tries=ASK_TRIES)
        return sorted(entry.filename for entry in entries if stat.S_ISDIR(entry.st_mode or 0))

    def size(self, name: str) -> int | None:
        return with_retries(partial(self._size, name), tries=ASK_TRIES)

    def _size(self, name: str) -> int | None:
        try:
            with self._client(name) as client:
                found = client.lstat(self._path(client, name))
        except NotInStore:
            return None
        return int(found.st_size) if stat.S_ISREG(found.st_mode) else None

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        if start >= stop:
            return
        where = f"{self.url}/{name}"
        with self._client(name) as client, client.open(self._path(client, name), "rb") as file:
            while start < stop:
                n_bytes = min(WINDOW_BYTES, stop - start)
                piece = b"".join(file.readv([(start, n_bytes)]))[:n_bytes]
                if not piece:
                    raise ends_early(where, start, stop)
                start += len(piece)
                yield piece

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        return with_retries(partial(self._document, name, most_bytes), tries=ASK_TRIES)

    def _document(self, name: str, most_bytes: int) -> bytes | None:
        size = self._size(name)
        if size is None:
            return None
        if size > most_bytes:
            raise too_large(f"{self.url}/{name}", most_bytes)
        return b"".join(self.stream(name, 0, size))

    def put(self, upload: Upload, meter: Meter) -> None:
        record = upload.record
        draft = f"{DRAFTS}/{uuid.uuid4().hex}"
        with self._client(record.path) as client:
            target = self._path(client, record.path)
            try:
                with self._drafts(client):
                    try:
                        self._send(client, f"{self.folder}/{draft}", upload, meter)
                        self._prove(record, draft)
                        _make_folders(client, target.rpartition("/")[0])
                        client.posix_rename(f"{self.folder}/{draft}", target)
                    except BaseException:
                        with suppress(OSError, EOFError):
                            client.remove(f"{self.folder}/{draft}")
                        raise
            except (FileNotFoundError, NotInStore) as error:
                # Another process has just removed the folder of drafts, as it was empty.
                raise StoreError(f"{self.url}/{draft} was removed", may_pass=True) from error

    def create(self, upload: Upload) -> bool:
        """See `claim.CreatesOnce`."""
        name = upload.record.path
        with self._client(name) as client:
            target = self._path(client, name)
            _make_folders(client, target.rpartition("/")[0])
            try:
                with client.open(target, "wx") as file:
                    file.write(upload.source)
            except (OSError, StoreError):
                # The protocol has no code of its own for a file that exists.
                if self._size(name) is None:
                    raise
                return False
        return True

    @contextmanager
    def _drafts(self, client: Any) -> Iterator[None]:
        """The folder of drafts, which is there while a thread of this store needs it."""
        path = f"{self.folder}/{DRAFTS}"
        with self._lock:
            if not self._n_drafts:
                _make_folders(client, path)
            self._n_drafts += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_drafts -= 1
                if not self._n_drafts:
                    with suppress(OSError, EOFError):
                        client.rmdir(path)

    def _send(self, client: Any, path: str, upload: Upload, meter: Meter) -> None:
        with Outgoing(upload, meter) as source, client.open(path, "wx") as file:
            file.set_pipelined(True)
            while piece := source.read(SEND_BYTES):
                file.write(piece)

    def _prove(self, record: FileRecord, draft: str) -> None:
        """Reads what arrived: the server itself tells no digests."""
        found = hashlib.sha256()
        for piece in self.stream(draft, 0, record.size):
            found.update(piece)
        if found.hexdigest() != record.sha256:
            raise StoreError(
                f"{self.url}/{record.path}: what arrived has SHA-256 {found.hexdigest()[:12]}, "
                f"expected {record.sha256[:12]}",
                may_pass=True,
            )

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        put_in_parallel(self, uploads, meter, done)

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        return False if size != record.size else None

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with_retries(partial(self._remove, name), tries=ASK_TRIES)

    def _remove(self, name: str) -> None:
        with suppress(NotInStore), self._client(name) as client:
            path = self._path(client, name)
            with suppress(FileNotFoundError):
                client.remove(path)
            with suppress(OSError):
                while path != self.folder:
                    path = path.rpartition("/")[0]
                    client.rmdir(path)

    def _entries(self, folder: str) -> list[Any]:
        """What a folder holds, links too, but no drafts; nothing where it is not there."""
        found: list[Any] = []
        try:
            with self._client(folder) as client:
                for entry in client.listdir_iter(f"{self.folder}/{folder}".rstrip("/")):
                    if entry.filename != DRAFTS:
                        found.append(entry)
                    if len(found) > MOST_FILES:
                        raise self._endless()
        except NotInStore:
            return []
        return found

    def _client(self, name: str) -> Any:
        return self._pool().client(f"{self.url}/{name}")

    def _path(self, client: Any, name: str) -> str:
        """Where a file lies; `StoreError` where a folder on the way, or the file, is a link."""
        path = self.folder
        for part in name.split("/"):
            path = f"{path}/{part}"
            with suppress(FileNotFoundError):
                if stat.S_ISLNK(client.lstat(path).st_mode or 0):
                    raise StoreError(
                        f"{self.url}: {path} is a link, which a bank does not have; remove it"
                    )
        return path

    def _endless(self) -> StoreError:
        return StoreError(f"{self.url} holds more than {MOST_FILES} files, which no bank does")


def _make_folders(client: Any, path: str) -> None:
    """Makes a folder and those above it; others may make them at the same time."""
    try:
        client.stat(path)
    except FileNotFoundError:
        _make_folders(client, path.rpartition("/")[0] or "/")
        try:
            client.mkdir(path)
        except OSError:
            client.stat(path)
