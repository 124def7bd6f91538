"""A bucket of Google Cloud Storage as a store, over gcsfs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.store import PIECE_BYTES, Meter, Upload
from patchbank.pipeline.sharing.transfer import in_parallel, put_in_parallel, with_retries
from patchbank.pipeline.sharing.wire import ASK_TRIES, PerProcess, ends_early, too_large

MISSING = "gs:// needs gcsfs: pip install 'patchbank[gs]'"
CREDENTIALS = (
    "credentials are looked for where Google's tools do: GOOGLE_APPLICATION_CREDENTIALS, "
    "`gcloud auth application-default login`, the role of the machine"
)


def connect() -> Any:
    """A file system of gcsfs, which asks anew each time; `StoreError` where it is missing."""
    try:
        # The plain one: another class of this package asks for the kind of a bucket by gRPC first.
        from gcsfs.core import GCSFileSystem
    except ImportError as error:
        raise StoreError(MISSING) from error
    return GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


class GsStore:
    """See `Store`. The server tells the MD5 of each file, which is compared with what was sent."""

    is_writable = True
    can_list = True

    def __init__(self, place: str, files: PerProcess[Any]) -> None:
        self.place = place
        self._files = files

    @classmethod
    def open(cls, url: str) -> GsStore:
        """The store of gs://bucket/folder; nothing is asked of the server yet."""
        parts = urlsplit(url)
        if "@" in parts.netloc or not parts.netloc or parts.query:
            raise StoreError("expected gs://bucket/folder, without user, password and query")
        return cls(url.split("://", 1)[1].strip("/"), PerProcess(connect))

    @property
    def url(self) -> str:
        return f"gs://{self.place}"

    def below(self, part: str) -> GsStore:
        return GsStore(self._path(part), self._files)

    def sizes(self) -> Mapping[str, int]:
        with self._asking(""):
            found = self._files().find(self.place, detail=True)
        prefix = f"{self.place}/"
        return {
            path.removeprefix(prefix): int(entry["size"])
            for path, entry in found.items()
            if path.startswith(prefix) and entry["type"] == "file" and not path.endswith("/")
        }

    def folders(self) -> Sequence[str]:
        try:
            with self._asking(""):
                entries = self._files().ls(self.place, detail=True)
        except NotInStore:
            return []
        found = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
        return sorted(path.rpartition("/")[2] for path in found if path != self.place)

    def size(self, name: str) -> int | None:
        entry = self._entry(name)
        return None if entry is None else int(entry["size"])

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            end = min(start + PIECE_BYTES, stop)
            with self._asking(name):
                piece: bytes = self._files().cat_file(self._path(name), start=start, end=end)
            if len(piece) != end - start:
                raise ends_early(f"{self.url}/{name}", start + len(piece), stop)
            start = end
            yield piece

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        size = self.size(name)
        if size is None:
            return None
        if size > most_bytes:
            raise too_large(f"{self.url}/{name}", most_bytes)
        return with_retries(lambda: b"".join(self.stream(name, 0, size)), tries=ASK_TRIES)

    def put(self, upload: Upload, meter: Meter) -> None:
        record, source = upload.record, upload.source
        sha256, md5 = _digests(source)
        if sha256 != record.sha256:
            where = record.path if isinstance(source, bytes) else source
            raise StoreError(
                f"{where} has SHA-256 {sha256[:12]}, "
                f"expected {record.sha256[:12]}: it is damaged or was changed, and was not sent; "
                "run `patchbank bank verify` on the bank"
            )
        with self._asking(record.path):
            if isinstance(source, bytes):
                self._files().pipe_file(self._path(record.path), source)
            else:
                self._files().put_file(
                    str(source), self._path(record.path), callback=_metering(meter)
                )
        entry = self._entry(record.path)
        found = (entry or {}).get("md5Hash")
        if entry is None or int(entry["size"]) != record.size or (found and found != md5):
            raise StoreError(
                f"{self.url}/{record.path}: what arrived is not what was sent", may_pass=True
            )
        if not found and not self._reads_as(record):
            raise StoreError(f"{self.url}/{record.path}: other bytes arrived", may_pass=True)

    def _reads_as(self, record: FileRecord) -> bool:
        hasher = hashlib.sha256()
        for piece in self.stream(record.path, 0, record.size):
            hasher.update(piece)
        return hasher.hexdigest() == record.sha256

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        put_in_parallel(self, uploads, meter, done)

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        # The server tells MD5 and CRC-32C, a seal SHA-256.
        return False if size != record.size else None

    def remove(self, names: Sequence[str]) -> None:
        in_parallel([partial(self._remove, name) for name in names])

    def _remove(self, name: str) -> None:
        with suppress(NotInStore), self._asking(name):
            self._files().rm_file(self._path(name))

    def _entry(self, name: str) -> Mapping[str, Any] | None:
        def ask() -> Mapping[str, Any]:
            with self._asking(name):
                found: Mapping[str, Any] = self._files().info(self._path(name))
                return found

        try:
            entry = with_retries(ask, tries=ASK_TRIES)
        except NotInStore:
            return None
        return entry if entry["type"] == "file" else None

    def _path(self, name: str) -> str:
        return f"{self.place}/{name}"

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Turns what gcsfs raises into `StoreError` and `NotInStore`."""
        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise NotInStore(f"there is no {where}") from error
        except Exception as error:
            status = getattr(error, "code", None) or getattr(error, "status", None)
            kind = type(error).__name__
            if status in (401, 403) or kind in ("RefreshError", "DefaultCredentialsError"):
                raise StoreError(f"{where}: access refused ({kind}); {CREDENTIALS}") from error
            may_pass = (
                isinstance(error, OSError | TimeoutError)
                or status in (408, 429)
                or (isinstance(status, int) and status >= 500)
            )
            raise StoreError(f"{where}: {kind}; {CREDENTIALS}", may_pass=may_pass) from error


def _digests(source: Path | bytes) -> tuple[str, str]:
    """SHA-256 in hexadecimal and MD5 in base64, as Google tells it."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    if isinstance(source, bytes):
        sha256.update(source)
        md5.update(source)
    else:
        with source.open("rb") as file:
            while piece := file.read(2**20):
                sha256.update(piece)
                md5.update(piece)
    return sha256.hexdigest(), base64.b64encode(md5.digest()).decode()


def _metering(meter: Meter) -> Any:
    """A callback of fsspec that tells a meter of the bytes sent."""
    from fsspec.callbacks import Callback

    class Metering(Callback):  # type: ignore[misc]
        value: int

        def relative_update(self, inc: int = 1) -> None:
            meter(inc)

        def absolute_update(self, value: int) -> None:
            meter(value - self.value)
            self.value = value

    return Metering()
