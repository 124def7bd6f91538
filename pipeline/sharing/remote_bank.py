"""A sealed bank at an address: opened, shown and trained from without being pulled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchbank.pipeline.bank.layout import crc32c
from patchbank.pipeline.bank.places import RowPlaces, Tail, read_places
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.errors import BankCorrupt, BankError, NotInStore
from patchbank.pipeline.sharing.remote_files import RemoteFiles
from patchbank.pipeline.sharing.remote_rows import RemoteRows
from patchbank.pipeline.sharing.remote_seal import (
    read_remote_seal,
    seal_content,
)
from patchbank.pipeline.sharing.settings import ShareSettings, load_settings
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.stores import open_store
from patchbank.pipeline.sharing.trust import check_trust, read_signatures
from patchbank.pipeline.specs import Json

CHECKSUM_BYTES = 4
MOST_INDEX_BYTES = 64 * 2**20
"""Of four million rows; a card may claim any number."""
MOST_OPENINGS = 5
"""Of a bank that grows again and again while it is opened."""


class RemoteBank(Bank):
    """A bank whose files lie elsewhere: small ones are fetched once, rows when they are read.

    `path` is the folder of this disk that keeps what was fetched.
    """

    def __init__(
        self, remote: RemoteFiles, attributes: Json, schema: BankSchema, *, signed_by: Sequence[str]
    ) -> None:
        super().__init__(remote.folder, attributes, remote.seal, schema)
        self.remote = remote
        self.signed_by = tuple(signed_by)
        """Who signed it, of those that were asked about."""
        self._rows: dict[str, RemoteRows] = {}

    @property
    def where(self) -> str:
        return self.remote.where

    @property
    def is_remote(self) -> bool:
        return True

    def files(self, names: Sequence[str]) -> list[Path]:
        return self.remote.files(names)

    @contextmanager
    def _as_opened(self) -> Iterator[None]:
        try:
            yield
        except BankCorrupt as error:
            if str(error).startswith(self.where):
                raise
            # Readers name the files of this disk that they know of.
            what = str(error).removeprefix(f"{self.path}: ").replace(f"{self.path}/", "")
            raise self.remote.problem(what.partition("; ")[0]) from error

    def stored_places(self, layer: int, kind: str = "patches") -> RowPlaces:
        array = self.array(layer, kind)
        index_bytes = array.layout(self.schema.rows_per_shard).index_bytes

        def read_tails(names: Sequence[str], n_bytes: int) -> list[Tail]:
            return self.remote.each(lambda name: self._tail(name, n_bytes), names)

        with self._as_opened():
            if index_bytes > MOST_INDEX_BYTES or len(self.status) != self.n_rows:
                raise BankCorrupt(f"shards of {self.schema.rows_per_shard} rows are none of a bank")
            return read_places(self.path, self.schema, array, read_tails=read_tails)

    def _tail(self, name: str, n_bytes: int) -> Tail:
        """The index of a shard: from the cache if its checksum is right, else from afar."""
        size = self.seal.files[name].size
        start = max(0, size - n_bytes)
        memory = bytearray(size - start)
        is_here = self.remote.cache.read(self.path / name, start, memoryview(memory))
        if is_here and _is_sound(memory):
            return bytes(memory), size
        for _ in range(2):
            tail = self.remote.read(name, start, size)
            if _is_sound(tail):
                self.remote.cache.keep(self.path / name, start, tail)
                break
        return tail, size

    def row_reader(self, places: RowPlaces, *, direct: bool, most_open: int) -> RemoteRows:
        return RemoteRows(self, places)

    def stored_rows(self, places: RowPlaces, rows: Sequence[int]) -> list[bytes]:
        name = places.array.path
        if name not in self._rows:
            self._rows[name] = RemoteRows(self, places)
        return self._rows[name].stored(rows)

    def check_files(self) -> None:
        """Compares every sealed file's size with what the store lists, where it can list."""
        self.remote.check_sizes()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rows": {}}


def _is_sound(tail: bytes | bytearray) -> bool:
    body, stored = tail[:-CHECKSUM_BYTES], tail[-CHECKSUM_BYTES:]
    return bool(body) and crc32c(bytes(body)).to_bytes(CHECKSUM_BYTES, "little") == stored


def open_remote(url: str, *, settings: ShareSettings | None = None) -> RemoteBank:
    """See `open_bank`."""
    settings = settings or load_settings()
    store = open_store(url)
    for _ in range(MOST_OPENINGS - 1):
        content = seal_content(store)
        try:
            return _opened(url, store, settings)
        except (BankError, NotInStore):
            if seal_content(store) == content:
                raise
            # It grew meanwhile: what was read may be of two banks.
    return _opened(url, store, settings)


def _opened(url: str, store: Store, settings: ShareSettings) -> RemoteBank:
    there = read_remote_seal(store)
    signed_by = _signed_by(store, there.content, settings)
    remote = RemoteFiles(url, there.seal, settings)
    remote.check_sizes()
    return RemoteBank(remote, there.attributes, there.schema, signed_by=signed_by)


def _signed_by(store: Store, content: bytes, settings: ShareSettings) -> tuple[str, ...]:
    """Who signed a bank, where the settings name whom to trust; raises what `check_trust` does."""
    if settings.allowed_signers is None:
        return ()
    return check_trust(content, read_signatures(store), where=store.url, settings=settings)
