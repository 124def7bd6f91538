"""A bucket of Google Cloud Storage, as a store; credentials and connections are gcsfs's."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.http_client import HttpFiles, session_options
from patchbank.pipeline.sharing.store import Meter, Upload
from patchbank.pipeline.sharing.transfer import in_parallel, put_in_parallel, with_retries
from patchbank.pipeline.sharing.wire import ASK_TRIES, MOST_FILES, Outgoing, PerProcess

MISSING = "gs:// needs gcsfs: pip install 'patchbank[gs]'"
REFUSED = (
    "credentials are looked for in the file that GOOGLE_APPLICATION_CREDENTIALS names, in those of "
    "`gcloud auth application-default login`, and in the role of the machine"
)


class GsStore:
    """See `Store`. A file is one object, sent in one request: it is there whole or not at all."""

    is_writable = True
    can_list = True

    def __init__(self, bucket: str, prefix: str, fs: PerProcess[Any]) -> None:
        self.bucket, self.prefix = bucket, prefix
        self._fs = fs
        self._files = PerProcess(self._connected)

    @classmethod
    def open(cls, url: str) -> GsStore:
        """The store of gs://bucket/folder; nothing is asked of the server yet."""
        parts = urlsplit(url)
        if "@" in parts.netloc or not parts.netloc:
            raise StoreError("expected gs://bucket/folder, without user and password")
        prefix = url.split("://", 1)[1].partition("/")[2].strip("/")
        return cls(parts.netloc, prefix, PerProcess(_file_system))

    @property
    def url(self) -> str:
        return f"gs://{self.bucket}/{self.prefix}".rstrip("/")

    def below(self, part: str) -> GsStore:
        return GsStore(self.bucket, self._folder + part, self._fs)

    def sizes(self) -> Mapping[str, int]:
        return {
            item["name"].removeprefix(self._folder): int(item["size"])
            for page in self._pages(fields="items(name,size),nextPageToken")
            for item in page.get("items", ())
            if item["name"].startswith(self._folder) and not item["name"].endswith("/")
        }

    def folders(self) -> Sequence[str]:
        found = [
            prefix.removeprefix(self._folder).rstrip("/")
            for page in self._pages(fields="prefixes,nextPageToken", delimiter="/")
            for prefix in page.get("prefixes", ())
        ]
        return sorted(name for name in found if name)

    def size(self, name: str) -> int | None:
        ask = partial(self._ask, "GET", self._object(name), name, query={"fields": "size"})
        try:
            return int(with_retries(ask, tries=ASK_TRIES)["size"])
        except NotInStore:
            return None
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.url}/{name}: the server tells no size") from error

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        return self._files().stream(name, start, stop)

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        read = partial(self._files().document, name, most_bytes=most_bytes)
        return with_retries(read, tries=ASK_TRIES)

    def put(self, upload: Upload, meter: Meter) -> None:
        record = upload.record
        with Outgoing(upload, meter) as body:
            try:
                answer = self._ask(
                    "POST",
                    f"upload/storage/v1/b/{quote(self.bucket)}/o",
                    record.path,
                    data=_pieces(body),
                    headers={
                        "Content-Length": str(record.size),
                        "Content-Type": "application/octet-stream",
                    },
                    query={"uploadType": "media", "name": self._folder + record.path},
                )
            except NotInStore as error:
                raise self._no_bucket() from error
            except StoreError as error:
                raise body.error or error from error
            body.check()
            self._prove(record, answer.get("md5Hash"), body.md5.digest())

    def _prove(self, record: FileRecord, told: str | None, md5: bytes) -> None:
        """Returns once the server's object is proven to be what was sent."""
        if told == base64.b64encode(md5).decode():
            return
        found, size = hashlib.sha256(), self.size(record.path)
        if size == record.size:
            for piece in self.stream(record.path, 0, record.size):
                found.update(piece)
        if size != record.size or found.hexdigest() != record.sha256:
            raise StoreError(
                f"{self.url}/{record.path}: what arrived has {size} bytes of SHA-256 "
                f"{found.hexdigest()[:12]}, expected {record.size} of {record.sha256[:12]}",
                may_pass=True,
            )

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        put_in_parallel(self, uploads, meter, done)

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        # The server tells an MD5 and a CRC-32C, and the record has neither.
        return False if size != record.size else None

    def remove(self, names: Sequence[str]) -> None:
        in_parallel([partial(self._remove, name) for name in names])

    def _remove(self, name: str) -> None:
        with suppress(NotInStore):
            with_retries(partial(self._ask, "DELETE", self._object(name), name), tries=ASK_TRIES)

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        """Answers to one listing; `StoreError` where it does not end, or there is no bucket."""
        path = f"storage/v1/b/{quote(self.bucket)}/o"
        query = {"prefix": self._folder, **options}
        n_files = 0
        while n_files <= MOST_FILES:
            try:
                ask = partial(self._ask, "GET", path, "", query=query)
                page = with_retries(ask, tries=ASK_TRIES)
            except NotInStore as error:
                raise self._no_bucket() from error
            yield page
            if not page.get("nextPageToken"):
                return
            n_files += max(1, len(page.get("items", ())))
            query = {**query, "pageToken": str(page["nextPageToken"])}
        raise StoreError(f"{self.url} holds more than {MOST_FILES} files, which no bank does")

    def _ask(
        self,
        verb: str,
        path: str,
        name: str,
        *,
        query: Mapping[str, str] = MappingProxyType({}),
        headers: Mapping[str, str] = MappingProxyType({}),
        data: Any = None,
    ) -> dict[str, Any]:
        """The JSON that an answer holds."""
        fs, where = self._fs(), f"{self.url}/{name}".rstrip("/")

        async def asked() -> Any:
            from yarl import URL

            url = URL(f"{fs._location}/{path}?{urlencode(query)}", encoded=True)
            own = _headers(fs, dict(headers), where)
            return await fs.session.request(verb, url, headers=own, data=data)

        content = self._files().said(asked(), where)
        try:
            answer = json.loads(content or b"{}")
        except ValueError as error:
            raise StoreError(f"{where}: the answer is no JSON", may_pass=True) from error
        return answer if isinstance(answer, dict) else {}

    def _connected(self) -> HttpFiles:
        fs = self._fs()

        async def get(name: str, headers: Mapping[str, str]) -> Any:
            from yarl import URL

            url = URL(f"{fs._location}/download/{self._object(name)}?alt=media", encoded=True)
            own = _headers(fs, dict(headers), f"{self.url}/{name}")
            return await fs.session.get(url, headers=own)

        return HttpFiles(get, fs.loop, self.url, REFUSED)

    def _object(self, name: str) -> str:
        return f"storage/v1/b/{quote(self.bucket)}/o/{quote(self._folder + name, safe='')}"

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"{self.url}: there is no bucket {self.bucket}; make it or correct the address"
        )

    @property
    def _folder(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""


def _headers(fs: Any, headers: dict[str, str], where: str) -> dict[str, str]:
    """Headers with what lets a user in."""
    from google.auth.exceptions import GoogleAuthError

    try:
        found: dict[str, str] = fs._get_headers(headers)
    except GoogleAuthError as error:
        raise StoreError(f"{where}: {type(error).__name__}; {REFUSED}") from error
    return found


async def _pieces(body: Outgoing) -> AsyncIterator[bytes]:
    """The bytes of a file, read and hashed beside the event loop."""
    while piece := await asyncio.to_thread(body.read):
        yield piece


def _file_system() -> Any:
    try:
        from fsspec.asyn import sync
        from gcsfs.core import GCSFileSystem

        options = session_options()
    except ImportError as error:
        raise StoreError(MISSING) from error
    # The project only matters to those who make buckets, but gcsfs warns where it is None.
    fs = GCSFileSystem(
        project=os.environ.get("GOOGLE_CLOUD_PROJECT", ""),
        session_kwargs=options,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    # gcsfs asks as anybody may where it cannot use a key.
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") and fs.credentials.method == "anon":
        raise StoreError(f"gs: GOOGLE_APPLICATION_CREDENTIALS names no key of Google's; {REFUSED}")
    sync(fs.loop, fs._set_session)
    return fs
