"""What stores over a network have in common: bytes on their way out, and connections of their own
in each process."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.store import Meter, Upload

CONNECT_S = 15.0
"""How long a server may take to answer a call."""
SILENT_S = 60.0
"""How long a server may say nothing in the middle of an answer."""
READ_BYTES = 2**20
"""Pieces that bytes are taken from a connection in: they stay in a core's cache to be hashed."""
MOST_ANSWER_BYTES = 16 * 2**20
"""Of an answer that is no file: a page of a listing, what an error says."""
MOST_FILES = 2**20
"""Files that a listing may name."""
ASK_TRIES = 3
"""How often a question without a file in it is asked; callers repeat transfers."""

Connection = TypeVar("Connection")


class PerProcess(Generic[Connection]):
    """What `make` gives, made once in each process that asks: no socket outlives a fork."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._make = make
        self._made: dict[int, Connection] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __call__(self) -> Connection:
        process = os.getpid()
        if process not in self._made:
            # A lock of this process: that of a parent may be held for ever.
            with self._locks.setdefault(process, threading.Lock()):
                if process not in self._made:
                    self._made[process] = self._make()
        return self._made[process]


class Outgoing:
    """Bytes `start` to `stop` of an upload as a file to read once, digested on the way.

    The last piece of a file whose SHA-256 is not the record's is never handed out: `StoreError`,
    and the other side, which was promised more bytes, keeps nothing. `before` is the digest of all
    bytes before `start`.
    """

    def __init__(
        self,
        upload: Upload,
        meter: Meter,
        *,
        start: int = 0,
        stop: int | None = None,
        before: hashlib._Hash | None = None,
    ) -> None:
        self.error: StoreError | None = None
        """What stopped the sending on this side, for clients that only tell that it stopped."""
        self.start, self.stop = start, upload.record.size if stop is None else stop
        self._upload, self._meter = upload, meter
        self._before = before or hashlib.sha256()
        is_small = isinstance(upload.source, bytes)
        self._file = io.BytesIO(upload.source) if is_small else upload.source.open("rb")  # type: ignore[arg-type, union-attr]
        self.seek(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __enter__(self) -> Outgoing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell() - self.start

    def seek(self, offset: int, whence: int = 0) -> int:
        """Back to the beginning, which is the only place that clients go back to."""
        if (offset, whence) != (0, 0):
            raise StoreError("a file on its way can only be begun again")
        self._file.seek(self.start)
        self.sha256, self.md5 = self._before.copy(), hashlib.md5(usedforsecurity=False)
        self._is_checked = False
        return 0

    def read(self, n_bytes: int = -1) -> bytes:
        """The next piece of `READ_BYTES` at most, however few are asked for: clients of HTTP send
        what they are given, and those of 128 KiB cost a fifth of the speed."""
        left = len(self) - self.tell()
        try:
            piece = self._file.read(min(left, READ_BYTES))
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror})") from error
        self.sha256.update(piece)
        self.md5.update(piece)
        if left and not piece:
            raise self._damaged(f"ends at byte {self._file.tell()}")
        if len(piece) == left:
            self.check()
        self._meter(len(piece))
        return piece

    def check(self) -> None:
        """`StoreError` where the file ends here and is not what its record says."""
        if self.stop == self._upload.record.size and not self._is_checked:
            found = self.sha256.hexdigest()
            if found != self._upload.record.sha256:
                raise self._damaged(f"has SHA-256 {found[:12]}")
            self._is_checked = True

    def _damaged(self, found: str) -> StoreError:
        record, source = self._upload.record, self._upload.source
        where = record.path if isinstance(source, bytes) else source
        self.error = StoreError(
            f"{where} {found}, expected {record.size} bytes of SHA-256 {record.sha256[:12]}: it is "
            "damaged or was changed, and was not sent; run `patchbank bank verify` on the bank"
        )
        return self.error


def span_sha256(source: Path | bytes, start: int, stop: int) -> bytes:
    """The digest of a part of an upload, before it is sent."""
    if isinstance(source, bytes):
        return hashlib.sha256(source[start:stop]).digest()
    digest = hashlib.sha256()
    with source.open("rb") as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(READ_BYTES, stop - start))):
            digest.update(piece)
            start += len(piece)
    return digest.digest()


def ends_early(where: str, at: int, expected: int) -> StoreError:
    """Fewer bytes than promised: a cut connection, or a file that is no longer whole."""
    return StoreError(f"{where} ends at byte {at}, expected {expected}", may_pass=True)


def too_large(where: str, most_bytes: int) -> StoreError:
    return StoreError(f"{where} is larger than expected: at most {most_bytes} bytes")


def check_range(where: str, told: str | None, start: int, *, whole: bool) -> None:
    """`StoreError` unless an answer of HTTP begins at byte `start` of the file: by its header
    Content-Range, or, where it has none, as the `whole` file that was not asked for."""
    begins = re.match(r"bytes (\d{1,19})-", told or "")
    if (begins and int(begins[1]) == start) or (not told and whole and start == 0):
        return
    if not told and whole:
        raise StoreError(
            f"{where}: the server gives no parts of files (it ignored the header Range); pull the "
            "bank whole, or read it from a server that does"
        )
    raise StoreError(
        f"{where}: the server sent the range {(told or 'none')[:60]!r}, expected one from byte "
        f"{start}",
        may_pass=True,
    )
