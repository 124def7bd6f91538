"""Parts of files over HTTP, by fsspec's event loop and aiohttp; whatever comes is bounded."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.wire import (
    CONNECT_S,
    MOST_ANSWER_BYTES,
    READ_BYTES,
    SILENT_S,
    check_range,
    ends_early,
    too_large,
)

Get = Callable[[str, Mapping[str, str]], Awaitable[Any]]
"""Asks for a file by name, with headers; gives an answer of aiohttp whose body is not read."""


def session_options() -> dict[str, Any]:
    """Options of an aiohttp session that waits for bounded times and decodes nothing."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
    # A small body may decode into one without end.
    return {"timeout": timeout, "trust_env": True, "auto_decompress": False}


class HttpFiles:
    """Reads files by name; `loop` is the event loop that `get` runs in, in another thread."""

    def __init__(self, get: Get, loop: Any, url: str, refused: str) -> None:
        self._get, self._loop = get, loop
        self.url, self._refused = url, refused

    def size(self, name: str) -> int | None:
        """Bytes of a file, as an answer to the question for its first byte tells."""
        try:
            with self._answer(name, {"Range": "bytes=0-0"}, or_status=416) as answer:
                told = answer.headers.get("Content-Range", "")
                if answer.status == 200:
                    told = f"/{answer.headers.get('Content-Length', '')}"
        except NotInStore:
            return None
        total = re.search(r"/(\d{1,19})$", told)
        if total is None:
            raise StoreError(f"{self.url}/{name}: the server does not tell how large it is")
        return int(total[1])

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Store.stream`."""
        if start >= stop:
            return
        where = f"{self.url}/{name}"
        with self._answer(name, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            told = answer.headers.get("Content-Range")
            check_range(where, told, start, whole=answer.status == 200)
            while start < stop:
                piece = self._sync(_piece(answer, min(READ_BYTES, stop - start)), where)
                if not piece:
                    raise ends_early(where, start, stop)
                start += len(piece)
                yield piece

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        """See `Store.document`."""
        where = f"{self.url}/{name}"
        try:
            with self._answer(name, {}) as answer:
                content: bytes = self._sync(_piece(answer, most_bytes + 1), where)
        except NotInStore:
            return None
        if len(content) > most_bytes:
            raise too_large(where, most_bytes)
        return content

    def said(self, asked: Awaitable[Any], where: str) -> bytes:
        """What an answer says that is no file; `StoreError` where it goes on and on."""
        with self._checked(asked, where) as answer:
            content: bytes = self._sync(_piece(answer, MOST_ANSWER_BYTES + 1), where)
        if len(content) > MOST_ANSWER_BYTES:
            raise too_large(f"{where}: an answer", MOST_ANSWER_BYTES)
        return content

    def _answer(
        self, name: str, headers: Mapping[str, str], *, or_status: int = 200
    ) -> AbstractContextManager[Any]:
        asked = self._get(name, {"Accept-Encoding": "identity", **headers})
        return self._checked(asked, f"{self.url}/{name}", or_status=or_status)

    @contextmanager
    def _checked(self, asked: Awaitable[Any], where: str, *, or_status: int = 200) -> Iterator[Any]:
        answer = self._sync(asked, where)
        try:
            if answer.status not in (200, 204, 206, or_status):
                raise self._refusal(where, answer.status)
            yield answer
        finally:
            # Closed where bytes are left, given back to the pool where all were read.
            self._sync(_left(answer), where)

    def _refusal(self, where: str, status: int) -> StoreError:
        if status in (404, 410):
            return NotInStore(f"there is no {where}")
        if status in (401, 403, 407):
            return StoreError(f"{where}: access refused ({status}); {self._refused}")
        if status == 416:
            return StoreError(f"{where} is shorter than expected", may_pass=True)
        may_pass = status >= 500 or status in (408, 425, 429)
        return StoreError(f"{where}: the server answered {status}", may_pass=may_pass)

    def _sync(self, work: Awaitable[Any], where: str) -> Any:
        """Waits for work of the loop; `StoreError` for what went wrong on the way."""
        import aiohttp
        from fsspec.asyn import sync

        try:
            return sync(self._loop, lambda: work)
        except aiohttp.ClientConnectorCertificateError as error:
            raise StoreError(f"{where}: the server's certificate is not to be trusted") from error
        except aiohttp.InvalidURL as error:
            raise StoreError(f"{where} is no address") from error
        except TimeoutError as error:  # aiohttp's and fsspec's are kinds of it
            raise StoreError(
                f"{where}: the server said nothing for too long", may_pass=True
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise StoreError(
                f"{where}: the connection broke ({type(error).__name__})", may_pass=True
            ) from error


async def _piece(answer: Any, n_bytes: int) -> bytes:
    """Up to so many bytes of a body; fewer only at its end."""
    pieces: list[bytes] = []
    while n_bytes and (piece := await answer.content.read(n_bytes)):
        pieces.append(piece)
        n_bytes -= len(piece)
    return b"".join(pieces)


async def _left(answer: Any) -> None:
    if answer.content.at_eof():
        answer.release()
    else:
        answer.close()
