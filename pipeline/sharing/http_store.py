"""A folder of a web server, as a store that can only be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.http_client import HttpFiles, session_options
from patchbank.pipeline.sharing.store import Meter, Upload
from patchbank.pipeline.sharing.transfer import with_retries
from patchbank.pipeline.sharing.wire import ASK_TRIES, PerProcess

MISSING = "http:// needs aiohttp: pip install 'patchbank[http]'"
REFUSED = "user and password are looked for in ~/.netrc"
URL_SIGNS = "/%:@!$&'()*+,;=~-._"


class HttpStore:
    """See `Store`. A bank there is read by the names in its seal: plain HTTP has no listings."""

    is_writable = False
    can_list = False

    def __init__(self, url: str, fs: PerProcess[Any]) -> None:
        self.url = url
        self._fs = fs
        self._files = PerProcess(self._connected)

    @classmethod
    def open(cls, url: str) -> HttpStore:
        """The store of http(s)://host/folder; nothing is asked of the server yet."""
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment or not parts.hostname:
            raise StoreError(
                f"expected {parts.scheme}://host/folder, without password and query; {REFUSED}"
            )
        return cls(url.rstrip("/"), PerProcess(_file_system))

    def below(self, part: str) -> HttpStore:
        return HttpStore(f"{self.url}/{part}", self._fs)

    def sizes(self) -> Mapping[str, int]:
        raise self._cannot("has no listings")

    def folders(self) -> Sequence[str]:
        raise self._cannot("has no listings")

    def size(self, name: str) -> int | None:
        return with_retries(partial(self._files().size, name), tries=ASK_TRIES)

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        return self._files().stream(name, start, stop)

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        read = partial(self._files().document, name, most_bytes=most_bytes)
        return with_retries(read, tries=ASK_TRIES)

    def put(self, upload: Upload, meter: Meter) -> None:
        raise self._cannot("can only be read")

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        raise self._cannot("can only be read")

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        return False if size != record.size else None

    def remove(self, names: Sequence[str]) -> None:
        raise self._cannot("can only be read")

    def _cannot(self, what: str) -> StoreError:
        return StoreError(
            f"{self.url}: plain HTTP {what}; use s3://, gs://, sftp://, hf:// or a folder for that"
        )

    def _connected(self) -> HttpFiles:
        from yarl import URL

        fs = self._fs()
        session = fs._session

        async def get(name: str, headers: Mapping[str, str]) -> Any:
            url = quote(self.url, safe=URL_SIGNS) + "/" + quote(name)
            return await session.get(URL(url, encoded=True), headers=headers)

        return HttpFiles(get, fs.loop, self.url, REFUSED)


def _file_system() -> Any:
    try:
        from fsspec.asyn import sync
        from fsspec.implementations.http import HTTPFileSystem

        options = session_options()
    except ImportError as error:
        raise StoreError(MISSING) from error
    fs = HTTPFileSystem(skip_instance_cache=True, use_listings_cache=False, client_kwargs=options)
    sync(fs.loop, fs.set_session)
    return fs
