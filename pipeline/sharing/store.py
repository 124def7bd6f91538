"""A store: a folder on a disk, a share, a bucket, a server or a hub, in the few verbs that banks
need.

Names inside a store are relative POSIX paths. Methods may be called by many threads at once. A
store tells what its transport tells; whether bytes are those of a seal is for its callers to check,
but for `put`, which is done only once the store's own copy is proven to be what was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from patchbank.pipeline.bank.writer import FileRecord

Meter = Callable[[int], None]
"""Told of bytes as they are sent or come, by any thread; it waits where there is a speed limit."""
PIECE_BYTES = 16 * 2**20
"""Size of the pieces that bytes come in, at most."""


@dataclass(frozen=True)
class Upload:
    """A file on its way into a store."""

    source: Path | bytes
    """A file of this disk, or a small document itself."""
    record: FileRecord
    """Its name in the store, its size and its SHA-256."""


@runtime_checkable
class Store(Protocol):
    """One folder of files somewhere."""

    @property
    def url(self) -> str:
        """Its address, for messages and records: never with a password, token or signed query."""
        ...

    @property
    def is_writable(self) -> bool:
        """Whether its kind can be written to at all (not whether this user may)."""
        ...

    @property
    def can_list(self) -> bool:
        """Whether it tells what it holds; plain HTTP does not."""
        ...

    def below(self, part: str) -> Store:
        """The store of a folder inside, whether it exists or not."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """The size of every file, at any depth, by name; empty where the folder is not there."""
        ...

    def folders(self) -> Sequence[str]:
        """Names of the folders directly inside, sorted."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""
        ...

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a file, in pieces of at most `PIECE_BYTES`.

        Never more than `stop - start` bytes, whatever the other side sends. Raises `StoreError`,
        worth a retry where fewer come, and `NotInStore`.
        """
        ...

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        """A small file whole; None where it is not there, `StoreError` where it is larger."""
        ...

    def put(self, upload: Upload, meter: Meter) -> None:
        """Makes a file: other readers see all of it or, until then, what was there before.

        Raises `StoreError` where what arrived is not proven to have the record's SHA-256.
        """
        ...

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        """`put` of many, with retries, in any order and in parallel; `done` after each.

        On a hub this is one commit or several.
        """
        ...

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        """Whether the file `record.path`, of `size` bytes there, is the record's, as the store
        itself tells (a digest that its server computed); None where it cannot tell."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Removes files, and folders that become empty; quiet about what is not there."""
        ...
