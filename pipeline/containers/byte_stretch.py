"""Bytes that are no file of their own, read as if they were one."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

_MORE_BYTES = 1 << 40


class ByteStretch(io.RawIOBase):
    """`size` bytes that `read_at(view, position)` copies from wherever they lie.

    Nothing is held in memory: libsndfile reads the blocks that it needs, so that a window of a
    long recording costs a window.
    """

    claims_more = False
    """Whether the end is said to be a tebibyte further, which lifts libsndfile's guess of it."""

    def __init__(
        self,
        size: int,
        read_at: Callable[[memoryview, int], int],
        close: Callable[[], None] | None = None,
    ) -> None:
        self.size = size
        self._read_at = read_at
        self._close = close
        self._position = 0
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + position
        self._is_at_end = whence == os.SEEK_END
        return self._position

    def tell(self) -> int:
        return self._position + (_MORE_BYTES if self.claims_more and self._is_at_end else 0)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._position)]
        n_read = self._read_at(view, self._position) if len(view) else 0
        self._position += n_read
        return n_read

    def readall(self) -> bytes:
        # The inherited one reads 8 KiB at a time.
        buffer = bytearray(max(0, self.size - self._position))
        n_read = self.readinto(buffer)
        return bytes(memoryview(buffer)[:n_read])

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()


def file_stretch(descriptor: int, start: int, size: int) -> ByteStretch:
    """`size` bytes of an open file, from `start` on; closing it closes the file."""

    def read_at(view: memoryview, position: int) -> int:
        return os.preadv(descriptor, [view], start + position)

    return ByteStretch(size, read_at, lambda: os.close(descriptor))


def memory_stretch(content: Any) -> ByteStretch:
    """What the buffer protocol gives, without a copy."""
    source = memoryview(content).cast("B")

    def read_at(view: memoryview, position: int) -> int:
        view[:] = source[position : position + len(view)]
        return len(view)

    return ByteStretch(len(source), read_at)
